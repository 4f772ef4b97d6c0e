"""Distances between feature measures: optimal transport, maximum mean discrepancy, moments, kernel alignment, null
bands.

A feature is the vector x in R^D of its values over fixed probe inputs and positions; a layer is a measure sum_i p_i
delta_{x_i} on such vectors.  Vectors are measured by their root mean square |x| / sqrt(D), so that every distance here
has the unit of one feature value and does not grow with the number of probes.  Sums are taken in float64.

    >>> import torch
    >>> from meanfield.bench.distances import FeatureMeasure, wasserstein
    >>> here = FeatureMeasure.uniform(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> round(wasserstein(here, FeatureMeasure.uniform(here.values + 3)), 6)
    3.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meanfield import limits
from meanfield.network import MASS_TOLERANCE, ParticleNetwork, propagate
from meanfield.penalties import lengths as vector_lengths
from meanfield.signatures import checked
from meanfield.starts import normal
from meanfield.validation import Misuse, finite, instance, integer, positive, shaped

if TYPE_CHECKING:
    from meanfield.finite.network import FiniteCNN

EXACT_PARTICLES = 2000  # exact transport takes about 2 s there
SIMPLEX_PIVOTS = 10**8  # no limit in practice: Gaussian clouds of 2,000 particles need fewer than 10^5
BANDWIDTH_MULTIPLES = (0.5, 1.0, 2.0)  # of the median distance
CANCELLED = 1e-4  # a squared distance below this share of |x|^2 + |y|^2 has lost four digits in their difference
ALIGNED = 16  # directions: torch draws normals by sixteens, so that any multiple of it at a time gives the same ones
RESOLVED = 1e-4  # an optimum above this share of the unit of its costs is known to eleven digits
LARGEST_COST = 1e8  # costs beyond, in units of the optimum, are as bad
MASS_ROUNDING = 8 * np.finfo(float).eps  # a coupling moves less than that by rounding of the masses
REFINEMENTS = 8  # of the unit, at one p
CONSTANT = 32  # units of rounding of the largest value: a feature that varies by less does not vary


@dataclass(frozen=True, eq=False)
class FeatureMeasure:
    """The features of one layer on probes: values (M, D), one row per feature, and masses (M,) that sum to one."""

    values: Tensor
    masses: Tensor

    def __post_init__(self) -> None:
        if instance(self.values, "values", Tensor).ndim != 2 or self.values.numel() == 0:
            raise ValueError(
                f"values has shape {tuple(self.values.shape)}; expected (M, D), M >= 1 features on D >= 1 probes"
            )
        shaped(self.masses, (self.size,), "masses")
        kinds = {(each.dtype, each.device) for each in (self.values, self.masses)}
        if len(kinds) != 1 or self.values.dtype not in MASS_TOLERANCE:
            raise ValueError(
                "values and masses must share one dtype, float32 or float64, and one device; got "
                f"{sorted(map(str, kinds))}"
            )
        finite(self.values, "values")
        low, total = float(finite(self.masses, "masses").min()), float(self.masses.sum())
        if low < 0 or abs(total - 1) > MASS_TOLERANCE[self.masses.dtype]:
            raise ValueError(
                f"masses have the least entry {low:g} and the sum {total:.10g}; they must be at least 0 and sum to 1"
            )

    @classmethod
    def uniform(cls, values: Tensor) -> FeatureMeasure:
        """Equal masses on the rows of values (M, D)."""
        instance(values, "values", Tensor)
        return cls(values, values.new_full(values.shape[:1], 1 / max(len(values), 1)))

    @classmethod
    @torch.no_grad()
    def of(
        cls, network: ParticleNetwork | FiniteCNN, inputs: Tensor, layer: int, *, preactivations: bool = False
    ) -> FeatureMeasure:
        """f^l, or g^l with `preactivations`, of layer l (counted from 0) on inputs (N, C_0, H, W);
        D = N x positions.
        """
        particles = network if isinstance(network, ParticleNetwork) else network.particles()
        depth = particles.architecture.depth
        if integer(layer, "layer", minimum=0) >= depth:
            raise Misuse("layer", layer, f"is not one of the {depth} layers; they are counted from 0")
        arch, particles = particles.architecture, particles.detach()
        each = particles.check_inputs(inputs).element_size() * arch.entries(particles.widths)
        size, flows = arch.geometry[layer], particles.flows[: layer + 1]
        places = math.prod(size.output if preactivations else size.pooled)
        values = inputs.new_empty(particles.widths[layer], len(inputs), places)
        for block in limits.blocks(len(inputs), each):
            maps = propagate(arch, flows, particles.biases, inputs[block])[0 if preactivations else 1]
            values[:, block] = maps[layer].flatten(2).transpose(0, 1)
        return cls(values.flatten(1), particles.masses[layer])

    @property
    def size(self) -> int:
        """M, the number of particles."""
        return self.values.shape[0]

    @property
    def dimension(self) -> int:
        """D, the number of probe values."""
        return self.values.shape[1]

    def __repr__(self) -> str:
        return (
            f"FeatureMeasure(size={self.size}, dimension={self.dimension}, dtype={self.values.dtype}, "
            f"device={self.values.device})"
        )

    def select(self, keep: Tensor) -> FeatureMeasure:
        """The particles with the given indices, masses divided by their sum."""
        masses = self.masses[keep]
        return FeatureMeasure(self.values[keep], masses / masses.sum())

    def standardised(self) -> FeatureMeasure:
        """Each feature with mean 0 and root mean square 1 over the probes; features that are constant become 0.

        The squared distance of two features is then 2 (1 - their correlation): offset and scale of a feature no longer
        count, its sign does.
        """
        centred = _centred(self.values)
        deviation = centred.square().mean(1, keepdim=True).sqrt()
        return FeatureMeasure((centred / deviation.where(deviation > 0, 1.0)).to(self.values), self.masses)

    def double(self) -> tuple[Tensor, Tensor]:
        """Values and masses in float64, masses summing to one in it."""
        masses = self.masses.detach().double()
        return self.values.detach().double(), masses / masses.sum()


Distance = Callable[[FeatureMeasure, FeatureMeasure], float]


def _rounding(values: Tensor) -> Tensor:
    """(..., D) -> (...): spreads up to here are rounding of constant values."""
    return CONSTANT * torch.finfo(values.dtype).eps * values.abs().amax(-1).double()


def _centred(values: Tensor) -> Tensor:
    """Rows less their means, in float64; constant rows are exactly 0.  (M, D) -> (M, D)."""
    centred = values.detach().double() - values.detach().double().mean(1, keepdim=True)
    varies = centred.square().mean(1).sqrt() > _rounding(values.detach())
    return centred * varies[:, None]


def _check_pair(a: FeatureMeasure, b: FeatureMeasure) -> None:
    if a.dimension != b.dimension:
        raise ValueError(
            f"a has {a.dimension} probe values per feature and b has {b.dimension}; evaluate both on the same probes"
        )
    if a.values.device != b.values.device:
        raise ValueError(f"a is on {a.values.device} and b on {b.values.device}; move one of them")


def _unit(*clouds: Tensor) -> float:
    """A power of two near the largest size: dividing by it is exact, and squares then neither under- nor overflow."""
    size = max(float(cloud.abs().max()) for cloud in clouds)
    return 2.0 ** math.frexp(size)[1] if 0 < size < 2.0**1022 else 1.0


def _distances(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """|x_i - y_j| / sqrt(D) in a unit, and the unit: (M, D), (M', D) -> (M, M'), float; equal vectors are at 0 exactly.

    The difference of squares is quick and loses what is small beside the sizes, such as all distances but an
    outlier's: those are summed from differences.  In blocks of probes, and of such pairs.
    """
    dimension, blocks = x.shape[1], list(limits.blocks(x.shape[1], 8 * (len(x) + len(y))))
    unit = max(_unit(*_about(x[:, block], y[:, block])) for block in blocks)
    sizes, products = x.new_zeros(len(x), len(y)), x.new_zeros(len(x), len(y))
    for block in blocks:
        near, far = (part / unit for part in _about(x[:, block], y[:, block]))
        sizes += near.square().sum(1)[:, None] + far.square().sum(1)
        products += near @ far.T
    squared = sizes - 2 * products
    rows, columns = torch.nonzero(squared <= CANCELLED * sizes, as_tuple=True)
    lengths = squared.clamp_min(0).sqrt()
    for block in limits.blocks(len(rows), 3 * 8 * dimension):
        i, j = rows[block], columns[block]
        lengths[i, j] = vector_lengths(x[i] / unit - y[j] / unit)
    return lengths / math.sqrt(dimension), unit


def _about(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the mean of x: a common offset would be lost in the difference of squares, and in projections."""
    centre = x.mean(0)
    return x - centre, y - centre


@checked
def wasserstein(a: FeatureMeasure, b: FeatureMeasure, p: float = 2) -> float:
    """W_p(a, b) = ( min over couplings of E (|x - y| / sqrt(D))^p )^(1/p), exact up to rounding of values and masses,
    p >= 1.

    A linear program, solved by the network simplex method for any masses; at most EXACT_PARTICLES particles each.  Its
    costs are powers in units of the longest distance, and where the optimum is far below that (an outlier in both, a
    large p) again in units of the best coupling so far, with smaller p first.
    """
    if positive(p, "p") < 1:
        raise Misuse("p", p, "must be at least 1: below, W_p is no distance")
    _check_pair(a, b)
    for name, measure in (("a", a), ("b", b)):
        if measure.size > EXACT_PARTICLES:
            raise ValueError(
                f"{name} has {measure.size} particles, exact transport takes {EXACT_PARTICLES}; use sliced_wasserstein"
            )
    (x, masses_x), (y, masses_y) = a.double(), b.double()
    lengths, unit = _distances(x, y)
    return unit * _transport(masses_x.cpu().numpy(), masses_y.cpu().numpy(), lengths.cpu().numpy(), p)


def _transport(masses_x: np.ndarray, masses_y: np.ndarray, lengths: np.ndarray, p: float) -> float:
    """W_p from the lengths (M, M'): couplings for p, or for 1, 2, 4, ... up to it where the first is not resolved."""
    import ot  # takes seconds to import

    def coupled(size: float, power: float) -> np.ndarray:
        costs = np.minimum(lengths / size, LARGEST_COST ** (1 / power)) ** power
        found: Any = ot.emd(masses_x, masses_y, costs, numItermax=SIMPLEX_PIVOTS)
        return np.where(found > MASS_ROUNDING, found, 0.0)

    longest = float(lengths.max())
    if longest == 0:
        return 0.0
    best = _moment(coupled(longest, p), lengths, p)
    if best >= longest * RESOLVED ** (1 / p):
        return best
    for power in (*(2.0**k for k in range(1024) if 2.0**k < p), p):
        size = longest
        for _ in range(REFINEMENTS):
            coupling = coupled(size, power)
            found, before = _moment(coupling, lengths, power), size
            best, size = min(best, _moment(coupling, lengths, p)), min(found, size)
            if size == 0 or found >= before * RESOLVED ** (1 / power):
                break
    return best


def _moment(coupling: np.ndarray, lengths: np.ndarray, p: float) -> float:
    """(sum coupling lengths^p)^(1/p), in units of the longest length that has mass."""
    shares, used = coupling[coupling > 0], lengths[coupling > 0]
    longest = float(used.max())
    return longest * float(shares @ (used / longest) ** p) ** (1 / p) if longest > 0 else 0.0


@dataclass(frozen=True)
class SlicedWasserstein:
    """squared: the mean over random directions of W_2^2 of the projections; squared_error: its standard error."""

    squared: float
    squared_error: float

    @property
    def value(self) -> float:
        """The distance, the square root of `squared`."""
        return math.sqrt(self.squared)

    @property
    def error(self) -> float:
        """Standard error of `value` to first order."""
        return self.squared_error / (2 * self.value) if self.squared > 0 else 0.0


@checked
def sliced_wasserstein(
    a: FeatureMeasure, b: FeatureMeasure, *, generator: torch.Generator, projections: int = 1000
) -> SlicedWasserstein:
    """SW_2^2 = mean over unit vectors theta of W_2^2 between the laws of <theta, x> and <theta, y> (Bonneel et al.
    2015).

    Unit vectors make D E <theta, v>^2 = |v|^2, so that this has the unit of `wasserstein` without a further factor:
    SW_2 <= W_2, with equality for a shift.  `squared` is unbiased over the directions, which `generator` draws.
    Memory: the measures once more, and a block of directions.
    """
    _check_pair(a, b)
    (x, masses_x), (y, masses_y) = a.double(), b.double()
    x, y = _about(x, y)
    unit = _unit(x, y)
    x, y = x.div_(unit), y.div_(unit)
    parts = []
    for count in _at_a_time(integer(projections, "projections", minimum=2), 8 * (a.dimension + 8 * (a.size + b.size))):
        directions = _directions(a.dimension, count, generator, x)
        parts.append(_transport_on_lines(directions @ x.T, masses_x, directions @ y.T, masses_y))
    costs = torch.cat(parts)
    return SlicedWasserstein(
        unit * unit * float(costs.mean()), unit * unit * float(costs.std()) / math.sqrt(projections)
    )


def _at_a_time(count: int, bytes_each: int) -> list[int]:
    """How many of `count` directions to draw at a time: multiples of ALIGNED that fit a block, and the rest with the
    last of them.
    """
    step = max(ALIGNED, limits.block_bytes() // bytes_each // ALIGNED * ALIGNED)
    firsts = list(range(0, max(count - ALIGNED + 1, 1), step))
    return [last - first for first, last in zip(firsts, [*firsts[1:], count])]


def _directions(dimension: int, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Uniform on the unit sphere, (count, D)."""
    return torch.nn.functional.normalize(normal((count, dimension), generator, like), dim=1)


def _transport_on_lines(x: Tensor, p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """W_2^2 on the line, int_0^1 (quantile of x - quantile of y)^2 du, for each of R rows: (R, M), (M,), (R, M'),
    (M',) -> (R,).
    """
    (x, order_x), (y, order_y) = x.sort(1), y.sort(1)
    levels_x, levels_y = p[order_x].cumsum(1), q[order_y].cumsum(1)
    levels = torch.cat([levels_x, levels_y], 1).sort(1).values  # both quantile functions are constant in between
    gaps = x.gather(1, _reach(levels_x, levels)) - y.gather(1, _reach(levels_y, levels))
    return (levels.diff(dim=1, prepend=levels.new_zeros(len(levels), 1)) * gaps.square()).sum(1)


def _reach(cumulated: Tensor, levels: Tensor) -> Tensor:
    """The first index at which the cumulated masses reach each level; the last one where rounding keeps them below."""
    return torch.searchsorted(cumulated, levels).clamp_max(cumulated.shape[1] - 1)


@dataclass(frozen=True)
class MMD:
    """Squared maximum mean discrepancies and the bandwidths they belong to, in units of a feature value."""

    bandwidths: tuple[float, ...]
    squared: tuple[float, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """The distances; 0 where an unbiased estimate of the square is negative."""
        return tuple(math.sqrt(max(square, 0.0)) for square in self.squared)


@checked
def mmd(
    a: FeatureMeasure, b: FeatureMeasure, bandwidths: Sequence[float] | None = None, *, unbiased: bool = False
) -> MMD:
    """MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) with k(x, y) = exp(-|x - y|^2 / (2 s^2 D)), per bandwidth s.

    By default the distance of the two measures themselves (a V-statistic), at least 0.  `unbiased`: without the pairs
    of a particle with itself (Gretton et al. 2012, Lemma 6, for equal masses), a U-statistic whose expectation is
    MMD^2 of the laws that the particles were drawn from independently, whatever their fixed masses; it can be negative.
    bandwidths None takes BANDWIDTH_MULTIPLES of `median_distance`, which depends on a and b: to compare several pairs
    give all of them the same bandwidths.  Memory: a few times (M + M')^2 numbers.
    """
    _check_pair(a, b)
    for name, measure in (("a", a), ("b", b)):
        if unbiased and int((measure.masses > 0).sum()) < 2:
            raise ValueError(f"{name} has mass on one particle only; an unbiased estimate needs two")
    (x, p), (y, q) = a.double(), b.double()
    points = torch.cat([x, y])
    lengths, unit = _distances(points, points)
    if bandwidths is None:
        median = _median(lengths, unit, torch.cat([p, q]))
        bandwidths = [multiple * median for multiple in BANDWIDTH_MULTIPLES]
    scales = tuple(positive(bandwidth, "bandwidths") for bandwidth in bandwidths)
    kernels = (torch.exp(-0.5 * (lengths / (scale / unit)).square()) for scale in scales)
    return MMD(scales, tuple(_discrepancy(kernel, p, q, unbiased) for kernel in kernels))


def _discrepancy(kernel: Tensor, p: Tensor, q: Tensor, unbiased: bool) -> float:
    """p' K p + q' K q - 2 p' K q from the kernel of the pooled points, (M + M', M + M')."""
    size = len(p)
    squares = [p @ kernel[:size, :size] @ p, q @ kernel[size:, size:] @ q]
    if unbiased:  # the mean over the pairs i != j; k_ii = 1
        squares = [(square - masses @ masses) / (1 - masses @ masses) for square, masses in zip(squares, (p, q))]
    return float(squares[0] + squares[1] - 2 * p @ kernel[:size, size:] @ q)


@checked
def median_distance(a: FeatureMeasure, b: FeatureMeasure) -> float:
    """Median of |x - x'| / sqrt(D) over x, x' independent of the law (a + b) / 2, given that x and x' differ.

    The lower median where two values qualify; 1 where all features are equal.  As a figure of the measures it does not
    change when particles are split into clones.
    """
    _check_pair(a, b)
    (x, p), (y, q) = a.double(), b.double()
    points = torch.cat([x, y])
    return _median(*_distances(points, points), torch.cat([p, q]))


def _median(lengths: Tensor, unit: float, masses: Tensor) -> float:
    first, second = torch.triu_indices(len(masses), len(masses), 1, device=masses.device)
    lengths, order = lengths[first, second].sort()
    cumulated = ((masses[first] * masses[second])[order] * (lengths > 0)).cumsum(0)
    if len(cumulated) == 0 or cumulated[-1] == 0:
        return 1.0
    # one part in 10^12 keeps a tie at one half from being decided by rounding
    return unit * float(lengths[torch.searchsorted(cumulated, cumulated[-1:] * (0.5 - 1e-12))])


class Moments(NamedTuple):
    """Of one feature value: mean, variance (of the measure: no n - 1), excess kurtosis (0 for a Gaussian; nan for a
    constant).
    """

    mean: float
    variance: float
    kurtosis: float


@checked
def moments(measure: FeatureMeasure) -> Moments:
    """Moments of x_d with the feature x drawn by mass and the probe d uniformly: over features and probes jointly."""
    values, masses = measure.double()
    mean = masses @ values.mean(1)
    unit = _unit(values - mean)
    square, fourth = (masses @ ((values - mean) / unit).pow(power).mean(1) for power in (2, 4))
    constant = unit * square.sqrt() <= _rounding(measure.values.detach().flatten())
    variance = unit * unit * float(square)
    return Moments(float(mean), variance, math.nan if constant else float(fourth / square**2 - 3))


@checked
def linear_cka(a: FeatureMeasure, b: FeatureMeasure) -> float:
    """|Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms (Kornblith et al. 2019, table 1); between 0 and 1.

    The D probes are the examples; column i of X is sqrt(p_i) times feature i less its mean over the probes.  Unchanged
    by orthogonal maps of these columns (so by the order and the splitting of particles), by a common factor and by
    an offset of each feature; not by a general linear map.  nan where a measure has only constant features.
    """
    _check_pair(a, b)
    x, y = _columns(a), _columns(b)
    scale = math.sqrt(_alignment(x, x) * _alignment(y, y))
    return _alignment(x, y) / scale if scale > 0 else math.nan


@checked
def debiased_cka(a: FeatureMeasure, b: FeatureMeasure) -> float:
    """`linear_cka` with the unbiased estimate of HSIC in place of |Y'X|^2 (Song et al. 2012, theorem 2; Nguyen et al.
    2021, eq. 3); between -1 and 1, about 0 for independent features where the plain one tends to 1 with their number.

    Unbiased for independent probes; positions of one image are not.  Invariances as there.  ValueError under 4 probes.
    """
    _check_pair(a, b)
    if a.dimension < 4:
        raise ValueError(f"a and b have {a.dimension} probe values per feature; unbiased estimates need at least 4")
    x, y = _columns(a), _columns(b)
    sizes = _unbiased_alignment(x, x), _unbiased_alignment(y, y)
    rounding = 64 * x.shape[1] * torch.finfo(x.dtype).eps
    if any(size <= rounding * _alignment(each, each) for size, each in zip(sizes, (x, y))):
        return math.nan
    return _unbiased_alignment(x, y) / math.sqrt(sizes[0] * sizes[1])


def _columns(measure: FeatureMeasure) -> Tensor:
    """sqrt(p_i) times feature i less its mean over the probes, in units of the largest, (M, D)."""
    rows = _centred(measure.values)
    return rows / _unit(rows) * measure.double()[1].sqrt()[:, None]


def _unbiased_alignment(x: Tensor, y: Tensor) -> float:
    """<K, L> + 1'K1 1'L1 / ((D-1)(D-2)) - 2 1'KL1 / (D-2) for x'x and y'y without their diagonals: D (D-3) HSIC_1.

    No matrix over probes is formed.
    """
    count, diagonals = x.shape[1], [each.square().sum(0) for each in (x, y)]
    first, second = (each.T @ each.sum(1) - diagonal for each, diagonal in zip((x, y), diagonals))
    within = _alignment(x, y) - float(diagonals[0] @ diagonals[1])
    total = float(first.sum() * second.sum()) / ((count - 1) * (count - 2))
    return within + total - 2 * float(first @ second) / (count - 2)


def _alignment(x: Tensor, y: Tensor) -> float:
    """|x y'|_F^2 = <x'x, y'y>_F of (M, D), (M', D), by whichever matrices are smaller."""
    if x.shape[1] < min(len(x), len(y)):
        return float(((x.T @ x) * (y.T @ y)).sum())
    return float((x @ y.T).square().sum())


@dataclass(frozen=True)
class NullBand:
    """Distances that arise without a difference worth the name."""

    distances: tuple[float, ...]

    def quantile(self, level: float) -> float:
        """Interpolated linearly between the order statistics, 0 <= level <= 1."""
        return float(np.quantile(self.distances, level))

    @property
    def interval(self) -> tuple[float, float]:
        """The central 90%."""
        return self.quantile(0.05), self.quantile(0.95)


def split_half(
    measure: FeatureMeasure, distance: Distance, generator: torch.Generator, repetitions: int = 100
) -> NullBand:
    """Distances between random halves of a measure's particles (those with mass; masses of each half divided by their
    sum).

    What the finite number of particles alone makes of one law.  Halves have M / 2 particles, so the band lies above
    that of two independent measures of M particles: by a factor 2 for squares of rate 1/M, such as the biased MMD^2.
    """
    live = torch.nonzero(measure.masses > 0).flatten()
    if len(live) < 2:
        raise ValueError(f"measure has {len(live)} particle with mass; halves need at least two")
    distances = []
    for _ in range(integer(repetitions, "repetitions")):
        order = live[torch.randperm(len(live), generator=generator, device=generator.device).to(live.device)]
        first, second = order.tensor_split([len(order) // 2])
        distances.append(distance(measure.select(first), measure.select(second)))
    return NullBand(tuple(distances))


def null_band(measures: Sequence[FeatureMeasure], distance: Distance) -> NullBand:
    """Distances of all pairs of given measures, such as one layer of independent untrained networks on the same probes.

    Pairs that share a measure are not independent: n measures hold the information of n, not of n (n - 1) / 2 draws.
    """
    if len(measures) < 2:
        raise ValueError(f"measures has {len(measures)} entries; pairs need at least two")
    return NullBand(tuple(distance(first, second) for first, second in combinations(measures, 2)))
