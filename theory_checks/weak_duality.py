"""Claim 10: no lower bound ever lies above a value, whatever the multipliers and whoever made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import meanfield as mf
from meanfield import certificates
from meanfield.certificates import Multipliers, compositions, concave
from meanfield.certificates.compositions import Compositions, OwnFeatures
from meanfield.starts import normal
from meanfield.studies.convexity import ProgramVariables
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting, ranked
from theory_checks.instances import Variety, random_network, with_penalty
from theory_checks.rounding import value_error
from theory_checks.statistics import largest, share_text

WIDTHS = ((6,), (6, 4), (5, 4, 3))
NOISES = (0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0, 10.0)
SOLVER_TOLERANCE = 1e-6
TIGHTENED = 0.6  # a bound, of what a random network reaches: it holds the optimum back
FEASIBLE = 1e-13  # relative violation of a point, up to which the rounding bound of its value covers it


@lru_cache(maxsize=128)
def _optimal(setting: Setting, instance: int) -> tuple[mf.ConvexProgram, mf.ProgramPoint, Multipliers]:
    """A random program with a near-optimal point: the smallest values that lower bounds have to stay under.

    Every second one is bounded.
    """
    variety, depth = Variety(setting, 10), 1 + instance % 3
    problem = variety.problem(instance, depth, side=3)
    network = random_network(problem, WIDTHS[depth - 1], setting.generator(10, instance))
    if instance % 2:
        problem, network = variety.bounded(problem, network, TIGHTENED, instance)
    program = mf.ConvexProgram.freeze(problem, network)
    solved = mf.solvers.splitting.solve(program, SOLVER_TOLERANCE, max_iterations=setting.either(150, 400))
    assert solved.point is not None
    assert solved.multipliers is not None
    return program, program.restore(solved.point), solved.multipliers


def _perturbed(multipliers: Multipliers, noise: float, generator: torch.Generator) -> Multipliers:
    """Every multiplier plus Gaussian noise of `noise` times the root mean square of its kind."""
    return multipliers.map(lambda m: m + noise * m.square().mean().sqrt() * normal(m.shape, generator, m))


# --- on the features of a support -----------------------------------------------------------------------------------


Bound = Callable[[mf.ConvexProgram, Multipliers, Multipliers], float]


def _repaired(program: mf.ConvexProgram, optimal: Multipliers, moved: Multipliers) -> float:
    return certificates.dual_value(program, moved)


def _unrepaired(program: mf.ConvexProgram, optimal: Multipliers, moved: Multipliers) -> float:
    """-mean conjugate of the moved multipliers less the mass multipliers of the optimal ones, which they no longer
    satisfy.
    """
    problem = program.problem
    count = len(problem.inputs)
    conjugate = float(problem.loss.conjugate(count * optimal.output, problem.targets).mean())
    masses = -certificates.dual_value(program, optimal) - conjugate  # sum of mu_l
    return -float(problem.loss.conjugate(count * moved.output, problem.targets).mean()) - masses


def _pairs(setting: Setting, bound: Bound) -> Evidence:
    """Every bound against the optimal value and against feasible points of all kinds; in units of rounding."""
    worst, at_optimum, total, beyond = [], [], 0, 0
    for instance in range(setting.instances(12, 48)):
        program, point, multipliers = _optimal(setting, instance)
        generator, variables = setting.generator(101, instance), ProgramVariables(program)
        drawn = [variables.sample(generator) for _ in range(11)]
        vectors = [point.vector(), *(v for v in drawn if program.violation(point.at(v)) <= FEASIBLE)]
        values = torch.tensor([float(program.value(point.at(vector))) for vector in vectors], dtype=torch.float64)
        allowed = torch.tensor([2 * variables.rounding(vector) for vector in vectors], dtype=torch.float64)
        moved = [_perturbed(multipliers, noise, generator) for noise in NOISES for _ in range(setting.either(1, 4))]
        bounds = torch.tensor([bound(program, multipliers, each) for each in moved], dtype=torch.float64)
        ratios = (bounds[:, None] - values) / allowed
        worst.append(float(ratios.max()))
        at_optimum.append((bounds.reshape(len(NOISES), -1).amax(1) / values[0]).tolist())
        total, beyond = total + ratios.numel(), beyond + int((ratios > 1).sum())
    closest = [max(each[k] for each in at_optimum) for k in range(len(NOISES))]
    text = (
        f"{share_text(beyond, total, 'pairs have the bound above the value')}; the best bound reaches "
        f"{max(closest):.7f} of an optimal value"
    )
    shown = [max(noise, 1e-7) for noise in NOISES if noise <= 1]
    lines = tuple(Series(f"program {k}", shown, line[: len(shown)]) for k, line in enumerate(at_optimum[:6]))
    return Evidence(max(worst), text, total, beyond, lines)


# --- over all measures, on the features of a network ----------------------------------------------------------------

SECTION5_THRESHOLD = 1e-6
SPARE = 8  # units of rounding by which mu is raised: c = 2 sqrt(lambda (mu + gamma)) has no slope where that is zero


@dataclass(frozen=True)
class Section5:
    """The dual of section 5 as it is written there: r in the conjugate's domain, kappa >= 0, no smaller than needed.

    centred, price: what controls read otherwise; price is that of kappa, B kappa_j.
    """

    output: Tensor
    conjugate: float
    mu: list[float]

    @classmethod
    def of(
        cls,
        program: mf.ConvexProgram,
        multipliers: Multipliers,
        scale: float = 1.0,
        *,
        centred: bool = True,
        price: float = 1.0,
    ) -> Section5:
        problem, penalty, count = program.problem, program.problem.penalty, len(program.problem.inputs)
        output = scale * problem.loss.feasible(count * multipliers.output, problem.targets) / count
        conjugate = float(problem.loss.conjugate(count * output, problem.targets).mean())
        gamma, mu, bound = program.feature_costs, [], penalty.amplitude_bound
        preactivations, features = program.maps(problem.inputs)
        kappas = multipliers.amplitude or [pulls.new_zeros(len(pulls)) for pulls in multipliers.realisation]
        for layer, (pulls, kappa) in enumerate(zip(multipliers.realisation, kappas), start=1):
            conv, g = problem.architecture.layers[layer], preactivations[layer]
            patches = conv.patches(features[layer - 1])
            beta = scale * _realised(pulls, patches, conv.bias, free=conv.bias and bound is None and centred)
            b = torch.einsum("jnq,nqs->js", beta, patches).unflatten(1, (-1, conv.offsets))
            norms = b.norm(dim=2) if penalty.kernel_norm == "l2" else b.abs().amax(2)
            kappa = scale * kappa.clamp_min(0) if bound is not None else torch.zeros_like(kappa)
            t = (norms - kappa[:, None]).clamp_min(0).amax(0)
            mu.append(float((t.square() / (4 * penalty.source) - gamma).max()))
            allowed = (4 * penalty.source * (mu[-1] + gamma).clamp_min(0)).sqrt()
            needed = (norms - allowed).clamp_min(0).amax(1)
            gamma = torch.einsum("jnq,njq->j", beta, g.flatten(2)) - price * (bound or 0.0) * needed
            if conv.bias and bound is not None:
                gamma = gamma - bound * beta.sum((1, 2)).abs()
        q = torch.einsum("nk,nj...->jk...", output, program.readout_features).flatten(1)
        mu.append(float((q.square().sum(1) / (4 * penalty.readout) - gamma).max()))
        return cls(output, conjugate, mu)

    @property
    def value(self) -> float:
        return -self.conjugate - sum(self.mu)


def _realised(pulls: torch.Tensor, patches: torch.Tensor, bias: bool, *, free: bool) -> torch.Tensor:
    """beta (M, N, positions) with A^T beta_j the part of b_j in the row space of A, and sum beta_j = 0 if free."""
    A = patches.flatten(0, 1)
    A = torch.cat([A, A.new_ones(len(A), 1)], 1) if bias else A
    inverse = torch.linalg.pinv(A.T, rtol=1e-10)
    rows = pulls @ inverse.T @ A
    if free:
        direction = A[:, -1].new_zeros(A.shape[1])
        direction[-1] = 1
        direction = A.T @ (inverse @ direction)
        rows = rows - torch.outer(rows @ direction, direction) / (direction @ direction)
    return (rows @ inverse.T).unflatten(1, patches.shape[:2])


def _as_written(setting: Setting, **read: Any) -> Evidence:
    """The library's bound against section 5 at the scale of all multipliers that serves it best."""
    differences, beyond = [], 0
    for instance in range(setting.instances(9, 24)):
        program, point, multipliers = _optimal(setting, instance)
        generator, worst = setting.generator(103, instance), 0.0
        for noise in NOISES:
            moved = _perturbed(multipliers, noise, generator)
            value = lambda scale: Section5.of(program, moved, scale, **read).value  # noqa: B023, E731
            best, library = max(value(1.0), concave.maximum(value, 2.0)[1]), certificates.dual_value(program, moved)
            worst = max(worst, abs(library - best) / (abs(best) + float(program.value(point))))
        differences.append(worst)
        beyond += worst > SECTION5_THRESHOLD
    text = (
        f"relative differences up to {max(differences):.1e} over {len(differences)} programs and {len(NOISES)} noises"
    )
    return Evidence(largest(differences), text, len(differences), beyond, (ranked("largest difference", differences),))


def _all_measures(
    problem: mf.Problem, network: mf.ParticleNetwork, dual: Section5, mu: list[float], price: float
) -> list[float]:
    """-mean conjugate - sum mu - the largest score of the network's own features, which the search prices; as features
    of one network and as compositions of their own.
    """
    priced = with_penalty(problem, replace(problem.penalty, source=problem.penalty.source * price**2))
    own: list[OwnFeatures | Compositions] = [
        OwnFeatures(network),
        compositions.own_features(problem, network, max(network.widths)),
    ]
    scores = [
        part.responses(problem, dual.output) / (4 * problem.penalty.readout) - part.costs(priced, mu) for part in own
    ]
    return [-dual.conjugate - sum(mu) - float(score.max()) for score in scores]


def _between(setting: Setting, price: float, depths: tuple[int, ...] = (2, 3)) -> Evidence:
    """How far the bound lies above J or below the dual of the network's own program, in units of rounding."""
    ratios, closest = [], []
    for instance in range(setting.instances(12, 48)):
        program, point, multipliers = _optimal(setting, instance)
        if program.depth not in depths:
            continue
        problem, network, generator = program.problem, program.network(point), setting.generator(102, instance)
        value = float(problem.terms(network).total())
        allowed = 2 * value_error(problem, network)
        for noise in NOISES:
            dual = Section5.of(program, _perturbed(multipliers, noise, generator))
            spare = SPARE * torch.finfo(torch.float64).eps
            sizes = [abs(m) + float(program.feature_costs.max()) + abs(dual.value) for m in dual.mu[:-1]]
            mu = [m + spare * size for m, size in zip(dual.mu, sizes)]
            bounds = _all_measures(problem, network, dual, mu, price)
            allowed_below = allowed + 2 * spare * sum(sizes)
            ratios += [(bound - value) / allowed for bound in bounds]
            ratios += [(dual.value - bound) / allowed_below for bound in bounds]
            if noise == 0:
                closest.append(min(bounds) / value)
    beyond = sum(ratio > 1 for ratio in ratios)
    text = (
        f"{share_text(beyond, len(ratios), 'comparisons fail')}; at the optimal multipliers the bound is "
        f"{min(closest):.5f} to {max(closest):.5f} of J"
    )
    return Evidence(largest(ratios), text, len(ratios), beyond, (ranked("bound / J at the optimum", closest),))


CLAIMS = (
    Claim(
        name="weak_duality",
        statement="Any multipliers, once repaired, give a lower bound of the program: it never lies above a feasible "
        "value.",
        source="docs/theory.md, section 5",
        statistic="largest (lower bound - value) over random pairs, in rounding bounds of the value",
        threshold=1.0,
        derivation="running error bound of the value, twice (the bound is summed from as many terms)",
        limits="A bound on this support. Features nobody has tried need the bound over all measures.",
        measure=lambda setting: _pairs(setting, _repaired),
        controls={"multipliers not repaired": lambda setting: _pairs(setting, _unrepaired)},
        axes=Axes(
            "noise on the optimal multipliers (its root mean square = 1)",
            "best lower bound / optimal value",
            "x",
            1.0,
            "the optimal value",
        ),
    ),
    Claim(
        name="weak_duality.all_measures",
        statement="On the features of a network the bound over all measures lies between the dual value of its own "
        "program and J: the price c = 2 sqrt(lambda_s (mu + gamma)) of a source is neither too high nor too low.",
        source="docs/theory.md, section 5",
        statistic="largest of (bound - J) and (dual value - bound) over networks and multipliers, in rounding bounds",
        threshold=1.0,
        derivation=(
            "above: lambda_s s^2 + gamma + mu >= c s at every source, for any multipliers. Below: dual feasible "
            "multipliers have |b_ij|* <= c_i + kappa_j, so that no feature costs less than <beta_j, g_j> - B kappa_j. "
            "The dual is written out in this file, from section 5"
        ),
        limits="On features that are there. What the search does not find can still lie above its bound.",
        measure=lambda setting: _between(setting, 1.0),
        controls={
            "twice the price": lambda setting: _between(setting, 2.0),
            "half the price, two layers": lambda setting: _between(setting, 0.5, (2,)),
        },
        axes=Axes("network, sorted", "bound / J at the optimal multipliers", "", 1.0, "J"),
    ),
    Claim(
        name="weak_duality.section5",
        statement="The library's bound is that of section 5: biases, the bound's multipliers and the dual norms enter "
        "as they are written there.",
        source="docs/theory.md, section 5",
        statistic="largest relative difference from the formulas, written out in this file, over programs of every "
        "kind and multipliers",
        threshold=SECTION5_THRESHOLD,
        derivation="both search the best common scale of the multipliers, to 1e-8 of it or better, by one search",
        limits="Two programs of one formula: that it is a bound is the claim above.",
        measure=_as_written,
        controls={
            "free biases not centred": lambda setting: _as_written(setting, centred=False),
            "the price of the bound with its sign turned": lambda setting: _as_written(setting, price=-1.0),
        },
        axes=Axes("program, sorted", "relative difference", "y", SECTION5_THRESHOLD),
    ),
)
