"""Claim 2: the program is jointly convex in (p, W, U), and which assumptions that needs.

Controls replace the source penalty alone: a strictly convex loss could hide them in J.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import meanfield as mf
from meanfield.convex import repopulation
from meanfield.studies import convexity
from meanfield.studies.convexity import Function, ProgramVariables
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting, ranked
from theory_checks.instances import Variety, random_network
from theory_checks.statistics import largest, share_text

WIDTHS = ((6,), (7, 4), (5, 4, 3))
SOURCE = "docs/theory.md, section 3; Fang et al. 2019, section 4; Gu et al. 2020, section 4"
# (|W_ij| (targets, sources), source masses, target masses) -> term
Penalty = Callable[[Tensor, Tensor, Tensor], Tensor]


def _weight_decay(norms: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """sum_ij |w_ij|^2 p_i p_j = sum |W_ij|^2 / (p_i p_j)."""
    return (norms.square() / (target[:, None] * source)).sum()


def _inner_power(norms: Tensor, source: Tensor, target: Tensor, outer: float) -> Tensor:
    """sum_i p_i (sum_j |w_ij|^{3/2} p_j)^outer."""
    inner = ((norms / (target[:, None] * source)) ** 1.5 * target[:, None]).sum(0)
    return (source * inner**outer).sum()


def _concave_outer(norms: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """sum_i p_i sqrt(sum_j |w_ij| p_j)."""
    return (norms.sum(0) * source).sqrt().sum()


PENALTIES: dict[str, Penalty] = {
    "weight decay for the source penalty": _weight_decay,
    "inner power 3/2, r = t^2": partial(_inner_power, outer=2.0),
    "inner power 3/2, r = t": partial(_inner_power, outer=1.0),
    "inner power 3/2, r = t^(4/3)": partial(_inner_power, outer=4 / 3),
    "concave outer r = sqrt(t)": _concave_outer,
}


def _variables(setting: Setting, instance: int, depth: int) -> ProgramVariables:
    problem = Variety(setting, 24).problem(instance, depth, images=2, side=3)
    network = random_network(problem, WIDTHS[depth - 1], setting.generator(2, instance))
    return ProgramVariables(mf.ConvexProgram.freeze(problem, network))


def _program(variables: ProgramVariables) -> Function:
    return variables.objective


def _penalty_alone(penalty: Penalty, variables: ProgramVariables) -> Function:
    """A control's term in the place of the source penalty, over the same variables."""
    norm = variables.program.problem.penalty.norms

    def value(vector: Tensor) -> Tensor:
        point = variables.point(vector)
        return sum(
            (penalty(norm(W), p, q) for W, p, q in zip(point.kernels, point.masses, point.masses[1:])),
            vector.new_zeros(()),
        )

    return value


def _in_weights(variables: ProgramVariables) -> Function:
    """J over (p, w, u, b) themselves: the vector is read as a network."""
    problem, frozen = variables.program.problem, variables.program.frozen

    def value(vector: Tensor) -> Tensor:
        point = variables.point(vector)
        kernels = [frozen.kernels[0], *point.kernels]
        biases = [frozen.biases[0], *point.biases]
        network = mf.ParticleNetwork.unchecked(frozen.architecture, point.masses, kernels, point.readout, biases)
        return problem.terms(network).total()

    return value


def _weights_of(variables: ProgramVariables, vector: Tensor) -> Tensor:
    """(p, w, u, b) of a feasible (p, W, U, B)."""
    point = variables.point(vector)
    network = repopulation.to_network(point, variables.program.frozen)
    biases = [bias for bias in network.biases[1:] if bias is not None]
    return torch.cat([each.flatten() for each in (*network.masses, *network.kernels[1:], network.readout, *biases)])


Objective = Callable[[ProgramVariables], Function]


def _cases(setting: Setting, quick: int, full: int, least_depth: int) -> list[ProgramVariables]:
    depths = range(least_depth, 4)
    return [
        _variables(setting, instance, depths[instance % len(depths)])
        for instance in range(setting.instances(quick, full))
    ]


def _along_segments(setting: Setting, objective: Objective, least_depth: int = 1, weights: bool = False) -> Evidence:
    """Straight lines between feasible points; `weights` takes the same points as networks and joins their weights."""
    shares, violated, lines, worst, shown = [], 0, 0, None, ()
    for instance, variables in enumerate(_cases(setting, 6, 60, least_depth)):
        generator = setting.generator(21, instance)
        points = torch.stack([variables.sample(generator) for _ in range(6)])
        if weights:
            points = torch.stack([_weights_of(variables, point) for point in points])
        function = objective(variables)
        rounding = variables.rounding if objective is _program else None
        found = convexity.segments(function, points, rounding=rounding)
        violated, lines = violated + int(found.violated.sum()), lines + len(found.pairs)
        shares.append(found.worst.violation / found.worst.rounding)
        if worst is None or shares[-1] >= max(shares):
            worst, shown = found.worst, _line(function, found.worst)
    assert worst is not None
    text = (
        f"{share_text(violated, lines, 'lines rise above their chord')}; the worst by {worst.relative:+.1e} of the "
        "chord"
    )
    return Evidence(largest(shares), text, lines, violated, shown, worst)


@torch.no_grad()
def _line(function: Function, witness: convexity.Witness, count: int = 41) -> tuple[Series, ...]:
    """The function along a witness's line, less its chord, in units of the chord's scale."""
    times = torch.linspace(0, 1, count, dtype=witness.start.dtype).tolist()
    values = [float(function((1 - t) * witness.start + t * witness.end)) for t in times]
    rise = [(v - (1 - t) * values[0] - t * values[-1]) / max(witness.scale, 1e-300) for t, v in zip(times, values)]
    return (Series("worst line", times, rise),)


def _curvatures(setting: Setting, objective: Objective, least_depth: int = 1) -> Evidence:
    """Smallest eigenvalue of the Hessian on the tangent space of the constraints, in units of its rounding."""
    ratios, relative, negative = [], [], 0
    for instance, variables in enumerate(_cases(setting, 4, 60, least_depth)):
        point = variables.sample(setting.generator(22, instance))
        found = convexity.curvature(
            objective(variables), point, variables.tangent(point), seed=setting.derived_seed(22, instance)
        )
        ratios.append(-found.smallest / found.rounding)
        relative.append(-found.smallest / max(abs(found.smallest), abs(found.largest)))
        negative += found.negative
    text = (
        f"{share_text(negative, len(ratios), 'points have negative curvature')}; most negative eigenvalue over the "
        f"largest {max(relative):+.1e}"
    )
    series = ranked("minus the smallest eigenvalue / its rounding", ratios)
    return Evidence(largest(ratios), text, len(ratios), negative, (series,))


def _adversary(setting: Setting, objective: Objective, least_depth: int = 1) -> Evidence:
    """Gradient ascent of the midpoint's rise over pairs of feasible points."""
    ratios, found_at, worst, shown = [], 0, None, ()
    for instance, variables in enumerate(_cases(setting, 3, 12, least_depth)):
        function = objective(variables)
        rounding = variables.rounding if objective is _program else None
        search = convexity.falsify(
            function,
            variables.sample,
            setting.either(750, 3000),
            seed=setting.derived_seed(23, instance),
            rounding=rounding,
        )
        ratios.append(search.witness.violation / search.witness.rounding)
        found_at += search.falsified
        if worst is None or ratios[-1] >= max(ratios):
            worst, shown = search.witness, _line(function, search.witness)
    assert worst is not None
    text = (
        f"{share_text(found_at, len(ratios), 'searches found a witness')}; the midpoint's worst rise is "
        f"{worst.relative:+.1e} of the chord"
    )
    return Evidence(largest(ratios), text, len(ratios), found_at, shown, worst)


Measurement = Callable[..., Evidence]


def _controls(measurement: Measurement) -> dict[str, Callable[[Setting], Evidence]]:
    def control(penalty: Penalty, setting: Setting) -> Evidence:
        return measurement(setting, partial(_penalty_alone, penalty), least_depth=2)

    return {name: partial(control, penalty) for name, penalty in PENALTIES.items()}


def _claim(
    name: str, statement: str, statistic: str, derivation: str, measurement: Measurement, axes: Axes, **more
) -> Claim:
    return Claim(
        name=f"joint_convexity.{name}",
        statement=statement,
        source=SOURCE,
        statistic=statistic,
        threshold=1.0,
        derivation=derivation,
        limits="Populations of FROZEN features. Moving the features themselves is not covered, and the loss stays "
        "non-convex in weights.",
        measure=lambda setting: measurement(setting, _program),
        controls=_controls(measurement) | more,
        axes=axes,
    )


CLAIMS = (
    _claim(
        "segments",
        "The program's value lies below its chord on every straight line between feasible (p, W, U).",
        "largest rise above a chord, in rounding bounds",
        "the rise of a convex function is at most rounding, which is bounded for the three values it is made of",
        _along_segments,
        Axes("t along the worst line", "rise above the chord / chord", "", 0.0, "chord"),
        **{"J along the same lines in weights": lambda setting: _along_segments(setting, _in_weights, 2, weights=True)},
    ),
    _claim(
        "curvature",
        "The Hessian of the program is positive semi-definite on the tangent space of its constraints.",
        "minus the smallest eigenvalue (autograd products, float64), in units of its rounding",
        "eigenvalues of a computed Hessian move by at most d^(3/2) eps times the largest",
        _curvatures,
        Axes("point, sorted", "minus the smallest eigenvalue / rounding", "", 1.0),
    ),
    _claim(
        "falsification",
        "An adversarial search over pairs of feasible points finds no midpoint above its chord.",
        "largest rise of a midpoint that gradient ascent with restarts finds, in rounding bounds",
        "as for segments; the same search finds a witness in every control",
        _adversary,
        Axes("t along the worst line", "rise above the chord / chord", "", 0.0, "chord"),
    ),
)
