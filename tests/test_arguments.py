"""What is said of arguments of another class, and what torch's inference mode changes."""

import numpy as np
import pytest
import torch
from strategies import normal, seeded
from torch import nn

import meanfield as mf
from meanfield.bench import distances
from meanfield.certificates import sphere
from meanfield.finite import FiniteCNN, Recipe, kernel
from meanfield.grafting import graft
from meanfield.solvers import flow, velocities
from meanfield.studies import convexity
from meanfield.validation import Misuse, WrongType

LAYER = mf.Conv(2, activation="tanh")
ARCHITECTURE = mf.Architecture((1, 3, 3), (LAYER, LAYER))
PENALTY = mf.Penalty(source=3e-3, readout=3e-2, input=3e-3)


def small_problem() -> mf.Problem:
    return mf.Problem(ARCHITECTURE, normal((5, 1, 3, 3), 0), normal((5,), 1), penalty=PENALTY)


PROBLEM = small_problem()
NETWORK = mf.starts.draw(PROBLEM, (3, 2), seeded(0))
PROGRAM = mf.ConvexProgram.freeze(PROBLEM, NETWORK)
POINT = PROGRAM.point(NETWORK)
TENSOR = torch.eye(3, dtype=torch.float64)
ONE_LAYER = mf.Architecture((1, 3, 3), (mf.Conv(2),))
square = lambda x: x.square().sum()  # noqa: E731

CALLS = {  # every argument that is a tensor or an object of the library, given something else
    "values uniform": lambda x: distances.FeatureMeasure.uniform(x),
    "values": lambda x: distances.FeatureMeasure(x, TENSOR[0]),
    "masses": lambda x: distances.FeatureMeasure(TENSOR, x),
    "inputs of": lambda x: distances.FeatureMeasure.of(NETWORK, x, 0),
    "a": lambda x: distances.wasserstein(x, x),
    "a mmd": lambda x: distances.mmd(x, x),
    "a cka": lambda x: distances.debiased_cka(x, x),
    "architecture": lambda x: mf.Problem(x, PROBLEM.inputs, PROBLEM.targets),
    "penalty": lambda x: mf.Problem(ARCHITECTURE, PROBLEM.inputs, PROBLEM.targets, penalty=x),
    "network value": lambda x: PROBLEM.value(x),
    "inputs": lambda x: NETWORK(x),
    "inputs features": lambda x: NETWORK.features(x),
    "architecture network": lambda x: mf.ParticleNetwork(x, NETWORK.masses, NETWORK.kernels, NETWORK.readout),
    "masses[0]": lambda x: mf.ParticleNetwork(ARCHITECTURE, [x, x], NETWORK.kernels, NETWORK.readout),
    "kernels[0]": lambda x: mf.ParticleNetwork(ARCHITECTURE, NETWORK.masses, [x, x], NETWORK.readout),
    "readout": lambda x: mf.ParticleNetwork(ARCHITECTURE, NETWORK.masses, NETWORK.kernels, x),
    "problem draw": lambda x: mf.starts.draw(x, (3, 2), seeded(0)),
    "generator": lambda x: mf.starts.draw(PROBLEM, (3, 2), x),
    "inputs start": lambda x: mf.starts.start(ARCHITECTURE, (3, 2), x, seeded(0)),
    "shares": lambda x: mf.measures.split(NETWORK, 0, 0, x),
    "first": lambda x: mf.measures.mixture(x, NETWORK, 0.5),
    "second": lambda x: mf.measures.mixture(NETWORK, x, 0.5),
    "problem freeze": lambda x: mf.ConvexProgram.freeze(x, NETWORK),
    "network freeze": lambda x: mf.ConvexProgram.freeze(PROBLEM, x),
    "network point": lambda x: PROGRAM.point(x),
    "masses[0] point": lambda x: mf.ProgramPoint((x,), (), TENSOR, ()),
    "readout point": lambda x: mf.ProgramPoint((), (), x, ()),
    "program certify": lambda x: mf.certificates.certify(x, POINT),
    "point": lambda x: mf.certificates.certify(PROGRAM, x),
    "multipliers[0]": lambda x: mf.certificates.certify(PROGRAM, POINT, x),
    "output": lambda x: mf.certificates.Multipliers(x, ()),
    "output search": lambda x: mf.certificates.search_features(PROBLEM, x),
    "A": lambda x: sphere.maximise(x, TENSOR),
    "problem solve": lambda x: mf.solve(x),
    "problem flow": lambda x: flow.solve(x, NETWORK),
    "network flow": lambda x: flow.solve(PROBLEM, x),
    "network alternating": lambda x: mf.solvers.alternating.solve(PROBLEM, x),
    "program": lambda x: mf.solvers.splitting.solve(x),
    "program reference": lambda x: mf.solvers.reference.solve(x),
    "problem arrangements": lambda x: mf.solvers.arrangements.solve(x),
    "network save": lambda x: mf.save_network(x, "nowhere"),
    "problem train": lambda x: mf.finite.train(x, (3, 2)),
    "inputs fit": lambda x: mf.finite.fit(nn.Linear(3, 3), x, torch.arange(3), Recipe()),
    "labels": lambda x: mf.finite.evaluate(nn.Linear(3, 3).double(), TENSOR, x),
    "network from": lambda x: FiniteCNN.from_particles(x),
    "network sample": lambda x: mf.finite.sample(x, (3, 2), seeded(0)),
    "network sequential": lambda x: mf.finite.sequential(x),
    "weight": lambda x: mf.finite.l12(x),
    "inputs finite": lambda x: mf.finite.sample(NETWORK, (3, 2), seeded(0))(x),
    "inputs kernel": lambda x: kernel.infinite(ONE_LAYER, x),
    "points": lambda x: convexity.segments(square, x),
    "point curvature": lambda x: convexity.curvature(square, x),
    "tangent": lambda x: convexity.curvature(square, TENSOR[0], x),
    "feasible_sampler(generator)": lambda x: convexity.falsify(square, lambda generator: x, 200),
}


@pytest.mark.parametrize(
    "came", [np.eye(3), [[1.0, 0.0], [0.0, 1.0]], None, 3], ids=["array", "list", "None", "number"]
)
@pytest.mark.parametrize("call", CALLS)
def test_an_argument_of_another_class_is_named_in_one_line(call, came):
    if came is None and call in ("penalty", "tangent"):  # which may be None
        return
    with pytest.raises(WrongType) as caught:
        CALLS[call](came)
    kind = type(came).__name__
    assert str(caught.value).startswith(f"{call.split()[0]} must be a")
    assert str(caught.value).endswith(f", not {kind}")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, Misuse)
    assert isinstance(caught.value, TypeError)


def test_what_came_is_said_in_one_line_however_long_it_is():
    error = Misuse("input_shape", np.arange(5000.0).reshape(-1, 2), "must be (channels, height, width)")
    assert "\n" not in str(error)
    assert len(str(error)) < 300


@pytest.mark.filterwarnings("ignore:the infimum over all measures")
def test_inference_mode_changes_nothing():
    """Of all that takes gradients, on objects made inside and outside of that mode: by the same bits."""
    inputs, network = normal((20, 3), 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    images, labels, recipe = normal((8, 3), 3), torch.arange(8) % 2, Recipe(epochs=1, learning_rate=0.1)
    relu = lambda: mf.Problem(ONE_LAYER, normal((3, 1, 3, 3), 0), normal((3,), 1), penalty=PENALTY)  # noqa: E731
    two = mf.Architecture((1, 1, 3), (mf.Conv((1, 2)),))

    def results(problem: mf.Problem) -> list[object]:
        start = mf.starts.draw(problem, (3, 2), seeded(0))
        program = mf.ConvexProgram.freeze(problem, start)
        return [
            mf.solve(problem, (3, 2), rounds=1, flow_steps=5).value,
            flow.solve(problem, start, steps=5).value,
            velocities.velocity(problem, start)[0].total(),
            mf.solvers.splitting.solve(program, max_iterations=20).value,
            mf.solvers.reference.solve(program).gap,
            mf.solvers.arrangements.solve(
                mf.Problem(two, normal((3, 1, 1, 3), 4), normal((3,), 1), penalty=PENALTY)
            ).value,
            mf.certificates.certify(program, program.point(start)).gap,
            mf.certificates.search_features(problem, 0.1 * normal((5, 1), 5), start, steps=3, rounds=1).bound,
            mf.finite.train(problem, (3, 2), steps=3).network.readout.detach(),
            mf.finite.fit(network, images, labels, recipe).network[0].weight.detach(),
            kernel.empirical(FiniteCNN.random(ONE_LAYER, (3,), relu().inputs, seeded(0)), relu().inputs),
            convexity.curvature(square, TENSOR[0]).largest,
            convexity.falsify(square, lambda generator: torch.randn(2, generator=generator), 200).witness.violation,
            graft(network, network, "2", inputs).error,
            graft(network, network, "2", inputs, "adam", steps=3).error,
        ]

    expected = results(PROBLEM)
    with torch.inference_mode():
        inside, made = results(PROBLEM), small_problem()
        small = mf.starts.draw(made, (3, 2), seeded(0))
    for found in (inside, results(made)):
        for ours, theirs in zip(found, expected):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert flow.solve(made, small, steps=5).value == expected[1]


def test_a_warning_names_the_caller():
    problem = mf.Problem(ONE_LAYER, normal((3, 1, 3, 3), 0), normal((3,), 1), penalty=mf.Penalty(readout=0))
    start = mf.starts.draw(problem, (2,), seeded(0))
    for solve in (
        lambda: flow.solve(problem, start, steps=1),
        lambda: mf.solvers.alternating.solve(problem, start, rounds=1, flow_steps=1),
    ):
        with pytest.warns(UserWarning, match="the infimum over all measures") as warned:
            solve()
        assert warned[0].filename == __file__
