import importlib
import json
import pkgutil
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from command_line import run

import benchmarks
import meanfield as mf
from benchmarks import contenders, isolated, judge, plain, problems
from benchmarks.__main__ import main
from benchmarks.flow import measure as flow_step
from benchmarks.growth import measure as growth
from benchmarks.solve import measure as solve
from benchmarks.solve import one_layer
from benchmarks.widths import measure as widths
from meanfield.bench import provenance
from meanfield.bench.options import spelled
from meanfield.solvers import flow, splitting

NAMES = [each.name for each in pkgutil.iter_modules(benchmarks.__path__) if each.ispkg]
TINY = flow_step.Options(samples=20, widths=(3, 2), dtypes=("float64",), repetitions=2, block=1, training_steps=3)


def options_of(name):
    return importlib.import_module(f"benchmarks.{name}.measure").Options


def measured(name, *arguments, out):
    """What a benchmark writes into a directory, and what it says."""
    ended = run(name, *arguments, "--out", out, main=main)
    assert ended.exit_code == 0, ended.stderr
    return json.loads((out / f"{name}.json").read_text()), ended


def test_both_contenders_lower_their_loss():
    options = replace(TINY, samples=30, widths=(6, 5))
    problem, _ = plain.problem(30, "float64")
    for name in flow_step.CONTENDERS:
        each = flow_step.contender(name, problem, options, 40)
        before = problem.loss.value(each.predict(problem.inputs), problem.targets).mean()
        for _ in range(40):
            each.step()
        assert problem.loss.value(each.predict(problem.inputs), problem.targets).mean() < before


def test_the_flow_is_the_solvers():
    problem, _ = plain.problem(TINY.samples, "float64")
    each = flow_step.FlowContender(problem, TINY, 5)
    solution = flow.solve(problem, each.network, steps=5, record_every=5)
    for _ in range(5):
        each.step()
    assert solution.history[-1]["value"] == pytest.approx(float(each.terms.total()), rel=1e-12)


def test_networks_have_equal_sizes():
    problem, _ = plain.problem(TINY.samples, "float64")
    flowed, trained = (flow_step.contender(name, problem, TINY, 1) for name in flow_step.CONTENDERS)
    sizes = [tuple(p.shape) for p in trained.network.parameters()]
    assert sizes == [tuple(t.shape) for t in (*flowed.network.kernels, flowed.network.readout)]


def test_every_benchmark_is_listed_and_the_list_costs_no_torch():
    code = "import sys; from benchmarks.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    root = Path(benchmarks.__file__).parent.parent
    listed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    text = " ".join(listed.stdout.replace("│", " ").split())
    for name in NAMES:
        said = importlib.import_module(f"benchmarks.{name}").__doc__
        assert f"{name} {said.splitlines()[0]}" in text
        assert importlib.import_module(f"benchmarks.{name}.command").command.__doc__.startswith(said)


@pytest.mark.parametrize("name", NAMES)
def test_help_states_every_option_and_its_default(name):
    text = " ".join(run(name, "--help", main=main).stdout.replace("│", " ").split())
    for each in fields(options_of(name)):
        _, option, rest = text.partition(f"--{each.name.replace('_', '-')} ")
        assert option, each.name
        told = rest.split(" --")[0]
        if not isinstance(each.default, bool) and each.default is not None:
            assert f"[default: {spelled(each.default)}]" in told
        if each.default is None and each.name != "out":
            assert "Without it:" in told
            assert "[default" not in told


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["slow"], ['"slow"', '"flow"']),
        (["flow", "--sample", "3"], ["--sample", "Did you mean --samples?"]),
        (["flow", "--samples", "0"], ["--samples=0", "at least 1"]),
        (["flow", "--samples", "1797"], ["1797", "0 are left"]),
        (["flow", "--widths", "3"], ["--widths=3", "2 layers"]),
        (["flow", "--dtypes", "float16"], ["--dtypes='float16'", "'float64'"]),
        (["flow", "--block", "0.5"], ["--block", "'0.5' is no integer"]),
        (["flow", "--training-steps", "-1"], ["--training-steps=-1", "at least 0"]),
        (["optima", "--seeds-one", "0"], ["--seeds-one=0", "at least 1"]),
        (["solve", "--gaps", "2"], ["--gaps=2.0", "between 0 and 1"]),
        (["solve", "--gaps", "1e-3,x"], ["--gaps", "'1e-3,x'"]),
        (["solve", "--max-seconds", "0"], ["--max-seconds=0", "greater than 0"]),
        (["solve", "--quick", "--large"], ["--large does not go with --quick"]),
        (["growth", "--quick", "--large"], ["--large does not go with --quick"]),
        (["widths", "--dtype", "float16"], ["--dtype='float16'", "'float64'"]),
        (["peers", "--data", "digits", "--samples", "1797"], ["--samples=1797", "leaves no image"]),
        (["proven", "--only", "digits10"], ["--only='digits10'", "'digits01'"]),
        (["grafting", "--device", "tpu"], ["--device='tpu'", "'cpu'"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, parts):
    ended = run(*arguments, main=main)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert all(part in ended.stderr for part in parts), ended.stderr


@pytest.mark.parametrize("out", ["file", "file/growth.json", "directory"])
def test_out_is_refused_before_the_work(out, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.growth.command.run", None)  # a call of it would be another error
    (tmp_path / "file").touch()
    (tmp_path / "directory" / "growth.json").mkdir(parents=True)
    ended = run("growth", "--out", tmp_path / out, main=main)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: --out=")
    assert ended.stderr.count("\n") == 1


def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path, monkeypatch):
    def stopped(options, report):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.growth.command.run", stopped)
    ended = run("growth", "--out", tmp_path, main=main)
    assert ended.exit_code == 130
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["flow", "--widths=3,2", "--dtypes=float64", "--seed=4"],
        ["optima", "--rounds=2", "--quiet"],
        ["solve", "--gaps=1e-5,0.001", "--max-seconds=2.5", "--large"],
        ["growth", "--quick", "--in-process"],
        ["device", "--quick", "--out=a b"],
        ["widths", "--width=4", "--jobs=1"],
        ["grafting", "--samples=9", "--threads=1"],
        ["landscape", "--repetitions=2", "--quick"],
        ["proven", "--only=tanh,digits35", "--seconds=3"],
    ],
    ids=lambda words: words[0],
)
def test_the_command_line_that_is_written_makes_the_same_settings(words, monkeypatch):
    heard = []
    monkeypatch.setattr(
        f"benchmarks.{words[0]}.command.run_benchmark", lambda name, options, *rest: heard.append((name, options))
    )
    run(*words, main=main)
    name, options = heard.pop()
    line = options.command_line(*shlex.split(benchmarks.PROGRAM), name)
    *program, again = shlex.split(line)[:4]
    assert (program, again) == (["python", "-m", "benchmarks"], words[0])
    run(*shlex.split(line)[3:], main=main)
    assert heard == [(name, options)]
    assert len(shlex.split(line)[4:]) == len(words) - 1


def test_flow_command(tmp_path, monkeypatch):
    monkeypatch.setattr(flow_step, "own_memory", None)  # only the fresh processes may measure memory
    sizes = ["--samples", "20", "--widths", "3,2", "--dtypes", "float64"]
    threads = torch.get_num_threads()
    found, ended = measured("flow", *sizes, "--repetitions", 2, "--block", 1, "--training-steps", 3, out=tmp_path)
    assert torch.get_num_threads() == threads
    each = found["figures"]["float64"]
    assert each["speed_ratio"] > 0
    assert set(each["peak_bytes"]) == set(flow_step.CONTENDERS)
    assert found["training"]["held_out_images"] == 1797 - 20
    assert "held out" in ended.stdout
    assert flow_step.Options.from_dict(found["made"]["settings"]) == TINY.variant(out=tmp_path)
    assert found["made"]["library"] == provenance.library("benchmarks")
    assert found["machine"]["cores"] >= 1


@pytest.fixture(scope="module")
def tiny():
    program = problems.program(problems.TINY)
    solution = splitting.solve(program, 1e-6)
    return program, judge.Answer([solution.point], [solution.multipliers])


def test_standard_programs_are_those_of_the_seed():
    program = problems.program(problems.TINY)
    assert program.widths == (6, 4)
    assert program.maps(program.problem.inputs)[0][1].shape == (6, 4, 4, 4)
    assert torch.equal(program.frozen.kernels[0], problems.program(problems.TINY).frozen.kernels[0])
    assert not torch.equal(
        program.frozen.kernels[0], problems.program(replace(problems.TINY, seed=1)).frozen.kernels[0]
    )
    assert problems.digits(5, 6)[0].shape == (5, 1, 6, 6)
    assert problems.Case.from_dict(json.loads(json.dumps(problems.TINY.to_dict()))) == problems.TINY


def test_a_program_with_an_amplitude_bound_has_it_active_at_its_optimum():
    case = replace(problems.TINY, tightness=0.3)
    assert case.name == f"{problems.TINY.name}, amplitude bound 0.3"
    assert problems.Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case
    program = problems.program(case)
    penalty, point = program.problem.penalty, splitting.solve(program, 1e-6).point
    heavy = point.masses[1] > 1e-3
    reached = penalty.norms(point.kernels[0]).sum(1)[heavy] / point.masses[1][heavy]
    assert reached.max().item() == pytest.approx(penalty.amplitude_bound, rel=1e-6)


def test_judge_passes_an_optimum_and_fails_what_is_worse(tiny):
    program, answer = tiny
    optimum = judge.judge(program, answer)
    assert judge.meets(judge.figures(optimum), 1e-6)
    frozen = judge.judge(program, judge.Answer([program.point(program.frozen)], answer.multipliers))
    assert judge.figures(frozen)["feasible"]
    assert frozen.value > optimum.value
    runs = [judge.figures(optimum), judge.figures(frozen)]
    bound = judge.best_bound(runs)
    judge.write_excess(runs, bound)
    assert bound == max(optimum.dual_value, frozen.dual_value)
    assert runs[0]["excess"] <= 1e-6 < runs[1]["excess"]
    assert not judge.meets(runs[1], 1e-6)


def test_judge_accepts_no_value_below_the_bound_from_an_infeasible_point(tiny):
    program, answer = tiny
    point = answer.points[0]
    shrunk = replace(point, kernels=tuple(0.5 * W for W in point.kernels))
    found = judge.figures(judge.judge(program, judge.Answer([shrunk], answer.multipliers)))
    assert found["value"] < judge.judge(program, answer).value
    assert not found["feasible"]
    assert not judge.meets(found, 1.0)
    both = judge.judge(program, judge.Answer([shrunk, point], answer.multipliers))
    assert both.value == judge.judge(program, answer).value


def test_worse_multipliers_only_widen_the_gap(tiny):
    program, answer = tiny
    worse = answer.multipliers[0].map(lambda tensor: 1.1 * tensor + 1e-3)
    assert judge.judge(program, judge.Answer(answer.points, [worse])).gap > judge.judge(program, answer).gap


def test_answers_survive_their_file(tiny, tmp_path):
    program, answer = tiny
    answer.save(tmp_path / "answer.pt")
    assert judge.judge(program, judge.Answer.load(tmp_path / "answer.pt")) == judge.judge(program, answer)


def test_times_count_only_where_the_gap_is_proven():
    runs = [
        {"contender": "splitting", "feasible": True, "relative_gap": 1e-5, "cpu_seconds": 1.0},
        {"contender": "CLARABEL", "feasible": True, "relative_gap": 2e-5, "cpu_seconds": 5.0},
        {"contender": "CLARABEL", "feasible": True, "relative_gap": 3e-6, "cpu_seconds": 20.0},
        {"contender": "CLARABEL", "feasible": True, "relative_gap": 3e-8, "cpu_seconds": 25.0},
        {"contender": "SCS", "feasible": False, "relative_gap": 1e-9, "cpu_seconds": 0.1},
    ]
    found = solve.at_gap(solve.SMALL, runs, 1e-5)
    assert found["cpu_seconds"] == {"splitting": 1.0, "CLARABEL": 20.0}
    assert found["times_faster"] == {"CLARABEL": 20.0}
    assert [target["kept"] for target in found["targets"]] == [True]
    assert [target["kept"] for target in solve.at_gap(solve.SMALL, runs[:2], 1e-5)["targets"]] == [False]


def test_solve_command(tmp_path):
    found, ended = measured("solve", "--quick", "--in-process", out=tmp_path)
    assert (tmp_path / "solve.png").read_bytes().startswith(b"\x89PNG")
    case = found["cases"][0]
    assert {run["contender"] for run in case["runs"]} == set(contenders.CONTENDERS)
    assert all(run["excess"] > -1e-9 for run in case["runs"])
    assert set(case["at_gap"][0]["cpu_seconds"]) == set(contenders.CONTENDERS)
    assert [run["contender"] for run in found["one_layer"][0]["runs"]][:2] == ["meanfield", "exact optimum"]
    assert {"cvxpy", "clarabel", "scs", "pyscnn"} <= set(found["made"]["versions"])
    assert "CLARABEL" in ended.stdout
    assert "splitting at 1e-03" in ended.stderr


def test_growth_command(tmp_path):
    ended = run("growth", "--quick", "--in-process", "--quiet", "--out", tmp_path / "sub" / "sizes.json", main=main)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "", "")
    assert (tmp_path / "sub" / "sizes.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "sub" / "sizes.json").read_text())
    assert set(found["sweeps"]) == {"particles", "images", "positions"}
    for sweep in found["sweeps"].values():
        assert len(sweep["rows"]) == 2
        assert all(row["matmul_gflops"] > 0 and row["rank"] > 0 for row in sweep["rows"])


def test_device_command_without_a_gpu_and_again_as_it_says_of_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, ended = measured("device", "--quick", out=tmp_path)
    assert "no GPU" in found["skipped"]
    assert "no GPU" in ended.stderr
    (tmp_path / "device.json").unlink()
    run(*shlex.split(found["made"]["command"])[3:], main=main)
    assert json.loads((tmp_path / "device.json").read_text()) == found


def test_optima_command(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.optima.measure.two_layers", lambda seed, rounds: TWO_LAYERS | {"seed": seed})
    found, ended = measured("optima", "--seeds-one", 1, "--seeds-two", 2, out=tmp_path)
    assert abs(found["one_layer"][0]["excess"]) < 1e-6
    assert [row["seed"] for row in found["two_layers"]] == [0, 1]
    assert "two layers, seed 1" in ended.stderr
    assert "cvxpy on the final program" in ended.stdout


def test_unseen_command(tmp_path):
    found, ended = measured("unseen", "--quick", out=tmp_path)
    assert found["figures"]["problems"] == len(found["rows"]) == 2
    for row in found["rows"]:
        assert row["lowered"] <= row["lowered_there"]  # other multipliers can only give the bound back
        assert row["lowered_there"] >= 0
        assert row["shortfalls"] == sorted(row["shortfalls"])
        assert row["said"] == row["shortfalls"][5]
    exceeded = [at["share"] for at in found["figures"]["at_rank"].values()]
    assert exceeded == sorted(exceeded, reverse=True)
    assert "at the first multipliers" in ended.stdout


def test_proven_command(tmp_path):
    found, ended = measured("proven", "--quick", "--only", "digits35,tanh", out=tmp_path)
    assert (tmp_path / "proven.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["layers"], row["classes"], row["side"]) for row in found["rows"]] == [(1, [3, 5], 8), (2, [0, 1], 4)]
    for row in found["rows"]:
        assert 0 < row["share"] <= 1
        assert row["value"] < 0.5  # no network without particles
        assert row["curve"][-1][1] == pytest.approx(row["share"])
        assert row["curve"][-1][0] <= row["seconds"]
        assert (row["device"], row["threads"]) == ("cpu", torch.get_num_threads())
    assert found["rows"][0]["trivial"] is None
    assert 0 < found["rows"][1]["trivial"] < found["rows"][1]["share"]
    assert "two layers" in ended.stdout


TWO_LAYERS = {
    "value": 0.1,
    "gap": 1e-9,
    "flow_gaps": [1e-5],
    "never_rises": True,
    "reference_value": 0.1,
    "seconds": 1.0,
}


def test_slopes():
    exact = growth.slope([1, 2, 4], [3, 12, 48])
    assert exact["slope"] == pytest.approx(2)
    assert exact["upper"] == pytest.approx(2)
    assert exact["error"] == pytest.approx(0, abs=1e-9)
    assert growth.slope([1], [1])["slope"] is None


def test_a_fresh_process_answers_and_a_failure_says_why():
    order = {
        "case": one_layer.TINY.to_dict(),
        "contender": "exact optimum",
        "tolerance": None,
        "max_seconds": 60.0,
        "answer": "/nowhere/network.pt",
    }
    with pytest.raises(isolated.Failure, match="nowhere"):
        isolated.call("benchmarks.solve.one_layer:run", order)
    with pytest.raises(isolated.Failure, match="stopped after"):
        isolated.call("benchmarks.solve.one_layer:run", order, timeout=0.01)


def test_pyscnn_is_skipped_with_a_reason(monkeypatch):
    monkeypatch.setattr(one_layer.importlib.util, "find_spec", lambda name: None)
    lines = []
    found = one_layer.measure(one_layer.TINY, 10.0, False, lines.append)
    assert [entry["contender"] for entry in found["skipped"]] == ["pyscnn"]
    assert "not installed" in found["skipped"][0]["reason"]
    assert any("not installed" in line for line in lines)
    assert "positions" in (one_layer.absence("pyscnn", one_layer.CASES[-1]) or "")
    assert one_layer.absence("exact optimum", one_layer.CASES[1])


def test_neurons_become_the_particles_of_least_penalty():
    case = one_layer.TINY
    exact = one_layer.problem(case)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((5, 3), (5,)))
    second[2] = 0.0
    network = one_layer.balanced_network(exact, first, second)
    output = (exact.inputs.flatten(1) @ first.T).clamp_min(0) @ second
    assert network(exact.inputs).flatten() == pytest.approx(output, rel=1e-10)
    variation = float((first.norm(dim=1) * second.abs()).sum())
    expected = 0.5 * float((output - exact.targets.flatten()).square().mean()) + 2 * one_layer.STRENGTH * variation
    assert float(exact.value(network)) == pytest.approx(expected, rel=1e-10)
    assert float(one_layer.balanced_network(exact, first, 0 * second)(exact.inputs).abs().max()) == 0


def test_the_library_s_step_is_that_of_training():
    options = widths.Options(samples=10, width=4, dtype="float64")
    step, (problem, _) = widths.library_step(options), plain.problem(10, "float64")
    run = step.__closure__[0].cell_contents
    start = mf.finite.FiniteCNN(problem.architecture, run.network.kernels, run.network.readout)
    step()
    trained = mf.finite.train(problem, (4, 4), start=start, optimiser="sgd", schedule="constant", steps=1).network
    for ours, theirs in zip(run.network.parameters(), trained.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_the_plain_contender_has_the_penalties_of_the_library():
    problem, _ = plain.problem(10, "float64")
    generator = torch.Generator().manual_seed(0)
    network = mf.finite.FiniteCNN.random(problem.architecture, (4, 4), problem.inputs, generator)
    network_in_torch = plain.network(problem, (4, 4))
    weights = [each.weight for each in network_in_torch if hasattr(each, "weight")]
    with torch.no_grad():
        for weight, kernel in zip(weights, [network.kernels[0], network.kernels[1] / 4, network.readout / 4]):
            weight.copy_(kernel)
    terms = problem.terms(network.particles())
    expected = float(terms.source + terms.readout + terms.input)
    assert widths._penalties(network_in_torch, problem.penalty).item() == pytest.approx(expected, rel=1e-10)


def test_widths_command(tmp_path):
    found, ended = measured("widths", "--quick", "--samples", 4, "--width", 2, "--jobs", 1, out=tmp_path)
    assert set(found["step"]["seconds_per_step"]) == set(widths.CONTENDERS)
    assert found["sweep"]["cell_seconds"] >= 0.04
    assert "plain with penalties" in ended.stdout


def test_grafts_are_measured_and_agree_with_the_whole_design_matrix(tmp_path):
    found, ended = measured("grafting", "--quick", "--in-process", "--samples", 12, "--threads", 1, out=tmp_path)
    assert found["peer"]["largest_difference"] < 1e-4  # float32 networks
    (large,) = found["grafts"]
    assert (large["images"], large["rows"], large["unknowns"]) == (12, 12 * 16 * 16, 9 * 8)
    assert [each["images"] for each in found["memory"]] == [500, 1000]
    assert "whole matrix" in ended.stdout


def test_points_of_a_landscape_are_measured_and_an_absent_peer_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.landscape.measure.PEER", "no_such_package")
    sizes = ("--samples", 40, "--repetitions", 1)
    found, ended = measured("landscape", "--quick", "--in-process", *sizes, out=tmp_path)
    (row,) = found["rows"]
    assert row["parameters"] == 9930
    assert set(row["milliseconds"]) == {"exact", "functional_call"}
    assert row["largest_relative_difference"] < 1e-6
    assert row["ratio"] is None
    assert "no_such_package is not installed" in ended.stdout
