"""The outer loop on tiny problems."""

import math
from itertools import pairwise

import pytest
import torch
from stops import interrupt_at
from stored_optima import EXACT_ONE_LAYER, one_layer_problem
from strategies import seeded

import meanfield as mf
from meanfield import limits, starts
from meanfield.certificates import UnseenFeatures, search
from meanfield.solvers import alternating
from meanfield.solvers.solution import STATUS_TEXTS

COLUMNS = {
    "round",
    "phase",
    "seconds",
    "rate",
    "flow_drop",
    "flow_speed",
    "flow_value",
    "flow_gap",
    "value",
    "dual_value",
    "gap",
    "violation",
    "widths",
    "accepted",
    "flow_steps",
    "program_iterations",
}
OPTIONS = {"rounds": 3, "flow_steps": 20, "program_iterations": 200, "tolerance": 1e-10}


def tiny(dtype=torch.float64, widths=(8, 4), seed=0):
    """Six digits 3 and 5 of 4x4 pixels, two tanh layers, and a low-rank start."""
    digits = mf.data.load("digits", classes=(3, 5), samples=6, pool=2)
    layer = mf.Conv(3, padding=1, activation="tanh")
    arch = mf.Architecture(digits.input_shape, (layer, layer))
    penalty = mf.Penalty(source=3e-3, readout=3e-2, input=3e-3)
    problem = mf.Problem(arch, digits.inputs.to(dtype), digits.targets("squared").to(dtype), penalty=penalty)
    return problem, starts.start(arch, widths, problem.inputs, seeded(seed), "low_rank")


@pytest.fixture(scope="module")
def run():
    problem, network = tiny()
    return problem, network, alternating.solve(problem, network, **OPTIONS)


def test_the_value_never_rises(run):
    problem, network, solution = run
    values = [problem.value(network).item()]
    for row in solution.history:
        assert row["flow_value"] <= values[-1] + 1e-12
        assert row["value"] <= row["flow_value"] + 1e-12
        values.append(row["value"])
    assert solution.value == values[-1]
    assert values[-1] < 0.9 * values[0]


def test_history_rows_are_complete(run):
    _, _, solution = run
    assert [row["round"] for row in solution.history] == [0, 1, 2]
    for row in solution.history:
        assert set(row) == COLUMNS
        assert row["violation"] < 1e-7
        assert 1 <= row["program_iterations"] <= 200
        assert 1 <= row["flow_steps"] <= 20
        assert all(1 <= now <= start for now, start in zip(row["widths"], (8, 4)))


def test_gaps_bracket_what_they_measure(run):
    _, _, solution = run
    for row in solution.history:
        assert row["flow_gap"] == pytest.approx(row["flow_value"] - row["dual_value"], abs=1e-15)
        assert row["flow_gap"] >= row["value"] - row["dual_value"] - 1e-12
        assert row["value"] - row["dual_value"] >= -1e-9
        assert row["gap"] >= -1e-9


def test_the_answer_is_consistent(run):
    problem, _, solution = run
    assert solution.value == pytest.approx(problem.value(solution.network).item(), abs=1e-9)
    assert solution.status == "max_rounds"
    assert STATUS_TEXTS["max_rounds"] in solution.message
    assert f"value {solution.value:.8g}" in solution.message
    assert "3 rounds" in solution.message
    assert solution.lower_bound is None
    assert solution.certificate.violation < 1e-7
    assert list(solution.network.widths) == solution.history[-1]["widths"]


def test_same_seed_same_answer():
    problem, network = tiny()
    options = {**OPTIONS, "rounds": 2, "clones": (2, 2)}
    runs = [alternating.solve(problem, network, seed=seed, **options) for seed in (0, 0, 1)]
    assert runs[0].value == runs[1].value
    assert all(torch.equal(a, b) for a, b in zip(runs[0].network.tensors(), runs[1].network.tensors(), strict=True))
    assert runs[0].value != runs[2].value


def test_flows_of_minibatches_report_and_compare_all_images():
    problem, network = tiny()
    rows = []
    options = {"rounds": 1, "flow_steps": 20, "program_iterations": 20, "batch_size": 3}
    solved = alternating.solve(problem, network, callback=rows.append, **options)
    assert solved.value == pytest.approx(float(problem.value(solved.network)))
    flow = [row for row in rows if row["phase"] == "flow"]
    assert [row["step"] for row in flow] == [0, 10, 20]  # J on all images costs a pass: once in five epochs of two
    assert min(row["value"] for row in flow) == solved.history[0]["flow_value"]
    assert flow[0]["value"] == pytest.approx(float(problem.value(network)))


def test_clones_enter_as_candidates_and_never_raise_the_value():
    problem, network = tiny(widths=(4, 3))
    plain, grown = (
        alternating.solve(problem, network, clones=clones, **{**OPTIONS, "rounds": 1}) for clones in (None, (3, 2))
    )
    assert grown.history[0]["flow_value"] == plain.history[0]["flow_value"]
    rounding = 8 * torch.finfo(torch.float64).eps * plain.value  # of two sums; both gaps can be exactly zero
    assert grown.value <= plain.value + plain.gap + grown.gap + rounding
    assert grown.value <= grown.history[0]["flow_value"]
    assert [m - n for m, n in zip(mf.measures.extend(network, (3, 2), 0.3, seeded(0)).widths, network.widths)] == [
        3,
        2,
    ]


def test_convergence_is_a_flow_that_ends_at_its_programs_optimum():
    problem, network = tiny()
    solution = alternating.solve(problem, network, rounds=6, flow_steps=150, tolerance=0.05, program_iterations=2000)
    assert solution.status == "alternation_converged"
    assert STATUS_TEXTS["alternation_converged"] in solution.message
    *earlier, last = solution.history
    assert last["flow_gap"] <= 0.05 * last["flow_value"]
    assert all(row["flow_gap"] > 0.05 * row["flow_value"] for row in earlier)


@pytest.mark.parametrize("phase", ["flow", "program", "round"])
@pytest.mark.parametrize("when", [0, 1])
def test_ctrl_c_in_any_phase_keeps_the_best(phase, when):
    problem, network = tiny()

    def interrupt(row):
        if row["phase"] == phase and row["round"] == when:
            raise KeyboardInterrupt

    solution = alternating.solve(problem, network, callback=interrupt, **OPTIONS)
    assert solution.status == "interrupted"
    assert solution.value == pytest.approx(problem.value(solution.network).item(), abs=1e-9)
    assert solution.value <= problem.value(network).item() + 1e-12
    assert all(solution.value <= row["value"] for row in solution.history)


def test_time_limit_is_a_status():
    problem, network = tiny()
    solution = alternating.solve(problem, network, max_seconds=0.0, **OPTIONS)
    assert solution.status == "max_seconds"
    assert STATUS_TEXTS["max_seconds"] in solution.message
    assert solution.value == pytest.approx(problem.value(network).item(), abs=1e-12)


def test_callback_sees_all_phases_in_order():
    rows = []
    problem, network = tiny()
    solution = alternating.solve(problem, network, callback=rows.append, **{**OPTIONS, "rounds": 2})
    order = list(dict.fromkeys((row["round"], row["phase"]) for row in rows))
    assert order == [(index, phase) for index in (0, 1) for phase in ("flow", "program", "round")]
    assert [row for row in rows if row["phase"] == "round"] == solution.history


def test_a_program_that_finds_nothing_leaves_the_flows_answer():
    problem, network = tiny()
    solution = alternating.solve(problem, network, **{**OPTIONS, "rounds": 2, "program_iterations": 1})
    assert [row["value"] <= row["flow_value"] for row in solution.history] == [True, True]
    assert solution.gap >= -1e-9


def test_runs_in_single_precision():
    problem, network = tiny(torch.float32)
    solution = alternating.solve(problem, network, **OPTIONS)
    assert {tensor.dtype for tensor in solution.network.tensors()} == {torch.float32}
    assert solution.value == pytest.approx(problem.value(solution.network).item(), rel=1e-4)
    values = [problem.value(network).item(), *(row["value"] for row in solution.history)]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(values))


@pytest.mark.parametrize("options", [{"rounds": 0}, {"tolerance": 0.0}])
def test_bad_options_are_named(options):
    problem, network = tiny()
    with pytest.raises(ValueError, match=next(iter(options))):
        alternating.solve(problem, network, **options)


def test_a_flow_that_lowers_nothing_cannot_end_the_run_and_is_slowed_down(monkeypatch):
    monkeypatch.setattr(alternating, "RATE", 50.0)  # far too fast: the flow returns the network that it was given
    problem, network = tiny()
    solution = alternating.solve(problem, network, rounds=2, flow_steps=3, tolerance=1e-2)
    first, second = solution.history
    assert first["flow_drop"] <= 0
    assert second["flow_drop"] <= 0
    assert second["flow_gap"] <= 1e-2 * second["flow_value"]  # by construction: it is the program's own gap
    assert second["rate"] == alternating.RATE_CUT * first["rate"]
    assert solution.status == "max_rounds"


def test_growth_takes_a_poor_support_to_the_exact_optimum_and_claims_only_what_is_proven():
    problem = one_layer_problem()
    solution = mf.solve(problem, (2,), rounds=12, grow=4, flow_steps=20, tolerance=1e-3)
    values = [row[key] for row in solution.history for key in ("flow_value", "value")]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(values))
    exact = EXACT_ONE_LAYER
    assert exact - 1e-9 <= solution.value <= exact * (1 + 1e-3)
    assert solution.status == "search_converged"
    assert "best of" in solution.message
    assert solution.lower_bound == max(row["proven_bound"] for row in solution.history) <= exact + 1e-9
    for row in solution.history:
        assert row["search_bound"] >= row["proven_bound"] - 1e-12
        assert row["unseen_chance"] == min(1, 2.0 ** (1 - row["search_reached"]))
        assert 0 <= row["unseen_lowering"] < math.inf
        assert len(row["kept"]) <= row["added"] <= 4
        assert all(0 <= index < row["widths"][-1] for index in row["kept"] if row["accepted"])
    assert solution.history[0]["added"] == 0
    assert sum(len(row["kept"]) for row in solution.history) > 0


@pytest.mark.parametrize("share", [1, 0.01])
def test_a_bound_above_the_value_raises_an_alarm_and_ends_no_run(share, monkeypatch):
    """A search that missed everything: its bound is twice J, or twice what another run has reached."""
    problem, network = tiny()
    value = share * problem.value(network).item()
    attained = None if share == 1 else value
    monkeypatch.setattr(search._Search, "run", lambda *_: UnseenFeatures(2 * value, 7))
    solution = alternating.solve(problem, network, grow=2, attained=attained, **{**OPTIONS, "tolerance": 1e-2})
    assert solution.status == "max_rounds"
    assert len(solution.history) == OPTIONS["rounds"]
    assert all(row["refuted_bound"] == 2 * value for row in solution.history)
    assert all(row["search_bound"] == min(value, solution.value) for row in solution.history)
    assert "7 starts" in solution.message
    assert "refuted by J" in solution.message
    assert "for every network" not in solution.message
    assert f"WARNING: 3 of 3 searches gave bounds above a J that was reached, up to {2 * value:.8g}" in solution.message


def test_a_bound_that_a_later_round_goes_below_is_refuted_in_its_row(monkeypatch):
    problem, network = tiny()
    close = lambda made, *_: UnseenFeatures(float(problem.value(made.network)) * (1 - 1e-5), 7)  # noqa: E731
    monkeypatch.setattr(search._Search, "run", close)
    shown = []
    solution = alternating.solve(
        problem, network, **{**OPTIONS, "rounds": 2, "tolerance": 1e-9}, grow=2, callback=shown.append
    )
    (before, _), (first, last) = [row for row in shown if row["phase"] == "round"], solution.history
    assert before["refuted_bound"] is None
    assert before["search_bound"] > solution.value
    assert (first["search_bound"], first["refuted_bound"]) == (solution.value, before["search_bound"])
    assert last["refuted_bound"] is None
    assert "WARNING: 1 of 2 searches" in solution.message


class TestResume:
    """An alternation that was broken off goes on from its file to the same bits."""

    @pytest.mark.parametrize(
        "options",
        [{}, pytest.param({"grow": 2}, marks=pytest.mark.slow), {"batch_size": 3, "clones": (2, 2)}],
        ids=["plain", "grow", "batches"],
    )
    def test_bits(self, tmp_path, monkeypatch, options):
        monkeypatch.setattr(alternating, "STARTS", 2)
        monkeypatch.setattr(alternating, "CONFIRMING_STARTS", 3)
        problem, network = tiny(widths=(4, 3))
        options = {"rounds": 2, "flow_steps": 12, "program_iterations": 60, "tolerance": 1e-9, **options}
        whole = alternating.solve(problem, network, **options)
        state, found, moments = tmp_path / "state.safetensors", None, [2, 9, 17, 30, 41, 53, 66]
        while found is None or found.status == "interrupted":
            with limits.watched(interrupt_at(moments.pop(0) if moments else math.inf)):
                try:
                    found = alternating.solve(problem, network, **options, state=state, state_seconds=0.0)
                except KeyboardInterrupt:  # before there was anything to return
                    continue
        assert not moments
        for again in (
            found,
            alternating.solve(problem, network, **options, state=state),
        ):  # once more: from the file at once
            assert again.status == whole.status
            assert again.value == whole.value
            assert all(map(torch.equal, again.network.tensors(), whole.network.tensors()))
            assert all(map(torch.equal, again.multipliers.realisation, whole.multipliers.realisation))
            rows, expected = ([{**row, "seconds": 0} for row in each.history] for each in (again, whole))
            assert repr(rows) == repr(expected)
        assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
        longer = alternating.solve(problem, network, **{**options, "rounds": 3}, state=state)
        assert len(longer.history) == 3
        with pytest.raises(ValueError, match="is of another run: its seed is 0, here 1"):
            alternating.solve(problem, network, **options, state=state, seed=1)
