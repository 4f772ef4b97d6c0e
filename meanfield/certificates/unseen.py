"""Lower bounds of J over all measures, and the search for features that no support holds yet.

For any output multipliers r in the domain of the loss conjugate and any mu_l >= 0, every network has

    J >= -(1/N) sum_n loss*(N r_n) - sum_{l<L} mu_l - sup_g [ |q(h(g))|^2 / (4 lambda_u) - gamma_L(g) ],

gamma_1(z) = lambda_1 |(z, b)|^2,   c_l = 2 sqrt(lambda_s (mu_l + gamma_l)),   gamma_{l+1}(g) = inf { int c_l |a| : g = int a * f }.

Why: loss(F) >= <N r, F> - loss*(N r) leaves sum_j p_j (lambda_u |u_j|^2 + <u_j, q_j>) >= -sum_j p_j |q_j|^2 / (4 lambda_u);
a source with outflow s = sum_j |w_ij| p_j has lambda_s s^2 + gamma + mu >= c s, and with flows a_ij = w_ij p_i the sum of
p_i c_i s_i is sum_j p_j sum_i c_i |a_ij| >= sum_j p_j gamma(g_j), layer by layer.  Bounds on a and z restrict the sup.

The sup runs over compositional features, each a small network of its own, and is not concave.  A search from K starts
finds it from below, so its bound may be too high: it is called the best of K starts and proves nothing.  For one ReLU or
linear layer the sup follows from the largest |q| over unit kernels, which `sphere` bounds from above: that is rigorous.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from meanfield import measures, validation
from meanfield.architecture import Architecture
from meanfield.certificates import sphere
from meanfield.certificates.duality import GOLDEN
from meanfield.network import ParticleNetwork
from meanfield.penalties import Penalty, input_norms
from meanfield.problem import Problem

HIDDEN = 16  # sources of a searched feature, per layer
MOST_OWN = 64  # sources that a start from the network keeps, the heaviest ones
LEARNING_RATE = 0.1  # of the root mean square of each tensor of a start
NOISE = 1.0  # of disturbed starts, in the same units
STAGES = (0.25, 0.25)  # of the starts of a climb go on to the next
LEAST_COST = 1e-3  # of the conjugate part, joins the cost in gain over cost
PROOF_SUFFICES = 1e-3  # relative: a proven bound this close to the searched one is quoted instead
AGREEMENT = 2e-4  # relative: the search finds no more than the pool knew
SAME_FEATURE = 0.99  # cosine of two features on the training inputs
LEAST_SHARE = 1e-4  # flows below this share of a feature's largest are set to zero
KEPT = 256  # features that the pool keeps of one search, the best ones
ENTRIES = 1 << 22  # of the widest feature maps that are in memory at a time
SPHERE_STEPS = 60
HOMOGENEOUS = ("relu", "identity")
RECESSION = {"softplus": "relu", "gelu": "relu"}  # what these activations are far from zero, up to lower order
RAYS = (1.0, 10.0, 100.0, 1000.0)
SMOOTHING = (1e-1, 1e-2, 1e-3, 1e-4)  # of the bound: temperatures of the soft maximum over the pool
PROVEN_ENTRIES = 1 << 22  # of the weights handed to `sphere`
QUICK_ENTRIES = 3  # kernels of so few entries are proven exactly at once


@dataclass(frozen=True, eq=False)
class UnseenFeatures:
    """What a search found: a bound over all measures, how far it can be trusted, and features worth adding.

    bound: the best figure, of the given kind; -inf, with a reason, where the theory or the search gives none.
    kind: "best of K starts", "exact over the arrangement", "exact spectral norm", "branch and bound" or "none"; rigorous
    says whether the bound is proven.  searched_bound: best of `starts` starts.  rigorous_bound: proven (up to rounding)
    by rigorous_kind; None where no method applies or no time was given.
    output (N, K), mu (L - 1): the multipliers of the bound; scale: |output| / |r given|.
    features: the best features as the last layer of a network of their own (None if there are none), scores (F,) their
    |q|^2 / (4 lambda_u) - gamma_L at the r given, all above `level`, the best of the network's own features.
    """

    bound: float
    kind: str
    starts: int
    reason: str = ""
    searched_bound: float = -math.inf
    rigorous: bool = False
    rigorous_bound: float | None = None
    rigorous_kind: str = ""
    output: Tensor | None = None
    mu: tuple[float, ...] = ()
    scale: float = 1.0
    features: ParticleNetwork | None = None
    scores: Tensor | None = None
    level: float = 0.0
    seconds: float = 0.0

    def summary(self) -> str:
        """One line that claims no more than was shown."""
        if self.kind == "none":
            return f"no bound over all measures: {self.reason}"
        text = f"best of {self.starts} starts: every network has J >= {self.searched_bound:.6g} unless the search missed a feature"
        if self.rigorous_bound is not None:
            text += f"; proven ({self.rigorous_kind}): every network has J >= {self.rigorous_bound:.6g}"
        return text


def search_features(
    problem: Problem,
    output: Tensor,
    network: ParticleNetwork | None = None,
    *,
    mu: Sequence[float] | None = None,
    starts: int = 128,
    steps: int = 150,
    rounds: int = 4,
    count: int = 8,
    seed: int = 0,
    max_seconds: float = math.inf,
    rigorous_seconds: float = 0.0,
    fixed: bool = False,
) -> UnseenFeatures:
    """A lower bound of J over all measures from output multipliers r = `output` (N, K), and the features that violate it.

    Each of at most `rounds` searches ascends from `starts` starts (the particles of `network`, data patches, random
    draws) for `steps` steps; then r and mu are chosen anew against all that was found, until search and pool agree.
    fixed: keep the direction of r, choose its scale and mu only.  mu: first mu_1..mu_{L-1}, by default those of `network`.
    count: features to return.  max_seconds is looked at between batches of starts; one round is always begun.
    rigorous_seconds: time for the proven bound of one ReLU layer; up to three kernel entries it is always computed.
    """
    began = time.perf_counter()
    for value, name in ((starts, "starts"), (steps, "steps"), (rounds, "rounds"), (count, "count")):
        validation.integer(value, name)
    validation.finite(validation.shaped(output, (len(problem.inputs), problem.architecture.outputs), "output"), "output")
    problem, output = problem.to(dtype=torch.float64), output.detach().to(problem.inputs.device, torch.float64)
    if network is not None:
        network = network.detach().to(dtype=torch.float64)
        problem.require_feasible(network)
    prices = _checked_prices(problem, mu, network)
    reason = _no_bound(problem)
    if reason:
        return UnseenFeatures(-math.inf, "none", 0, reason, seconds=time.perf_counter() - began)
    output = problem.loss.feasible(len(output) * output, problem.targets) / len(output)
    search = _Search(problem, output, network, torch.Generator().manual_seed(seed), starts, steps, began + max_seconds)
    best = search.run(prices, rounds, fixed)
    quick = _kernel_entries(problem.architecture) <= QUICK_ENTRIES
    found = search.result(best, prices, count, max(rigorous_seconds, 2.0) if quick else rigorous_seconds)
    return replace(found, seconds=time.perf_counter() - began)


def _checked_prices(problem: Problem, mu: Sequence[float] | None, network: ParticleNetwork | None) -> tuple[float, ...]:
    hidden = problem.architecture.depth - 1
    if mu is None:
        return _network_prices(problem, network)
    if len(mu) != hidden or any(not math.isfinite(m) or m < 0 for m in mu):
        raise ValueError(f"mu={list(mu)} must hold {hidden} finite numbers >= 0, one per layer but the last")
    return tuple(float(m) for m in mu)


def _network_prices(problem: Problem, network: ParticleNetwork | None) -> tuple[float, ...]:
    """mu_l = sum_i p_i (lambda_s s_i^2 - gamma_i), what the optimality of the masses asks for; gamma_{l+1} sums to 2 lambda_s s_i^2."""
    strength, prices = problem.penalty.source, []
    if network is None:
        return (strength,) * (problem.architecture.depth - 1)
    gamma = float(problem.terms(network).input)
    for layer in range(1, problem.architecture.depth):
        outflow = network.masses[layer] @ problem.penalty.norms(network.kernels[layer])
        source = strength * float(network.masses[layer - 1] @ outflow.square())
        prices.append(max(source - gamma, 0.0))
        gamma = 2 * source
    return tuple(prices)


def _no_bound(problem: Problem) -> str:
    """Why there is no bound: the sup is infinite, or so far out that no search finds it."""
    if problem.penalty.readout == 0:
        return "without a readout penalty the supremum over features is infinite; missing: a positive readout penalty"
    missing = problem.missing_bounds()
    if missing:
        names = " and ".join(missing)
        return f"with these activations, biases and penalties the supremum over features is infinite or not attained; missing: {names}"
    return ""


# --- features with the kernels that realise them ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Compositions:
    """R small networks with T features in the last layer each: R T features with the kernels of all layers that realise them.

    kernels[0] (R, m_1, C_0, kh, kw) first-layer kernels z; kernels[l] (R, m_{l+1}, m_l, kh, kw) flows a, m_L = T;
    biases[l] (R, m_{l+1}) or None.
    """

    architecture: Architecture
    kernels: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    def __len__(self) -> int:
        return len(self.kernels[0])

    def tensors(self) -> list[Tensor]:
        return [*self.kernels, *(b for b in self.biases if b is not None)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Compositions:
        """With other tensors, in the order of `tensors`."""
        rest = list(tensors[len(self.kernels) :])
        biases = tuple(None if b is None else rest.pop(0) for b in self.biases)
        return Compositions(self.architecture, tuple(tensors[: len(self.kernels)]), biases)

    def take(self, chosen: Tensor | slice) -> Compositions:
        return self.with_tensors([t[chosen] for t in self.tensors()])

    def preactivations(self, inputs: Tensor) -> Tensor:
        """g of every feature, (R T, N, H', W').

        Kernels are applied before shifts: one matrix product per layer, whatever the number of starts.
        """
        first, bias = self.architecture.layers[0], self.biases[0]
        columns = first.patches(inputs).flatten(0, 1) / inputs.shape[1]  # (N P, d)
        signal = (self.kernels[0].flatten(2).flatten(0, 1) @ columns.T).view(*self.kernels[0].shape[:2], len(inputs), -1)
        signal = signal if bias is None else signal + bias[:, :, None, None]
        signal = signal.unflatten(3, self.architecture.geometry[0].output)  # (R, m_1, N, H', W')
        for index in range(1, len(self.kernels)):
            features = self.architecture.layers[index - 1].activate(signal.flatten(0, 1)).unflatten(0, signal.shape[:2])
            signal = _flow(self.architecture, index, self.kernels[index], features, self.biases[index])
        return signal.flatten(0, 1)

    def readouts(self, inputs: Tensor) -> Tensor:
        """What the readout multiplies, (R T, N, 1) or (R T, N, positions)."""
        read = self.architecture.readout_features(self.architecture.layers[-1].activate(self.preactivations(inputs)))
        return read if read.ndim == 3 else read[:, :, None]

    def costs(self, penalty: Penalty, mu: Sequence[float] | Tensor) -> Tensor:
        """gamma_L of this realisation, (R T,): no less than that of the feature; differentiable in kernels and mu."""
        gamma = penalty.input * self.input_norms().square()
        for kernels, price in zip(self.kernels[1:], mu):
            amounts = _amounts(penalty, kernels)
            if penalty.source == 0:
                gamma = torch.zeros_like(amounts[:, :, 0])
                continue
            tiny = torch.finfo(gamma.dtype).tiny  # the root has no gradient at zero
            gamma = (amounts * (2 * (penalty.source * (price + gamma)).clamp_min(tiny).sqrt())[:, None]).sum(2)
        return gamma.flatten()

    def input_norms(self) -> Tensor:
        """|(z, b)|, (R, m_1)."""
        bias = self.biases[0]
        return input_norms(self.kernels[0].flatten(0, 1), None if bias is None else bias.flatten()).view(self.kernels[0].shape[:2])

    def scaled_first(self, factors: Tensor | float) -> Compositions:
        """First-layer kernels and biases times factors, (R, m_1) or a number."""
        bias = self.biases[0]
        wide = factors[:, :, None, None, None] if isinstance(factors, Tensor) else factors
        return replace(
            self, kernels=(self.kernels[0] * wide, *self.kernels[1:]), biases=(None if bias is None else bias * factors, *self.biases[1:])
        )

    def unit(self) -> Compositions:
        """First-layer kernels on the unit sphere."""
        return self.scaled_first(1 / self.input_norms().clamp_min(torch.finfo(self.kernels[0].dtype).tiny))

    def projected(self, penalty: Penalty) -> Compositions:
        """Scaled down to the bounds of the penalty."""
        result = self
        if penalty.input_bound is not None:
            result = self.scaled_first(_shrink(penalty.input_bound, self.input_norms()))
        kernels, biases, bound = list(result.kernels), list(result.biases), penalty.amplitude_bound
        if bound is None:
            return result
        for index in range(1, len(kernels)):
            kernels[index] = kernels[index] * _shrink(bound, _amounts(penalty, kernels[index]).sum(2))[:, :, None, None, None]
            bias = biases[index]
            biases[index] = None if bias is None else bias.clamp(-bound, bound)
        return replace(result, kernels=tuple(kernels), biases=tuple(biases))

    def pruned(self, penalty: Penalty) -> Compositions:
        """With the smallest flows set to zero, so that few atoms remain."""
        kernels = list(self.kernels)
        for index in range(1, len(kernels)):
            amounts = _amounts(penalty, kernels[index])
            keep = amounts >= LEAST_SHARE * amounts.amax(2, keepdim=True)
            kernels[index] = kernels[index] * keep[..., None, None]
        return replace(self, kernels=tuple(kernels))


def _shrink(bound: float, reached: Tensor) -> Tensor:
    return (bound / reached.clamp_min(torch.finfo(reached.dtype).tiny)).clamp_max(1)


def _amounts(penalty: Penalty, kernels: Tensor) -> Tensor:
    """|a_ij| (R, targets, sources)."""
    return penalty.norms(kernels.flatten(0, 1)).view(kernels.shape[:3])


def _flow(architecture: Architecture, index: int, kernels: Tensor, features: Tensor, bias: Tensor | None) -> Tensor:
    """sum_i sum_s a_ijs T_s f_i + b_j: features (R, m, N, H, W) -> (R, m', N, H', W')."""
    layer = architecture.layers[index]
    (height, width), (rows, columns) = architecture.geometry[index].output, layer.padding  # type: ignore[misc]
    R, targets, sources = kernels.shape[:3]
    weights = kernels.flatten(3).movedim(3, 1).reshape(R, -1, sources)  # (R, S m', m)
    moved = torch.bmm(weights, features.flatten(2)).view(R, layer.offsets, targets, *features.shape[2:])
    total = 0
    for offset, part in enumerate(moved.unbind(1)):
        y, x = divmod(offset, layer.kernel[1])
        part = functional.pad(part, (columns, columns, rows, rows))
        down, right = layer.stride  # type: ignore[misc]
        total = total + part[..., y : y + down * (height - 1) + 1 : down, x : x + right * (width - 1) + 1 : right]
    return total if bias is None else total + bias[:, :, None, None, None]  # type: ignore[operator]


def _own(network: ParticleNetwork) -> Compositions:
    """The features of a network, realised by the network: a_ij = w_ij p_i."""
    network = measures.drop_massless(network)
    flows = [w * p[None, :, None, None] for w, p in zip(network.kernels[1:], network.masses)]
    kernels = tuple(k[None] for k in (network.kernels[0], *flows))
    return Compositions(network.architecture, kernels, tuple(None if b is None else b[None] for b in network.biases))


def as_network(found: Sequence[Compositions], penalty: Penalty) -> ParticleNetwork:
    """A network with these features (R = T = 1 each) in its last layer, uniform masses and no readout; idle atoms are left out."""
    pieces = [_without_idle(piece, penalty) for piece in found]
    arch = found[0].architecture
    widths = [sum(len(kernels[layer]) for kernels, _ in pieces) for layer in range(arch.depth)]
    like = found[0].kernels[0]
    masses = [like.new_full((width,), 1 / width) for width in widths]
    kernels = [torch.cat([piece[0] for piece, _ in pieces])]
    for layer in range(1, arch.depth):  # w = a / p of the source
        kernels.append(_block_diagonal([piece[layer] for piece, _ in pieces]) * widths[layer - 1])
    biases = [torch.cat([b[layer] for _, b in pieces]) if conv.bias else None for layer, conv in enumerate(arch.layers)]
    return ParticleNetwork(arch, masses, kernels, like.new_zeros(arch.readout_shape(widths[-1])), biases)


def _without_idle(piece: Compositions, penalty: Penalty) -> tuple[list[Tensor], list[Tensor]]:
    """Kernels and biases of one feature without the atoms that nothing flows out of (one atom is kept)."""
    kernels = [k[0] for k in piece.kernels]
    biases = [kernels[0].new_zeros(0) if b is None else b[0] for b in piece.biases]
    for layer in range(len(kernels) - 1, 0, -1):
        outflow = penalty.norms(kernels[layer]).sum(0)
        keep = torch.nonzero((outflow > 0) | (outflow.cumsum(0).amax() == 0) & (torch.arange(len(outflow), device=outflow.device) == 0)).flatten()
        kernels[layer], kernels[layer - 1] = kernels[layer][:, keep], kernels[layer - 1][keep]
        biases[layer - 1] = biases[layer - 1][keep] if len(biases[layer - 1]) else biases[layer - 1]
    return kernels, biases


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Kernels (targets, sources, kh, kw) on the diagonal of one."""
    rows, columns = sum(len(b) for b in blocks), sum(b.shape[1] for b in blocks)
    whole = blocks[0].new_zeros(rows, columns, *blocks[0].shape[2:])
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


# --- the bound on what was found --------------------------------------------------------------------------------------


class _Pool:
    """Features found so far with what the readout sees of them; those of equal widths are held as one batch.

    The first part is g = 0, the second the network's own where there is one.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.parts: list[Compositions] = []
        self._seen: list[Tensor] = []
        self._readouts: Tensor | None = None

    def add(self, part: Compositions, keep_apart: bool = False) -> None:
        """keep_apart: the part stays a batch of its own, before those that are not."""
        read, self._readouts = part.readouts(self.problem.inputs), None
        shapes = [k.shape[1:] for k in part.kernels]
        for index, other in enumerate(self.parts[2:], start=2):
            if not keep_apart and [k.shape[1:] for k in other.kernels] == shapes:
                self.parts[index] = other.with_tensors([torch.cat(pair) for pair in zip(other.tensors(), part.tensors())])
                self._seen[index] = torch.cat([self._seen[index], read])
                return
        self.parts.append(part)
        self._seen.append(read)

    @property
    def readouts(self) -> Tensor:
        """(F, N, positions)."""
        if self._readouts is None:
            self._readouts = torch.cat(self._seen)
        return self._readouts

    def responses(self, output: Tensor) -> Tensor:
        """|q|^2, (F,)."""
        return _responses(output, self.readouts)

    def costs(self, mu: Sequence[float] | Tensor) -> Tensor:
        return torch.cat([part.costs(self.problem.penalty, mu) for part in self.parts])

    def scores(self, output: Tensor, mu: Sequence[float] | Tensor) -> Tensor:
        """|q|^2 / (4 lambda_u) - gamma_L, (F,)."""
        return self.responses(output) / (4 * self.problem.penalty.readout) - self.costs(mu)

    def single(self, index: int) -> Compositions:
        """One feature as R = T = 1."""
        for part in self.parts:
            targets = part.kernels[-1].shape[1]
            if index < len(part) * targets:
                one, target = part.take(slice(index // targets, index // targets + 1)), index % targets
                last, bias = one.kernels[-1][:, target : target + 1], one.biases[-1]
                last_bias = None if bias is None else bias[:, target : target + 1]
                return replace(one, kernels=(*one.kernels[:-1], last), biases=(*one.biases[:-1], last_bias))
            index -= len(part) * targets
        raise IndexError(index)


def _responses(output: Tensor, readouts: Tensor) -> Tensor:
    """|q|^2 (F,) of readouts (F, N, positions) to r (N, K)."""
    return torch.einsum("nk,fnq->fkq", output, readouts).flatten(1).square().sum(1)


def _golden(function: Callable[[float], float], low: float, high: float, steps: int = 60) -> tuple[float, float]:
    """(where, value) of the largest value met by golden-section search of a concave function, ends included."""
    seen = [(function(x), x) for x in (low, high)]
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        seen += [(at_left, left), (at_right, right)]
        if at_left > at_right or at_right == -math.inf:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = function(right)
    value, where = max([*seen, (at_left, left), (at_right, right)])
    return where, value


@dataclass(frozen=True, eq=False)
class _Tried:
    """Multipliers at which features were searched for, and the bound there."""

    output: Tensor
    mu: tuple[float, ...]
    bound: float


class _Search:
    """What was found so far, and the multipliers that suit it best.

    finite: features as they are, those of the network and g = 0 among them.  sphere: unit kernels of one homogeneous
    layer, or, for softplus and gelu, of the ReLU layer that theirs becomes far away; their kernels may be of any length.
    """

    def __init__(
        self, problem: Problem, output: Tensor, network: ParticleNetwork | None, generator: torch.Generator, starts: int, steps: int, deadline: float
    ) -> None:
        self.problem, self.given, self.network, self.generator = problem, output, network, generator
        self.starts, self.steps, self.deadline, self.tried = starts, steps, deadline, 0
        arch = problem.architecture
        activation, single = arch.layers[0].activation, arch.depth == 1
        self.homogeneous = single and activation in HOMOGENEOUS
        self.free = single and problem.penalty.input_bound is None
        self.finite = None if self.homogeneous else _Pool(problem)
        self.sphere = _Pool(problem) if self.homogeneous else None
        if self.free and activation in RECESSION:
            self.sphere = _Pool(_with_activation(problem, RECESSION[activation]))
        self._fill()

    def _fill(self) -> None:
        arch, like = self.problem.architecture, self.problem.inputs
        nothing = Compositions(
            arch,
            tuple(like.new_zeros(1, *shape) for shape in arch.kernel_shapes([1] * arch.depth)),
            tuple(like.new_zeros(1, 1) if conv.bias else None for conv in arch.layers),
        )
        for part in (nothing,) if self.network is None else (nothing, _own(self.network)):
            if self.finite is not None:
                self.finite.add(part, keep_apart=True)
            if self.sphere is not None:
                first = replace(part, architecture=self.sphere.problem.architecture, kernels=(part.kernels[0].movedim(1, 0),))
                first = replace(first, biases=tuple(None if b is None else b.T for b in part.biases))
                self.sphere.add(first.unit(), keep_apart=True)

    # --- the bound

    def conjugate(self, output: Tensor) -> float:
        return float(self.problem.loss.conjugate(len(output) * output, self.problem.targets).mean())

    def bound(self, output: Tensor, mu: Sequence[float], scale: float = 1.0) -> float:
        """The bound at r = scale * output with the sup over everything found."""
        return self._line(output, mu)(scale)

    def _line(self, output: Tensor, mu: Sequence[float]) -> Callable[[float], float]:
        """The bound as a function of the scale of r."""
        readout, input_ = 4 * self.problem.penalty.readout, self.problem.penalty.input
        rows = costs = None
        if self.finite is not None:
            rows, costs = self.finite.responses(output) / readout, self.finite.costs(mu)
        largest = float(self.sphere.responses(output).max()) / readout if self.sphere is not None else 0.0

        def value(scale: float) -> float:
            worst = 0.0 if rows is None or costs is None else float((scale**2 * rows - costs).max())
            gain = scale**2 * largest - input_
            if self.sphere is not None and self.homogeneous and not self.free:
                worst = max(worst, self._radius_squared * gain)
            elif self.sphere is not None and gain > 1e-12 * input_:
                return -math.inf
            return -self.conjugate(scale * output) - sum(mu) - worst

        return value

    @cached_property
    def _radius_squared(self) -> float:
        """B_1^2, or a square length that no kernel of an optimal network needs: kernels may share one, lambda_1 |z|^2 <= J."""
        penalty = self.problem.penalty
        if penalty.input_bound is not None:
            return penalty.input_bound**2
        if self.network is not None:
            value = float(self.problem.value(self.network))
        else:
            nothing = self.problem.inputs.new_zeros(self.given.shape)
            value = float(self.problem.loss.value(nothing, self.problem.targets).mean())
        return 2 * value / penalty.input

    def largest_scale(self, output: Tensor) -> float:
        """The scale of r beyond which the conjugate part falls or ends, or unit kernels gain more than they cost."""
        limit = _conjugate_limit(self.problem, output)
        if self.sphere is not None and self.free:
            largest = float(self.sphere.responses(output).max().sqrt())
            room = 2 * math.sqrt(self.problem.penalty.input * self.problem.penalty.readout) / max(largest, 1e-300)
            limit = min(limit, room if self.homogeneous else 0.999 * room)
        return limit

    def scaled(self, output: Tensor, mu: tuple[float, ...]) -> _Tried:
        """The best scale of r."""
        scale, value = _golden(self._line(output, mu), 0.0, self.largest_scale(output))
        return _Tried(scale * output, mu, value)

    # --- the rounds

    def run(self, prices: tuple[float, ...], rounds: int, fixed: bool) -> _Tried:
        output, mu, tried = self.given, prices, []
        best = _Tried(output, mu, -math.inf)
        for _ in range(rounds):
            self.look(output, mu)
            tried.append((output, mu))
            best = max((self.scaled(*each) for each in tried), key=lambda t: t.bound)
            if time.perf_counter() >= self.deadline:
                break
            better = self.maximised(best, fixed)
            if better.bound - best.bound <= AGREEMENT * abs(best.bound):
                break
            output, mu = better.output, better.mu
        return best

    def maximised(self, start: _Tried, fixed: bool) -> _Tried:
        """r and mu of the largest bound over the pool: concave, the maximum over features softened less and less; L-BFGS."""
        problem, unit = self.problem, max(abs(start.bound), 1e-12)
        hidden = len(start.mu)
        begin = np.ones(1) if fixed else _outputs_of(problem, start.output).flatten().numpy(force=True)
        x = np.concatenate([begin, np.array(start.mu) / unit])
        limits = [(0.0, _conjugate_limit(problem, start.output))] if fixed else [(None, None)] * len(begin)
        limits += [(0.0, None)] * hidden

        def multipliers(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mu = unit * point[len(begin) :]
            if fixed:
                output = point[0] * start.output
                return output, mu, problem.loss.conjugate(len(output) * output, problem.targets).mean()
            outputs = point[: len(begin)].view(start.output.shape)
            slopes = problem.loss.gradient(outputs, problem.targets)
            conjugate = (outputs * slopes).sum(1) - problem.loss.value(outputs, problem.targets)  # equality of Fenchel
            return slopes / len(slopes), mu, conjugate.mean()

        def negative(values: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
            point = torch.from_numpy(values).to(start.output).requires_grad_()
            output, mu, conjugate = multipliers(point)
            worst = temperature * (self._scores(output, mu) / temperature).logsumexp(0)
            total = (conjugate + mu.sum() + worst) / unit
            total.backward()
            assert point.grad is not None
            return total.item(), point.grad.numpy(force=True)

        best = start
        for share in SMOOTHING:
            x = minimize(negative, x, args=(share * unit,), jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": 300, "maxcor": 30}).x
            with torch.no_grad():
                output, mu, _ = multipliers(torch.from_numpy(x).to(start.output))
            found = self.scaled(output, tuple(float(m) for m in mu))
            best = found if found.bound > best.bound else best
        return best

    def _scores(self, output: Tensor, mu: Tensor) -> Tensor:
        """Scores of everything found; unit kernels at the length of `_radius_squared`, and nothing."""
        found = [output.new_zeros(1)]
        if self.finite is not None:
            found.append(self.finite.scores(output, mu))
        if self.sphere is not None:
            penalty = self.problem.penalty
            found.append(self._radius_squared * (self.sphere.responses(output) / (4 * penalty.readout) - penalty.input))
        return torch.cat(found)

    # --- the search

    def look(self, output: Tensor, mu: tuple[float, ...]) -> None:
        """Search at these multipliers; the best features join the pools."""
        if self.sphere is not None:
            for begun in self._chunks(self._begun(output, mu, self.sphere)):
                self.tried += len(begun)
                self._join(self.sphere, self._ascend_sphere(begun.unit(), output), output, mu)
            if self.finite is not None:
                self._add_rays(output)
        if self.finite is not None:
            for begun in self._chunks(self._begun(output, mu, self.finite)):
                self.tried += len(begun)
                for found in self._ascend(begun, output, mu):
                    self._join(self.finite, found, output, mu)

    def _join(self, pool: _Pool, found: Compositions, output: Tensor, mu: tuple[float, ...]) -> None:
        if len(found) > KEPT:
            readouts = found.readouts(self.problem.inputs)
            scores = _responses(output, readouts) / (4 * self.problem.penalty.readout) - found.costs(self.problem.penalty, mu)
            found = found.take(scores.topk(KEPT).indices)
        pool.add(found)

    def _add_rays(self, output: Tensor) -> None:
        """The directions in which long kernels pay most, at several lengths."""
        assert self.sphere is not None
        assert self.finite is not None
        order = self.sphere.responses(output).argsort(descending=True)[:8].tolist()
        for ray in RAYS:
            far = _stacked([self.sphere.single(index) for index in order], 1, self.problem.penalty).scaled_first(ray)
            self.finite.add(replace(far, architecture=self.problem.architecture))

    def _chunks(self, parts: list[Compositions]):
        """Batches of starts that fit into memory; none once time is up, the first one apart."""
        count = len(self.problem.inputs)
        for part in parts:
            maps = [k.shape[1] * g.output[0] * g.output[1] for k, g in zip(part.kernels, self.problem.architecture.geometry)]
            size = max(1, ENTRIES // (count * max(maps)))
            for low in range(0, len(part), size):
                if self.tried and time.perf_counter() >= self.deadline:
                    return
                yield part.take(slice(low, low + size))

    def _begun(self, output: Tensor, mu: tuple[float, ...], pool: _Pool) -> list[Compositions]:
        """Starts: half of them the best known features and disturbed ones, half random, every other of these from data patches.

        Starts of equal widths make one batch.
        """
        arch, half = pool.problem.architecture, max(1, self.starts // 2)
        order = (1 + pool.scores(output, mu)[1:].argsort(descending=True))[: max(1, half // 3)].tolist()  # without g = 0
        known = [pool.single(index) for index in order]
        parts = [self._drawn(arch, [HIDDEN] * (arch.depth - 1) + [1], max(1, self.starts - half if known else self.starts))]
        for widths in sorted({tuple(k.shape[2] for k in piece.kernels) for piece in known}):
            alike = [piece for piece in known if tuple(k.shape[2] for k in piece.kernels) == widths]
            same = _stacked(alike, MOST_OWN, self.problem.penalty)
            number = max(1, round(half * len(same) / len(known)) - len(same))
            parts.append(_joined([same, self._disturbed(same, number)]))
        return parts

    def _disturbed(self, known: Compositions, number: int) -> Compositions:
        known = known.take(torch.arange(number, device=known.kernels[0].device) % len(known))
        noise = [measures.normal(t.shape, self.generator, t) for t in known.tensors()]
        return known.with_tensors([t + NOISE * e * _size(t) for t, e in zip(known.tensors(), noise)])

    def _drawn(self, arch: Architecture, widths: list[int], number: int) -> Compositions:
        """Random kernels, every other start with data patches on layer 1; pre-activations of later layers of size one."""
        inputs = self.problem.inputs
        shapes = [(number, *shape) for shape in arch.kernel_shapes(widths)]
        first = measures.normal(shapes[0], self.generator, inputs)
        signs = first[:, :, :1, :1, :1].sign()
        patches = signs * self._patches(number * widths[0]).view(shapes[0])
        first = torch.where((torch.arange(number, device=inputs.device) % 2 == 0).view(-1, 1, 1, 1, 1), patches, first)
        kernels = [first, *(measures.normal(shape, self.generator, inputs) / shape[2] for shape in shapes[1:])]
        biases = [0.1 * measures.normal(k.shape[:2], self.generator, inputs) if conv.bias else None for conv, k in zip(arch.layers, kernels)]
        return Compositions(arch, tuple(kernels), tuple(biases)).unit().scaled_first(self._radius)

    @cached_property
    def _radius(self) -> float:
        """Root mean square |(z, b)| of the network, or that of a standard normal kernel."""
        usual = math.sqrt(_kernel_entries(self.problem.architecture))
        if self.network is None:
            return usual
        norms = input_norms(self.network.kernels[0], self.network.biases[0])
        return float((self.network.masses[0] @ norms.square()).sqrt()) or usual

    def _patches(self, number: int) -> Tensor:
        inputs, conv = self.problem.inputs, self.problem.architecture.layers[0]
        rows = conv.patches(inputs).flatten(0, 1)
        rows = rows[rows.norm(dim=1) > 0]
        if not len(rows):
            return measures.normal((number, inputs.shape[1] * conv.offsets), self.generator, inputs)
        return rows[torch.randint(len(rows), (number,), generator=self.generator).to(rows.device)]

    def _ascend_sphere(self, begun: Compositions, output: Tensor) -> Compositions:
        """Unit kernels follow the normalised gradient of |q|^2, after a while by steps that shrink."""
        for step in range(SPHERE_STEPS):
            leaves = [t.detach().requires_grad_() for t in begun.tensors()]
            current = begun.with_tensors(leaves)
            with torch.enable_grad():
                total = _responses(output, current.readouts(self.problem.inputs)).sum()
            slopes = begun.with_tensors(torch.autograd.grad(total, leaves)).unit()
            moved = [z.detach() + 0.8 ** max(0, step - SPHERE_STEPS // 3) * slope for z, slope in zip(leaves, slopes.tensors())]
            begun = begun.with_tensors(moved).unit()
        return begun

    def _ascend(self, begun: Compositions, output: Tensor, mu: tuple[float, ...]) -> list[Compositions]:
        """All starts, then the better ones again, by gain over cost; the best at last by gain less cost.

        Gain over cost does not let a feature vanish on its way: g = 0 is a local maximum of gain less cost.
        """
        assert self.finite is not None
        level = max(0.0, float(self.finite.scores(output, mu).max())) + LEAST_COST * abs(self.conjugate(output))
        begun, ended = begun.projected(self.problem.penalty), []
        for share in (*STAGES, 0.0):
            moved = self._climb(begun, output, mu, level if share else None)
            kept = [moved, moved.pruned(self.problem.penalty)]
            ended += [begun, *kept] if not ended else kept
            if not share or time.perf_counter() >= self.deadline:
                break
            begun = moved.take(self._merit(moved, output, mu, level).topk(max(1, round(share * len(moved)))).indices)
        return ended

    def _climb(self, begun: Compositions, output: Tensor, mu: tuple[float, ...], level: float | None) -> Compositions:
        """Adam on all starts at once, in float32 and in units of each start's own size.

        Flows are a = |v| v: their cost is then smooth in v, and flows that do not pay die out.
        """
        penalty, single = self.problem.penalty, torch.float32
        inputs, output = self.problem.inputs.to(single), output.to(single)
        roots = _roots(begun, penalty)
        sizes = [_size(t).to(single) for t in roots.tensors()]
        leaves = [(t.to(single) / s).requires_grad_() for t, s in zip(roots.tensors(), sizes)]
        current = lambda: _powers(begun.with_tensors([x * s for x, s in zip(leaves, sizes)]), penalty)  # noqa: E731
        optimiser = torch.optim.Adam(leaves, lr=LEARNING_RATE, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        bounded = penalty.amplitude_bound is not None or penalty.input_bound is not None
        for _ in range(self.steps):
            optimiser.zero_grad()
            with torch.enable_grad():
                (-_merit(current(), inputs, penalty, output, mu, level).sum()).backward()
            optimiser.step()
            schedule.step()
            if time.perf_counter() >= self.deadline:
                break
            if bounded:
                with torch.no_grad():
                    for leaf, tensor, s in zip(leaves, _roots(current().projected(penalty), penalty).tensors(), sizes):
                        leaf.copy_(tensor / s)
        with torch.no_grad():
            ended = current()
        return ended.with_tensors([t.to(self.problem.inputs.dtype) for t in ended.tensors()]).projected(penalty)

    def _merit(self, current: Compositions, output: Tensor, mu: tuple[float, ...], level: float | None = None) -> Tensor:
        return _merit(current, self.problem.inputs, self.problem.penalty, output, mu, level)

    # --- the answer

    def prove(self, best: _Tried, seconds: float) -> tuple[_Tried, dict[str, float | str | bool]]:
        """A rigorous bound at the direction of the best r, from an upper bound of the largest |q| over unit kernels."""
        found = _largest_response(self.problem, best.output, seconds, self._directions())
        if found is None or self.sphere is None:
            return best, {}
        upper, method, argmax = found
        if argmax is not None:
            self.sphere.add(_from_direction(self.problem.architecture, argmax))
            best = self.scaled(best.output, best.mu)
        penalty = self.problem.penalty

        def value(scale: float) -> float:
            gain = scale**2 * upper**2 / (4 * penalty.readout) - penalty.input
            worst = 0.0 if self.free else self._radius_squared * max(gain, 0.0)
            return -self.conjugate(scale * best.output) - worst

        limit = _conjugate_limit(self.problem, best.output)
        if self.free:
            limit = min(limit, 2 * math.sqrt(penalty.input * penalty.readout) / max(upper, 1e-300))
        return best, {"rigorous_bound": _golden(value, 0.0, limit)[1], "rigorous_kind": method}

    def _directions(self) -> Tensor | None:
        """First-layer kernels on the sphere, biases appended, (F, d)."""
        if self.sphere is None:
            return None
        rows = [part.kernels[0].flatten(0, 1).flatten(1) for part in self.sphere.parts]
        biases = [part.biases[0] for part in self.sphere.parts]
        return torch.cat([z if b is None else torch.cat([z, b.reshape(-1, 1)], 1) for z, b in zip(rows, biases)])

    def result(self, best: _Tried, prices: tuple[float, ...], count: int, seconds: float) -> UnseenFeatures:
        proof: dict[str, float | str | bool] = {}
        if seconds > 0:
            best, proof = self.prove(best, seconds)
        size = float(self.given.norm())
        bound, kind = best.bound, "best of K starts"
        if proof and float(proof["rigorous_bound"]) >= bound - PROOF_SUFFICES * abs(bound):  # close enough to quote what is proven
            bound, kind = float(proof["rigorous_bound"]), str(proof["rigorous_kind"])
        found = UnseenFeatures(
            bound, kind, self.tried, "", best.bound, rigorous=kind != "best of K starts",
            output=best.output, mu=best.mu, scale=float(best.output.norm()) / size if size else 1.0,
        )  # fmt: skip
        return replace(found, **proof, **self._features(prices, count))

    def _features(self, mu: tuple[float, ...], count: int) -> dict:
        pool = self.finite or self.sphere
        assert pool is not None
        scores = pool.scores(self.given, mu)
        lengths = 1.0
        if self.finite is None:  # a longer kernel scores more: all get the length of the network's
            lengths = self._radius if self.free else math.sqrt(self._radius_squared)
            scores = lengths**2 * scores
        own = 0 if self.network is None else sum(int((p > 0).sum()) for p in self.network.masses[-1:])
        level = max(float(scores[: 1 + own].max()), 0.0)
        order = scores.argsort(descending=True)[: 16 * count]
        order = order[scores[order] > level + 1e-12 * abs(level)].tolist()
        pieces = [pool.single(index).scaled_first(lengths) for index in order]
        kept = _distinct(pieces, self.problem.inputs)[:count]
        if not kept:
            return {"level": level}
        chosen = torch.tensor([order[i] for i in kept], device=scores.device)
        return {"level": level, "features": as_network([pieces[i] for i in kept], self.problem.penalty), "scores": scores[chosen]}


def _merit(
    current: Compositions, inputs: Tensor, penalty: Penalty, output: Tensor, mu: Sequence[float] | Tensor, level: float | None
) -> Tensor:
    """Gain less cost, or with a level log gain / (cost + level), (R,)."""
    gain = _responses(output, current.readouts(inputs)) / (4 * penalty.readout)
    cost = current.costs(penalty, mu)
    if level is None:
        return gain - cost
    return gain.clamp_min(torch.finfo(gain.dtype).tiny).log() - (cost + level).clamp_min(torch.finfo(gain.dtype).tiny).log()


def _powers(roots: Compositions, penalty: Penalty) -> Compositions:
    """Flows a = |v| v from v; l1: entry by entry."""
    kernels = [roots.kernels[0]]
    for v in roots.kernels[1:]:
        kernels.append(v * _lengths(v, penalty))
    return replace(roots, kernels=tuple(kernels))


def _roots(flows: Compositions, penalty: Penalty) -> Compositions:
    """v from a = |v| v."""
    kernels = [flows.kernels[0]]
    for a in flows.kernels[1:]:
        kernels.append(a / _lengths(a, penalty).sqrt())
    return replace(flows, kernels=tuple(kernels))


def _lengths(kernels: Tensor, penalty: Penalty) -> Tensor:
    lengths = kernels.abs() if penalty.kernel_norm == "l1" else torch.linalg.vector_norm(kernels, dim=(3, 4), keepdim=True)
    return lengths.clamp_min(1e-12)


def _size(tensor: Tensor) -> Tensor:
    """Root mean square of every start's entries, broadcastable; one where there are none."""
    rms = tensor.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (tensor.ndim - 1))
    return torch.where(rms > 0, rms, 1.0)


def _joined(parts: Sequence[Compositions]) -> Compositions:
    """Compositions of equal widths as one batch."""
    return parts[0].with_tensors([torch.cat(each) for each in zip(*(part.tensors() for part in parts))])


def _stacked(pieces: Sequence[Compositions], width: int, penalty: Penalty) -> Compositions:
    """Compositions of equal widths as one batch; of more than `width` sources those of the largest outflow stay."""
    whole = _joined(pieces)
    kernels, biases = list(whole.kernels), list(whole.biases)
    for layer in range(len(kernels) - 1, 0, -1):
        outflow = _amounts(penalty, kernels[layer]).sum(1)  # (R, sources)
        if outflow.shape[1] > width:
            keep = outflow.topk(width).indices
            rows = torch.arange(len(keep), device=keep.device)[:, None]
            kernels[layer] = kernels[layer].movedim(2, 1)[rows, keep].movedim(1, 2)
            kernels[layer - 1] = kernels[layer - 1][rows, keep]
            bias = biases[layer - 1]
            biases[layer - 1] = None if bias is None else bias[rows, keep]
    return replace(whole, kernels=tuple(kernels), biases=tuple(biases))


def _distinct(pieces: Sequence[Compositions], inputs: Tensor) -> list[int]:
    """Indices of features no two of which are alike on the inputs, earlier ones first."""
    if not pieces:
        return []
    rows = functional.normalize(torch.cat([piece.preactivations(inputs).flatten(1) for piece in pieces]), dim=1)
    alike = (rows @ rows.T).tolist()
    kept: list[int] = []
    for index, near in enumerate(alike):
        if all(near[other] < SAME_FEATURE for other in kept):
            kept.append(index)
    return kept


def _largest_response(problem: Problem, output: Tensor, seconds: float, starts: Tensor | None) -> tuple[float, str, Tensor | None] | None:
    """(upper bound of |q| over unit kernels, method, where) for one ReLU or linear layer without max pooling; None elsewhere."""
    arch = problem.architecture
    conv, geometry = arch.layers[0], arch.geometry[0]
    positions = geometry.output[0] * geometry.output[1]
    columns = arch.outputs * (1 if arch.readout == "average" else arch.readout_positions)
    if arch.depth > 1 or conv.activation not in HOMOGENEOUS or conv.pooling == "max":
        return None
    if max(positions**2, len(output) * positions * columns) > PROVEN_ENTRIES:
        return None
    patches = conv.patches(problem.inputs).flatten(0, 1) / arch.input_shape[0]  # (N P, d)
    if conv.bias:
        patches = torch.cat([patches, patches.new_ones(len(patches), 1)], 1)
    weights = torch.einsum("nk,pq->npkq", output, _position_weights(arch).to(output)).flatten(2).flatten(0, 1)
    if conv.activation == "identity":
        return float(torch.linalg.matrix_norm(patches.T @ weights, 2)) * (1 + 1e-12), "exact spectral norm", None
    found = sphere.maximise(patches, weights, max_seconds=seconds, start=starts)
    method = "exact over the arrangement" if found.method == "arrangement" else found.method
    return found.upper, method, found.argmax


def _position_weights(arch: Architecture) -> Tensor:
    """What every position before pooling adds to the readout's features, (P, 1) or (P, positions)."""
    conv, (height, width) = replace(arch.layers[0], activation="identity"), arch.geometry[0].output
    units = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    return arch.readout_features(conv.activate(units)).flatten(1)


def _from_direction(arch: Architecture, direction: Tensor) -> Compositions:
    """A first-layer kernel (d,), its bias last, as a composition."""
    kernel, bias = (direction[:-1], direction[-1:]) if arch.layers[0].bias else (direction, None)
    return Compositions(arch, (kernel.view(1, 1, arch.input_shape[0], *arch.layers[0].kernel),), (None if bias is None else bias.view(1, 1),))


def _kernel_entries(arch: Architecture) -> int:
    return arch.input_shape[0] * arch.layers[0].offsets + arch.layers[0].bias


def _with_activation(problem: Problem, activation: str) -> Problem:
    arch = problem.architecture
    far = replace(arch, layers=(replace(arch.layers[0], activation=activation), *arch.layers[1:]))
    return Problem(far, problem.inputs, problem.targets, problem.loss.name, problem.penalty)


def _conjugate_limit(problem: Problem, output: Tensor) -> float:
    """The scale of r at which the conjugate part is largest (squared loss) or its domain ends."""
    scores = len(output) * output
    if problem.loss.name == "squared":
        size = float(scores.square().sum())
        return max(0.0, -float((scores * problem.targets).sum()) / size) if size else 1.0
    largest = float(scores.abs().max())
    return (1 - 1e-12) / largest if largest else 1.0


def _outputs_of(problem: Problem, output: Tensor) -> Tensor:
    """Outputs F at which the loss has the gradient N r."""
    slopes, targets = len(output) * output, problem.targets
    if problem.loss.name == "squared":
        return slopes + targets
    if problem.loss.name == "logistic":
        return -targets * torch.logit(-targets * slopes, eps=1e-9)
    share = slopes + functional.one_hot(targets, output.shape[1])
    return share.clamp_min(1e-9).log()
