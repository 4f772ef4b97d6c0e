"""The coordinate check, against the same network trained one step at a time."""

import pytest
from strategies import seeded

from meanfield import finite
from meanfield.bench.sweep import select
from meanfield.bench.task import Task
from meanfield.finite.scaling import SCALINGS
from meanfield.studies.widths import coordinates

TASK = Task(pool=4, samples=6)


def cell(**changes):
    named = {"scaling": "mean_field", "optimiser": "sgd", "width": 4, "seed": 2, "steps": 3}
    return {**TASK.to_dict(), **named, **changes}


def coordinates_of(network, problem):
    responses = network.particles().responses(problem.inputs)
    return {"1": responses.preactivations[0], "2": responses.preactivations[1], "output": responses.output}


@pytest.mark.parametrize("scaling", ["mean_field", "standard"])
def test_sizes_and_changes_after_one_and_two_whole_batch_gradient_steps(scaling):
    """Mean absolute coordinates, and how far they are from the start, after steps of plain gradient descent."""
    problem, rows = TASK.problem(), coordinates.check(cell(scaling=scaling, steps=2))
    network = finite.FiniteCNN.random(problem.architecture, (4, 4), problem.inputs, seeded(2), scaling)
    start = {name: x.detach() for name, x in coordinates_of(network, problem).items()}
    assert [row["step"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    for step in range(3):
        for name, now in coordinates_of(network, problem).items():
            (row,) = select(rows, step=step, layer=name)
            assert row["size"] == pytest.approx(float(now.abs().mean()), rel=1e-9)
            assert row["change"] == pytest.approx(float((now - start[name]).abs().mean()), rel=1e-7, abs=1e-15)
        descend(network, problem, SCALINGS[scaling].rates["sgd"])
    assert {(row["scaling"], row["optimiser"], row["width"], row["seed"]) for row in rows} == {(scaling, "sgd", 4, 2)}


def descend(network, problem, rate):
    run = finite.train(
        problem,
        network.widths,
        start=network,
        scaling=network.scaling,
        optimiser="sgd",
        schedule="constant",
        learning_rate=rate,
        steps=1,
        checkpoints=[rate],
    )
    network.load_state_dict(run.checkpoints[-1][1].state_dict())


def test_the_width_and_the_seed_are_those_of_the_cell():
    start = {}
    for width, seed in ((4, 2), (8, 2), (4, 3)):
        rows = select(coordinates.check(cell(width=width, seed=seed, steps=1)), step=0)
        start[width, seed] = [row["size"] for row in rows]
    assert start[4, 2] != start[8, 2] != start[4, 3]
    assert start[4, 2] != start[4, 3]
