"""Claim 5: the limit of the flow is optimal for the convex program of its own features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

import meanfield as mf
from meanfield import certificates, measures
from meanfield.certificates import Multipliers
from meanfield.convex import repopulation
from meanfield.penalties import KERNEL_NORMS, input_norms
from meanfield.problem import FEASIBLE, project_bounds
from meanfield.solvers import flow, velocities
from meanfield.solvers.solution import Solution
from meanfield.solvers.velocities import Tangent
from meanfield.starts import normal
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting, ranked
from theory_checks.instances import (
    Variety,
    random_masses,
    random_network,
    random_problem,
    random_start,
    reached,
    with_penalty,
)
from theory_checks.rounding import value_error
from theory_checks.statistics import largest

WIDTHS = ((6,), (8, 5), (8, 6, 5))
STEPS, EARLY_STEPS = 2000, 200
NOISE = 0.1


@lru_cache(maxsize=64)
def _problem(setting: Setting, depth: int, instance: int) -> mf.Problem:
    drawn = random_problem(
        setting.generator(5, depth, instance), depth, side=2, images=4, activation="tanh", loss="squared"
    )
    penalty = mf.Penalty(source=3e-3, readout=5e-3, input=2e-3)
    return mf.Problem(drawn.architecture, drawn.inputs, drawn.targets, "squared", penalty).to(device=setting.device)


@lru_cache(maxsize=128)
def _flowed(setting: Setting, depth: int, instance: int, steps: int) -> Solution:
    problem = _problem(setting, depth, instance)
    start = random_start(problem, WIDTHS[depth - 1], setting.derived_seed(51, depth, instance))
    return flow.solve(problem, start, steps=steps)


def _limit(setting: Setting, depth: int, instance: int) -> mf.ParticleNetwork:
    return _flowed(setting, depth, instance, STEPS).network


def _early(setting: Setting, depth: int, instance: int) -> mf.ParticleNetwork:
    return _flowed(setting, depth, instance, EARLY_STEPS).network


def _perturbed(setting: Setting, depth: int, instance: int) -> mf.ParticleNetwork:
    """Every kernel and the readout of the limit times 1 + noise."""
    generator, limit = setting.generator(52, depth, instance), _limit(setting, depth, instance)
    noisy = [w * (1 + NOISE * normal(w.shape, generator, w)) for w in (*limit.kernels, limit.readout)]
    return mf.ParticleNetwork(limit.architecture, limit.masses, noisy[:-1], noisy[-1], limit.biases)


def _excess(problem: mf.Problem, network: mf.ParticleNetwork) -> float:
    """(J - dual value of the program frozen at the network) / J; the multipliers come from
    CLARABEL and are repaired.
    """
    solved = mf.solvers.reference.solve(mf.ConvexProgram.freeze(problem, network))
    value = float(problem.terms(network).total())
    return (value - (solved.value - solved.gap)) / value


def _cases(setting: Setting) -> list[tuple[int, int]]:
    if not setting.full:
        return [(1, 0), (2, 0)]
    return [(depth, instance) for depth in (1, 2, 3) for instance in range(6)]


def _excesses(setting: Setting, network_of) -> Evidence:
    cases = _cases(setting)
    found = [_excess(_problem(setting, *case), network_of(setting, *case)) for case in cases]
    speeds = [_flowed(setting, *case, STEPS).history[-1]["speed"] for case in cases]
    own = [_flowed(setting, *case, STEPS).relative_gap for case in cases]
    beyond = sum(excess > THRESHOLD for excess in found)
    text = (
        f"{min(found):.1e} to {max(found):.1e} of J above the dual value over {len(found)} runs (L = {cases[0][0]} to "
        f"{cases[-1][0]}); metric speed left at the limit {min(speeds):.1e} to {max(speeds):.1e}, gap by the flow's "
        f"own multipliers {min(own):.1e} to {max(own):.1e}"
    )
    return Evidence(largest(found), text, len(found), beyond, _series(cases, found))


def _series(cases: list[tuple[int, int]], found: list[float]) -> tuple[Series, ...]:
    by_depth: dict[int, list[float]] = {}
    for (depth, _), excess in zip(cases, found):
        by_depth.setdefault(depth, []).append(max(excess, 1e-12))
    return tuple(ranked(f"L = {depth}", excesses) for depth, excesses in by_depth.items())


# --- with active bounds ---------------------------------------------------------------------------------------------

TIGHTENED = 0.25  # bounds, of what the start reaches
BOUNDED_WIDTHS = ((6,), (8, 5))
BOUNDED_ACTIVATIONS = ("relu", "tanh", "softplus")
BOUNDED_EARLY, VELOCITY_THRESHOLD = 50, 1.001
ON_BOUND = 1e-9


@lru_cache(maxsize=64)
def _bounded(setting: Setting, depth: int, instance: int) -> tuple[mf.Problem, mf.ParticleNetwork]:
    """A problem with an input bound, and an amplitude bound with two layers; and a start on the bounds.  One layer has
    biases: the bound holds them with their kernel.
    """
    drawn = random_problem(
        setting.generator(55, depth, instance // 3),
        depth,
        side=2,
        images=4,
        activation=BOUNDED_ACTIVATIONS[instance % 3],
        loss="squared",
        bias=depth == 1,
        kernel_size=2,
    )
    start = random_start(drawn, BOUNDED_WIDTHS[depth - 1], setting.derived_seed(56, depth, instance // 3))
    amplitude, size = reached(drawn, start)
    penalty = mf.Penalty(
        source=1e-3,
        readout=1e-2,
        input=1e-3,
        amplitude_bound=TIGHTENED * amplitude if depth > 1 else None,
        input_bound=TIGHTENED * size,
    )
    problem = with_penalty(drawn, penalty)
    return problem.to(device=setting.device), project_bounds(problem, start).to(device=setting.device)


@lru_cache(maxsize=128)
def _bounded_flow(setting: Setting, depth: int, instance: int, steps: int) -> mf.ParticleNetwork:
    return flow.solve(*_bounded(setting, depth, instance), steps=steps).network


def _velocity(problem: mf.Problem, network: mf.ParticleNetwork) -> Tangent:
    """Of the flow, its proximal and projected parts included: the difference quotient of a small step."""
    move, step = velocities.velocity(problem, network)[1], velocities.PROBE[network.dtype]
    moved = velocities.advance(problem, network, move.map(lambda v: step * v), step)
    rate = lambda a, b: (b - a) / step  # noqa: E731
    return Tangent(
        [rate(p, q) / p for p, q in zip(network.masses, moved.masses)],
        list(map(rate, network.kernels, moved.kernels)),
        rate(network.readout, moved.readout),
        [None] * len(network.biases),
    )


def _allowed_by(problem: mf.Problem, network: mf.ParticleNetwork, velocity: Tangent) -> float:
    """What the flow's own multipliers can leave open at this velocity; later layers without biases.

    At r = d loss / d F, beta_j = -(1/p_j) d loss / d g_j and the projection's kappa the velocities are, with
    x / |x| for a subgradient,
        v_ij = b_ij - (2 lambda_s s_i + kappa_j) w_ij / |w_ij|,   v_j = -q_j - 2 lambda_u u_j,
        rate_j = e_j - sum p e,   e_j = A_j - gamma_j + in_j + out_j,
    s_i = sum_j p_j |w_ij|; A_j = lambda_s s_j^2, on the last layer lambda_u |u_j|^2; in_j = sum_i p_i <v_ij, w_ij>;
    out_j = sum_k p_k <v_jk, w_jk>, on the last layer <v_j, u_j>.  Solve the first two for b and q.  Then section 5 asks
    for a mu_l of at most
        max_j (A_j + spread_j - gamma_j) = sum p e + max_j (rate_j + spread_j - in_j - out_j),
        spread_j = s_j V + V^2 / (4 lambda_s), V = max_k |v_jk|*; last layer: |u_j| |v_j| + |v_j|^2 / (4 lambda_u).
    J less -mean conjugate is <r, F> and the penalties (Fenchel), <r, F> = -sum_j p_j <2 lambda_u u_j + v_j, u_j>.  All
    that does not vanish at rest cancels in the sum, and
        J - dual value <= sum_l max_j (rate_j + spread_j - in_j - out_j) + sum_{l < L} sum_j p_j out_j.
    Nothing here is divided by a mass, and the largest counts: a light particle as much as a heavy one.
    """
    p, w, penalty, total = network.masses, network.kernels, problem.penalty, 0.0
    flat = lambda readout: readout.movedim(1, 0).flatten(1)  # noqa: E731
    for layer, rate in enumerate(velocity.masses):
        assert rate is not None
        inward = outward = torch.zeros_like(rate)
        if layer > 0:
            inward = p[layer - 1] @ (velocity.kernels[layer] * w[layer]).sum((2, 3)).T
        if layer + 1 < len(p):
            v, above = velocity.kernels[layer + 1], p[layer + 1]
            outward = above @ (v * w[layer + 1]).sum((2, 3))
            amounts, speeds, strength = (
                above @ penalty.norms(w[layer + 1]),
                penalty.dual_norms(v).amax(0),
                penalty.source,
            )
            total += float(p[layer] @ outward)
        else:
            u, v = flat(network.readout), flat(velocity.readout)
            outward = (u * v).sum(1)
            amounts, speeds, strength = u.norm(dim=1), v.norm(dim=1), penalty.readout
        spread = amounts * speeds + speeds.square() / (4 * strength)
        total += float((rate + spread - inward - outward).max())
    return total


def _without_kappa(multipliers: Multipliers) -> Multipliers:
    """kappa = 0: as if the bound had no price."""
    return replace(multipliers, amplitude=tuple(beta.new_zeros(len(beta)) for beta in multipliers.realisation))


def _own_gap(problem: mf.Problem, network: mf.ParticleNetwork, change: Callable[[Multipliers], Multipliers]) -> float:
    """J less the dual value of the flow's own multipliers, the certificate's choice of kappa included."""
    program = mf.ConvexProgram.freeze(problem, network)
    own = certificates.stationary_multipliers(program, program.point(network))
    return float(problem.value(network)) - certificates.dual_value(program, change(own))


def _held(setting: Setting, case: tuple[int, int], steps: int) -> int:
    """Features that end on a bound."""
    problem, network = _bounded(setting, *case)[0], _bounded_flow(setting, *case, steps)
    norms = [input_norms(network.kernels[0], network.biases[0]) / (problem.penalty.input_bound or math.inf)]
    for layer in range(1, problem.architecture.depth):
        amplitudes = network.amplitudes(layer, problem.penalty.norms(network.kernels[layer]))
        norms.append(amplitudes / (problem.penalty.amplitude_bound or math.inf))
    return sum(int((each >= 1 - ON_BOUND).sum()) for each in norms)


def _bounded_gaps(
    setting: Setting,
    depths: tuple[int, ...] = (1, 2),
    early: int | None = None,
    change: Callable[[Multipliers], Multipliers] = lambda found: found,
) -> Evidence:
    """Gaps over what the velocity at the end of the flow allows; `early` takes the gap of the network after so many
    steps.
    """
    cases = [(depth, instance) for depth in depths for instance in range(setting.instances(3, 6))]
    steps = setting.either(600, 2000)
    gaps, shares, ratios = [], [], []
    for case in cases:
        problem, network = _bounded(setting, *case)[0], _bounded_flow(setting, *case, steps)
        value = float(problem.value(network))
        allowed = _allowed_by(problem, network, _velocity(problem, network)) + 2 * value_error(problem, network)
        judged = network if early is None else _bounded_flow(setting, *case, early)
        gap = _own_gap(problem, judged, change)
        gaps.append(gap / value)
        shares.append(allowed / value)
        ratios.append(gap / allowed)
    beyond = sum(ratio > VELOCITY_THRESHOLD for ratio in ratios)
    text = (
        f"gaps of the flow's own multipliers {min(gaps):.1e} to {max(gaps):.1e} of J over {len(gaps)} runs, the last "
        f"velocity allows {min(shares):.1e} to {max(shares):.1e}; "
        f"{sum(_held(setting, case, steps) for case in cases)} features end on a bound"
    )
    return Evidence(largest(ratios), text, len(ratios), beyond, _series(cases, ratios))


# --- programs of every kind -----------------------------------------------------------------------------------------

PROGRAM_WIDTHS = ((6,), (6, 4), (5, 4, 3))
PROGRAM_THRESHOLD, HELD_AT = 1e-3, 0.6


def _program_gaps(setting: Setting, iterations: int) -> Evidence:
    """Relative gaps that the splitting proves of drawn programs; those of more layers have bounds that are active."""
    variety, gaps, depths = Variety(setting, 57), [], []
    for instance in range(setting.instances(12, 60)):
        depth = 1 + instance % 3
        problem = variety.problem(instance, depth, side=3)
        network = random_network(problem, PROGRAM_WIDTHS[depth - 1], setting.generator(57, instance))
        if depth > 1:
            problem, network = variety.bounded(problem, network, HELD_AT, instance)
        solved = mf.solvers.splitting.solve(
            mf.ConvexProgram.freeze(problem, network), PROGRAM_THRESHOLD / 10, max_iterations=iterations
        )
        assert solved.certificate is not None
        gaps.append(max(solved.relative_gap, solved.certificate.violation))
        depths.append((depth, instance))
    beyond = sum(gap > PROGRAM_THRESHOLD for gap in gaps)
    text = f"relative gaps {min(gaps):.1e} to {max(gaps):.1e} over {len(gaps)} programs, {beyond} beyond the threshold"
    return Evidence(largest(gaps), text, len(gaps), beyond, _series(depths, gaps))


# --- inside every constraint ----------------------------------------------------------------------------------------

RESTORED_WIDTHS, SLACK = (7, 5), 1.2  # a bound, of what the network reaches
Restoration = Callable[[mf.ConvexProgram, mf.ProgramPoint], mf.ProgramPoint]


def _tight(setting: Setting, instance: int) -> tuple[mf.ConvexProgram, mf.ProgramPoint]:
    """A program in an amplitude bound, and a point outside: other kernels and masses, none on one of two sources that
    are clones.  The frozen network is no way back, as it needs that source, but with its kernels on the twin every
    constraint holds with room to spare.
    """
    generator = setting.generator(58, instance)
    problem = random_problem(
        generator,
        2,
        side=2,
        images=1,
        kernel_size=2,
        bias=instance % 2 == 1,
        kernel_norm=KERNEL_NORMS[instance // 2 % len(KERNEL_NORMS)],
    ).to(device=setting.device)
    network = measures.split(random_network(problem, RESTORED_WIDTHS, generator), 0, 0, torch.tensor([0.5, 0.5]))
    bound = SLACK * reached(problem, network)[0]
    problem = with_penalty(problem, replace(problem.penalty, amplitude_bound=bound))
    masses = [random_masses(width, generator).to(problem.inputs) for width in network.widths]
    masses[0][0] = 0
    masses[0] /= masses[0].sum()
    kernels = [w + normal(w.shape, generator, w) for w in network.kernels]
    moved = mf.ParticleNetwork(network.architecture, masses, kernels, network.readout, network.biases)
    return mf.ConvexProgram.freeze(problem, network), repopulation.to_program(moved)


def _restored_without_the_bound(program: mf.ConvexProgram, point: mf.ProgramPoint) -> mf.ProgramPoint:
    problem = program.problem
    free = with_penalty(problem, replace(problem.penalty, amplitude_bound=None))
    return mf.ConvexProgram.freeze(free, program.frozen).restore(point)


def _violations(setting: Setting, restore: Restoration) -> Evidence:
    """What is left of violations, in units of what a solver may return."""
    found = []
    for instance in range(setting.instances(12, 120)):
        program, point = _tight(setting, instance)
        found.append(program.violation(restore(program, point)) / FEASIBLE[point.readout.dtype])
    beyond = sum(each > 1 for each in found)
    text = f"{min(found):.1e} to {max(found):.1e} of what is allowed over {len(found)} points, {beyond} beyond it"
    return Evidence(largest(found), text, len(found), beyond, (ranked("violation", found),))


THRESHOLD = 1e-4

CLAIMS = (
    Claim(
        name="zero_gap",
        statement="Where the flow comes to rest with positive masses, its convex program has nothing left to gain.",
        source="docs/theory.md, sections 4.2, 5 and 7; Fang et al. 2019, section 5",
        statistic="largest (J - dual value of the program frozen there) / J at the end of the flow",
        threshold=THRESHOLD,
        derivation="a definition: certified to 1e-4 of J. Convexity bounds the excess by the metric speed left times "
        "the distance to the optimum",
        limits="On the features the flow ended with. Other features may do better, and a flow stopped earlier "
        "certifies nothing.",
        measure=lambda setting: _excesses(setting, _limit),
        controls={
            "weights of the limit perturbed by 10%": lambda setting: _excesses(setting, _perturbed),
            "a tenth of the steps": lambda setting: _excesses(setting, _early),
        },
        axes=Axes("run, sorted by its excess", "excess over the dual value / J", "y", THRESHOLD),
    ),
    Claim(
        name="zero_gap.bounded",
        statement="As the flow comes to rest on active bounds, of amplitudes and of inputs, with ReLU as well, its own "
        "multipliers close the gap of its convex program, those of the bounds among them.",
        source="docs/theory.md, sections 5 and 6; derived in this file",
        statistic="largest gap of the flow's own multipliers over what the velocity of particles and masses allows",
        threshold=VELOCITY_THRESHOLD,
        derivation="the flow's equations give the multipliers up to velocities, these the dual value: the ratio is "
        "at most 1, and a thousandth is for the difference quotient that velocities are. The largest velocity counts, "
        "not a mean over masses: light particles move slowly in the metric, and are dual constraints like others",
        limits="One and two layers, later layers without biases, on the features the flow ended with. It holds on the "
        "way too; how near to rest a flow has come is what the velocity allows, given with the gap.",
        measure=_bounded_gaps,
        controls={
            "multipliers of the amplitude bound dropped": lambda setting: _bounded_gaps(
                setting, (2,), change=_without_kappa
            ),
            "50 steps, at the last velocity": lambda setting: _bounded_gaps(setting, early=BOUNDED_EARLY),
        },
        axes=Axes("run, sorted", "gap / what the velocity allows", "y", VELOCITY_THRESHOLD),
    ),
    Claim(
        name="zero_gap.programs",
        statement="The gap closes on programs of every kind: the splitting and the certificate, which do not know each "
        "other, meet.",
        source="docs/theory.md, sections 3, 5 and 7",
        statistic="largest relative duality gap, or violation, of what the splitting returns",
        threshold=PROGRAM_THRESHOLD,
        derivation="a definition: a thousandth of J, after 300 iterations (full: 1,000)",
        limits="Small programs; what larger ones take is measured by the benchmarks.",
        measure=lambda setting: _program_gaps(setting, setting.either(300, 1000)),
        controls={"5 iterations": lambda setting: _program_gaps(setting, 5)},
        axes=Axes("program, sorted by its gap", "relative gap", "y", PROGRAM_THRESHOLD),
    ),
    Claim(
        name="zero_gap.restoration",
        statement="Where the support can meet every constraint, restoration does: what solvers return are points of "
        "the program.",
        source="docs/theory.md, sections 3 and 7; Gurin, Polyak & Raik 1967",
        statistic="largest violation of any constraint after restoration, relative to its scale, over what a solver "
        "may return",
        threshold=1.0,
        derivation="what a solver may return is one tolerance of the library, `problem.FEASIBLE`",
        limits="Two layers, a fifth to spare: where a support can just meet its constraints restoration may not.",
        measure=lambda setting: _violations(setting, lambda program, point: program.restore(point)),
        controls={
            "not restored": lambda setting: _violations(setting, lambda program, point: point),
            "restored without the bound": lambda setting: _violations(setting, _restored_without_the_bound),
        },
        axes=Axes("point, sorted", "violation / what is allowed", "y", 1.0),
    ),
)
