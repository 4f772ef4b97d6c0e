"""A scaling of one's own through the width study in one call: known slopes, and what the call hands back."""

import pytest
from strategies import seeded

import meanfield as mf
from meanfield.bench.sweep import select
from meanfield.finite import FiniteCNN, Scaling
from meanfield.studies.widths import summary
from meanfield.studies.widths.parameterisation import TASK, measure_scaling
from meanfield.validation import Misuse

RATES = {"sgd": 1e-4, "adam": 1e-4}  # small: the slopes are those of the first order in the rate


def slopes_of_the_first_step(readout_start, rates):
    """docs/theory.md, section 10, for two layers with forward powers 0 and He's start below the readout."""
    own = [rates["input"] + readout_start, 1 + rates["hidden"] + readout_start]
    second = max(own)
    return {"1": own[0], "2": second, "output": max(1 + rates["readout"], 1 + readout_start + second)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("readout_start", "rates", "expected"),
    [
        (-0.5, {"input": 0, "hidden": 0, "readout": 0}, (-0.5, 0.5, 1)),
        (-0.5, {"input": -1, "hidden": -1, "readout": -1}, (-1.5, -0.5, 0)),
        (-1, {"input": 1, "hidden": 0, "readout": -1}, (0, 0, 0)),
    ],
)
def test_the_interval_holds_the_known_slope(readout_start, rates, expected):
    """The standard parameterisation, with rates that fall like 1/m, and the maximal update; no other seed was tried."""
    known = slopes_of_the_first_step(readout_start, rates)
    assert tuple(known.values()) == expected
    found = measure_scaling(Scaling(initial={"readout": readout_start}, learning_rate=rates, rates=RATES)).slopes
    for layer, slope in found.items():
        assert slope.low <= known[layer] <= slope.high, (layer, str(slope))
        assert slope.high - slope.low < 0.5  # a wrong half would be outside


def test_rows_are_those_of_the_start_and_the_first_step():
    own = Scaling(forward={"readout": -0.5}, initial={"readout": 0}, rates=RATES)
    found = measure_scaling(own, widths=(8, 4), seeds=2, seed=5)
    assert {(row["width"], row["seed"], row["step"]) for row in found.coordinates} == {
        (width, seed, step) for width in (4, 8) for seed in (5, 6) for step in (0, 1)
    }
    problem = TASK.problem()
    start = FiniteCNN.random(problem.architecture, (4, 4), problem.inputs, seeded(6), own)
    (row,) = select(found.coordinates, width=4, seed=6, step=0, layer="output")
    assert row["size"] == pytest.approx(float(start(problem.inputs).abs().mean().detach()))
    assert found.slopes.keys() == found.sizes.keys() == {"1", "2", "output"}
    assert found.trajectories == []
    assert found.approach == {}
    assert found.pictures().keys() == {"coordinates"}


def test_the_rate_and_the_problem_may_be_given():
    """Ten times the rate, ten times the change, to first order."""
    problem = TASK.variant(depth=1).problem()
    options = {"widths": (4, 8), "seeds": 2}
    slow, fast = (measure_scaling("standard", problem, learning_rate=rate, **options) for rate in (1e-6, 1e-5))
    for a, b in zip(slow.coordinates, fast.coordinates, strict=True):
        assert b["change"] == pytest.approx(10 * a["change"], rel=1e-4)
    assert slow.slopes.keys() == {"1", "output"}
    longer, adam = (
        measure_scaling("standard", problem, learning_rate=1e-5, **options, **further)
        for further in ({"steps": 2}, {"optimiser": "adam"})
    )
    assert [row for row in longer.coordinates if row["step"] < 2] == fast.coordinates
    assert {row["step"] for row in longer.coordinates} == {0, 1, 2}
    for a, b in zip(fast.coordinates, adam.coordinates, strict=True):  # of one start, which steps leave differently
        assert (a["size"] == b["size"]) == (a["step"] == 0)
    assert str(longer.sizes) == str(fast.sizes)  # of the start


def test_trajectories_come_with_pairs():
    found = measure_scaling("mean_field", widths=(4, 8), seeds=2, pairs=2, times=2, optimiser="adam", seed=5)
    assert {row["number"] for row in found.trajectories} == {5, 6}
    rates = summary.trajectory_rates(found.trajectories)["rates"]
    assert found.approach == {row["kind"]: row["slope"] for row in rates if row["distance"] == "mmd"}
    assert len({row["distance"] for row in rates}) > 1
    assert found.approach.keys() == {"seeds", "doubled"}
    times = {row["time"] / 0.05 for row in select(found.trajectories, kind="seeds")}
    assert times == {0, 1, 2}
    assert found.pictures().keys() == {"coordinates", "trajectories"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 8)}, r"widths=\(8, 8\) must be two widths at least"),
        ({"pairs": 1}, "pairs=1 must be 0, or 2 at least"),
        ({"seeds": 1}, "seeds=1 must be an integer of at least 2"),
        ({"scaling": "mupp"}, "scaling='mupp' is unknown.*did you mean 'mup'"),
    ],
)
def test_what_gives_no_interval_is_refused(options, message):
    with pytest.raises(Misuse, match=message):
        measure_scaling(**{"scaling": "mup", **options})


def test_a_divergence_of_a_trajectory_is_said():
    wild = Scaling(rates={"sgd": 1e9, "adam": 1.0})
    problem = TASK.problem()
    relu = mf.Architecture(problem.architecture.input_shape, (mf.Conv(2, activation="relu"),), outputs=1)
    with pytest.raises(RuntimeError, match=r"width 4, seed 0: .*left all bounds"):
        measure_scaling(wild, mf.Problem(relu, problem.inputs, problem.targets), widths=(4, 8), seeds=2, pairs=2)
