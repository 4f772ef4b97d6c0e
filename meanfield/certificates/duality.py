"""Judges any point of a convex program from outside its solver: dual value, duality gap, violation; in float64.

The dual of the program.  Let r* be the conjugate of lambda t^q, x^2 / (4 lambda) for q = 2 (`outer`).  Multipliers r_n
for the output and beta_j(n, q) for the realisation constraint A W_j = p_j g_j of feature j of layers >= 2 give, for ANY
values, the lower bound

    -(1/N) sum_n loss*(N r_n) - sum_l mu_l,
    mu_l = max_i (r*_s(t_i) - gamma_i)  for l < L,   mu_L = max_j (r*_u(|q_j|) - gamma_j),

with q_j the readout's response to r, b_j = A^T beta_j, t_i = max_j (|b_ij|* - kappa_j)_+, gamma_i = lambda_1 |z_i|^2 on
layer 1 and <beta_i, g_i> - B kappa_i - B |sum beta_i| on later ones.  mu is chosen here, kappa too unless a solver
gives it, as small as they can be: no solver grades itself.

beta is never formed.  Only b_j counts, which may be any vector of A's row space: with g_j = A w^_j it is
<beta_j, g_j> = <b_j, w^_j>, and sum beta_j, where the layer has a bias, is b_j's entry for the bias.  So multipliers
are given as any b_j, of which the part in the row space is taken: with y_j = V^T b_j it is V y_j, and <y_j, c_j> is
<beta_j, g_j>.  Every column of V is a combination of rows of A, whatever the tolerance of its rank: a direction that
was left out has a multiplier of zero, which can only lower the bound.

Rounding.  Nothing here is compared with a fixed number.  q_j, a sum over images, is known up to c e_j with
e_j = sum_n |r_n| |f_nj|.  To take it for less than it is, by up to that, raises the bound over a network with readouts
U by at most c sum_j e_j |U_j| = c sum_n |r_n| sum_j |f_nj| |U_j|: r_n times the rounding of the network's own output.
So without a readout penalty, where q_j must vanish, a q_j within that is zero and any other bounds nothing, however
small: readouts as large as 1 / q_j cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meanfield import limits
from meanfield.certificates import concave
from meanfield.convex.program import ConvexProgram
from meanfield.convex.repopulation import ProgramPoint, joined, parted
from meanfield.host import on_host
from meanfield.losses import Loss
from meanfield.network import ordinary, propagate
from meanfield.penalties import largest, lengths
from meanfield.precision import full_float32
from meanfield.problem import Problem
from meanfield.signatures import checked
from meanfield.validation import instance

# of r between the domain of the conjugate and what no feature sees; where the two meet, a few dozen do
PROJECTIONS = 50


@dataclass(frozen=True, eq=False)
class Multipliers:
    """output r (N, K); realisation[l-1] b (M_l, columns of A) for layers l = 1..L-1 counted from 0: kernels source by
    source as `repopulation.joined` has them, then the bias.  What of b lies outside the row space of A does not count.

    amplitude[l-1] kappa (M_l,) >= 0 of the amplitude bound, where a solver knows it; None has it searched for.
    """

    output: Tensor
    realisation: tuple[Tensor, ...]
    amplitude: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        instance(self.output, "output", Tensor)
        for name, tensors in (("realisation", self.realisation), ("amplitude", self.amplitude or ())):
            for index, tensor in enumerate(instance(tensors, name, Sequence)):
                instance(tensor, f"{name}[{index}]", Tensor)

    def map(self, function: Callable[[Tensor], Tensor]) -> Multipliers:
        """With `function` of every tensor, such as another dtype or device."""
        amplitude = None if self.amplitude is None else tuple(map(function, self.amplitude))
        return Multipliers(function(self.output), tuple(map(function, self.realisation)), amplitude)


@dataclass(frozen=True)
class Certificate:
    """What is proven of a point: value, a lower bound of the program on this support, their gap, the violation."""

    value: float
    dual_value: float
    gap: float
    violation: float

    @property
    def relative_gap(self) -> float:
        """gap / |value|."""
        return self.gap / max(abs(self.value), torch.finfo(torch.float64).tiny)


@checked
@torch.inference_mode(False)
def certify(program: ConvexProgram, point: ProgramPoint, *multipliers: Multipliers) -> Certificate:
    """Value, best dual value and gap of a point, in float64.

    Every given set of multipliers is tried, with those of a stationary network at the point
    (`stationary_multipliers`) when none is given; the best bound counts.  A gap near zero proves optimality on this
    support; a large one may also mean that the multipliers are poor.  The value is that of the point as it is: read
    it together with the violation.
    """
    for index, each in enumerate(multipliers):
        instance(each, f"multipliers[{index}]", Multipliers)
    program, point = program.to(dtype=torch.float64), point.map(Tensor.double)
    candidates = multipliers or (stationary_multipliers(program, point),)
    value = float(program.value(point))
    dual = max(dual_value(program, candidate) for candidate in candidates)
    return Certificate(value, dual, value - dual, program.violation(point))


@checked
@torch.inference_mode(False)
@full_float32()
def stationary_multipliers(program: ConvexProgram, point: ProgramPoint) -> Multipliers:
    """r = d loss / d F and b_j = -(1/p_j) d loss / d w^_j for the flows w^_j = W_j / p_j of the point's network.

    They are optimal where that network is stationary.  Features without mass get b_j = 0.
    """
    problem, arch, frozen = program.problem, program.problem.architecture, program.frozen
    point = point.map(ordinary)
    shapes = [flows.shape for flows in program.flows[1:]]
    masses = [p[:, None] for p in point.masses[1:]]
    leaves = []
    for flows, bias, W, B, p in zip(program.flows[1:], frozen.biases[1:], point.kernels, point.biases, masses):
        leaves.append(torch.where(p > 0, joined(W, B) / p, joined(flows, bias)).detach().requires_grad_())
    targets, responses = problem.own_targets, point.readout.new_empty(len(problem.inputs), arch.outputs)

    def piece(block: slice) -> Tensor:
        with torch.enable_grad():
            parts = [parted(leaf, shape) for leaf, shape in zip(leaves, shapes)]
            flows, biases = zip((program.flows[0], frozen.biases[0]), *parts)
            _, features = propagate(arch, flows, biases, problem.inputs[block])
            output = arch.readout_features(features[-1]).flatten(1) @ point.readout.flatten(1).T
        responses[block] = problem.loss.gradient(output.detach(), targets[block]) / problem.count
        slopes = torch.autograd.grad(output, leaves, responses[block]) if leaves else ()
        return torch.cat([responses.new_empty(0), *(slope.flatten() for slope in slopes)])

    sizes = [leaf.numel() for leaf in leaves]
    slopes = problem.total(program.bytes_each, responses.new_zeros(sum(sizes)), piece).split(sizes)
    realisation = [
        torch.where(p > 0, -slope.view(leaf.shape) / p, 0.0) for slope, leaf, p in zip(slopes, leaves, masses)
    ]
    return Multipliers(problem.gathered(responses), tuple(realisation))


@checked
def dual_value(program: ConvexProgram, multipliers: Multipliers) -> float:
    """The best lower bound of the program that these multipliers give, after repair to feasibility; float64.

    Repair: r is moved into the domain of the conjugate, beta is centred where a bias is free, and both are scaled by
    the common factor that serves the bound best (not so where kappa has to be searched for on two or more layers).
    """
    program.problem.penalty.require_certifiable("a dual value")
    program = program.to(dtype=torch.float64)
    dual = _PricedFeatures.of(program, multipliers.map(lambda t: t.to(program.readout_features)))
    # kappa takes a search over several layers: one around that would cost too much
    if dual.bounded and dual.amplitude is None and program.depth > 2:
        return max(dual.value(0.0), dual.value(1.0))
    return max(dual.value(1.0), concave.maximum(dual.value, 2.0)[1])


@dataclass(frozen=True, eq=False)
class _PricedFeatures:
    """What the dual value needs of multipliers, layer by layer, before the choice of mu and kappa.

    norms[l-1] |b_ij|* (M_l, M_{l-1}); pairings[l-1] <y_j, c_j> - B |bias entry of b_j| (M_l,); readout |q_j| (M_L,);
    costs lambda_1 |z_i|^2 (M_1,); amplitude kappa.  All but r, which knows the images, are held on the host: the
    searches read one number after the other.
    """

    program: ConvexProgram
    output: Tensor
    norms: list[Tensor]
    pairings: list[Tensor]
    readout: Tensor
    costs: Tensor
    amplitude: Sequence[Tensor] | None

    @classmethod
    def of(cls, program: ConvexProgram, multipliers: Multipliers) -> _PricedFeatures:
        output, readout = _repaired_output(program, multipliers.output)
        norms, pairings = [], []
        for layer, pulls in enumerate(multipliers.realisation, start=1):
            norm, pairing = _price_layer(program, layer, pulls)
            norms.append(norm)
            pairings.append(pairing)
        # without a source penalty kappa_j = max_i |b_ij|* is the only choice, and the search finds it
        amplitude = multipliers.amplitude if program.problem.penalty.source > 0 else None
        readout, costs, *rest = on_host([readout, program.feature_costs, *norms, *pairings, *(amplitude or ())])
        count = len(norms)
        amplitude = None if amplitude is None else rest[2 * count :]
        return cls(program, output, rest[:count], rest[count : 2 * count], readout, costs, amplitude)

    @property
    def bounded(self) -> bool:
        """Whether the amplitude bound is on and has a layer to act on."""
        return self.program.depth > 1 and self.program.problem.penalty.amplitude_bound is not None

    def value(self, scale: float) -> float:
        """Dual value of the multipliers times `scale` >= 0; -inf where it overflows, which bounds nothing."""
        limits.look()
        problem = self.program.problem
        conjugate = float(mean_conjugate(problem, scale * self.output))
        if conjugate == torch.inf:
            return -torch.inf
        if self.bounded and self.amplitude is not None:
            masses = self._masses_given(scale, self.amplitude)
        elif self.bounded:
            masses = _least_total(lambda offsets: self._masses_bounded(scale, offsets), self.program.depth - 1)
        else:
            masses = self._masses(scale)
        value = -conjugate - masses
        return value if math.isfinite(value) else -torch.inf

    def _masses(self, scale: float) -> float:
        """sum_l mu_l without an amplitude bound."""
        penalty, gamma, total = self.program.problem.penalty, self.costs, 0.0
        conjugate = penalty.outer.conjugate
        for norm, pairing in zip(self.norms, self.pairings):
            load = scale * norm.amax(0)
            total += float((conjugate(load, penalty.source) - gamma).max())
            gamma = scale * pairing
        return total + float((conjugate(scale * self.readout, penalty.readout) - gamma).max())

    def _masses_given(self, scale: float, amplitude: Sequence[Tensor]) -> float:
        """sum_l mu_l with the given kappa, lowered to what each mu_l then needs."""
        penalty, gamma, total = self.program.problem.penalty, self.costs, 0.0
        conjugate = penalty.outer.conjugate
        for norm, pairing, kappa in zip(self.norms, self.pairings, amplitude):
            load = (scale * (norm - kappa.clamp_min(0)[:, None])).clamp_min(0).amax(0)
            mu = float((conjugate(load, penalty.source) - gamma).max())
            total += mu
            gamma = scale * pairing - (penalty.amplitude_bound or 0.0) * self._least_kappa(scale * norm, mu, gamma)
        return total + float((conjugate(scale * self.readout, penalty.readout) - gamma).max())

    def _least_kappa(self, norms: Tensor, mu: float, gamma: Tensor) -> Tensor:
        """kappa_j = max_i (|b_ij|* - the price of mu + gamma_i)_+."""
        penalty = self.program.problem.penalty
        thresholds = penalty.outer.price((mu + gamma).clamp_min(0), penalty.source)
        return (norms - thresholds).clamp_min(0).amax(1)

    def _masses_bounded(self, scale: float, offsets: list[float]) -> float:
        """sum_l mu_l when mu_l exceeds its least value max(-gamma) by a share `offsets[l]` of what kappa = 0 needs."""
        penalty, gamma, total = self.program.problem.penalty, self.costs, 0.0
        conjugate = penalty.outer.conjugate
        bound = penalty.amplitude_bound or 0.0
        for norm, pairing, offset in zip(self.norms, self.pairings, offsets):
            least = float((-gamma).max())
            need = float((conjugate(scale * norm.amax(0), penalty.source) - gamma).max()) if penalty.source else least
            mu = least + offset * (need - least)
            gamma, total = scale * pairing - bound * self._least_kappa(scale * norm, mu, gamma), total + mu
        return total + float((conjugate(scale * self.readout, penalty.readout) - gamma).max())


def _price_layer(program: ConvexProgram, layer: int, pulls: Tensor) -> tuple[Tensor, Tensor]:
    limits.look()
    penalty, right = program.problem.penalty, program.bases[layer - 1]
    bias, bound = program.frozen.biases[layer] is not None, penalty.amplitude_bound
    y = pulls @ right
    if penalty.source == 0 and bound is None:
        y = torch.zeros_like(y)  # b_ij must vanish: the trivial choice
    if bias and bound is None:
        y = _orthogonal(y, right[-1])
    loads, sums = parted(y @ right.T, program.flows[layer].shape)
    sizes = largest(loads.flatten(2))
    norms = penalty.dual_norms(loads / sizes[..., None, None]) * sizes
    pairing = (y * program.coordinates[layer - 1]).sum(1)
    return norms, pairing if sums is None or bound is None else pairing - bound * sums.abs()


def _orthogonal(rows: Tensor, direction: Tensor) -> Tensor:
    """The rows without their parts along a direction."""
    unit = direction / torch.linalg.vector_norm(direction).clamp_min(torch.finfo(direction.dtype).tiny)
    return rows - (rows @ unit)[:, None] * unit


def _repaired_output(program: ConvexProgram, output: Tensor) -> tuple[Tensor, Tensor]:
    """r in the domain of the conjugate and |q_j| (M_L,); without a readout penalty q = 0, if need be by r = 0."""
    problem, features = program.problem, program.readout_features
    if problem.penalty.readout > 0:
        output = feasible(problem, output)
        return output, lengths(torch.einsum("nk,nj...->j...k", output, features))
    basis = _column_space(features.flatten(1))
    for _ in range(PROJECTIONS):
        unseen = output - basis @ (basis.T @ output)
        unseen = unseen - basis @ (basis.T @ unseen)  # once more: what rounding left of the first
        # entries that are rounding of others are zero: no sum that they are in vanishes up to its own rounding
        unseen = unseen.where(unseen.abs() > _rounding(features) * unseen.abs().amax(0), 0.0)
        allowed = feasible(problem, unseen)
        q = torch.einsum("nk,nj...->j...k", allowed, features)
        size = torch.einsum("nk,nj...->j...k", allowed.abs(), features.abs())
        q = q.where(q.abs() > _rounding(features) * size, 0.0)
        if not bool(q.any()):
            return allowed, lengths(q)
        output = 2 * allowed - unseen  # reflected: where the two sets meet in more than a corner, this ends
    return torch.zeros_like(output), output.new_zeros(features.shape[1])


def _rounding(features: Tensor) -> float:
    """Of a sum over the rows or the columns of the readout's features (N, columns), relative to that of its sizes."""
    return (features.shape[0] + features.flatten(1).shape[1]) * torch.finfo(features.dtype).eps


def _column_space(rows: Tensor) -> Tensor:
    """Orthonormal basis (N, rank) of the space of the columns, each first divided by its size: small ones count too."""
    left, values, _ = torch.linalg.svd(rows / largest(rows.T), full_matrices=False)
    return left[:, values > max(rows.shape) * torch.finfo(rows.dtype).eps * values.amax()]


def _least_total(total: Callable[[list[float]], float], count: int) -> float:
    """Least total over offsets in [0, 1]^count, one coordinate after the other (exact for one)."""
    offsets, best = [1.0] * count, total([1.0] * count)
    for _ in range(1 if count == 1 else 3):
        for index in range(count):

            def along(x: float, index: int = index) -> float:
                return -total([*offsets[:index], x, *offsets[index + 1 :]])

            offsets[index], found = concave.maximum(along, 1.0)
            best = min(best, -found)
    return best


def feasible(problem: Problem, output: Tensor) -> Tensor:
    """Output multipliers r (N, K), moved to where N r is in the domain of the loss conjugate."""
    return problem.loss.feasible(problem.count * output, problem.targets) / problem.count


def mean_conjugate(problem: Problem, output: Tensor) -> Tensor:
    """(1/N) sum_n loss*(N r_n) at r = `output` (N, K)."""
    return problem.loss.conjugate(problem.count * output, problem.targets).mean()


def largest_scale(loss: Loss) -> float:
    """Up to which factor r is scaled: up to 1 it stays in the domain of any conjugate, which is convex and holds 0.

    Where the domain has no end, 2 leaves room enough above an r that is nearly optimal.
    """
    return 2.0 if loss.supercoercive else 1.0


def price_of(problem: Problem) -> float:
    """What a unit kernel of unit readout costs in one homogeneous layer, at the best masses and scales."""
    return 2 * math.sqrt(problem.penalty.input * problem.penalty.readout)


def scale_limit(problem: Problem, largest: float) -> float:
    """The scale of r up to which no unit kernel gains more than it costs, where none has |q| above `largest`."""
    return price_of(problem) / largest if largest > 0 else math.inf
