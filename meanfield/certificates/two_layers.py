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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from meanfield import limits
from meanfield.architecture import Architecture
from meanfield.certificates import concave, gain, vectors
from meanfield.certificates.duality import feasible, largest_scale, mean_conjugate
from meanfield.certificates.gain import Gain, Response
from meanfield.certificates.proof import FIRST, Proof
from meanfield.certificates.saturating import SATURATING, Saturating
from meanfield.certificates.sphere.response import unit
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem

FLOWS, SLOPES, GROUPS = 1500, 96, 64  # t at which S is tabulated, lines theta to choose from, groups of rows by B_i
COARSE = (250, 32, 24)  # of them, while mu and r are chosen
LEAST_FLOW = 1e-4  # the first t above 0, relative to the last
LEAST_RADIUS, RADIUS_STEP, RADII = 1e-3, 1.03, 500  # lengths of kernels between which B_i is bounded
ASCENTS, ASCENT_STEPS, RATE = 256, 100, 0.1
STEPS, ROUNDS = 300, 3  # of the choice of r; mu is chosen anew before every round
STEP, DECAY = 0.05, 0.02  # the first step, relative to |r|, and what is left of it at the end
PRICES = tuple(1e-3 * 2.0**step for step in range(16))  # mu that are tried first, over lambda_s
GAIN_SHARE = 0.25  # of the time is for G at least
NEAR = tuple(2 ** (step / 2) for step in range(-3, 4))  # and then, over the best so far


@dataclass(frozen=True, eq=False)
class TwoLayerBound:
    """No network has a J below `bound`, which is attained at the multipliers `output` (N, K) and mu.

    gain: of one kernel, before the last scaling of the multipliers.
    """

    bound: float
    output: Tensor
    mu: float
    gain: Gain
    seconds: float


def unfit(problem: Problem) -> str:
    """Why this problem has no such bound; "" where it has one."""
    arch, penalty = problem.architecture, problem.penalty
    known = [layer.h.name in SATURATING for layer in arch.layers]
    reasons = {
        f"there is a method for two layers, and there are {arch.depth}": arch.depth != 2,
        f"two layers have a method for {', '.join(SATURATING)} only": not all(known),
        "there is no method for maximum pooling": any(layer.pooling == "max" for layer in arch.layers),
        "there is a method for the average readout only": arch.readout != "average",
        "biases of later layers cost nothing": any(layer.bias for layer in arch.layers[1:]),
        "there is a method for power 2 only": penalty.power != 2,
        "without penalties on source, readout and input features cost nothing": 0
        in (penalty.source, penalty.readout, penalty.input),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def prove(
    problem: Problem,
    output: Tensor,
    network: ParticleNetwork | None = None,
    *,
    seconds: float = 10.0,
    tolerance: float = 1e-2,
    steps: int = STEPS,
    mu: float | None = None,
) -> TwoLayerBound:
    """The bound at multipliers chosen for it in `steps` steps a round from r = `output` (N, K), in float64.

    seconds: for all of it, and GAIN_SHARE of them at least for G, whose branch and bound ends earlier within
    `tolerance` of it; the bound holds either way.  network: one whose kernels are tried first.  mu: where the choice of
    mu begins, if it is known.  Raises ValueError where `unfit` says why there is no such bound.
    """
    began = time.perf_counter()
    if reason := unfit(problem):
        raise ValueError(f"no proven bound for two layers: {reason}")
    problem = problem.to(dtype=torch.float64)
    features = Features.of(problem)
    output = feasible(problem, output.to(problem.inputs))
    if mu is None:
        output, mu = _priced(features, output, network, [features.problem.penalty.source * each for each in PRICES])
    for _ in range(ROUNDS if steps else 0):  # each with the kernels that matter now
        output, mu = _priced(features, output, network, [mu * each for each in NEAR])
        output = _chosen(features.dual(mu, output, COARSE), output, features.kernels(output, mu, network), steps)
    tried = features.kernels(output, mu, network)
    deadline = max(began + seconds, time.perf_counter() + GAIN_SHARE * seconds)
    found = gain.largest(features.response(output, mu), tried, deadline, tolerance)
    scale, bound = features.dual(mu, output).best_scale(output, found.upper)
    return TwoLayerBound(bound, scale * output, mu, found, time.perf_counter() - began)


def _priced(
    features: Features, output: Tensor, network: ParticleNetwork | None, prices: Sequence[float]
) -> tuple[Tensor, float]:
    """The factor on r and the mu, among these, that promise most."""
    best = (-math.inf, output, prices[0])
    kernels = features.kernels(output, prices[len(prices) // 2], network)
    for mu in prices:
        reached = float(features.response(output, mu).ratios(kernels).max())
        scale, bound = features.dual(mu, output, COARSE).best_scale(output, reached)
        best = max(best, (bound, scale * output, mu), key=lambda each: each[0])
    return best[1:]


def _chosen(dual: Dual, output: Tensor, kernels: Tensor, steps: int) -> Tensor:
    """Multipliers near `output` with a larger bound, G taken for the largest ratio of these kernels."""
    read = dual.features.read_of(kernels, dual.mu)  # (b, N, S)
    leaf = output.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=STEP * float(output.abs().mean()))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, DECAY ** (1 / steps))
    best = (-math.inf, output)
    for _ in range(steps):
        limits.look()
        reached = torch.einsum("bns,nk->bks", read, leaf).flatten(1).norm(dim=1).max()
        bound = dual.value(leaf, reached)
        best = max(best, (float(bound.detach()), leaf.detach().clone()), key=lambda each: each[0])
        optimiser.zero_grad()
        (-bound).backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            leaf.copy_(feasible(dual.features.problem, leaf))
    return best[1]


@dataclass(frozen=True, eq=False)
class Features:
    """What the two layers make of the images.

    patches (N, P_1, d) of the first layer, a column of ones for its bias included.  seen (S, P_1): what the average
    readout adds up of the first layer's values through a kernel of the second with a single entry; read (P_2,): of the
    second layer's values.
    """

    problem: Problem
    patches: Tensor
    seen: Tensor
    read: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Features:
        patches = vectors.patches(problem)
        read = vectors.position_weights(problem.architecture)
        return cls(problem, patches, _seen(problem.architecture).to(patches), read.to(patches))

    @property
    def _first(self) -> Saturating:
        return SATURATING[self.problem.architecture.layers[0].h.name]

    def response(self, output: Tensor, mu: float) -> Response:
        """Xi at these multipliers; equal patches are one, and those that are zero none."""
        weights = torch.einsum("nk,sq->nqks", output, self.seen).flatten(0, 1).flatten(1)
        patches = self.patches.flatten(0, 1)
        alive = patches.any(1)
        rows, group = torch.unique(patches[alive], dim=0, return_inverse=True)
        merged = weights.new_zeros(len(rows), weights.shape[1]).index_add(0, group, weights[alive])
        return Response(self._first, rows, merged, self.problem.penalty, mu)

    def read_of(self, kernels: Tensor, mu: float) -> Tensor:
        """What every image adds to Xi / c of kernels (b, d), at multipliers one: (b, N, S)."""
        values = self._first.function(torch.einsum("bd,nqd->bnq", kernels, self.patches))
        return (values @ self.seen.T) / self.price(mu, kernels.norm(dim=1))[:, None, None]

    def price(self, mu: float, lengths: Tensor) -> Tensor:
        """c of kernels of these lengths."""
        return gain.price(self.problem.penalty, mu, lengths)

    def reaches(self, mu: float) -> Tensor:
        """B_i, (N, P_2), between lengths of kernels in steps of RADIUS_STEP."""
        below, above = self.problem.architecture.layers
        lengths = self.patches.norm(dim=2).unflatten(1, (1, *self.problem.architecture.geometry[0].output))

        def seen(radius: float) -> Tensor:
            values = torch.where(lengths > 0, self._first.function(radius * lengths), 0.0)
            return above.patches(below.pool(values)).norm(dim=2)

        radii = [0.0, *(LEAST_RADIUS * RADIUS_STEP**step for step in range(RADII)), math.inf]
        return reduce(torch.maximum, (seen(b) / self.price(mu, lengths.new_tensor(a)) for a, b in pairwise(radii)))

    def dual(self, mu: float, output: Tensor, sizes: tuple[int, int, int] = (FLOWS, SLOPES, GROUPS)) -> Dual:
        """The bound at mu, for multipliers about as large as `output`, in tables of these sizes."""
        return Dual.of(self, mu, output, sizes)

    def kernels(self, output: Tensor, mu: float, network: ParticleNetwork | None) -> Tensor:
        """Kernels of large ratios, (b, d): random ones and those of the network, and where gradients take them."""
        response = self.response(output, mu)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(ASCENTS, self.patches.shape[2], generator=generator, dtype=torch.float64)
        drawn = (unit(drawn) * torch.logspace(-1, 1.5, ASCENTS, dtype=torch.float64)[:, None]).to(self.patches)
        if network is not None:
            drawn = torch.cat([drawn, vectors.kernels(network).to(drawn)])
        leaf = drawn.clone().requires_grad_()
        optimiser = torch.optim.Adam([leaf], lr=RATE)
        for _ in range(ASCENT_STEPS):
            limits.look()
            optimiser.zero_grad()
            (-response.ratios(leaf).clamp_min(torch.finfo(leaf.dtype).tiny).log().sum()).backward()
            optimiser.step()
        return torch.cat([drawn, leaf.detach()])


@dataclass(frozen=True, eq=False)
class Dual:
    """The bound as a function of r and G, at one mu.

    flows (T,): t, rising from 0; slopes (s,): theta; apart (T, s, groups): alpha(theta, t B_i) of groups of
    positions with nearly the same B_i, the largest of which counts; spread (groups, N): what |r_n| adds to their |w_i|.
    """

    features: Features
    mu: float
    flows: Tensor
    slopes: Tensor
    apart: Tensor
    spread: Tensor

    @classmethod
    def of(cls, features: Features, mu: float, output: Tensor, sizes: tuple[int, int, int]) -> Dual:
        h = SATURATING[features.problem.architecture.layers[1].h.name]
        reaches, count = features.reaches(mu), len(features.patches)
        groups = [few for few in reaches.flatten().argsort().tensor_split(sizes[2]) if len(few)]
        largest = torch.stack([reaches.flatten()[few].max() for few in groups])
        spread = reaches.new_zeros(len(groups), count)
        for row, few in zip(spread, groups):
            row.index_add_(0, few // len(features.read), features.read[few % len(features.read)])
        most = largest_scale(features.problem.loss) * output.norm(dim=1).sum() * features.read.sum()
        end = float(features.problem.penalty.outer.conjugate(most, features.problem.penalty.readout))
        flows = torch.logspace(math.log10(LEAST_FLOW), 0, sizes[0] - 1, dtype=reaches.dtype).to(reaches) * end
        flows = torch.cat([flows.new_zeros(1), flows])
        slopes = h.slope * torch.linspace(0, 1, sizes[1] + 1, dtype=reaches.dtype).to(reaches)[1:]
        apart = torch.cat([h.apart(slopes[:, None], few[:, None, None] * largest) for few in flows.split(64)])
        return cls(features, mu, flows, slopes, apart, spread)

    def largest_q(self, output: Tensor, gain: Tensor | float) -> Tensor:
        """S at every flow, (T,)."""
        sizes = self.spread @ output.norm(dim=1)
        lines = self.apart @ sizes + self.slopes * self.flows[:, None] * gain
        return torch.minimum(lines.amin(1), sizes.sum())

    def supremum(self, largest: Tensor, most: Tensor | float) -> Tensor:
        """No feature has a larger r*_u(|q(h(g))|) - gamma(g): between two flows it gains no more than at the second and
        costs no less than at the first; beyond the last one it gains no more than at `most` = sum_i |w_i|.
        """
        penalty = self.features.problem.penalty
        gains = penalty.outer.conjugate(torch.cat([largest[1:], largest.new_ones(1) * most]), penalty.readout)
        return (gains - self.flows).max().clamp_min(0)

    def value(self, output: Tensor, gain: Tensor | float) -> Tensor:
        """The bound at multipliers r = `output`, whose G is `gain`."""
        return self._bound(output, self.largest_q(output, gain))

    def best_scale(self, output: Tensor, gain: float) -> tuple[float, float]:
        """The factor on r that gives the best bound, which is concave in it, and that bound."""
        largest, limit = self.largest_q(output, gain), largest_scale(self.features.problem.loss)
        return concave.maximum(lambda scale: float(self._bound(scale * output, scale * largest)), limit)

    def _bound(self, output: Tensor, largest: Tensor) -> Tensor:
        most = (self.spread @ output.norm(dim=1)).sum()
        return -mean_conjugate(self.features.problem, output) - self.mu - self.supremum(largest, most)


def _seen(arch: Architecture) -> Tensor:
    """`seen` of `Features`."""
    below, above = arch.layers
    units = torch.eye(above.offsets, dtype=torch.float64).view(above.offsets, 1, *above.kernel)

    def through(values: Tensor) -> Tensor:
        return arch.readout_features(above.pool(above.convolve(below.pool(values), units))).flatten()

    zeros = torch.zeros(1, 1, *arch.geometry[0].output, dtype=torch.float64)
    return torch.autograd.functional.jacobian(through, zeros).flatten(1)


class TwoLayerProof(Proof):
    """Two saturating layers: a quick bound at r, then one at multipliers chosen for it; later ones at the best r."""

    def run(self, output: Tensor) -> None:
        mu = None
        if not self.best.curve:
            first = self._bounded(output, FIRST * self.seconds, 0)
            output, mu = first.output, first.mu
        if self.elapsed() >= self.seconds:
            return
        chosen = len(self.best.curve) > 1
        output = self.best.output if chosen and self.best.output is not None else output
        self._bounded(output, self.seconds - self.elapsed(), 0 if chosen else STEPS, mu)

    def _bounded(self, output: Tensor, seconds: float, steps: int, mu: float | None = None) -> TwoLayerBound:
        found = prove(self.problem, output, self.network, seconds=seconds, steps=steps, mu=mu)
        low, high = found.gain.lower, found.gain.upper
        kind = f"two layers, the gain of a kernel between {low:.6g} and {high:.6g}"
        self.keep(found.bound, kind, found.output)
        return found
