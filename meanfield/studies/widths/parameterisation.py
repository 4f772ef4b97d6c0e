"""The width study of a scaling of one's own, in one call: coordinate check, slopes with intervals, trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from meanfield.bench.sweep import Row, select
from meanfield.bench.task import Task
from meanfield.finite.scaling import Scaling, registered
from meanfield.finite.training import OPTIMISERS
from meanfield.problem import Problem
from meanfield.rates import Slope
from meanfield.signatures import Count, Natural, Positive, Seed, checked
from meanfield.studies.widths import coordinates, pictures, summary, trajectories
from meanfield.validation import Misuse, at_least, choice, integer

WIDTHS = (32, 64, 128, 256)
TASK = Task(pool=4, samples=8, source_penalty=0.0, readout_penalty=0.0, input_penalty=0.0)


@dataclass(frozen=True, eq=False)
class Measured:
    """What became of a scaling over the widths.

    coordinates: the table of the coordinate check, a row per width, seed, step and layer with size and change (means
    of |x| and |x - x at the start|; layers 1..L are pre-activations, "output" is F).  trajectories: a row per width,
    pair, layer, time and kind of comparison with distances of feature measures, as in `meanfield widths`; empty without
    pairs.
    """

    scaling: Scaling
    coordinates: list[Row] = field(repr=False)
    trajectories: list[Row] = field(repr=False)

    @cached_property
    def slopes(self) -> dict[str, Slope]:
        """Layer -> log-log slope over the width of the mean change after the last step, with its 95% interval."""
        return {row["layer"]: row["slope"] for row in summary.coordinate_slopes(self.coordinates)}

    @cached_property
    def sizes(self) -> dict[str, Slope]:
        """Layer -> that of the size at the start."""
        start = select(self.coordinates, step=0)
        found = {layer: summary.rate(select(start, layer=layer), "size") for layer in self.slopes}
        return {layer: each for layer, each in found.items() if each is not None}

    @cached_property
    def approach(self) -> dict[str, Slope]:
        """Kind of comparison ("seeds", "doubled") -> slope over the width of the distance (MMD) of their last features
        at the last time; negative where networks share a limit.
        """
        if not self.trajectories:
            return {}
        rates = summary.trajectory_rates(self.trajectories)["rates"]
        return {row["kind"]: row["slope"] for row in rates if row["distance"] == "mmd"}

    def pictures(self) -> dict[str, Any]:
        """Name -> figure (matplotlib): the changes, and the trajectories where there are some, over the width."""
        found = {"coordinates": pictures.coordinates({"coordinates": self.coordinates})}
        if self.trajectories:
            found["trajectories"] = pictures.trajectories({"trajectories": self.trajectories})
        return found


@checked
def measure_scaling(
    scaling: Annotated[str | Scaling, registered],
    problem: Problem | None = None,
    *,
    widths: Sequence[int] = WIDTHS,
    seeds: Annotated[int, at_least(2)] = 10,
    steps: Count = 1,
    optimiser: Annotated[str, choice(OPTIMISERS)] = "sgd",
    learning_rate: Positive | None = None,
    pairs: Natural = 0,
    times: Count = 16,
    seed: Seed = 0,
) -> Measured:
    """Train networks of several widths in a scaling, and say how what they do depends on the width.

    problem: what they learn; by default two tanh layers on eight of the digits 3 and 5 at 2x2 pixels, without
        penalties, whose gradients would mask the loss's.
    widths: two at least, of every layer.  seeds: starts at each, from `seed` on; they make the intervals.
    steps: of the coordinate check, at a constant rate.  The first step is what abc-parameterisations are derived for;
        with more, what was small in the first may lead.
    learning_rate: default that of the scaling for `optimiser`.
    pairs: of networks whose trajectories are compared at each width, over `times` steps; none by default, they take
        most of the time.

    Misuse where there is one width or one pair.  RuntimeError where a run of the trajectories diverges.
    """
    rule, every = registered(scaling), sorted({integer(each, "widths") for each in widths})
    if pairs == 1:
        raise Misuse("pairs", pairs, "must be 0, or 2 at least: an interval needs them")
    if len(every) < 2:
        raise Misuse("widths", tuple(widths), "must be two widths at least: a slope needs them")
    subject = TASK.problem() if problem is None else problem
    rate = rule.rates[optimiser] if learning_rate is None else learning_rate
    named = {"scaling": rule.name, "optimiser": optimiser}
    rows = [
        {**named, "width": width, "seed": each, **row}
        for width in every
        for each in range(seed, seed + seeds)
        for row in coordinates.along(subject, rule, width, each, optimiser, steps, rate)
    ]
    return Measured(rule, rows, _trajectories(subject, rule, every, range(seed, seed + pairs), times, rate, optimiser))


def _trajectories(
    problem: Problem, scaling: Scaling, widths: Sequence[int], numbers: Sequence[int], steps: int, rate: float, by: str
) -> list[Row]:
    """Checkpoints at 0, 1, 2, 4, ... steps."""
    if not numbers:
        return []
    reached = [0, *(2**power for power in range(steps.bit_length()))]
    options = {"rate": rate, "times": [rate * step for step in reached], "scaling": scaling, "optimiser": by}
    setting = trajectories.setting(problem, problem.inputs)
    return [
        {"arm": scaling.name, "width": width, "number": number, **row}
        for width in widths
        for number in numbers
        for row in trajectories.compared(setting, width, number, doubled=True, **options)
    ]
