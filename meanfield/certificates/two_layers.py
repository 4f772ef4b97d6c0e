"""A proven lower bound of J over all measures for two layers of tanh, erf or hard tanh.

Section 5 of docs/theory.md: every network has

    J >= -(1/N) sum_n loss*(N r_n) - mu - sup_g [ r*_u(|q(h(g))|) - gamma(g) ],

where gamma(g) is the least flow int c(z) |a(z)| with g = int a(z) * f_z, c(z) = 2 sqrt(lambda_s (mu + lambda_1 |z|^2)).
Here the sup is bounded from above.  Write q(h(g)) = sum_i w_i h(g_i) over images and positions.  An h that is odd, and
concave above zero, lies within alpha(theta, T) of the line theta x on [-T, T], so that a g of flow t has

    |q(h(g))| <= S(t) = min_theta  sum_i |w_i| alpha(theta, t B_i) + theta t G,
    B_i = max_z |(f_z)_i| / c(z),     G = max_z |Xi(z)| / c(z),     Xi(z) = sum_i w_i (f_z)_i,

(f_z)_i what a kernel of the second layer sees of f_z.  Rows of w that cancel do so in G; they cost only what h is away
from a line.  S rises with t, and no t above r*_u(sum_i |w_i|) counts.  `gain` bounds G.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from meanfield.architecture import Architecture
from meanfield.certificates import concave, gain
from meanfield.certificates.gain import Gain, Response
from meanfield.certificates.saturating import SATURATING, Saturating
from meanfield.losses import Loss
from meanfield.network import ParticleNetwork
from meanfield.outer import Outer
from meanfield.problem import Problem

SLOPES = 64  # lines theta that S(t) chooses from
GROUPS = 48  # of rows with nearly the same B_i: the largest counts for all
LEAST_RADIUS, RADIUS_STEP, RADII = 1e-3, 1.03, 500  # lengths of kernels between which B_i is bounded
FLOWS, LEAST_FLOW = 2000, 1e-6  # t at which S is tabulated, the first one above 0 relative to the last
ASCENTS, ASCENT_STEPS, RATE = 256, 100, 0.1
PRICES = (1e-3, 30.0, 16)  # of mu: the least and the largest, over lambda_s, and how many are tried


@dataclass(frozen=True, eq=False)
class TwoLayerBound:
    """No network has a J below `bound`, which is attained at the multipliers scale * r and mu.

    gain: of one kernel, at the unscaled r.
    """

    bound: float
    scale: float
    mu: float
    gain: Gain
    seconds: float


def unfit(problem: Problem) -> str:
    """Why this problem has no such bound; "" where it has one."""
    arch, penalty = problem.architecture, problem.penalty
    if arch.depth != 2:
        return f"it is for two layers, and there are {arch.depth}"
    if unknown := [layer.h.name for layer in arch.layers if layer.h.name not in SATURATING]:
        return f"it is for {', '.join(SATURATING)}, and there is {unknown[0]}"
    if any(layer.pooling == "max" for layer in arch.layers):
        return "it is not for max pooling"
    if arch.readout != "average":
        return "it is for the average readout"
    if arch.layers[1].bias:
        return "biases of the second layer cost nothing"
    if penalty.power != 2:
        return "it is for power 2"
    if min(penalty.source, penalty.readout, penalty.input) <= 0:
        return "it needs all three penalties"
    return ""


def prove(
    problem: Problem,
    output: Tensor,
    network: ParticleNetwork | None = None,
    *,
    seconds: float = 10.0,
    tolerance: float = 1e-2,
) -> TwoLayerBound:
    """The bound at the output multipliers r = `output` (N, K), with their scale and mu chosen for it, in float64.

    seconds: for G, whose branch and bound ends earlier within `tolerance` of it; the bound holds either way.  network:
    one whose kernels are tried first.  Raises ValueError where `unfit` says why there is no such bound.
    """
    began = time.perf_counter()
    if reason := unfit(problem):
        raise ValueError(f"no proven bound for two layers: {reason}")
    problem = problem.to(dtype=torch.float64)
    output = problem.loss.feasible(len(output) * output.to(problem.inputs), problem.targets) / len(output)
    features = Features.of(problem, output)
    response = Response(*features.first_layer, problem.penalty.source, problem.penalty.input, problem.penalty.source)
    tried = _ascended(response, network)
    least, most, count = PRICES
    prices = [problem.penalty.source * least * (most / least) ** (i / (count - 1)) for i in range(count)]
    hoped = [_best(problem, output, features, mu, float(at(response, mu).ratios(tried).max())) for mu in prices]
    mu = prices[max(range(count), key=lambda i: hoped[i][1])]
    found = gain.largest(at(response, mu), tried, time.perf_counter() + seconds, tolerance)
    scale, bound = _best(problem, output, features, mu, found.upper)
    return TwoLayerBound(bound, scale, mu, found, time.perf_counter() - began)


def at(response: Response, mu: float) -> Response:
    """The same kernels at another price."""
    return replace(response, mu=mu)


def _best(problem: Problem, output: Tensor, features: Features, mu: float, gain: float) -> tuple[float, float]:
    """The factor on r that gives the best bound, which is concave in it, and that bound."""
    count, limit = len(output), _largest_scale(problem.loss)
    table = features.table(mu, gain, limit)

    def value(scale: float) -> float:
        conjugate = float(problem.loss.conjugate(count * scale * output, problem.targets).mean())
        return -conjugate - mu - features.supremum(scale, table)

    return concave.maximum(value, limit)


def _largest_scale(loss: Loss) -> float:
    return 2.0 if loss.supercoercive else 1.0


@dataclass(frozen=True, eq=False)
class Features:
    """What S(t) needs of images and multipliers, at r itself.

    first_layer: h_1, its patches (n, d), a column of ones for the bias included, and the weights (n, K S) with which
    they add up to Xi.  sizes (N P_2,): |w_i| of the second layer's positions; lengths (N, 1, H, W): |x| of the first
    layer's patches where they are; strengths: lambda_s, lambda_1.
    """

    architecture: Architecture
    outer: Outer
    readout: float
    strengths: tuple[float, float]
    first_layer: tuple[Saturating, Tensor, Tensor]
    second: Saturating
    sizes: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, problem: Problem, output: Tensor) -> Features:
        arch, penalty = problem.architecture, problem.penalty
        below, above = arch.layers
        patches = below.patches(problem.inputs) / arch.input_shape[0]  # (N, P_1, d)
        if below.bias:
            patches = torch.cat([patches, torch.ones_like(patches[..., :1])], 2)
        lengths = patches.norm(dim=2).unflatten(1, (1, *arch.geometry[0].output))
        seen, read = _adjoints(arch)
        weights = torch.einsum("nk,sq->nqks", output, seen.to(output)).flatten(0, 1).flatten(1)
        first = (SATURATING[below.h.name], *_merged(patches.flatten(0, 1), weights))
        return cls(
            arch,
            penalty.outer,
            penalty.readout,
            (penalty.source, penalty.input),
            first,
            SATURATING[above.h.name],
            (output.norm(dim=1)[:, None] * read.to(output)).flatten(),
            lengths,
        )

    def table(self, mu: float, gain: float, limit: float) -> tuple[Tensor, Tensor]:
        """Flows t (FLOWS,), rising from 0 to where no more counts at multipliers up to limit * r, and S at each."""
        reaches, sizes = self._groups(mu)
        end = float(self.outer.conjugate(limit * self.sizes.sum(), self.readout))
        flows = torch.logspace(math.log10(LEAST_FLOW), 0, FLOWS - 1, dtype=sizes.dtype).to(sizes) * end
        flows = torch.cat([flows.new_zeros(1), flows])
        steps = torch.linspace(0, 1, SLOPES + 1, dtype=sizes.dtype).to(sizes)[1:]
        theta = self.second.slope * (1 - (1 - steps).square())
        apart = torch.cat([self._apart(theta, few, reaches) @ sizes for few in flows.split(64)])
        return flows, (apart + theta * flows[:, None] * gain).amin(1).clamp_max(float(self.sizes.sum()))

    def _apart(self, theta: Tensor, flows: Tensor, reaches: Tensor) -> Tensor:
        return self.second.apart(theta[:, None], flows[:, None, None] * reaches)

    def supremum(self, scale: float, table: tuple[Tensor, Tensor]) -> float:
        """No feature g has a larger r*_u(|q(h(g))|) - gamma(g), at the multipliers scale * r and what the table is of:
        between two flows the gain is no more than at the second, the cost no less than at the first.
        """
        flows, largest = table
        return max(0.0, float((self.outer.conjugate(scale * largest[1:], self.readout) - flows[:-1]).max()))

    def _groups(self, mu: float) -> tuple[Tensor, Tensor]:
        """B_i and |w_i| of at most GROUPS groups of positions with nearly the same B_i."""
        source, first = self.strengths
        price = lambda radius: 2 * math.sqrt(source * (mu + first * radius**2))  # noqa: E731
        radii = [0.0, *(LEAST_RADIUS * RADIUS_STEP**step for step in range(RADII)), math.inf]
        ratios = (self._seen(high) / price(low) for low, high in pairwise(radii))
        largest = reduce(torch.maximum, ratios)
        groups = [few for few in largest.argsort().tensor_split(GROUPS) if len(few)]
        return torch.stack([largest[few].max() for few in groups]), torch.stack(
            [self.sizes[few].sum() for few in groups]
        )

    def _seen(self, radius: float) -> Tensor:
        """No kernel of that length lets a kernel of the second layer see more than this, (N P_2,)."""
        below, above = self.architecture.layers
        values = torch.where(self.lengths > 0, (self.first_layer[0].slope * radius) * self.lengths, 0.0).clamp_max(1)
        return above.patches(below.pool(values)).norm(dim=2).flatten()


def _adjoints(arch: Architecture) -> tuple[Tensor, Tensor]:
    """What the average readout adds up of a linear second layer: weights (S, P_1) of the values h_1 of the first layer
    through a kernel of a single entry, and (P_2,) of the second layer's values.
    """
    below, above = arch.layers
    units = torch.eye(above.offsets, dtype=torch.float64).view(above.offsets, 1, *above.kernel)

    def through(values: Tensor) -> Tensor:
        return arch.readout_features(above.pool(above.convolve(below.pool(values), units))).flatten()

    def read(values: Tensor) -> Tensor:
        return arch.readout_features(above.pool(values)).flatten()

    zeros = [torch.zeros(1, 1, *size.output, dtype=torch.float64) for size in arch.geometry]
    seen, last = (torch.autograd.functional.jacobian(*pair) for pair in zip((through, read), zeros))
    return seen.flatten(1), last.flatten()


def _merged(patches: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Equal patches as one, without those that are zero."""
    alive = patches.any(1)
    rows, group = torch.unique(patches[alive], dim=0, return_inverse=True)
    return rows, weights.new_zeros(len(rows), weights.shape[1]).index_add(0, group, weights[alive])


def _ascended(response: Response, network: ParticleNetwork | None) -> Tensor:
    """Kernels of large ratios: random ones and those of the network, and where gradients take them."""
    dimension = response.patches.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(ASCENTS, dimension, generator=generator, dtype=torch.float64).to(response.patches)
    scales = torch.logspace(-1, 1.5, ASCENTS, dtype=torch.float64).to(drawn)[:, None]
    starts = [drawn / drawn.norm(dim=1, keepdim=True) * scales]
    if network is not None:
        own = network.kernels[0].flatten(1)
        own = own if network.biases[0] is None else torch.cat([own, network.biases[0][:, None]], 1)
        starts.append(own.to(drawn))
    kernels = torch.cat(starts)
    leaf = kernels.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=RATE)
    for _ in range(ASCENT_STEPS):
        optimiser.zero_grad()
        (-response.ratios(leaf).clamp_min(1e-300).log().sum()).backward()
        optimiser.step()
    return torch.cat([kernels, leaf.detach()])
