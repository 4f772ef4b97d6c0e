"""Lower bounds of J over all measures, and the search for features that no support holds yet.

For any output multipliers r in the domain of the loss conjugate and any mu_l >= 0, every network has

    J >= -(1/N) sum_n loss*(N r_n) - sum_{l<L} mu_l - sup_g [ r*_u(|q(h(g))|) - gamma_L(g) ],

    gamma_1(z) = lambda_1 |(z, b)|^2,   r*_s(c_l) = mu_l + gamma_l,
    gamma_{l+1}(g) = inf { int c_l |a| : g = int a * f },

because lambda_s s^q + gamma + mu >= c s at every feature, layer by layer; r* is the conjugate of lambda t^q, for q = 2
x^2 / (4 lambda), so that c = 2 sqrt(lambda_s (mu + gamma)).  The sup runs over compositional features: a
small network of its own, kernels of all layers jointly.  A search from K starts finds it from below, so its bound may
be too high: it is called the best of K starts and proves nothing; `unseen` estimates what more starts would do.  For
one ReLU layer the sup is a maximum over the unit sphere, which `sphere` bounds from above: that bound is rigorous.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from meanfield import limits, validation
from meanfield.activations import ACTIVATIONS, Activation
from meanfield.architecture import Architecture
from meanfield.certificates import concave, proving, unseen, vectors
from meanfield.certificates.compositions import (
    Compositions,
    OwnFeatures,
    joined,
    own_features,
    with_tensors,
    zeros_like,
)
from meanfield.certificates.duality import feasible, largest_scale, mean_conjugate, price_of, scale_limit
from meanfield.certificates.sphere.response import unit
from meanfield.network import ParticleNetwork, along_axis
from meanfield.problem import Problem
from meanfield.signatures import Count, Nonnegative, Number, Seed, checked
from meanfield.starts import normal
from meanfield.storage import states

HIDDEN = 16  # sources of a searched feature, per layer
MOST_HIDDEN = 64  # sources that a feature of the given network starts a search with, the heaviest ones
UNIT_RATE, KERNEL_RATE, FLOW_RATE = 0.05, 0.2, 0.02  # of Adam: unit kernels, first-layer kernels, flows between layers
STEPS = {True: 60, False: 300}  # for one layer, for more
ROUNDS, LEAST_ROUNDS = 4, 3
RADII = (-2.0, 1.0)  # logarithms of the factors on the network's own |z|: sources of one feature differ that much
AGREEMENT = 1e-4  # relative to the bound: the search finds no more than the pool knew, a start has reached the best
SAME_FEATURE = 0.99  # cosine of two features on the training inputs


@dataclass(frozen=True, eq=False)
class UnseenFeatures:
    """What a search found: a bound over all measures, how far it can be trusted, and features worth adding.

    bound: best of `starts` starts; -inf, with a reason, where the theory gives none.  rigorous_bound: proven, by
    `rigorous_kind`; None where no method applies or no time was given for it.  scale, mu: multipliers r times scale,
    and mu_1..mu_{L-1}, at which the bound is attained.  features: the best features as the last layer of a network of
    their own (None if there is none), scores (F,) their r*_u(|q|) - gamma_L at the unscaled r.

    fresh: starts that were drawn, and did not begin at features known before; reached: how many of them led to the best
    feature known, to AGREEMENT of the bound.  unseen_chance: at most how probably as many fresh starts again lower the
    bound by more than AGREEMENT of it (1 says nothing); unseen_lowering: what they lower it by at most, but for a
    chance of `unseen.LEVEL`.  Both are estimates (docs/theory.md, section 5).
    refuted: what the search gave as its bound where that lies above an attained J, which `bound` is then; else None.
    """

    bound: float
    starts: int
    reason: str = ""
    rigorous_bound: float | None = None
    rigorous_kind: str = ""
    scale: float = 1.0
    mu: tuple[float, ...] = ()
    features: ParticleNetwork | None = None
    scores: Tensor | None = None
    fresh: int = 0
    reached: int = 0
    unseen_chance: float = 1.0
    unseen_lowering: float = math.inf
    refuted: float | None = None
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        """For a `StateFile`."""
        features = self.features
        entries = features and {**states.entries(features), "architecture": features.architecture.to_dict()}
        return {**vars(self), "features": entries}

    @classmethod
    def restored(cls, state: dict[str, Any], architecture: Architecture) -> UnseenFeatures:
        """What `state` described, of a problem of that architecture."""
        entries = state["features"]
        if entries is not None:
            used = (layer.h for layer in architecture.layers)
            entries = {**entries, "architecture": Architecture.from_dict(entries["architecture"], used)}
        return cls(**{**state, "mu": tuple(state["mu"]), "features": entries and ParticleNetwork(**entries)})

    def below(self, attained: float, problem: Problem, widths: Sequence[int]) -> UnseenFeatures:
        """The same once some network of these widths attains a J: a bound above it, by more than rounding of J, is
        refuted.
        """
        if self.bound <= attained:
            return self
        rounding = (problem.count + sum(widths)) * torch.finfo(problem.inputs.dtype).eps * abs(attained)
        refuted = self.bound if self.refuted is None and self.bound > attained + rounding else self.refuted
        return replace(self, bound=attained, refuted=refuted)

    def summary(self) -> str:
        """One line that claims no more than what was shown."""
        if self.bound == -math.inf:
            text = f"no bound over all measures: {self.reason}"
        elif self.refuted is not None:
            text = (
                f"the best of {self.starts} starts gives the bound {self.refuted:.8g}, refuted by J = {self.bound:.8g} "
                "that was reached: it missed a feature and bounds nothing"
            )
        else:
            text = f"J >= {self.bound:.8g} for every network, unless the best of {self.starts} starts missed a feature"
            text += f" ({self._outlook()})" if self.fresh else ""
        if self.rigorous_bound is not None:
            text += f"; J >= {self.rigorous_bound:.8g} for every network, proven ({self.rigorous_kind})"
        return text

    def _outlook(self) -> str:
        text = (
            f"{self.reached} of {self.fresh} fresh starts led to the best; estimated: as many again lower the bound "
            f"with a chance of at most {unseen.percent(self.unseen_chance)}"
        )
        few = math.isinf(self.unseen_lowering)
        return text if few else f"{text}, with one of {unseen.LEVEL:.0%} by more than {self.unseen_lowering:.2g}"


@checked
@torch.inference_mode(False)
def search_features(
    problem: Problem,
    output: Tensor,
    network: ParticleNetwork | None = None,
    *,
    starts: Count = 64,
    steps: Count | None = None,
    rounds: Count = ROUNDS,
    count: Count = 8,
    seed: Seed = 0,
    rigorous_seconds: Nonnegative = 0.0,
    attained: Number | None = None,
) -> UnseenFeatures:
    """The bound over all measures at the output multipliers r = `output` (N, K), and the features that violate it most.

    Each of at most `rounds` searches ascends from `starts` starts, drawn from data patches, at random and from the best
    features so far, those of `network` at first, for `steps` steps (default: 60 for one layer, 300 for more); then r's
    scale and mu are chosen anew on all that was found.  The bound uses everything found.  r itself stays: the convex
    program of a support that holds the found features gives the next one.  count: features to return.
    rigorous_seconds: time for the proven bound of one ReLU layer with average readout and power 2; up to three kernel
    entries it is always computed, being quick.
    attained: the lowest J that any run of the same problem has reached.  A bound above it is refuted, and so reported.
    """
    began = time.perf_counter()
    problem.require_whole("search_features")
    problem.penalty.require_certifiable("a bound over all measures")
    steps = STEPS[problem.architecture.depth == 1] if steps is None else steps
    shape = len(problem.inputs), problem.architecture.outputs
    output = validation.finite(validation.shaped(output, shape, "output"), "output").detach()
    posed, problem = problem, problem.to(dtype=torch.float64)
    output = output.to(problem.inputs)
    network = None if network is None else network.to(dtype=torch.float64)
    reason = _no_bound(problem)
    if reason:
        return UnseenFeatures(-math.inf, 0, reason, seconds=time.perf_counter() - began)
    output = feasible(problem, output)
    search = _Search(problem, output, network, torch.Generator().manual_seed(seed), starts, steps)
    found = search.run(rounds, count)
    found = replace(found, **proving.at_multipliers(problem, output, network, rigorous_seconds))
    if attained is not None:
        found = found.below(attained, posed, () if network is None else network.widths)
    return replace(found, seconds=time.perf_counter() - began)


def _no_bound(problem: Problem) -> str:
    penalty = problem.penalty
    if penalty.readout == 0:
        return "without a readout penalty the supremum over features is infinite"
    if problem.architecture.depth > 1 and penalty.source == 0:
        return "without a source penalty features of the last layer cost nothing"
    missing = problem.missing_bounds()
    if missing:
        return (
            "with these activations, biases and penalties the supremum over features may be infinite, and is not "
            "searched; missing: " + ", ".join(missing)
        )
    return ""


class _Search:
    """The pool of features found so far, and the multipliers that suit it best."""

    def __init__(
        self,
        problem: Problem,
        output: Tensor,
        network: ParticleNetwork | None,
        generator: torch.Generator,
        starts: int,
        steps: int,
    ):
        self.problem, self.output, self.network, self.generator, self.starts, self.steps = (
            problem,
            output,
            network,
            generator,
            starts,
            steps,
        )
        self.depth = problem.architecture.depth
        only = problem.architecture.layers[0]
        # where long kernels gain as fast as they cost: slower for larger powers, and for smaller ones there is no bound
        free = self.depth == 1 and problem.penalty.input_bound is None and problem.penalty.power == 2
        self.homogeneous = free and only.h.homogeneous
        self.fresh = 0  # starts drawn so far
        self.searched: list[tuple[float, list[float]]] = []  # the multipliers of the searches
        self.scale_limit = largest_scale(problem.loss)
        self.tried = 0
        # the network's own features count as they are, all of them: no bound comes out above its value
        self.own = [] if network is None or self.homogeneous else [OwnFeatures(network.detach())]
        # what searches start from; in the homogeneous case unit kernels, and nothing else
        self.pool = [] if network is None else [self._retracted(own_features(problem, network, self._width()))]
        # of every feature of the pool the fresh start that it descends from, -1 where that is a feature of the network
        self.origins = [torch.full((len(part),), -1, device=problem.inputs.device) for part in self.pool]
        recession = only.h.recession
        if free and recession is not None:
            self.scale_limit = min(self.scale_limit, self._recession_limit(ACTIVATIONS[recession]))
        elif free and not only.h.bounded and not only.h.homogeneous:
            self.scale_limit = min(self.scale_limit, self._steepest_limit())

    def run(self, rounds: int, count: int) -> UnseenFeatures:
        """Search and choose multipliers in turn; only multipliers at which a search was made can give the bound."""
        scale, mu = min(1.0, self.scale_limit), self._first_mu()
        # what is sought in the homogeneous case depends on no multiplier
        for index in range(1 if self.homogeneous else rounds):
            self.pool.append(self._ascend(self._starts(scale, mu), scale, mu))
            self.searched.append((scale, mu))
            bound = self._bound(scale, mu)
            scale, mu, hoped = self._best_multipliers(scale, mu)
            if index + 1 >= LEAST_ROUNDS and hoped - bound <= AGREEMENT * abs(hoped):
                break
        if self.homogeneous:  # here the scale follows from the largest response, whatever multipliers it was sought at
            self.searched.append((scale, mu))
        scale, mu = max(self.searched, key=lambda each: self._bound(*each))
        return self._result(scale, mu, self._bound(scale, mu), count)

    def _outlook(self, scale: float, mu: list[float], bound: float) -> dict[str, Any]:
        """What more fresh starts would find, by what was made of those of this search."""
        shortfalls = self._shortfalls(scale, mu, bound)
        count = unseen.reached(shortfalls, AGREEMENT * abs(bound))
        return {
            "fresh": self.fresh,
            "reached": count,
            "unseen_chance": unseen.chance(count),
            "unseen_lowering": unseen.lowering(shortfalls),
        }

    def _shortfalls(self, scale: float, mu: list[float], bound: float) -> Tensor:
        """By how much higher the bound would be with the best that descends from one fresh start alone, (fresh,)."""
        if not self.homogeneous:
            best = self._best_of_lines(self._scores(self.pool, scale, mu))
            return self._worst(scale, mu) - best.clamp_min(self._nothing(scale))
        responses = torch.cat([part.responses(self.problem, self.output) for part in self.pool])
        allowed = self._limits(self._best_of_lines(responses))
        peak, _ = concave.maximum(lambda s: -self._conjugate(s), self.scale_limit)
        alone = [-self._conjugate(each) for each in allowed.clamp_max(peak).tolist()]
        return (allowed.new_tensor(alone) - bound).clamp_min(0)

    def _best_of_lines(self, figures: Tensor) -> Tensor:
        """The largest figure, of those of all features of the pool, that descends from each fresh start, (fresh,)."""
        lowest = figures.new_full((self.fresh + 1,), -math.inf)  # the first one for the network's own
        return lowest.scatter_reduce(0, torch.cat(self.origins) + 1, figures, "amax")[1:]

    def _first_mu(self) -> list[float]:
        """mu_l = (q - 1) lambda_s sum_i p_i s_i^q, which complementary slackness makes the right size."""
        penalty, network = self.problem.penalty, self.network
        source = (penalty.power - 1) * penalty.source
        if network is None:
            return [source] * (self.depth - 1)
        found = []
        for layer in range(1, self.depth):
            outflow = network.masses[layer] @ penalty.norms(network.kernels[layer])
            found.append(source * (float(network.masses[layer - 1] @ penalty.outer(outflow)) or 1.0))
        return found

    # ---- the bound on the pool

    def _conjugate(self, scale: float) -> float:
        return float(mean_conjugate(self.problem, scale * self.output))

    def _scores(self, parts: Sequence[Compositions | OwnFeatures], scale: float, mu: Sequence[float]) -> Tensor:
        """r*_u(|q|) - gamma of all features of some parts, one after the other."""
        responses = torch.cat([part.responses(self.problem, self.output) for part in parts])
        gamma = torch.cat([part.costs(self.problem, mu) for part in parts])
        return self._gains(scale**2 * responses) - gamma

    def _gains(self, responses: Tensor) -> Tensor:
        """r*_u(|q|) of responses |q|^2."""
        penalty = self.problem.penalty
        return penalty.outer.conjugate_of_squares(responses, penalty.readout)

    def _worst(self, scale: float, mu: Sequence[float]) -> float:
        """The largest score of what is known (the feature g = 0, which costs nothing, included)."""
        return max(float(self._scores([*self.own, *self.pool], scale, mu).max()), self._nothing(scale))

    def _bound(self, scale: float, mu: Sequence[float]) -> float:
        """The lower bound with the sup over what is known."""
        if self.homogeneous and scale > self._homogeneous_limit():
            return -math.inf
        worst = 0.0 if self.homogeneous else self._worst(scale, mu)
        return -self._conjugate(scale) - sum(mu) - worst

    def _nothing(self, scale: float) -> float:
        """The score of g = 0: zero unless h(0) is not."""
        zero = zeros_like(self.problem, 1)
        return float(self._gains(scale**2 * zero.responses(self.problem, self.output)))

    def _homogeneous_limit(self) -> float:
        """Largest scale of r for which no unit kernel of the pool gains more than it costs."""
        # the pool holds unit kernels
        return float(self._limits(torch.stack([p.responses(self.problem, self.output).max() for p in self.pool])).min())

    def _limits(self, responses: Tensor) -> Tensor:
        """Largest scales of r for which unit kernels of these responses |q|^2 gain no more than they cost."""
        # 0 / 0: no price, but no gain either
        largest = (price_of(self.problem) / responses.sqrt()).nan_to_num(nan=math.inf)
        return largest.clamp_max(self.scale_limit)

    def _best_multipliers(self, scale: float, mu: Sequence[float]) -> tuple[float, list[float], float]:
        if self.depth == 1:
            limit = self._homogeneous_limit() if self.homogeneous else self.scale_limit
            best = concave.maximum(lambda s: self._bound(s, []), limit)
            return best[0], [], best[1]
        return self._best_prices(scale, list(mu))

    def _best_prices(self, scale: float, mu: list[float]) -> tuple[float, list[float], float]:
        """Maximise the bound, concave in (scale, mu), in its epigraph form; any point it ends at
        gives a valid figure.
        """
        scores = self._scores(self.pool, scale, mu)
        near = scores.topk(min(200, len(scores))).indices
        kept = [*self.own, Compositions(self.problem.architecture, *joined(self.pool))[near]]
        responses = torch.cat([part.responses(self.problem, self.output) for part in kept])

        def gaps(x: np.ndarray) -> np.ndarray:
            limits.look()
            gamma = torch.cat([part.costs(self.problem, [float(m) for m in x[1:-1]]) for part in kept])
            return (x[-1] - self._gains(float(x[0]) ** 2 * responses) + gamma).numpy(force=True)

        unit = abs(self._bound(scale, mu)) or 1.0
        objective = lambda x: (self._conjugate(float(x[0])) + float(x[1:].sum())) / unit  # noqa: E731
        start = np.array([scale, *mu, self._worst(scale, mu)])
        ranges = [(0.0, self.scale_limit), *[(0.0, None)] * len(mu), (0.0, None)]
        answer = minimize(
            objective,
            start,
            method="SLSQP",
            bounds=ranges,
            constraints={"type": "ineq", "fun": lambda x: gaps(x) / unit},
        )
        candidates = [
            (scale, mu),
            (float(np.clip(answer.x[0], 0, self.scale_limit)), [max(float(m), 0.0) for m in answer.x[1:-1]]),
        ]
        values = [self._bound(*candidate) for candidate in candidates]
        best = int(np.argmax(values))
        return candidates[best][0], candidates[best][1], values[best]

    # ---- the search

    def _starts(self, scale: float, mu: Sequence[float]) -> Compositions:
        """Half from the best features so far, the network's own at first; the rest from data patches and at random."""
        parts, origins = [], []
        if self.pool:
            pool = Compositions(self.problem.architecture, *joined(self.pool))
            order = self._scores(self.pool, scale, mu).argsort(descending=True)[: self.starts // 2]
            parts.append(pool[order])
            origins.append(torch.cat(self.origins)[order])
        left = self.starts - sum(map(len, parts))
        origins.append(torch.arange(self.fresh, self.fresh + left, device=self.problem.inputs.device))
        self.fresh += left
        self.origins.append(torch.cat(origins))
        parts.append(self._drawn(left // 2, patches=True))
        parts.append(self._drawn(left - left // 2, patches=False))
        return Compositions(self.problem.architecture, *joined(parts))

    def _width(self) -> int:
        alive = (
            max((int((p > 0).sum()) for p in self.network.masses[:-1]), default=1) if self.network is not None else 1
        )
        return max(HIDDEN, min(alive, MOST_HIDDEN))

    def _drawn(self, number: int, patches: bool) -> Compositions:
        arch, inputs = self.problem.architecture, self.problem.inputs
        widths = [self._width()] * (self.depth - 1) + [1]
        shapes = [(number, *shape) for shape in arch.kernel_shapes(widths)]
        kernels = [normal(shapes[0], self.generator, inputs)]
        if patches:
            kernels[0] = kernels[0].sign()[:, :, :1, :1, :1] * self._patches(number * widths[0]).reshape(shapes[0])
        draws = torch.rand(shapes[0][:2], generator=self.generator, dtype=torch.float64).to(inputs)
        radii = self._radius() * (RADII[0] + (RADII[1] - RADII[0]) * draws).exp()
        kernels[0] = unit(kernels[0].flatten(2)).view(shapes[0]) * radii[:, :, None, None, None]
        kernels += [normal(shape, self.generator, inputs) / shape[2] for shape in shapes[1:]]
        biases = [
            normal(k.shape[:2], self.generator, inputs) * 0.1 if layer.bias else None
            for layer, k in zip(arch.layers, kernels)
        ]
        return Compositions(arch, tuple(kernels), tuple(biases))

    def _radius(self) -> float:
        """Root mean square |z| of the network, or that of a standard normal kernel."""
        arch = self.problem.architecture
        usual = math.sqrt(arch.input_shape[0] * arch.layers[0].offsets)
        if self.network is None:
            return usual
        return float((self.network.masses[0] @ self.network.kernels[0].flatten(1).square().sum(1)).sqrt()) or usual

    def _patches(self, number: int) -> Tensor:
        arch, inputs = self.problem.architecture, self.problem.inputs
        layer, positions = arch.layers[0], prod(arch.geometry[0].output)
        size = arch.input_shape[0] * layer.offsets
        blocks = list(limits.blocks(len(inputs), inputs.element_size() * positions * size))
        alive = [
            (layer.patches(inputs[block]) != 0).any(2).flatten().nonzero() + block.start * positions for block in blocks
        ]
        seen = torch.cat(alive).flatten()
        if not len(seen):  # black images
            return normal((number, size), self.generator, inputs)
        chosen = seen[torch.randint(len(seen), (number,), generator=self.generator).to(seen.device)]
        return layer.chosen_patches((inputs[block] for block in blocks), chosen)

    def _ascend(self, begun: Compositions, scale: float, mu: Sequence[float]) -> Compositions:
        """Adam on all starts at once; every start keeps the best of its path."""
        self.tried += len(begun)
        level = 0.0 if self.homogeneous or not self.pool else self._worst(scale, mu)
        leaves = [t.detach().clone().requires_grad_() for t in begun.projected(self.problem).tensors()]
        rates = [UNIT_RATE if self.homogeneous else KERNEL_RATE] + [FLOW_RATE] * (len(leaves) - 1)
        optimiser = torch.optim.Adam([{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves, rates)])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        best: list[Tensor] = []
        top = torch.full((len(begun),), -torch.inf, dtype=torch.float64, device=leaves[0].device)
        for _ in range(self.steps):
            limits.look()
            current = with_tensors(begun, leaves)
            scores = self._merit(current, scale, mu, level)
            better = scores.detach() > top
            top = torch.where(better, scores.detach(), top)
            best = [torch.where(along_axis(better, t, 0), t.detach(), b) for t, b in zip(leaves, best or leaves)]
            optimiser.zero_grad()
            (-scores.sum()).backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for leaf, moved in zip(leaves, self._retracted(with_tensors(begun, leaves)).tensors()):
                    leaf.copy_(moved)
        return self._retracted(with_tensors(begun, [t.detach() for t in best]))

    def _merit(self, current: Compositions, scale: float, mu: Sequence[float], level: float) -> Tensor:
        """log of r*_u(|q|) over gamma + level: above zero just where a feature beats the level.

        The score itself has a local maximum at g = 0, where the cost falls like |a| and the gain like a higher power of
        it: most starts would end there.
        """
        tiny = torch.finfo(torch.float64).tiny
        gain = self._gains(scale**2 * current.responses(self.problem, self.output))
        return gain.clamp_min(tiny).log() - (current.costs(self.problem, mu) + level).clamp_min(tiny).log()

    def _retracted(self, current: Compositions) -> Compositions:
        if not self.homogeneous:
            return current.projected(self.problem)
        kernels, bias = current.kernels[0], current.biases[0]
        flat = kernels.flatten(2) if bias is None else torch.cat([kernels.flatten(2), bias[..., None]], 2)
        flat = unit(flat)
        return replace(
            current,
            kernels=(flat[..., : kernels[0, 0].numel()].view(kernels.shape),),
            biases=(None if bias is None else flat[..., -1],),
        )

    def _steepest_limit(self) -> float:
        """The scale of r up to which, of an h with |h(g)| <= |h(0)| + D |g| and nothing else known, longer kernels gain
        at most what they cost: D sum_n |r_n| |pool |x_n||, over the positions that the readout sees, bounds |q| / |w|.
        """
        arch = self.problem.architecture
        conv, steepest = arch.layers[0], arch.layers[0].h.derivative_bound or math.inf
        lengths = vectors.patches(self.problem).norm(dim=2).unflatten(1, (1, *arch.geometry[0].output))
        read = arch.readout_features(conv.pool(lengths)).flatten(1).norm(dim=1)
        largest = steepest * float(self.output.norm(dim=1) @ read)
        return scale_limit(self.problem, largest)

    def _recession_limit(self, activation: Activation) -> float:
        """The scale of r beyond which ever longer kernels gain more than they cost: that of the activation far away."""
        arch = self.problem.architecture
        far = replace(arch, layers=(replace(arch.layers[0], activation=activation),))
        problem = Problem(far, self.problem.inputs, self.problem.targets, self.problem.loss, self.problem.penalty)
        other = _Search(problem, self.output, None, self.generator, self.starts, self.steps)
        other.pool.append(other._ascend(other._starts(1.0, []), 1.0, []))
        self.tried += other.tried
        return other._homogeneous_limit()

    def _result(self, scale: float, mu: list[float], bound: float, count: int) -> UnseenFeatures:
        everything = Compositions(self.problem.architecture, *joined(self.pool))
        responses = everything.responses(self.problem, self.output)
        if self.homogeneous:  # unit kernels: their gain over their cost, at the radius the network uses
            scores = self._radius() ** 2 * (self._gains(responses) - self.problem.penalty.input)
        else:
            scores = self._gains(responses) - everything.costs(self.problem, mu)
        chosen = self._distinct(everything, scores, count)
        best = everything[chosen]
        if self.homogeneous:
            bias = best.biases[0]
            best = replace(
                best,
                kernels=(best.kernels[0] * self._radius(),),
                biases=(None if bias is None else bias * self._radius(),),
            )
        features = best.network(self.problem) if len(chosen) else None
        outlook = self._outlook(scale, mu, bound)
        return UnseenFeatures(bound, self.tried, "", None, "", scale, tuple(mu), features, scores[chosen], **outlook)

    def _distinct(self, everything: Compositions, scores: Tensor, count: int) -> Tensor:
        """The best features with a positive score, no two alike on the training inputs."""
        order = scores.argsort(descending=True)[: 16 * count]
        order = order[scores[order] > 0]
        if not len(order):
            return order
        best, inputs = everything[order], self.problem.inputs
        groups = [best[few] for few in best.groups()]
        maps = (
            torch.cat([few.preactivations(inputs[block]) for few in groups], 1) for block in best.blocks(len(inputs))
        )
        products: Tensor = reduce(
            torch.add, (rows.T @ rows for rows in (each.movedim(1, -1).flatten(0, 2) for each in maps))
        )
        lengths = products.diagonal().sqrt().clamp_min(torch.finfo(products.dtype).tiny)
        alike = (products / lengths / lengths[:, None]).tolist()
        kept: list[int] = []
        for index in range(len(order)):
            if len(kept) < count and all(alike[index][other] < SAME_FEATURE for other in kept):
                kept.append(index)
        return order[kept]
