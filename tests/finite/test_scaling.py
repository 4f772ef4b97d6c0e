"""Scalings of one's own: powers and functions per kind of layer, in the function, the start and every step."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from strategies import seeded

import meanfield as mf
from meanfield.finite import FiniteCNN, Scaling, train
from meanfield.finite.scaling import BASE_WIDTH, SCALINGS
from meanfield.validation import Misuse

ARCHITECTURE = mf.Architecture(
    (3, 5, 5),
    (mf.Conv(3, padding=1, activation="tanh", bias=True), mf.Conv(2, activation="relu", bias=True)),
    "flatten",
    outputs=2,
)
INPUTS = torch.rand((4, 3, 5, 5), generator=seeded(1), dtype=torch.float64)
TARGETS = torch.rand((4, 2), generator=seeded(2), dtype=torch.float64)
PROBLEM = mf.Problem(ARCHITECTURE, INPUTS, TARGETS, penalty=mf.Penalty(source=1e-3, readout=2e-3, input=3e-3))
WIDTHS = (6, 10)


def test_forward_powers_are_of_what_is_written_in_the_first_layer_and_of_what_is_read_later():
    scaling = Scaling(forward={"input": 0.5, "hidden": -1, "readout": -0.25})
    network = FiniteCNN.random(ARCHITECTURE, WIDTHS, INPUTS, seeded(0), scaling)
    assert network.forward_factors == [6**0.5, 6**-1.0, 10**-0.25]
    by_hand = FiniteCNN(
        ARCHITECTURE,
        [network.kernels[0] * 6**0.5, network.kernels[1] / 6],
        network.readout * 10**-0.25,
        network.biases,
        "standard",
    )
    torch.testing.assert_close(network(INPUTS), by_hand(INPUTS), rtol=1e-13, atol=0)
    back = FiniteCNN.from_particles(network.particles(), scaling)
    torch.testing.assert_close(list(back.parameters()), list(network.parameters()), rtol=1e-13, atol=0)


def test_functions_get_the_channels_that_are_read_and_written():
    seen = []
    Scaling(forward=lambda source, target: seen.append((source, target)) or 1.0).forward_factors(ARCHITECTURE, WIDTHS)
    assert seen == [(3, 6), (6, 10), (10, 2)]


def test_the_start_has_the_deviations_that_were_named_and_he_elsewhere():
    """Closed form: constants sqrt(gain / (C_0 S)), sqrt(gain / S) and the root of the positions, times the power."""
    powers = Scaling(initial={"input": 0.5, "hidden": -1, "readout": -0.75})
    offsets, positions = (9, 4), ARCHITECTURE.readout_positions
    expected = [math.sqrt(1 / (3 * 9)) * 6**0.5, math.sqrt(2 / 4) / 6, math.sqrt(positions) * 10**-0.75]
    assert powers.deviations(ARCHITECTURE, WIDTHS) == pytest.approx(expected, rel=1e-14)
    functions = Scaling(
        initial={
            "input": lambda source, target: target**0.5,
            "hidden": lambda source, target: 1 / source,
            "readout": lambda source, target: source**-0.75,
        }
    )
    assert functions.deviations(ARCHITECTURE, WIDTHS) == pytest.approx(expected, rel=1e-14)
    he = [math.sqrt(gain / (read * s)) for gain, read, s in zip((1, 2), (3, 6), offsets)]
    shifted = Scaling(forward={"hidden": -0.5}, initial={"readout": 0}).deviations(ARCHITECTURE, WIDTHS)
    assert shifted == pytest.approx([he[0], he[1] * 6**0.5, math.sqrt(positions)], rel=1e-14)
    drawn = FiniteCNN.random(ARCHITECTURE, (200, 100), INPUTS, seeded(0), powers)
    measured = [float(each.detach().std()) for each in (*drawn.kernels, drawn.readout)]
    known = powers.deviations(ARCHITECTURE, (200, 100))
    for found, exact, count in zip(measured, known, (200 * 27, 200 * 100 * 4, drawn.readout.numel())):
        assert abs(found / exact - 1) < 5 / math.sqrt(2 * count)


def test_a_start_of_the_continuous_network_keeps_its_function():
    anchored = FiniteCNN.random(ARCHITECTURE, WIDTHS, INPUTS, seeded(3), Scaling(initial="anchored"))
    torch.testing.assert_close(
        anchored(INPUTS), FiniteCNN.random(ARCHITECTURE, WIDTHS, INPUTS, seeded(3))(INPUTS), rtol=1e-12, atol=1e-13
    )
    with pytest.raises(Misuse, match="initial='anchored' is a start without a deviation"):
        Scaling(initial="anchored").deviations(ARCHITECTURE, WIDTHS)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_step_moves_every_kind_at_its_rate_with_its_gradient(optimiser):
    """SGD by -rate * factor * size * gradient; Adam by -rate * factor * g / (|g| + 1e-8) with g the sized gradient."""
    rates = {"input": 1, "hidden": lambda source, target: target / source, "readout": -2, "bias": 0.5}
    scaling = Scaling(learning_rate=rates, gradient={"input": -1, "hidden": 0.5, "readout": 2, "bias": 1})
    network = FiniteCNN.random(ARCHITECTURE, WIDTHS, INPUTS, seeded(0), scaling)
    moved = train(
        PROBLEM, WIDTHS, start=network, scaling=scaling, optimiser=optimiser, learning_rate=1e-3, steps=1,
        schedule="constant", checkpoints=[1e-3],
    ).checkpoints[0][1]  # fmt: skip
    PROBLEM.terms(network.particles(attached=True)).total().backward()
    factors = {
        "kernels.0": (6 / BASE_WIDTH, 1 / 6),
        "bias_parameters.0": ((6 / BASE_WIDTH) ** 0.5, 6),
        "kernels.1": (10 / 6, 6**0.5),
        "bias_parameters.1": ((10 / BASE_WIDTH) ** 0.5, 10),
        "readout": ((10 / BASE_WIDTH) ** -2, 100),
    }
    for name, before in network.named_parameters():
        rate, size = factors[name]
        seen = size * before.grad
        direction = seen if optimiser == "sgd" else seen / (seen.abs() + 1e-8)
        after = moved.get_parameter(name)
        torch.testing.assert_close(after - before, -1e-3 * rate * direction, rtol=1e-6, atol=1e-15)


def test_rates_may_differ_by_optimiser():
    scaling = Scaling(learning_rate={"sgd": {"hidden": 1}, "adam": -1})
    assert scaling.layer_rates(ARCHITECTURE, (128, 32), "sgd")["kernels.1"] == 2
    assert scaling.layer_rates(ARCHITECTURE, (128, 32), "adam")["kernels.1"] == 0.5
    assert scaling.layer_rates(ARCHITECTURE, (128, 32), "sgd")["readout"] == 1


def test_a_name_is_the_object_registered_under_it():
    """mup in powers: at equal widths it is the registered one."""
    own = Scaling(
        initial={"readout": -1},
        learning_rate={"sgd": {"input": 1, "readout": -1, "bias": 1}},
        rates={"adam": 1, "sgd": 0.2},
    )
    runs = [train(PROBLEM, (5, 5), 3, scaling=each, optimiser="sgd", steps=4) for each in ("mup", SCALINGS["mup"], own)]
    values = [[record["value"] for record in run.history] for run in runs]
    assert values[0] == values[1]
    assert values[2] == pytest.approx(values[0], rel=1e-12)
    assert runs[0].network.scaling == runs[1].network.scaling != runs[2].network.scaling
    assert copy.deepcopy(runs[0].network).scaling == pickle.loads(pickle.dumps(SCALINGS["mup"])) == SCALINGS["mup"]


def test_a_scaling_is_described_by_its_name_only_where_that_says_all():
    assert SCALINGS["mup"].described(ARCHITECTURE, WIDTHS, "sgd") == "mup"
    own = replace(SCALINGS["mup"], forward={"hidden": -1})
    assert own.described(ARCHITECTURE, WIDTHS, "adam") == {
        "name": "mup",
        "forward": own.forward_factors(ARCHITECTURE, WIDTHS),
        "learning_rate": own.layer_rates(ARCHITECTURE, WIDTHS, "adam"),
        "initial": own.deviations(ARCHITECTURE, WIDTHS),
        "gradient": own.gradient_factors(ARCHITECTURE, WIDTHS),
    }
    assert replace(own, initial="anchored").described(ARCHITECTURE, WIDTHS, "adam")["initial"] == "anchored"


def test_a_stored_run_is_not_continued_in_another_scaling(tmp_path):
    """Two without a name are told apart by what they give."""
    arguments = {
        "optimiser": "sgd",
        "steps": 6,
        "learning_rate": 1e-3,
        "state": tmp_path / "a.safetensors",
        "state_every": 2,
    }
    whole = train(PROBLEM, WIDTHS, scaling=Scaling(forward=lambda m, k: m**-0.25), **{**arguments, "state": None})

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    first = Scaling(forward=lambda m, k: m**-0.25)
    assert train(PROBLEM, WIDTHS, scaling=first, **arguments, callback=stop).status == "interrupted"
    with pytest.raises(ValueError, match="scaling"):
        train(PROBLEM, WIDTHS, scaling=Scaling(forward=lambda m, k: m**-0.5), **arguments)
    again = train(PROBLEM, WIDTHS, scaling=Scaling(forward=lambda m, k: m**-0.25), **arguments)
    assert again.value == whole.value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"forward": {"hiden": 1}}, r"forward='hiden' is unknown: choose one of 'input', 'hidden', 'readout'; did you"),
        ({"forward": {"bias": 1}}, "forward='bias' is unknown"),
        ({"initial": {"bias": 1}}, "initial='bias' is unknown"),
        ({"initial": "anchord"}, "initial='anchord' is unknown.*did you mean 'anchored'"),
        (
            {"learning_rate": {"hidden": "m"}},
            r"learning_rate\['hidden'\]='m' must be a power of the width or a function",
        ),
        ({"learning_rate": {"sgd": {"hiden": 1}}}, "learning_rate='hiden' is unknown"),
        ({"gradient": math.inf}, "gradient=inf must be a power"),
        ({"rates": {"sgd": 1e-2}}, r"rates\['adam'\]=None must be a finite number"),
        ({"rates": {"adam": 1, "sgd": -1}}, r"rates\['sgd'\]=-1 must be"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(Misuse, match=message):
        Scaling(**fields)


def test_a_rule_that_gives_no_factor_is_named_with_its_place():
    with pytest.raises(Misuse, match=r"forward\['hidden'\]\(6, 10\)=-4 must be a positive number: a factor"):
        Scaling(forward={"hidden": lambda source, target: source - target}).forward_factors(ARCHITECTURE, WIDTHS)
    with pytest.raises(Misuse, match=r"forward\['input'\]=1000.0 is too large a power of 6"):
        Scaling(forward=1000.0).forward_factors(ARCHITECTURE, WIDTHS)
    with pytest.raises(Misuse, match="scaling=3 is unknown"):
        train(PROBLEM, WIDTHS, scaling=3, steps=1)


def test_float32_stays():
    network = FiniteCNN.random(
        ARCHITECTURE, WIDTHS, INPUTS.float(), seeded(0), Scaling(forward=-0.5, initial={"input": 1})
    )
    assert {each.dtype for each in (*network.parameters(), network(INPUTS.float()))} == {torch.float32}
