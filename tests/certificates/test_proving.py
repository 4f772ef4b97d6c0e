"""The proven bound over all measures, its multipliers and its curve."""

import json
import math
from dataclasses import replace

import pytest
import torch
from command_line import run, tiny
from stops import interrupt_at
from stored_optima import EXACT_ONE_LAYER, one_layer_problem
from strategies import normal, random_inputs, seeded

import meanfield as mf
from meanfield import limits, starts
from meanfield.certificates import ProvenBound, prove, proving, vectors
from meanfield.pages import plotting
from meanfield.solvers import arrangements, flow
from meanfield.studies.solve import page


def gradient(problem, network):
    return problem.loss.gradient(network(problem.inputs), problem.targets) / problem.count


def poor(problem, width=4, steps=5):
    """A network after a few steps of flow, and its multipliers."""
    start = starts.start(problem.architecture, (width,), problem.inputs, seeded(0))
    network = flow.solve(problem, start, steps=steps).network
    return network, gradient(problem, network)


def of_loss(loss, outputs, kernel, bias):
    arch = mf.Architecture((1, 3, 4), (mf.Conv(kernel, activation="relu", bias=bias),), outputs=outputs)
    targets = normal((5, outputs), 1) if loss == "squared" else torch.arange(5) % max(outputs, 2)
    targets = 1.0 - 2.0 * targets if loss == "hinge" else targets
    return mf.Problem(arch, random_inputs(arch, 5, 0), targets, loss, mf.Penalty(input=0.01, readout=0.02))


def test_at_the_optimum_all_of_it_is_proven():
    problem = one_layer_problem()
    solved = arrangements.solve(problem)
    rows = []
    proven = prove(problem, solved.multipliers.output, solved.network, 5.0, rows.append)
    assert 1 - 1e-6 <= proven.share <= 1 + 1e-9
    assert proven.value == pytest.approx(EXACT_ONE_LAYER, rel=1e-6)
    assert rows[-1]["bound"] == proven.value
    assert rows[-1]["phase"] == "proof"
    assert proven.seconds < 4  # it stops by itself


def test_a_poor_network_is_led_to_the_optimum():
    """Its own multipliers prove half; the rest are features that it lacks, and the program's residuals."""
    problem = one_layer_problem()
    network, output = poor(problem)
    proven = prove(problem, output, network, 20.0)
    assert EXACT_ONE_LAYER * (1 - 1e-6) <= proven.value <= EXACT_ONE_LAYER * (1 + 1e-9)
    assert proven.share == pytest.approx(proven.value / float(problem.value(network)))
    first, last = proven.curve[0][1], proven.curve[-1][1]
    assert first < 0.9 * last == 0.9 * proven.value
    assert all(before < after for before, after in zip(proven.curve, proven.curve[1:]))
    assert all(a[1] < b[1] for a, b in zip(proven.curve, proven.curve[1:]))
    # the multipliers it returns attain it
    assert -float(problem.loss.conjugate(12 * proven.output, problem.targets).mean()) == pytest.approx(proven.value)
    assert len(proven.kernels) > 0
    assert proven.kernels.norm(dim=1) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "outputs", "kernel", "bias", "share"),
    [
        ("squared", 2, (1, 2), False, 0.7),
        ("softmax", 3, (1, 2), False, 0.7),
        ("hinge", 1, (1, 2), True, 0.5),  # of kinked losses r is a subgradient, and gains nothing from the program
        ("squared", 1, 2, True, 0.0),  # how much depends on the time that the machine gives
    ],
)
def test_no_network_lies_below_the_bound_and_it_comes_near(loss, outputs, kernel, bias, share):
    """Near: J is not optimal, but half the price, or an output that is forgotten, would be less."""
    problem = of_loss(loss, outputs, kernel, bias)
    solved = mf.solve(problem, (20,), rounds=1, flow_steps=100)
    proven = prove(problem, solved.multipliers.output, solved.network, 1.5)
    for network in (solved.network, *(poor(problem, width)[0] for width in (1, 3, 30))):
        assert proven.value <= float(problem.value(network)) * (1 + 1e-9)
    assert proven.share >= share


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"layers": (mf.Conv(2, activation="relu"),) * 2}, "tanh, erf, hardtanh only"),
        ({"layers": (mf.Conv(1, activation="tanh"),) * 3}, "for two layers, and there are 3"),
        ({"layers": (mf.Conv(2, activation="tanh"),)}, "not for tanh"),
        ({"readout": "flatten"}, "average readout only"),
        ({"penalty": mf.Penalty(input=0.0)}, "cost nothing"),
        ({"penalty": mf.Penalty(power=3.0)}, "power 2 only"),
    ],
)
def test_where_there_is_no_method_it_says_why(changed, reason):
    given = {"layers": (mf.Conv(2, activation="relu"),), "readout": "average", "penalty": mf.Penalty(), **changed}
    arch = mf.Architecture((1, 3, 4), given["layers"], given["readout"])
    problem = mf.Problem(arch, random_inputs(arch, 3, 0), normal((3, 1), 1), penalty=given["penalty"])
    network = starts.start(arch, (2,) * arch.depth, problem.inputs, seeded(0))
    proven = prove(problem, normal((3, 1), 2), network, 1.0)
    assert proven.value == -math.inf
    assert reason in proven.reason
    assert reason in proven.summary()
    json.dumps(proven.figures(), allow_nan=False)


def test_a_stop_keeps_what_is_proven_and_a_later_call_goes_on():
    problem = one_layer_problem()
    network, output = poor(problem)
    with limits.watched(interrupt_at(2)):  # after the first bound
        stopped = prove(problem, output, network, 20.0)
    assert 0 < stopped.value < 0.9 * EXACT_ONE_LAYER
    assert len(stopped.curve) == 1
    kept = ProvenBound.restored(json.loads(json.dumps({**stopped.state(), "output": None, "kernels": None})))
    kept = replace(kept, output=stopped.output)
    proven = prove(problem, output, network, 20.0, before=kept)
    assert proven.curve[0] == stopped.curve[0]
    assert proven.value == pytest.approx(EXACT_ONE_LAYER, rel=1e-6)
    # however little time there is, there is a bound
    at_once = prove(problem, output.clone().requires_grad_(), network, 0.0)
    assert 0 < at_once.value <= EXACT_ONE_LAYER * (1 + 1e-9)
    assert not at_once.output.requires_grad
    with pytest.raises(ValueError, match=r"output\[0, 0\] is nan"):
        prove(problem, math.nan * output, network, 1.0)
    # no time is left: the answer is the one that was given
    assert prove(problem, output, network, 0.0, before=kept).value == stopped.value


def test_the_small_program_has_the_optimum_of_its_features():
    """Against the gap of the exact optimum's own features: residuals r, no feature above the price, D(r) = J."""
    problem = one_layer_problem()
    solved = arrangements.solve(problem)
    features = proving.Features.of(problem)
    own = vectors.kernels(solved.network)
    program = proving._Program(problem, features, own / own.norm(dim=1, keepdim=True))
    output = program.solve(0 * solved.multipliers.output + 1e-3)
    assert float((program.phi @ output).abs().max()) <= 2 * 2e-3 * (1 + 1e-6)
    assert proving._dual(problem, output) == pytest.approx(EXACT_ONE_LAYER, rel=1e-6)
    # phi is the network's response: F = sum_j p_j u_j |z_j| phi_j
    network = solved.network
    sizes = network.masses[0] * network.readout.flatten() * own.norm(dim=1)
    torch.testing.assert_close((sizes @ program.phi)[:, None], network(problem.inputs))


ONE_LAYER = ("--widths=6", "--activation=relu", "--kernel-size=2", "--prove=0.5")


def test_solve_proves_on_top_of_its_time_and_goes_on_from_a_state(tmp_path):
    problem = one_layer_problem()
    options = {"rounds": 1, "flow_steps": 5, "state": tmp_path / "state.safetensors"}
    rows = []
    first = mf.solve(problem, (4,), prove=0.05, callback=rows.append, **options)
    again = mf.solve(problem, (4,), prove=9.0, **options)
    assert rows[-1]["phase"] == "proof"
    assert first.lower_bound == first.proven.value <= again.proven.value == again.lower_bound
    assert again.proven.curve[: len(first.proven.curve)] == first.proven.curve
    assert again.lower_bound == pytest.approx(EXACT_ONE_LAYER, rel=1e-6)
    assert again.proven.share == again.lower_bound / again.value
    assert "proven" in again.message


def test_two_layers_that_saturate_have_a_bound_too():
    arch = mf.Architecture((1, 3, 4), (mf.Conv((1, 2), activation="tanh"),) * 2)
    problem = mf.Problem(
        arch, random_inputs(arch, 3, 0), normal((3, 1), 1), penalty=mf.Penalty(source=0.1, readout=0.1, input=0.1)
    )
    solution = mf.solve(problem, (4, 3), rounds=1, flow_steps=50, prove=2.0)
    assert 0.2 < solution.proven.share <= 1
    assert solution.proven.share == solution.lower_bound / solution.value
    assert solution.proven.curve[-1][1] == solution.lower_bound
    assert 0 < solution.proven.curve[-1][0] <= solution.proven.seconds


def test_layers_without_a_method_are_told_of_before_the_solve():
    arch = mf.Architecture((1, 3, 4), (mf.Conv(2, activation="relu"),) * 2)
    penalty = mf.Penalty(input_bound=1.0, amplitude_bound=1.0)
    problem = mf.Problem(arch, random_inputs(arch, 3, 0), normal((3, 1), 1), penalty=penalty)
    with pytest.warns(UserWarning, match="nothing will be proven over all measures: two layers have a method for tanh"):
        solution = mf.solve(problem, (2, 2), rounds=1, flow_steps=2, prove=1.0)
    assert solution.lower_bound is None
    assert "tanh, erf, hardtanh only" in solution.proven.reason


def test_the_command_proves_and_tells():
    ended = run(*tiny(*ONE_LAYER, "--json"))
    assert ended.exit_code == 0, ended.stderr
    assert "proof: J >= " in ended.stderr
    answer = json.loads(ended.stdout)["solution"]
    assert 0 < answer["proven"]["share"] <= 1
    assert answer["lower_bound"] == answer["proven"]["value"] == answer["proven"]["curve"][-1][1]
    (section,) = page._proof({"solution": answer})
    assert f"{answer['proven']['share']:.2%} of the J reached is proven" in section.items[0]
    assert plotting.png(plotting.proof(*zip(*answer["proven"]["curve"]))).startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_says_why_nothing_is_proven():
    ended = run(*tiny("--prove=1", "--quiet", "--readout=flatten"))
    assert ended.exit_code == 0
    assert ended.stderr == "warning: --prove proves nothing here: there is a method for the average readout only\n"
    nothing = ProvenBound(-math.inf, reason="of no use").figures()
    assert page._proof({"solution": {"proven": nothing}})[0].items == ["Nothing: of no use."]
