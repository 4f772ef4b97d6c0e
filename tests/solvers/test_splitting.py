"""The splitting solver against stored optima, against CLARABEL, and in the corners of the convex program."""

import math
from dataclasses import replace

import pytest
import reference as slow
import torch
from hypothesis import given
from stored_optima import TRUTH, stored_case
from strategies import architectures, cases, costly, normal, random_inputs, random_network, random_targets, seeded

import meanfield as mf
from meanfield import certificates
from meanfield.solvers import splitting

ROUNDING = 1e-9  # of certified figures of order one


def make(widths=(5, 4), loss="squared", count=4, dtype=torch.float64, seed=0, **penalty):
    arch = mf.Architecture((1, 3, 3), tuple(mf.Conv(2, activation="tanh") for _ in widths), outputs=2)
    strengths = {"source": 0.02, "readout": 0.03, "input": 0.01} | penalty
    inputs, targets = random_inputs(arch, count, seed, dtype), random_targets(loss, 2, count, seed)
    problem = mf.Problem(arch, inputs, targets, loss, mf.Penalty(**strengths))
    return problem, random_network(arch, widths, seed, dtype)


def program(*arguments, **options):
    return mf.ConvexProgram.freeze(*make(*arguments, **options))


@pytest.fixture(scope="module", params=sorted(TRUTH))
def solved(request):
    problem, network, settings = stored_case(request.param)
    frozen = mf.ConvexProgram.freeze(problem, network)
    return request.param, frozen, splitting.solve(frozen, tolerance=1e-6), settings


def test_stored_optimum_is_reached(solved):
    name, _, solution, settings = solved
    truth, tolerance = TRUTH[name]
    assert solution.status == "optimal"
    assert solution.value == pytest.approx(settings["optimum"], rel=tolerance)
    assert solution.value == pytest.approx(truth, rel=1e-6)
    assert solution.certificate.violation < 1e-7
    assert -ROUNDING <= solution.gap < 1e-6 * solution.value


def test_stored_optimum_lies_in_its_bracket(solved):
    name, _, solution, _ = solved
    low, high = (1.08029856, 1.08029880) if name == "tanh_softmax_l1" else (0.46029874, 0.46029875)
    assert low - ROUNDING <= solution.value <= high + solution.gap + ROUNDING
    assert solution.value - solution.gap <= high + ROUNDING


def test_stored_answer_is_a_network_of_its_value(solved):
    _, frozen, solution, settings = solved
    assert frozen.problem.value(solution.network).item() == pytest.approx(solution.value, rel=1e-9)
    assert frozen.value(solution.point).item() == pytest.approx(solution.value, rel=1e-12)
    assert solution.value < settings["start"]
    assert solution.history[-1]["value"] == solution.value
    assert solution.history[-1]["gap"] == solution.gap


def test_stored_multipliers_reproduce_the_gap(solved):
    _, frozen, solution, _ = solved
    again = certificates.certify(frozen, solution.point, solution.multipliers)
    assert again.gap == pytest.approx(solution.gap, abs=1e-12)
    assert again.violation == pytest.approx(solution.certificate.violation, abs=1e-14)


def test_history_tightens_both_sides(solved):
    _, _, solution, _ = solved
    values, duals = ([row[name] for row in solution.history] for name in ("value", "dual_value"))
    assert values == sorted(values, reverse=True)
    assert duals == sorted(duals)
    assert all(row["gap"] == row["value"] - row["dual_value"] for row in solution.history)
    assert [row["iteration"] for row in solution.history] == sorted({row["iteration"] for row in solution.history})


@pytest.mark.slow
@costly(40)
@given(cases(archs=architectures(sides=(2, 3)), max_width=3, zero_mass=(False, True)))
def test_agrees_with_clarabel_within_the_two_certified_gaps(case):
    frozen = case.freeze
    ours, theirs = splitting.solve(frozen, tolerance=1e-6), slow.solve(frozen)
    start = frozen.value(frozen.point(case.network)).item()
    assert ours.status == "optimal"
    assert ours.certificate.violation <= 1e-8
    assert -ROUNDING <= ours.gap <= 1e-6 * ours.value
    # each value lies above the optimum by at most its gap; CLARABEL's point meets its constraints to 1e-8 only
    slack = 1e-7 * (1 + ours.value)
    assert ours.value - theirs.value <= ours.gap + slack
    assert theirs.value - ours.value <= theirs.gap + slack
    assert ours.value <= start + ROUNDING
    assert case.problem.value(ours.network).item() <= ours.value + 1e-8 * (1 + ours.value)
    again = certificates.certify(frozen, ours.point, ours.multipliers)
    assert again.gap == pytest.approx(ours.gap, abs=ROUNDING)


@costly(10)
@given(cases(archs=architectures(sides=(2, 4))))
def test_never_worse_than_the_frozen_network_however_early_it_stops(case):
    frozen = case.freeze
    solution = splitting.solve(frozen, tolerance=1e-12, max_iterations=1, check_every=1)
    start = frozen.value(frozen.point(case.network)).item()
    assert solution.value <= start + 8 * torch.finfo(torch.float64).eps * abs(start)
    assert solution.gap >= -ROUNDING
    assert solution.certificate.violation < 1e-7


@pytest.mark.parametrize("stop", [1, 3])
def test_ctrl_c_keeps_the_best_point(stop):
    frozen, rows = program(), []

    def interrupt(row):
        rows.append(row)
        if len(rows) == stop:
            raise KeyboardInterrupt

    solution = splitting.solve(frozen, tolerance=1e-15, check_every=5, callback=interrupt)
    assert solution.status == "interrupted"
    assert "stopped by the user" in solution.message
    assert len(solution.history) == stop
    assert solution.value == min(row["value"] for row in rows)
    assert solution.certificate.violation < 1e-7


@pytest.mark.parametrize(
    ("options", "status"),
    [({"max_iterations": 5}, "max_iterations"), ({"max_seconds": 0.0, "check_every": 5}, "max_seconds")],
)
def test_limits_are_statuses_with_an_honest_gap(options, status):
    frozen = program()
    truth = splitting.solve(frozen, tolerance=1e-9)
    solution = splitting.solve(frozen, tolerance=1e-12, **options)
    assert solution.status == status
    assert solution.history[-1]["iteration"] == (5 if status == "max_iterations" else 1)
    assert solution.gap >= solution.value - truth.value - ROUNDING
    assert solution.gap > 1e-6


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"tolerance": math.nan}, {"max_iterations": 0}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        splitting.solve(program(), **options)


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_single_precision_reaches_a_gap_of_1e_5(name):
    problem, network, _ = stored_case(name)
    frozen = mf.ConvexProgram.freeze(problem, network).to(dtype=torch.float32)
    solution = splitting.solve(frozen, tolerance=1e-5)  # measured: 2.5e-7 and 6.2e-7 relative are within reach
    assert solution.status == "optimal"
    assert {t.dtype for t in (*solution.network.tensors(), *solution.point.masses)} == {torch.float32}
    # constraints and value are met to single rounding only: the violation moves the value by as much, relatively
    assert solution.certificate.violation < 1e-5
    assert solution.value == pytest.approx(TRUTH[name][0], rel=2e-5)


@pytest.mark.parametrize("silent", [("source",), ("readout",), ("input",), ("source", "readout", "input")])
def test_zero_penalties_end_with_a_finite_answer(silent):
    frozen = program(**dict.fromkeys(silent, 0.0))
    solution = splitting.solve(frozen, tolerance=1e-4, max_iterations=2000)
    assert solution.status in ("optimal", "max_iterations")
    assert math.isfinite(solution.value)
    assert solution.gap >= -ROUNDING
    assert all(torch.isfinite(tensor).all() for tensor in solution.network.tensors())
    assert solution.value <= frozen.value(frozen.point(frozen.frozen)).item()


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("zero", ["source", "input"])
def test_zero_penalties_agree_with_clarabel(zero, norm):
    frozen = program(kernel_norm=norm, **{zero: 0.0})
    ours, theirs = splitting.solve(frozen, tolerance=1e-6), slow.solve(frozen)
    assert ours.value == pytest.approx(theirs.value, rel=1e-5)


def test_candidates_of_zero_mass_never_raise_the_optimum_and_can_lower_it():
    problem, network = make((4, 3))
    grown = mf.measures.extend(network, [3, 3], 0.5, seeded(0))
    few, many = (splitting.solve(mf.ConvexProgram.freeze(problem, net), tolerance=1e-8) for net in (network, grown))
    assert many.value <= few.value + many.gap
    assert many.value < few.value - few.gap - many.gap  # beyond what the gaps could hide
    assert any((p[m:] > 0).any() for p, m in zip(many.point.masses, network.widths))


def test_duplicate_particles_change_nothing():
    problem, network = make()
    doubled = mf.measures.split(network, 0, 1, torch.tensor([0.3, 0.7], dtype=torch.float64))
    doubled = mf.measures.split(doubled, 1, 2, torch.tensor([0.5, 0.5], dtype=torch.float64))
    one, two = (splitting.solve(mf.ConvexProgram.freeze(problem, net), tolerance=1e-8) for net in (network, doubled))
    assert abs(one.value - two.value) <= max(one.gap, two.gap) + ROUNDING


def test_permuted_particles_change_nothing():
    problem, network = make()
    permuted = mf.measures.permute(network, [torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 0, 3, 1])])
    one, two = (splitting.solve(mf.ConvexProgram.freeze(problem, net), tolerance=1e-8) for net in (network, permuted))
    assert one.value == pytest.approx(two.value, rel=1e-8)


@pytest.mark.parametrize("loss", ["squared", "softmax", "logistic"])
def test_one_image(loss):
    problem, network = make(count=2, loss=loss)
    frozen = mf.ConvexProgram.freeze(problem.batch(torch.tensor([0])), network)
    ours, theirs = splitting.solve(frozen), slow.solve(frozen)
    assert ours.status == "optimal"
    assert ours.value == pytest.approx(theirs.value, abs=ours.gap + theirs.gap + 1e-7)


def test_single_particles_leave_a_ridge_regression_with_a_closed_form():
    """M_1 = M_2 = 1: masses are one, W is fixed by its constraint, and u solves a scalar least-squares problem per
    output.
    """
    problem, network = make((1, 1), count=5)
    frozen = mf.ConvexProgram.freeze(problem, network)
    solution = splitting.solve(frozen, tolerance=1e-8)
    f, y = frozen.readout_features[:, 0], problem.targets
    u = (f @ y / 5) / (f @ f / 5 + 2 * 0.03)
    kernels = network.kernels[1].square().sum().item() * 0.02 + network.kernels[0].square().sum().item() * 0.01
    expected = 0.5 * (f[:, None] * u - y).square().sum(1).mean().item() + 0.03 * u.square().sum().item() + kernels
    assert solution.value == pytest.approx(expected, abs=solution.gap + ROUNDING)
    assert [p.tolist() for p in solution.point.masses] == [[1.0], [1.0]]


def test_large_readout_penalty_leaves_no_readout():
    frozen = program((3,), readout=1e3, input=0.3)
    solution = splitting.solve(frozen, tolerance=1e-8)
    zero = 0.5 * frozen.problem.targets.square().sum(1).mean().item() + frozen.feature_costs.min().item()
    assert solution.value == pytest.approx(zero, rel=1e-3)
    assert solution.value <= zero + solution.gap


def test_a_looser_tolerance_never_costs_more_iterations():
    frozen = program(seed=3)
    counts = [splitting.solve(frozen, tolerance=t, check_every=10).history[-1]["iteration"] for t in (1e-2, 1e-4, 1e-8)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_starting_metric_does_not_move_the_optimum():
    frozen = program()
    values = [splitting.solve(frozen, tolerance=1e-8, rho=rho) for rho in (0.1, 1.0, 10.0)]
    assert max(s.value for s in values) - min(s.value for s in values) <= max(s.gap for s in values) + ROUNDING


def test_a_perturbed_feasible_point_has_a_larger_gap():
    frozen = program()
    solution = splitting.solve(frozen, tolerance=1e-9)
    masses = tuple(p + 0.05 * normal(p.shape, 9).abs() for p in solution.point.masses)
    moved = frozen.restore(
        solution.point.__class__(masses, solution.point.kernels, solution.point.readout, solution.point.biases)
    )
    judged = certificates.certify(frozen, moved, solution.multipliers)
    assert judged.violation < 1e-7
    assert judged.gap >= judged.value - solution.value - ROUNDING
    assert judged.gap > solution.gap


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_the_order_of_the_images_changes_nothing_but_rounding(name):
    """Down to the weights of the metric: they follow from multipliers, and must not tell a zero from its rounding."""
    problem, network, _ = stored_case(name)
    backwards = problem.batch(torch.arange(len(problem.inputs)).flip(0))
    runs = []
    for each in (problem, backwards):
        run = splitting._Run(mf.ConvexProgram.freeze(each, network), 1.0, 1e-12, None)
        run.iterate(100, 200)
        runs.append(run)
    first, second = (run.splitting.weights for run in runs)
    assert first == {key: pytest.approx(weight, rel=1e-6) for key, weight in second.items()}
    assert runs[0].value == pytest.approx(runs[1].value, rel=1e-9)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("readout", ["average", "flatten"])
def test_readout_and_output_move_to_the_nearest_pair(count, readout):
    """min w_U |U - U^|^2 + w_F |F - F^|^2 over F = features U, whichever side of the features is smaller."""
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"),), readout, 2)
    problem = mf.Problem(arch, random_inputs(arch, count, 0), normal((count, 2), 1))
    frozen = mf.ConvexProgram.freeze(problem, random_network(arch, (5,), 0))
    run = splitting._Run(frozen, 1.0, 1e-6, None).splitting
    state = run.state + normal(run.state.shape, 4)
    U, F = (run.blocks(run._project(run.blocks(state)))[key] for key in (("U", 0), ("F", 0)))
    rows, roots = frozen.readout_features.flatten(1), [math.sqrt(run.weight(key)) for key in (("U", 0), ("F", 0))]
    wanted = run.blocks(state)["U", 0][0].movedim(1, 2).flatten(0, 1)
    stacked = torch.cat([roots[0] * torch.eye(rows.shape[1], dtype=torch.float64), roots[1] * rows])
    goal = torch.cat([roots[0] * wanted, roots[1] * run.blocks(state)["F", 0]])
    best = torch.linalg.lstsq(stacked, goal).solution
    torch.testing.assert_close(U[0].movedim(1, 2).flatten(0, 1), best)
    torch.testing.assert_close(F, rows @ best)


def test_what_coordinates_promise_is_confirmed_on_the_images():
    """A row space that is empty promises that any kernels will do: no such point is returned, or called optimal."""
    whole = program()
    space = whole.spaces[0]
    blind = replace(whole, spaces=(space._replace(right=space.right[:, :0]),))
    solution = splitting.solve(blind, 1e-6, max_iterations=400)
    assert solution.status == "max_iterations"
    assert solution.certificate.violation <= 1e-12
    assert solution.value == pytest.approx(whole.problem.value(solution.network).item(), rel=1e-12)
    assert splitting.solve(whole, 1e-6, max_iterations=400).value <= solution.value


def test_an_answer_that_nobody_could_confirm_says_so(monkeypatch):
    frozen = program()
    monkeypatch.setattr(mf.ConvexProgram, "violation", stopped)
    solution = splitting.solve(frozen, 1e-6, max_iterations=50)
    assert solution.status == "interrupted"
    assert solution.certificate is None
    assert math.isinf(solution.gap)
    assert "no time or memory left to certify it" in solution.message
    assert solution.value == pytest.approx(frozen.problem.value(frozen.frozen).item(), rel=1e-12)


def stopped(*_):
    raise KeyboardInterrupt
