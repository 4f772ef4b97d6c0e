"""Trajectories: which networks are trained and compared, against runs and distances of their own."""

import math

import numpy as np
import pytest
import torch
from strategies import seeded

from meanfield import finite, starts
from meanfield.bench import distances
from meanfield.bench.distances import FeatureMeasure
from meanfield.bench.sweep import select
from meanfield.bench.task import Task
from meanfield.problem import Problem
from meanfield.studies.widths import trajectories

TASK = Task(pool=4, samples=6)
TIMES = [0.0, 0.5, 1.5]
CELL = {**TASK.to_dict(), "arm": "mean_field", "width": 4, "number": 0, "rate": 0.25, "times": TIMES, "doubled": False}
LAST = TASK.depth - 1


def trained(problem, width, seed, **options):
    return finite.train(
        problem,
        (width, width),
        seed,
        optimiser="sgd",
        schedule="constant",
        learning_rate=0.25,
        steps=6,
        checkpoints=TIMES,
        **options,
    ).checkpoints


def features(checkpoint, layer=LAST):
    return FeatureMeasure.of(checkpoint[1], trajectories._setting(TASK)[1], layer)


def test_probes_are_held_out_and_the_bandwidth_is_the_median_of_a_wide_start():
    problem, probes, bandwidths = trajectories._setting(TASK)
    held_out = TASK.images().rest.inputs
    assert torch.equal(probes, held_out[: trajectories.PROBES])
    assert len(probes) == trajectories.PROBES
    start = starts.draw(problem, (trajectories.REFERENCE_WIDTH,) * 2, seeded(0))
    for layer, bandwidth in enumerate(bandwidths):
        values = FeatureMeasure.of(start, probes, layer).values
        apart = torch.pdist(values) / math.sqrt(values.shape[1])
        assert bandwidth == pytest.approx(float(apart.median()), rel=1e-9)


def test_without_held_out_images_the_training_images_are_the_probes(tmp_path):
    images = np.random.default_rng(0).random((4, 2, 2))
    np.savez(tmp_path / "four.npz", inputs=images, targets=[0, 1, 0, 1])
    task = Task(data=str(tmp_path / "four.npz"), classes=None, samples=4, pool=1)
    problem, probes, _ = trajectories._setting(task)
    assert torch.equal(probes, problem.inputs)


@pytest.mark.parametrize(
    ("arm", "options"),
    [
        ("mean_field", {}),
        ("ntk", {"scaling": "ntk"}),
        ("shuffled_batches", {"batch_size": 2, "shuffle": True}),
        ("fixed_batches", {"batch_size": 2, "shuffle": False}),
        ("noise", {"noise": 1e-4}),
    ],
)
def test_arms_train_as_they_are_called(arm, options):
    """Seeds of a pair: 3 number, then the next; times are flow times."""
    rows = trajectories.pair({**CELL, "arm": arm, "number": 2})
    problem, _, bandwidths = trajectories._setting(TASK)
    first, second = (trained(problem, 4, seed, **options) for seed in (6, 7))
    assert [time for time, _ in first] == TIMES
    for index, time in enumerate(TIMES):
        (row,) = select(rows, kind="seeds", time=time, layer=LAST + 1)
        expected = distances.mmd(features(first[index]), features(second[index]), [bandwidths[LAST]]).values[0]
        assert row["mmd"] == pytest.approx(expected, rel=1e-9)
    assert not select(rows, kind="cross")
    assert not select(rows, kind="doubled")
    assert {row["number"] for row in rows} == {2}
    assert {row["arm"] for row in rows} == {arm}


def test_times_compare_a_network_with_itself_at_the_checkpoint_before():
    rows = select(trajectories.pair(CELL), kind="times")
    problem, _, bandwidths = trajectories._setting(TASK)
    run = trained(problem, 4, 0)
    assert [row["time"] for row in rows] == [time for time in TIMES[1:] for _ in range(TASK.depth)]
    for row in rows:
        index, layer = TIMES.index(row["time"]), row["layer"] - 1
        pair = features(run[index], layer), features(run[index - 1], layer)
        assert row["mmd"] == pytest.approx(distances.mmd(*pair, [bandwidths[layer]]).values[0], rel=1e-9)
        sliced = distances.sliced_wasserstein(*pair, generator=seeded(0), projections=trajectories.PROJECTIONS)
        assert row["sliced_wasserstein"] == pytest.approx(sliced.value, rel=1e-9)


def test_crossed_times_are_of_the_first_and_the_second_network_in_this_order():
    rows = select(trajectories.pair(CELL), kind="cross")
    problem, _, bandwidths = trajectories._setting(TASK)
    first, second = (trained(problem, 4, seed) for seed in (0, 1))
    assert [(row["time"], row["other_time"]) for row in rows] == [(a, b) for a in TIMES for b in TIMES]
    for row in rows:
        ours, theirs = first[TIMES.index(row["time"])], second[TIMES.index(row["other_time"])]
        expected = distances.mmd(features(ours), features(theirs), [bandwidths[LAST]]).values[0]
        assert row["mmd"] == pytest.approx(expected, rel=1e-9)
        assert row["layer"] == TASK.depth


def test_permuted_labels_are_those_of_the_images_in_another_order():
    problem = trajectories._setting(TASK)[0]
    for number in range(3):
        permuted = trajectories._permuted(TASK, problem, number)
        assert torch.equal(permuted.targets.sort(0).values, problem.targets.sort(0).values)
        assert torch.equal(permuted.inputs, problem.inputs)
        assert permuted.penalty == problem.penalty
    drawn = [trajectories._permuted(TASK, problem, number).targets for number in range(8)]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.equal(trajectories._permuted(TASK, problem, 3).targets, drawn[3])
    rows = trajectories.pair({**CELL, "arm": "permuted_labels", "number": 1})
    other = Problem(problem.architecture, problem.inputs, drawn[1], "squared", problem.penalty)
    ends = features(trained(problem, 4, 3)[-1]), features(trained(other, 4, 4)[-1])
    (row,) = select(rows, kind="seeds", time=TIMES[-1], layer=TASK.depth)
    expected = distances.mmd(*ends, [trajectories._setting(TASK)[2][LAST]]).values[0]
    assert row["mmd"] == pytest.approx(expected, rel=1e-9)


def test_statistics_have_a_row_for_every_time_layer_and_kind():
    cell = {**CELL, "seed": 5}
    rows = trajectories.statistics(cell)
    assert len(rows) == len(TIMES) * TASK.depth * 2
    problem, probes, _ = trajectories._setting(TASK)
    run = trained(problem, 4, 5)
    for index, time in enumerate(TIMES):
        responses = run[index][1].particles().responses(probes)
        for layer in range(TASK.depth):
            for what, maps in (("preactivations", responses.preactivations), ("features", responses.features)):
                (row,) = select(rows, time=time, layer=layer + 1, of=what)
                values = maps[layer].flatten().double()
                mean, variance = values.mean(), values.var(correction=0)
                fourth = (values - mean).pow(4).mean()
                assert row["mean"] == pytest.approx(float(mean), rel=1e-9, abs=1e-12)
                assert row["variance"] == pytest.approx(float(variance), rel=1e-9)
                assert row["kurtosis"] == pytest.approx(float(fourth / variance**2 - 3), rel=1e-6, abs=1e-9)
                assert row["q05"] == pytest.approx(float(values.quantile(0.05)), rel=1e-9, abs=1e-12)
                assert row["q95"] == pytest.approx(float(values.quantile(0.95)), rel=1e-9, abs=1e-12)


def test_a_gallery_compares_the_ends_of_all_seeds():
    rows = trajectories.gallery({**CELL, "seeds": 3})
    problem, _, bandwidths = trajectories._setting(TASK)
    ends = [features(trained(problem, 4, seed)[-1]) for seed in range(3)]
    for row in rows:
        pair = ends[row["seed"]], ends[row["other_seed"]]
        expected = distances.mmd(*pair, [bandwidths[LAST]]).values[0]
        assert row["mmd"] == pytest.approx(expected, rel=1e-9, abs=1e-7)
    assert [(row["seed"], row["other_seed"]) for row in rows] == [(i, j) for i in range(3) for j in range(3)]


def test_a_run_that_does_not_complete_is_named():
    problem = trajectories._setting(TASK)[0]
    with pytest.raises(RuntimeError, match=r"width 4, seed 7: .*lower the learning rate"):
        trajectories.networks(problem, 4, 7, rate=1e8, times=[0.0, 1e9])
