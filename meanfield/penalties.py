"""The penalties and bounds of the objective, and the scalar root behind all their proximal maps.

r(t) = t^q of the penalties is `outer.Outer`.

A kernel's norm is a sum over *atoms*: with the l2 norm a kernel is one atom, with the l1 norm every entry is one.  Both
norms then share every formula: the norm is the sum of atom magnitudes, its dual norm their maximum, and a proximal map
shrinks atoms without turning them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meanfield.host import on_host
from meanfield.outer import Outer
from meanfield.validation import Misuse, nonnegative, one_of, positive

KERNEL_NORMS = ("l2", "l1")
ROOT_STEPS = 100
BALL_STEPS = 12  # of Newton, on a function that is all but linear: rounding after half of them
CUBIC_STEPS = 6
POWER_STEPS = 8
INNER_STEPS = 25  # within one step of the projection on the amplitude bound


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """Strengths lambda_s (source), lambda_u (readout), lambda_1 (input), their power q, the kernel norm and the
    optional bounds.

    source:  lambda_s sum_i p_i (sum_j |w_ij| p_j)^q for every pair of layers, the inner sum over the TARGET layer
    readout: lambda_u sum_j p_j |u_j|^q
    input:   lambda_1 sum_i p_i |(z_i, b_i)|^2 on layer 1
    power q > 1
    amplitude_bound B: sum_i |w_ij| p_i <= B and |b_j| <= B for every feature j of layers >= 2
    input_bound B_1: |(z_i, b_i)| <= B_1 on layer 1
    uncertified: a term of one's own, a function of a ParticleNetwork whose value, a 0-dimensional tensor, autograd can
        differentiate in the network's tensors.  It is added to J, and to the value of a convex program, where flows and
        checks of convexity see it.  No theory stands behind it: whatever certifies, or solves what it would certify,
        refuses it by name, and a flow says that its answer is uncertified.
    """

    source: float = 3e-4
    readout: float = 3e-3
    input: float = 3e-4
    power: float = 2.0
    kernel_norm: str = "l2"
    amplitude_bound: float | None = None
    input_bound: float | None = None
    uncertified: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("source", "readout", "input"):
            object.__setattr__(self, name, nonnegative(getattr(self, name), name))
        for name in ("amplitude_bound", "input_bound"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive(getattr(self, name), name))
        if nonnegative(self.power, "power") <= 1:
            raise Misuse("power", self.power, "must be greater than 1: t^1 does not keep kernels off zero masses")
        object.__setattr__(self, "power", float(self.power))
        one_of(self.kernel_norm, "kernel_norm", KERNEL_NORMS)
        if self.uncertified is not None and not callable(self.uncertified):
            raise Misuse("uncertified", self.uncertified, "must be a function of a ParticleNetwork, or None")

    @cached_property
    def outer(self) -> Outer:
        """r(t) = t^power."""
        return Outer(self.power)

    def settings(self) -> dict[str, Any]:
        """The arguments as plain values, for a file that names a run; Misuse where a function is among them."""
        if self.uncertified is not None:
            raise Misuse(
                "uncertified", self.uncertified, "is a function, which a file of a state cannot name: leave out `state`"
            )
        return asdict(self)

    def require_certifiable(self, what: str) -> None:
        """Refuse a term of the user's own: `what` stands on the theory of the others."""
        if self.uncertified is not None:
            raise Misuse(
                "uncertified",
                self.uncertified,
                f"has no certificate, which {what} gives: follow it with solvers.flow, measure it with "
                "studies.convexity, or leave it out",
            )

    def atoms(self, kernels: Tensor) -> Tensor:
        """Atom magnitudes, (targets, sources, kh, kw) -> (targets, sources, 1 for l2 or kh kw for l1)."""
        flat = kernels.flatten(2)
        return torch.linalg.vector_norm(flat, dim=2, keepdim=True) if self.kernel_norm == "l2" else flat.abs()

    def norms(self, kernels: Tensor) -> Tensor:
        """|w_ij|, (targets, sources)."""
        return self.atoms(kernels).sum(2)

    def dual_norms(self, kernels: Tensor) -> Tensor:
        """|b_ij|*, (targets, sources)."""
        return self.atoms(kernels).amax(2)

    def shrink(self, kernels: Tensor, thresholds: Tensor, atoms: Tensor | None = None) -> Tensor:
        """Atoms x -> (1 - threshold / |x|)_+ x; thresholds broadcast against (targets, sources, atoms).

        atoms: `self.atoms(kernels)`, where they are at hand.
        """
        atoms = self.atoms(kernels) if atoms is None else atoms
        factors = torch.where(atoms > thresholds, 1 - thresholds / atoms, 0.0)
        return (kernels.flatten(2) * factors).reshape(kernels.shape)


def input_norms(kernels: Tensor, bias: Tensor | None) -> Tensor:
    """|(z_i, b_i)| of the first layer, (M_1,)."""
    flat = kernels.flatten(1) if bias is None else torch.cat([kernels.flatten(1), bias[:, None]], 1)
    return torch.linalg.vector_norm(flat, dim=1)


def lengths(vectors: Tensor) -> Tensor:
    """|v| of vectors of any size, (M, ...) -> (M,)."""
    flat = vectors.flatten(1)
    sizes = largest(flat)
    return sizes * torch.linalg.vector_norm(flat / sizes[:, None], dim=1)


def largest(rows: Tensor) -> Tensor:
    """Largest size along the last axis, 1 where all are zero: divided by it, squares neither vanish nor overflow."""
    sizes = rows.abs().amax(-1)
    return sizes.where(sizes > 0, 1.0)


def shrinkage_root(
    magnitudes: Tensor,
    slopes: Tensor | float,
    weights: Tensor | float,
    dims: tuple[int, ...],
    *,
    level: Tensor | float = 0.0,
    mass: Tensor | float = 0.0,
    curvature: float = 0.0,
    power: float = 2.0,
    start: Tensor | None = None,
) -> Tensor:
    """The root r >= 0 of  sum_dims weights (magnitudes - slopes r^(q-1))_+  =  level + r (mass + curvature r^q)_+.

    The left side falls in r and the right side does not, so the root is unique where one of them moves; 0 is returned
    where the left side is not above the right one at r = 0.  `magnitudes`, `slopes`, `weights` and `curvature` are
    non-negative, `level` and `mass` any numbers, q > 1 is `power`; tensors broadcast with keepdim over `dims`.  By
    sorting, in a fixed number of steps; on the host, where a look at what has settled costs nothing, from `start` (the
    root of a nearby problem) by a few steps of Newton's method instead.  Returns r with `dims` kept, size 1.
    """
    sides = _Sides(magnitudes, slopes, weights, dims, level, mass, curvature, _Exponents.of(power))
    exponent = min(1.0, power - 1)
    if start is None or magnitudes.is_cuda:
        return _raised(sides.root_by_sorting(), 1 / exponent)
    return _raised(sides.root_by_newton(_raised(start, exponent)), 1 / exponent)


class _Exponents(NamedTuple):
    """In y = r^min(1, q-1) both sides of the equation of `shrinkage_root` have exponents of at least 1,

        sum weights (magnitudes - slopes y^fall)_+  =  level + y^rise (mass + curvature y^bend)_+,

    so that the right minus the left side is convex between two points where terms vanish.  All but bend = 2 are 1 for
    q = 2.
    """

    fall: float
    rise: float
    bend: float

    @classmethod
    def of(cls, power: float) -> _Exponents:
        exponent = min(1.0, power - 1)
        return cls((power - 1) / exponent, 1 / exponent, power / exponent)


def _raised(base: Tensor, exponent: float) -> Tensor:
    return base if exponent == 1 else base.pow(exponent)


def _times(tensor: Tensor | float, factor: float, base: Tensor, exponent: float) -> Any:
    """tensor factor base^exponent, without the passes that would change nothing."""
    tensor = tensor if factor == 1 else factor * tensor
    return tensor if exponent == 0 else tensor * base.pow(exponent)


@dataclass(frozen=True, eq=False)
class _Sides:
    """Both sides of the equation of `shrinkage_root`, in y."""

    magnitudes: Tensor
    slopes: Tensor | float
    weights: Tensor | float
    dims: tuple[int, ...]
    level: Tensor | float
    mass: Tensor | float
    curvature: float
    exponents: _Exponents

    def inactive(self) -> Tensor:
        """Where the root is 0; `dims` kept."""
        return _weighted_sum(self.magnitudes, self.weights, 1.0, self.dims) <= self.level

    def excess(self, y: Tensor, fall: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Right side minus left side at y, its slope, and the sum of the sizes of its terms.

        fall: how fast the left side falls in y^fall, where it is known.
        """
        by, rise, power = self.exponents
        rest = (self.magnitudes - self.slopes * _raised(y, by)).clamp_min_(0)
        left = _weighted_sum(rest, self.weights, 1.0, self.dims)
        fall = _weighted_sum(rest.sign_(), self.weights, self.slopes, self.dims) if fall is None else fall
        bend = self.curvature * y.pow(power)
        grown = self.mass + bend
        steep = torch.where(grown > 0, (grown if rise == 1 else rise * grown) + power * bend, 0.0)
        slope = _times(fall, by, y, by - 1) + _times(steep, 1.0, y, rise - 1)
        size = left + y * (slope + _times(bend, 1.0, y, rise - 1) + _times(abs(self.mass), 1.0, y, rise - 1))
        return self.level + _raised(y, rise) * grown.clamp_min(0) - left, slope, size

    def root_by_newton(self, start: Tensor) -> Tensor:
        """Newton's method, kept inside a bracket."""
        inactive = self.inactive()
        eps, floor = torch.finfo(start.dtype).eps, torch.finfo(start.dtype).tiny / torch.finfo(start.dtype).eps
        low, high = torch.zeros_like(start), torch.full_like(start, torch.inf)
        y = torch.where(inactive, 0.0, start)
        for _ in range(ROOT_STEPS):
            value, slope, size = self.excess(y)
            # what rounding leaves; mass and bend may cancel
            settled = inactive | (value.abs() <= (8 * eps) * size + floor)
            if bool(settled.all()):
                break
            below = value < 0
            low, high = torch.where(below, y, low), torch.where(below, high, y)
            new = y - value / slope
            if (
                self.exponents.rise > 1
            ):  # from where high powers are flat a step leads far beyond, and comes back slowly
                new = new.minimum(2 * y + 1)
            # where the slope vanishes, 0 / 0 and 1 / 0 are no candidates
            inside = (new >= low) & (new <= high) & new.isfinite() | settled
            if not bool(inside.all()):
                new = torch.where(inside, new, torch.where(high.isinf(), 2 * y + 1, 0.5 * (low + high)))
            y = torch.where(settled, y, new)
        return y

    def root_by_sorting(self) -> Tensor:
        """Between two of the points at which terms vanish the left side is a monomial: the root is that of one cubic,
        or of one convex function of few terms.

        Sums of sorted terms tell between which two (Held, Wolfe & Crowder 1974 for projections on a simplex).  They are
        rounded more than plain sums are, so that a Newton step with these comes last, inside of the two.
        """
        magnitudes, slopes, weights = self._lines()
        level, mass = (self._line(each) for each in (self.level, self.mass))
        by, rise, power = self.exponents
        ratios, order = torch.where(slopes > 0, magnitudes / slopes, torch.inf).sort(-1, descending=True)
        ends = _raised(ratios, 1 / by)
        weights = weights.gather(-1, order)
        constants = (weights * magnitudes.gather(-1, order)).cumsum(-1)
        falls = (weights * slopes.gather(-1, order)).cumsum(-1)
        right = level + _raised(ends, rise) * (mass + self.curvature * ends.pow(power)).clamp_min(0)
        beyond = ends.isinf() | (right >= constants - falls * ratios)  # where the root is at the end or before
        terms = beyond.sum(-1, keepdim=True)  # that are there at the root
        pad = torch.nn.functional.pad
        constant, fall = (pad(sums, (1, 0)).gather(-1, terms) for sums in (constants, falls))
        low = pad(ends, (0, 1)).gather(-1, terms)
        high = pad(ends, (1, 0), value=torch.inf).gather(-1, terms)
        y = _rising_root(constant - level, fall, mass, self.curvature, self.exponents).maximum(low).minimum(high)
        y, low, high, fall = (self._unlined(each) for each in (y, low, high, fall))
        value, slope, _ = self.excess(y, fall)
        y = torch.where(slope > 0, y - value / slope, y).maximum(low).minimum(high)
        return torch.where(self.inactive(), 0.0, y)

    def _lines(self) -> list[Tensor]:
        """magnitudes, slopes and weights in one shape, `dims` as one last axis."""
        tensors = [self._full(each) for each in (self.magnitudes, self.slopes, self.weights)]
        return [self._line(each) for each in torch.broadcast_tensors(*tensors)]

    def _full(self, value: Tensor | float) -> Tensor:
        return value if isinstance(value, Tensor) else self.magnitudes.new_full((1,) * self.magnitudes.ndim, value)

    def _line(self, value: Tensor | float) -> Tensor:
        return self._full(value).movedim(self.dims, tuple(range(-len(self.dims), 0))).flatten(-len(self.dims))

    def _unlined(self, line: Tensor) -> Tensor:
        """(..., 1) with `dims` put back, of size 1."""
        kept = line.squeeze(-1)
        for dim in sorted(self.dims):
            kept = kept.unsqueeze(dim)
        return kept


def _rising_root(lack: Tensor, fall: Tensor, mass: Tensor, curvature: float, exponents: _Exponents) -> Tensor:
    """The root y > 0 of  fall y^fall + y^rise (mass + curvature y^bend)_+ = lack > 0;  0 where nothing rises."""
    if exponents != _Exponents.of(2):
        return _convex_root(lack, fall, mass, curvature, exponents)
    if curvature == 0:
        slope = fall + mass.clamp_min(0)
        return torch.where(slope > 0, lack / slope, 0.0)
    # r^3 + p r = q: from a start above the root by at most half of it six steps of Newton's method, which goes down
    # to the root of a convex function, reach rounding (the worst of 4e5 cubics after 4, 5, 6 steps: 2e-7, 3e-14, 7e-16)
    p, q = (fall + mass) / curvature, lack / curvature
    cubic, flat = q.clamp_min(0).pow(1 / 3), (-p).clamp_min(0).sqrt()
    r = torch.where(p > 0, torch.minimum(cubic, q / p), flat + torch.minimum(cubic, q / (2 * flat.square())))
    for _ in range(CUBIC_STEPS):
        r = (2 * r * r.square() + q) / (3 * r.square() + p)
    line = lack / fall
    return torch.where(mass + curvature * line.square() <= 0, line, r)


def _convex_root(lack: Tensor, fall: Tensor, mass: Tensor, curvature: float, exponents: _Exponents) -> Tensor:
    """`_rising_root` for any exponents of at least 1.

    The left side is convex, and each of its terms alone would reach `lack` at or above the root.  Newton's method
    starts to go down from the first of these points, where their sum is a few times too large at most, so that few
    steps reach rounding (the worst of 1e6 roots at powers from 1.05 to 10 after 6, 8 steps: 1e-6, 4e-15).
    """
    by, rise, bend = exponents
    lack = lack.clamp_min(0)
    line = torch.where(fall > 0, lack / fall, torch.inf).pow(1 / by)
    y = line.minimum(torch.where(mass > 0, lack / mass, torch.inf).pow(1 / rise))
    flat = torch.zeros_like(lack)
    if curvature > 0:  # nothing rises up to `flat`
        dip = (-mass / curvature).clamp_min(0)
        flat = dip.pow(1 / bend)
        # y^(rise + bend) = lack / curvature + dip y^rise, at most twice the larger of the two
        far = (2 * lack / curvature).pow(1 / (rise + bend)).maximum((2 * dip).pow(1 / bend))
        near = torch.where(flat > 0, dip + lack / (curvature * flat.pow(rise)), torch.inf).pow(1 / bend)
        y = y.minimum(far).minimum(near)
    y = torch.where(y.isinf(), 0.0, y)
    for _ in range(POWER_STEPS):  # from `flat` on, where rounding alone would end
        bent = curvature * y.pow(bend)
        grown = (mass + bent).clamp_min(0)
        value = fall * y.pow(by) + y.pow(rise) * grown - lack
        slope = _times(fall, by, y, by - 1) + _times(rise * grown + bend * bent, 1.0, y, rise - 1)
        y = torch.where(slope > 0, y - value / slope, y).maximum(flat)
    return torch.where(line <= flat, line, y)


def _weighted_sum(entries: Tensor, weights: Tensor | float, slopes: Tensor | float, dims: tuple[int, ...]) -> Tensor:
    """sum over dims of entries weights slopes; numbers are multiplied after the sum."""
    scale = 1.0
    for factor in (weights, slopes):
        if isinstance(factor, Tensor):
            entries = entries * factor
        else:
            scale *= factor
    total = entries.sum(dims, keepdim=True)
    return total if scale == 1 else scale * total


def row_prox(
    kernels: Tensor,
    masses: Tensor,
    penalty: Penalty,
    strength: float,
    kernel_weight: float,
    mass_weight: float,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Proximal map of strength sum_i (sum_j |W_ij|)^q / p_i^(q-1) + indicator(p >= 0), jointly in (W, p); q is the
    penalty's power.

    kernels (targets, sources, kh, kw), masses (sources,); the metric is kernel_weight/2 |W - .|^2 +
    mass_weight/2 |p - .|^2.  With r = (sum_j |W_ij|) / p_i the solution is a shrinkage of W by q strength r^(q-1) /
    kernel_weight and p = (masses + (q-1) strength r^q / mass_weight)_+, where r is one scalar root per row.  Returns W,
    p and the roots, a good `start` for the next call nearby.
    """
    if strength == 0:
        return kernels, masses.clamp_min(0), torch.zeros_like(masses)[None, :, None]
    q = penalty.power
    slope, curvature = q * strength / kernel_weight, (q - 1) * strength / mass_weight
    center = masses[None, :, None]
    atoms = penalty.atoms(kernels)
    r = shrinkage_root(atoms, slope, 1.0, (0, 2), mass=center, curvature=curvature, power=q, start=start)
    grown = (masses + curvature * r.flatten().pow(q)).clamp_min(0)
    # nothing flows out of no mass
    thresholds = torch.where(grown[None, :, None] > 0, slope * _raised(r, q - 1), torch.inf)
    return penalty.shrink(kernels, thresholds, atoms), grown, r


def cone_projection(
    kernels: Tensor, masses: Tensor, penalty: Penalty, bound: float, kernel_weight: float, mass_weight: float
) -> tuple[Tensor, Tensor]:
    """Projection on {sum_i |W_ij| <= bound p_j} in the metric of `row_prox`; kernels (targets, sources, ...), masses
    (targets,).
    """
    center = masses[:, None, None]
    slope = bound * kernel_weight / mass_weight
    atoms = penalty.atoms(kernels)
    theta = shrinkage_root(atoms, 1.0, 1.0, (1, 2), level=bound * center, mass=torch.full_like(center, bound * slope))
    return penalty.shrink(kernels, theta, atoms), (masses + slope * theta.flatten()).clamp_min(0)


def kernel_projection(
    kernels: Tensor, sources: Tensor, penalty: Penalty, bound: float, steps: Tensor | float = 1.0
) -> Tensor:
    """Projection of kernels w on {sum_i |w_ij| p_i <= bound for every j} at source masses p that are kept.

    kernels (targets, sources, kh, kw), sources (sources,), steps (targets, sources) or a number.  The distance is
    sum_i p_i |w_ij - .|^2 / (2 steps_ij), that of `inflow_projection`: w_ij shrinks by steps_ij theta_j, theta_j >= 0.
    """
    slopes = steps[:, :, None] if isinstance(steps, Tensor) else steps
    atoms = penalty.atoms(kernels)
    level = torch.full_like(atoms[:, :1, :1], bound)
    theta = shrinkage_root(atoms, slopes, sources[None, :, None], (1, 2), level=level)
    return penalty.shrink(kernels, slopes * theta, atoms)


def input_projection(
    kernels: Tensor, bias: Tensor | None, bound: float, bias_steps: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Projection of first-layer features on {|(z_i, b_i)| <= bound}, in the distance |dz_i|^2 + |db_i|^2 / bias_steps.

    kernels (M_1, C_0, kh, kw), bias (M_1,) or None.  The nearest point is z / (1 + mu), b / (1 + bias_steps mu) with
    mu >= 0 the root of |(z, b)| = bound, found by Newton's method on 1 / |(z, b)|: that is concave in mu (Conn, Gould &
    Toint 2000, section 7.3), so that the method approaches the root from below, and scaling ends inside.
    """
    if bias is not None and bias_steps != 1:
        size, mu = kernels.flatten(1).square().sum(1), torch.zeros_like(bias)
        outside = input_norms(kernels, bias) > bound
        for _ in range(BALL_STEPS):
            shares = size / (1 + mu).square(), bias.square() / (1 + bias_steps * mu).square()
            square = shares[0] + shares[1]
            fall = shares[0] / (1 + mu) + bias_steps * shares[1] / (1 + bias_steps * mu)
            mu = torch.where(outside, (mu + square * (square.sqrt() / bound - 1) / fall).clamp_min(0), mu)
        kernels, bias = kernels / (1 + mu)[:, None, None, None], bias / (1 + bias_steps * mu)
    factor = (bound / input_norms(kernels, bias).clamp_min(bound)).to(kernels.dtype)
    return kernels * factor[:, None, None, None], None if bias is None else bias * factor


def inflow_projection(
    kernels: Tensor,
    logits: Tensor,
    targets: Tensor,
    penalty: Penalty,
    bound: float,
    kernel_steps: Tensor | float,
    mass_steps: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projection on {sum_i |w_ij| p_i <= bound for every j, sum_i p_i = 1}, jointly in kernels w and source masses p.

    kernels (targets, sources, kh, kw); logits (sources,), logarithms of masses whose sum is free; targets (targets,),
    masses that are kept; kernel_steps (targets, sources) and mass_steps (sources,), or numbers.  The distance is that
    of the particle flow, every part over the step length that it was moved with:

        sum_i KL(p_i | exp(logits_i)) / mass_steps_i + sum_ij p_i targets_j |w_ij - .|^2 / (2 kernel_steps_ij)

    where KL(p | q) = p log(p / q) - p + q is dp^2 / (2 p) to second order.  Distance and bound are convex in (p, p w).
    The solution shrinks w_ij by kernel_steps_ij kappa_j and has

        p_i = exp(logits_i - mass_steps_i (nu + sum_j targets_j e_ij(kappa_j))),

    with e_ij the Moreau envelope of kappa_j |.| at w_ij and nu such that masses sum to one; kappa >= 0 maximises the
    concave dual, whose slope in kappa_j is targets_j (sum_i |w_ij| p_i - bound).  Returns w, p and kappa (targets,),
    the multipliers of sum_i |W_ij| <= bound p_j in the convex program.  The bound holds up to rounding.
    """
    by_kernel, by_source = (torch.as_tensor(steps).to(kernels) for steps in (kernel_steps, mass_steps))
    # how many steps it takes nobody knows beforehand: a device would wait for each
    atoms, *rest = on_host([penalty.atoms(kernels), logits, targets, by_kernel[..., None], by_source])
    kappa, masses = (each.to(kernels.device) for each in _InflowDual(bound, atoms, *rest).maximiser())
    return penalty.shrink(kernels, by_kernel[..., None] * kappa[:, None, None]), masses, kappa


class _Inflow(NamedTuple):
    """At one kappa: masses (sources,), atoms left (targets, sources, atoms), norms (targets, sources), slopes
    (targets,) of the dual over the target masses, sum_i |w_ij| p_i - bound.
    """

    masses: Tensor
    left: Tensor
    norms: Tensor
    slopes: Tensor


@dataclass(frozen=True, eq=False)
class _InflowDual:
    """The dual of `inflow_projection`, maximised by Newton steps on the multipliers that are free to move."""

    bound: float
    atoms: Tensor
    logits: Tensor
    targets: Tensor
    kernel_steps: Tensor
    mass_steps: Tensor

    def maximiser(self) -> tuple[Tensor, Tensor]:
        """kappa and the masses that belong to it; as far as it got where numbers are not finite."""
        kappa = torch.zeros_like(self.targets)
        now = self.at(kappa)
        for _ in range(ROOT_STEPS):
            free = (kappa > 0) | (now.slopes > 0)
            # rounding leaves this much of terms of this size
            rounding = 8 * torch.finfo(kappa.dtype).eps * (now.slopes + 2 * self.bound)
            if bool((~free | (now.slopes.abs() <= rounding)).all()):
                break
            step = self._newton(now, free)
            if not bool(step.isfinite().all()):
                break
            kappa, now = self._climb(kappa, now, step)
        return kappa, now.masses

    def at(self, kappa: Tensor) -> _Inflow:
        # an atom x shrinks by steps * pull; its envelope is kappa (x - steps pull) + steps pull^2 / 2
        tiny = torch.finfo(kappa.dtype).tiny
        pull = torch.minimum(kappa[:, None, None], self.atoms / self.kernel_steps.clamp_min(tiny))
        left = (self.atoms - self.kernel_steps * kappa[:, None, None]).clamp_min(0)
        envelopes = (kappa[:, None, None] * left + self.kernel_steps * pull.square() / 2).sum(2)
        masses = self._normalised(self.logits - self.mass_steps * (self.targets @ envelopes))
        norms = left.sum(2)
        return _Inflow(masses, left, norms, norms @ masses - self.bound)

    def _normalised(self, logits: Tensor) -> Tensor:
        """exp(logits - mass_steps nu) with sum one: Newton on the log of the sum, convex and decreasing in nu."""
        for _ in range(INNER_STEPS):
            excess = logits.logsumexp(0)
            masses = (logits - excess).exp()
            if not bool(excess.abs() > 8 * torch.finfo(logits.dtype).eps):  # also for NaN
                break
            logits = logits - self.mass_steps * (excess / (masses @ self.mass_steps.expand_as(masses)))
        return torch.softmax(logits, 0)

    def _newton(self, now: _Inflow, free: Tensor) -> Tensor:
        """Step of the free multipliers; slopes fall by the live atoms and by the covariance of norms over masses."""
        weights = now.masses[:, None] * self.kernel_steps
        fall = ((now.left > 0) * weights).sum((1, 2))
        # nothing left of the inflow: as steep as before anything had vanished
        fall = torch.where(fall > 0, fall, weights.expand_as(now.left).sum((1, 2)))
        shares = now.masses * self.mass_steps
        centred = now.norms - (now.norms @ shares / shares.sum())[:, None]
        matrix = (torch.diag(fall) + (centred * shares) @ now.norms.T * self.targets) * (free[:, None] & free)
        matrix = matrix + torch.diag((~free).to(matrix))
        return torch.linalg.solve_ex(matrix, torch.where(free, now.slopes, 0.0))[0]

    def _climb(self, kappa: Tensor, now: _Inflow, step: Tensor) -> tuple[Tensor, _Inflow]:
        """Along the step, cut at kappa >= 0, halved until the dual's slope along it has not turned by more than
        half.
        """
        moved, then = kappa, now
        for _ in range(INNER_STEPS):
            moved = (kappa + step).clamp_min(0)
            then = self.at(moved)
            before, after = ((moved - kappa) * self.targets @ point.slopes for point in (now, then))
            if bool(after >= -0.5 * before.abs()):
                break
            step = step / 2
        return moved, then
