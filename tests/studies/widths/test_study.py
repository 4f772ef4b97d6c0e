import math

import numpy as np
import pytest
import torch
from strategies import random_network

from meanfield import finite, measures, starts
from meanfield.bench import distances
from meanfield.bench.provenance import Provenance
from meanfield.bench.sweep import select
from meanfield.bench.task import Task
from meanfield.rates import Slope
from meanfield.studies.widths import coordinates, networks, plan, summary, trajectories
from meanfield.studies.widths.study import STUDY

TASK = Task(pool=4, samples=6)
CELL = TASK.to_dict()


@pytest.fixture(scope="module", params=[1, 2, 3])
def network(request):
    problem = TASK.variant(depth=request.param).problem()
    return problem, random_network(problem.architecture, (4, 3, 5)[: request.param], seed=request.param)


def counts(network, width, seed=0):
    return [c[0] for c in networks.draw_masses(network, width, 1, "masses", np.random.default_rng(seed))]


def test_a_sampled_network_is_the_measure_at_the_masses_that_were_drawn(network):
    """Against the finite network that holds every drawn channel."""
    problem, measure = network
    masses = networks.draw_masses(measure, 7, 5, "masses", np.random.default_rng(0))
    _, output = networks.sampled_responses(measure, problem.inputs, masses)
    for draw in range(5):
        chosen = [torch.repeat_interleave(torch.arange(len(p[draw])), (7 * p[draw]).round().long()) for p in masses]
        drawn = measures.select(measure, chosen)
        channels = finite.FiniteCNN(measure.architecture, drawn.kernels, drawn.readout, drawn.biases)
        assert channels.widths == (7,) * problem.architecture.depth
        torch.testing.assert_close(output[draw], channels(problem.inputs), rtol=0, atol=1e-11)


def test_masses_are_drawn_with_the_right_mean_and_covariance(network):
    _, measure = network
    draws, width = 4000, 10
    for p, found in zip(
        measure.masses, networks.draw_masses(measure, width, draws, "masses", np.random.default_rng(1))
    ):
        torch.testing.assert_close(found.sum(1), torch.ones(draws, dtype=torch.float64))
        error = (p * (1 - p) / width / draws).sqrt()
        assert ((found.mean(0) - p).abs() <= 4.5 * error).all()
        np.testing.assert_allclose(found.var(0), p * (1 - p) / width, rtol=0.25)


def test_one_layer_has_the_closed_form_of_monte_carlo():
    """E |F_m - F|^2 = (sum_j p_j |<u_j, f_j>|^2 - |F|^2) / m for one layer, and without the masses the bias stays."""
    task = TASK.variant(depth=1)
    problem = task.problem()
    network = networks._limit(task, 0).network
    responses = network.responses(problem.inputs)
    read = problem.architecture.readout_features(responses.features[0])
    single = torch.stack([network.readout[0, j] * read[:, j] for j in range(network.widths[0])])
    variance = float((network.masses[0] @ single.square().flatten(1)).mean() - responses.output.square().mean())
    rows = networks.sampled({**CELL, "depth": 1, "seed": 0, "sampling": "masses", "widths": [16], "draws": 3000})
    found = [row["squared_error"] for row in rows]
    assert abs(np.mean(found) - variance / 16) <= 4.5 * np.std(found) / math.sqrt(len(found))
    biased = networks.sampled({**CELL, "depth": 1, "seed": 0, "sampling": "uniform", "widths": [4096], "draws": 40})
    mean = single.mean(0)
    expected = float((mean - responses.output[:, 0]).square().mean())
    assert np.mean([row["squared_error"] for row in biased]) == pytest.approx(expected, rel=0.2)
    assert expected > 20 * variance / 4096


def test_excess_and_feature_errors_vanish_when_every_particle_is_drawn_as_often_as_it_should(network):
    problem, measure = network
    held_out = TASK.images().split(4)[1]
    exact = measure.responses(torch.cat([problem.inputs, held_out.inputs]))
    own = [p[None].repeat(3, 1) for p in measure.masses]
    found = networks._against(problem, held_out, measure, exact, own)
    assert found["squared_error"] < 1e-24
    assert found["excess"] == pytest.approx(float(problem.terms(measure).total()), rel=1e-12)
    assert all(value < 1e-20 for name, value in found.items() if name.startswith("feature_error"))


@pytest.mark.parametrize("masses", ["fixed", "free"])
def test_a_trained_row_is_the_objective_it_says(masses):
    cell = {**CELL, "masses": masses, "width": 3, "seed": 1, "steps": 30}
    (row,) = networks.trained(cell)
    assert networks.trained(cell) == [row]
    problem = TASK.problem()
    start = starts.start(problem.architecture, (3, 3), problem.inputs, torch.Generator().manual_seed(1))
    assert row["value"] < float(problem.value(start))


def test_pairs_compare_what_they_say():
    times = [0.0, 1.0, 2.0]
    cell = {**CELL, "arm": "mean_field", "width": 4, "number": 0, "rate": 0.5, "times": times, "doubled": True}
    rows = trajectories.pair(cell)
    problem, probes, bandwidths = trajectories._setting(TASK)
    ends = [
        finite.train(
            problem, (m, m), seed, optimiser="sgd", learning_rate=0.5, schedule="constant", steps=4, checkpoints=times
        ).checkpoints
        for m, seed in ((4, 0), (4, 1), (8, 2))
    ]
    at = lambda run, time: distances.FeatureMeasure.of(ends[run][time][1], probes, 1)  # noqa: E731
    expected = {"seeds": (at(0, 2), at(1, 2)), "doubled": (at(0, 2), at(2, 2)), "times": (at(0, 2), at(0, 1))}
    for kind, measured in expected.items():
        (row,) = select(rows, kind=kind, time=2.0, layer=2)
        assert row["mmd"] == pytest.approx(distances.mmd(*measured, [bandwidths[1]]).values[0], rel=1e-9)
    crossed = select(rows, kind="cross")
    assert len(crossed) == 9
    (same,) = select(crossed, time=2.0, other_time=2.0)
    assert same["mmd"] == pytest.approx(distances.mmd(*expected["seeds"], [bandwidths[1]]).values[0], rel=1e-9)


def test_the_permuted_control_learns_other_labels():
    times = [0.0, 2.0]
    cell = {**CELL, "width": 4, "number": 1, "rate": 0.5, "times": times, "doubled": False}
    plain, permuted = (trajectories.pair({**cell, "arm": arm}) for arm in ("mean_field", "permuted_labels"))
    assert select(plain, kind="seeds", time=0.0) != []
    same = [a["mmd"] == b["mmd"] for a, b in zip(select(plain, kind="seeds"), select(permuted, kind="seeds"))]
    assert same[:2] == [True, True]  # the starts
    assert not any(same[2:])


def test_statistics_are_those_of_the_pooled_values():
    cell = {**CELL, "arm": "mean_field", "width": 5, "seed": 3, "rate": 0.5, "times": [0.0, 1.0]}
    rows = trajectories.statistics(cell)
    problem, probes, _ = trajectories._setting(TASK)
    network = trajectories.networks(problem, 5, 3, rate=0.5, times=[0.0, 1.0])[1][1]
    values = network.particles().responses(probes).features[1].flatten().numpy()
    (row,) = select(rows, time=1.0, layer=2, of="features")
    assert row["mean"] == pytest.approx(values.mean())
    assert row["variance"] == pytest.approx(values.var())
    assert row["q25"] == pytest.approx(np.quantile(values, 0.25))


def test_a_gallery_is_symmetric_with_zeros_on_its_diagonal():
    rows = trajectories.gallery({**CELL, "arm": "mean_field", "width": 4, "seeds": 3, "rate": 0.5, "times": [0.0, 1.0]})
    matrix = np.array([row["mmd"] for row in rows]).reshape(3, 3)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-7)
    assert (matrix[~np.eye(3, dtype=bool)] > 1e-3).all()
    assert np.diag(matrix).max() < 1e-7


def test_coordinates_start_unchanged_and_one_step_is_one_step():
    cell = {**CELL, "scaling": "standard", "optimiser": "sgd", "width": 6, "seed": 0, "steps": 2}
    rows = coordinates.check(cell)
    assert all(row["change"] == 0 for row in select(rows, step=0))
    assert all(row["change"] > 0 for row in select(rows, step=1))
    assert {row["layer"] for row in rows} == {"1", "2", "output"}


def test_slopes_of_the_summary_find_a_planted_power():
    named = {"depth": 2, "activation": "tanh", "sampling": "masses"}
    sampled = [{**named, "width": m, "squared_error": 5 / m, "feature_error_2": 3 / m**2} for m in (8, 32, 128)]
    (row,) = summary.sampled_rates(sampled)
    assert row["slope"].value == pytest.approx(-1)
    assert row["feature_slope"].value == pytest.approx(-2)


def test_shares_count_seeds_within_one_and_five_per_cent_of_the_best():
    values = [1.0, 1.005, 1.03, 1.2]
    rows = [{"masses": "free", "width": 4, "value": value} for value in values]
    found = summary.trained_shares(rows, [{"value": 1.1, "bound": 0.97}, {"value": 1.1, "bound": 1.05}])
    assert (found["best"], found["bound"], found["refuted_bounds"]) == (1.0, 0.97, 1)
    (width,) = found["widths"]
    assert (width["within_1%"], width["within_5%"], width["median"]) == (0.5, 0.75, pytest.approx(0.0175))


def test_the_ratio_is_taken_where_a_network_moves_most():
    rows = [
        {
            "kind": kind,
            "time": time,
            "mmd": value,
            "sliced_wasserstein": value,
            "layer": 1,
            "arm": "mean_field",
            "width": 4,
        }
        for kind, time, value in [
            ("times", 1.0, 9.0),
            ("times", 2.0, 0.2),
            ("times", 4.0, 0.5),
            ("seeds", 2.0, 7.0),
            ("seeds", 4.0, 0.1),
        ]
    ]
    found = summary.trajectory_rates(rows)["ratios"][0]
    assert (found["time"], found["ratio"]) == (4.0, pytest.approx(0.2))


def test_the_page_holds_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "LIMIT_STEPS", 30)
    monkeypatch.setattr(networks, "PARTICLES", 8)
    monkeypatch.setattr(plan, "TIMES", [0.0, 1.0, 2.0])
    tiny = plan.Sizes(
        depths=(1, 2),
        sampled_widths=(8, 16),
        draws=40,
        control_draws=20,
        trained_widths=(2, 3),
        trained_seeds=2,
        trained_steps=4,
        limit_seeds=1,
        limit_rounds=1,
        trajectory_widths=(2, 3, 4),
        pairs=2,
        noisy_widths=(2,),
        coordinate_widths=(2, 4),
        coordinate_seeds=1,
        kernel_widths=(4, 8),
        kernel_seeds=2,
    )
    parts = [part for part in STUDY.parts if part != "limit"]  # its search for features takes long
    heard, made = [], Provenance("meanfield widths", {})
    options = {"parts": parts, "announce": lambda part, cell, kept: heard.append(kept)}
    tables = STUDY.run(TASK.variant(pool=2), tiny, tmp_path, **options)
    assert set(tables) == set(parts)
    files = STUDY.files(tables, made)
    text = files["widths.html"]
    headings = ["Sampled from", "Trained from", "Trajectories of", "Seed against", "Moments and", "Coordinate check"]
    places = [text.index(f"<h2>{heading}") for heading in [*headings, "Tangent kernel"]]
    assert places == sorted(places)
    assert text.count("data:image/png;base64,") == len(STUDY.pictures(tables)) == 8
    assert set(files) <= set(STUDY.names())
    assert "sampled.csv" in files
    assert STUDY.run(TASK.variant(pool=2), tiny, tmp_path, **options) == tables
    assert heard[len(heard) // 2 :] == [True] * (len(heard) // 2)


def test_a_slope_says_its_interval():
    assert str(Slope(-1.0, -1.04, -0.96)) == "-1.00 (-1.04 to -0.96)"
