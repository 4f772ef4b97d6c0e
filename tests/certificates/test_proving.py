"""The proven bound over all measures, its multipliers and its curve."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import kills
import pytest
import torch
from command_line import run, tiny
from stops import interrupt_at
from stored_optima import EXACT_ONE_LAYER, one_layer_problem
from strategies import normal, random_inputs, seeded

import meanfield as mf
from meanfield import limits, starts
from meanfield.certificates import ProvenBound, one_layer, prove, sphere, two_layers
from meanfield.certificates.cuts import Features, dual, price_of
from meanfield.certificates.gain import Gain
from meanfield.certificates.proof import Proof
from meanfield.certificates.two_layers import TwoLayerBound
from meanfield.pages import plotting
from meanfield.solvers import alternating, arrangements, flow
from meanfield.storage import tensors
from meanfield.studies.solve import page
from meanfield.validation import Misuse


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


def test_the_bound_of_trees_is_that_of_the_multipliers_returned(monkeypatch):
    """Four entries: a tree for each of several multipliers, nearly to its end."""
    refine = sphere.Search.refine
    monkeypatch.setattr(sphere.Search, "refine", lambda search, seconds: refine(search, seconds, tolerance=1e-2))
    monkeypatch.setattr(one_layer, "CLOSED", 3e-2)
    problem = of_loss("squared", 1, 2, False)
    network, output = poor(problem)
    proven = prove(problem, output, network, 20.0)
    assert proven.kind.startswith("branch and bound")
    assert len(proven.curve) > 1
    assert proven.value == pytest.approx(dual(problem, proven.output), rel=1e-12)
    features = Features.of(problem)
    largest = sphere.maximise(features.patches, features.weighted(proven.output), tolerance=1e-2)
    assert largest.lower <= price_of(problem) * (1 + 1e-12)
    assert largest.upper >= 0.98 * price_of(problem)


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
    assert 0 < stopped.curve[0][0] <= stopped.seconds < proven.curve[1][0] <= proven.seconds
    assert proven.value == pytest.approx(EXACT_ONE_LAYER, rel=1e-6)
    # however little time there is, there is a bound
    at_once = prove(problem, output.clone().requires_grad_(), network, 0.0)
    assert 0 < at_once.value <= EXACT_ONE_LAYER * (1 + 1e-9)
    assert not at_once.output.requires_grad
    with pytest.raises(ValueError, match=r"output\[0, 0\] is nan"):
        prove(problem, math.nan * output, network, 1.0)
    # no time is left: the answer is the one that was given
    assert prove(problem, output, network, 0.0, before=kept).value == stopped.value
    other = poor(problem, 3)[0]
    shared = prove(problem, output, other, 0.0, before=kept).share
    assert shared == pytest.approx(stopped.value / float(problem.value(other)), rel=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
def test_black_images_and_a_network_of_nothing(outputs):
    """Nothing is seen: r is the residual of 0.  Where there is nothing to say either, J is 0, and all of it proven."""
    arch = mf.Architecture((1, 5, 5), (mf.Conv(3, activation="relu"),), outputs=outputs)
    targets = normal((8, outputs), 1)
    images, penalty = torch.zeros(8, 1, 5, 5, dtype=torch.float64), mf.Penalty(input=0.01)
    problem, idle = (mf.Problem(arch, images, each, penalty=penalty) for each in (targets, 0 * targets))
    network = starts.start(arch, (4,), random_inputs(arch, 8, 0), seeded(0))
    proven = prove(problem, 0.01 * normal((8, outputs), 2), network, 5.0)
    assert proven.value == pytest.approx(float(problem.loss.value(0 * targets, targets).mean()), rel=1e-6)
    silent = replace(network, readout=0 * network.readout, kernels=tuple(0 * each for each in network.kernels))
    proven = prove(idle, 0 * targets, silent, 1.0)
    assert (proven.value, proven.share) == (0.0, 1.0)


# --- a tree that is kept ----------------------------------------------------------------------------------------------


def wide_open():
    """Kernels of nine entries, whose branch and bound does not end in a second; network and multipliers."""
    arch = mf.Architecture((1, 5, 5), (mf.Conv(3, activation="relu"),), readout="average")
    problem = mf.Problem(arch, random_inputs(arch, 8, 0), normal((8, 1), 1), penalty=mf.Penalty(input=0.01))
    return problem, *poor(problem)


@pytest.mark.parametrize("brightness", [1, 0])
def test_where_nothing_responds_a_search_is_closed(brightness):
    """r = 0 proves J >= 0 at once; images of zeros leave all features at zero, and J at the loss of F = 0."""
    problem, network, output = wide_open()
    problem = mf.Problem(problem.architecture, brightness * problem.inputs, problem.targets, penalty=problem.penalty)
    proven = prove(problem, 0 * output, network, 0.3)
    assert proven.curve[0][1] == 0
    at_zero = float(problem.loss.value(0 * problem.targets, problem.targets).mean())
    assert 0 <= proven.value < at_zero if brightness else proven.value == pytest.approx(at_zero)


def tree_of(path):
    """Cells looked at and kept, multipliers of what is in a file."""
    tree = tensors.unpack(path.read_bytes(), path)[0]
    return tree["state/tree/search/cells"], tree["state/tree/output"]


def test_a_stopped_proof_goes_on_from_its_tree(tmp_path, monkeypatch):
    """No search begins: the cells of the file are halved further, at the same multipliers."""
    monkeypatch.setattr(one_layer, "SLICE", 0.1)
    problem, network, output = wide_open()
    state = tmp_path / "proof.safetensors"
    with limits.watched(interrupt_at(1)):
        stopped = prove(problem, output, network, 30.0, state=state)
    cells, multipliers = tree_of(state)
    assert cells.dtype in (torch.int8, torch.int16)
    monkeypatch.setattr(sphere.Search, "__init__", lambda *_, **__: pytest.fail("the search begins anew"))
    with limits.watched(interrupt_at(1)):
        resumed = prove(problem, output, network, 30.0, state=state)
    assert resumed.curve[: len(stopped.curve)] == stopped.curve
    assert resumed.value > stopped.value
    more, same = tree_of(state)
    assert len(more) > len(cells)
    assert torch.equal(same, multipliers)
    # the answer is there without any time, and before is not asked
    again = prove(problem, output, network, 0.0, before=ProvenBound(-math.inf), state=state)
    assert (again.value, again.curve) == (resumed.value, resumed.curve)


def test_a_tree_that_was_stopped_proves_what_the_whole_one_does(tmp_path, monkeypatch):
    """To the last bit, with slices that end at a bound in place of seconds; there is a look before the first one and
    after every one.
    """
    problem, network, output = wide_open()
    refine = sphere.Search.refine

    def counted(search, seconds):
        tolerance = 0.99 * search.maximum.upper / search.maximum.lower - 1
        return refine(search, 60.0, tolerance=tolerance)

    monkeypatch.setattr(sphere.Search, "refine", counted)
    found = {}
    for name, looks in (("whole", (4,)), ("stopped", (2, 1, 1))):
        state = tmp_path / f"{name}.safetensors"
        for look in looks:
            with limits.watched(interrupt_at(look)):
                proven = prove(problem, output, network, 1000.0, state=state)
        found[name] = proven.value, tree_of(state)[0]
    assert found["whole"][0] == found["stopped"][0]
    assert torch.equal(found["whole"][1], found["stopped"][1])


def test_a_stop_among_relaxed_passes_keeps_where_they_have_led(tmp_path, monkeypatch):
    for name, value in (("LEAST_SLICE", 0.01), ("FIRST", 1e-9), ("PASSES", 1)):
        monkeypatch.setattr(one_layer, name, value)
    monkeypatch.setattr(one_layer.OneLayerProof, "_closes", lambda *_: False)
    problem, network, output = wide_open()
    state, led = tmp_path / "proof.safetensors", []

    def passes(program, output, partition, passes):
        led.append((output, passes))
        yield output * 1.1
        if len(led) == 1:
            raise KeyboardInterrupt
        yield output * 1.2
        raise KeyboardInterrupt

    monkeypatch.setattr(one_layer, "relaxed_passes", passes)
    for _ in range(3):
        prove(problem, output, network, 100.0, state=state)
    assert [count for _, count in led] == [one_layer.RELAXED_PASSES - done for done in (0, 1, 3)]
    torch.testing.assert_close(led[1][0], 1.1 * led[0][0])
    torch.testing.assert_close(led[2][0], 1.2 * led[1][0])


def test_a_file_of_another_proof_or_a_damaged_one_is_refused(tmp_path):
    problem, network, output = wide_open()
    state = tmp_path / "proof.safetensors"
    prove(problem, output, network, 0.1, state=state)
    with pytest.raises(Misuse, match="is of another run: its multipliers is"):
        prove(problem, 2 * output, network, 0.1, state=state)
    with pytest.raises(Misuse, match="is of another run: its widths"):
        prove(problem, output, poor(problem, 3)[0], 0.1, state=state)
    content = state.read_bytes()
    state.write_bytes(content[:-100])
    with pytest.raises(Misuse, match=r"perhaps truncated .*delete it to start anew"):
        prove(problem, output, network, 0.1, state=state)
    kept, body = tensors.unpack(content, state)
    kept["state/tree/output"] *= 1.5  # whole, but no tree of these multipliers
    state.write_bytes(tensors.pack(kept, body.pop("kind"), body))
    with pytest.raises(Misuse, match="its tree is of another W, with other entries; delete it to start anew"):
        prove(problem, output, network, 0.1, state=state)


@pytest.mark.parametrize(("cost", "expected"), [(0.01, 33), (3.0, 6)])
def test_writing_takes_a_small_share_of_the_time(cost, expected, monkeypatch):
    """Of 1,000 seconds and a state every 30: as often as that, or on a slow disk 2% of the time."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    problem, network, output = wide_open()
    saves = []

    class Disk:
        def save(self, state):
            clock[0] += cost
            saves.append(clock[0])

    proof = Proof(problem, network, 1000.0, None, Disk(), 30.0, None)
    while clock[0] < 1000:
        clock[0] += 1
        proof.keep(1.0, "", output)
    assert len(saves) == pytest.approx(expected, abs=1)
    assert saves[0] == pytest.approx(30, abs=1 + cost)
    assert len(saves) * cost <= 0.021 * clock[0]
    proof.keep(0.5, "worse", 2 * output)
    assert (proof.best.value, proof.best.kind, proof.best.output is output) == (1.0, "", True)


def test_of_two_layers_the_multipliers_are_kept(tmp_path, monkeypatch):
    """A stop between the two bounds leaves the second; later ones are at the r that was chosen, without steps.

    The second begins where the first one ended, with its mu where that is known.
    """
    arch = mf.Architecture((1, 3, 4), (mf.Conv((1, 2), activation="tanh"),) * 2)
    problem = mf.Problem(arch, random_inputs(arch, 3, 0), normal((3, 1), 1))
    network = starts.start(arch, (2, 2), problem.inputs, seeded(0))
    output, calls, gain = 0.01 * normal((3, 1), 2), [], Gain(1.0, 2.0, torch.zeros(2), 1)

    def bounded(problem, output, network, *, seconds, steps, mu):
        calls.append((output, steps, mu))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return TwoLayerBound(0.01 * len(calls), 1.1 * output, 1.0, gain, 0.0)

    monkeypatch.setattr(two_layers, "prove", bounded)
    state = tmp_path / "proof.safetensors"
    bounds = [prove(problem, output, network, 100.0, state=state).value for _ in range(3)]
    assert bounds == [0.01, 0.03, 0.04]
    assert [steps for _, steps, _ in calls] == [0, two_layers.STEPS, two_layers.STEPS, 0]
    assert [mu for _, _, mu in calls] == [None, 1.0, None, None]
    for (given, _, _), factor in zip(calls, (1, 1.1, 1, 1.1)):
        torch.testing.assert_close(given, factor * calls[0][0])


KILLED = """
import meanfield as mf
from certificates.test_proving import wide_open
mf.solve(wide_open()[0], (4,), rounds=1, flow_steps=5, prove=600.0, state={state!r}, state_seconds=0.0)
"""


@pytest.mark.slow
def test_a_killed_proof_goes_on_from_the_last_tree(tmp_path, monkeypatch):
    state = tmp_path / "state.safetensors"
    kept = alternating.proof_state(state)
    environment = {**kills.environment(), "PYTHONPATH": f"{kills.ROOT}{os.pathsep}{kills.ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(state=str(state))], env=environment)
    kills.until(kept.exists, "nothing is kept")
    process.kill()
    process.wait()
    cells = len(tree_of(kept)[0])
    monkeypatch.setattr(one_layer, "FIRST", 1.0)  # all the time is for one tree
    options = {"rounds": 1, "flow_steps": 5, "state": state}
    resumed = mf.solve(wide_open()[0], (4,), prove=0.0, **options)
    assert resumed.proven is None  # the alternation heard of nothing, and nothing more is asked for
    first = mf.solve(wide_open()[0], (4,), prove=0.001, **options).proven
    assert len(tree_of(kept)[0]) == cells
    more = mf.solve(wide_open()[0], (4,), prove=first.seconds + 0.5, **options).proven
    assert len(tree_of(kept)[0]) > cells
    assert more.curve[: len(first.curve)] == first.curve


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
    assert alternating.proof_state(options["state"]).exists()
    mf.solve(problem, (4,), **{**options, "rounds": 2})  # another network, of which no tree is
    assert not alternating.proof_state(options["state"]).exists()


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
