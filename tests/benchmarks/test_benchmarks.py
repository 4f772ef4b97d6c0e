import json
from dataclasses import replace

import pytest
import torch

import meanfield as mf
from benchmarks import __main__ as command
from benchmarks import (
    contenders,
    flow_step,
    grafting,
    growth,
    isolated,
    judge,
    one_layer,
    problems,
    solve,
    tables,
    widths,
)
from meanfield.solvers import flow, splitting

TINY = flow_step.Settings(
    samples=20, widths=(3, 2), dtypes=("float64",), repetitions=2, block=1, warm_up=1, memory_steps=1, training_steps=3
)


def test_both_contenders_lower_their_loss():
    settings = replace(TINY, samples=30, widths=(6, 5))
    problem, _ = flow_step.load(settings, "float64")
    for name in flow_step.CONTENDERS:
        each = flow_step.contender(name, problem, settings, 40)
        before = problem.loss.value(each.predict(problem.inputs), problem.targets).mean()
        for _ in range(40):
            each.step()
        assert problem.loss.value(each.predict(problem.inputs), problem.targets).mean() < before


def test_the_flow_is_the_solvers():
    problem, _ = flow_step.load(TINY, "float64")
    each = flow_step.FlowContender(problem, TINY, 5)
    solution = flow.solve(problem, each.network, steps=5, record_every=5)
    for _ in range(5):
        each.step()
    assert solution.history[-1]["value"] == pytest.approx(float(each.terms.total()), rel=1e-12)


def test_networks_have_equal_sizes():
    problem, _ = flow_step.load(TINY, "float64")
    flowed, plain = (flow_step.contender(name, problem, TINY, 1) for name in flow_step.CONTENDERS)
    sizes = [tuple(p.shape) for p in plain.network.parameters()]
    assert sizes == [tuple(t.shape) for t in (*flowed.network.kernels, flowed.network.readout)]


def test_command_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flow_step, "own_memory", None)  # only the fresh processes may measure memory
    sizes = ["--samples", "20", "--widths", "3", "2", "--dtypes", "float64"]
    arguments = ["flow", *sizes, "--repetitions", "2", "--block", "1", "--training-steps", "3"]
    threads = torch.get_num_threads()
    found = command.main([*arguments, "--out", str(tmp_path / "sub" / "figures.json")])
    assert torch.get_num_threads() == threads
    assert json.loads((tmp_path / "sub" / "figures.json").read_text()) == json.loads(json.dumps(found))
    each = found["figures"]["float64"]
    assert each["speed_ratio"] > 0
    assert set(each["peak_bytes"]) == set(flow_step.CONTENDERS)
    assert found["training"]["held_out_images"] == 1797 - 20
    assert "held out" in capsys.readouterr().out


def test_settings_survive_json():
    assert flow_step.from_dict(json.loads(json.dumps(flow_step.asdict(TINY)))) == TINY


@pytest.mark.parametrize(
    "arguments", [[], ["flow", "--samples", "0"], ["flow", "--dtypes", "float16"], ["slow"], ["solve", "--gaps", "2"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "usage" in capsys.readouterr().err


TINY_CASE = problems.Case(6, 4, (6, 4))


@pytest.fixture(scope="module")
def tiny():
    program = problems.program(TINY_CASE)
    solution = splitting.solve(program, 1e-6)
    return program, judge.Answer([solution.point], [solution.multipliers])


def test_standard_programs_are_those_of_the_seed():
    program = problems.program(TINY_CASE)
    assert program.widths == (6, 4)
    assert program.preactivations[1].shape == (6, 4, 4, 4)
    assert torch.equal(program.frozen.kernels[0], problems.program(TINY_CASE).frozen.kernels[0])
    assert not torch.equal(program.frozen.kernels[0], problems.program(replace(TINY_CASE, seed=1)).frozen.kernels[0])
    assert problems.digits(5, 6)[0].shape == (5, 1, 6, 6)
    assert problems.Case.from_dict(json.loads(json.dumps(TINY_CASE.to_dict()))) == TINY_CASE


def test_judge_passes_an_optimum_and_fails_what_is_worse(tiny):
    program, answer = tiny
    optimum = judge.judge(program, answer)
    assert judge.meets(judge.figures(optimum), 1e-6)
    frozen = judge.judge(program, judge.Answer([program.point(program.frozen)], answer.multipliers))
    assert judge.figures(frozen)["feasible"]
    assert frozen.value > optimum.value
    runs = [judge.figures(optimum), judge.figures(frozen)]
    bound = judge.excess(runs)
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


def test_solve_command(tmp_path, capsys):
    found = command.main(["solve", "--quick", "--in-process", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "solve.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "solve.png").read_bytes().startswith(b"\x89PNG")
    case = found["cases"][0]
    assert {run["contender"] for run in case["runs"]} == set(contenders.CONTENDERS)
    assert all(run["excess"] > -1e-9 for run in case["runs"])
    assert set(case["at_gap"][0]["cpu_seconds"]) == set(contenders.CONTENDERS)
    assert [run["contender"] for run in found["one_layer"][0]["runs"]][:2] == ["meanfield", "exact optimum"]
    assert found["machine"]["versions"]["cvxpy"]
    assert "CLARABEL" in capsys.readouterr().out


def test_growth_command(tmp_path):
    found = command.main(["growth", "--quick", "--in-process", "--out", str(tmp_path / "sizes.json")])
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert set(found["sweeps"]) == {"particles", "images", "positions"}
    for sweep in found["sweeps"].values():
        assert len(sweep["rows"]) == 2
        assert all(row["matmul_gflops"] > 0 and row["rank"] > 0 for row in sweep["rows"])


def test_device_command_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = command.main(["device", "--out", str(tmp_path)])
    assert "no GPU" in found["skipped"]
    assert "no GPU" in capsys.readouterr().out
    assert json.loads((tmp_path / "device.json").read_text())["skipped"] == found["skipped"]


def test_slopes():
    exact = growth.slope([1, 2, 4], [3, 12, 48])
    assert exact["slope"] == pytest.approx(2)
    assert exact["upper"] == pytest.approx(2)
    assert exact["error"] == pytest.approx(0, abs=1e-9)
    assert growth.slope([1], [1])["slope"] is None


def test_a_fresh_process_answers_and_a_failure_says_why():
    order = {
        "case": one_layer.TINY.__dict__,
        "contender": "exact optimum",
        "tolerance": None,
        "max_seconds": 60.0,
        "answer": "/nowhere/network.pt",
    }
    with pytest.raises(isolated.Failure, match="nowhere"):
        isolated.call("benchmarks.one_layer:run", order)
    with pytest.raises(isolated.Failure, match="stopped after"):
        isolated.call("benchmarks.one_layer:run", order, timeout=0.01)


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
    settings = widths.Settings(samples=10, width=4, dtype="float64")
    step, problem = widths.library_step(settings), widths.problem(settings)
    run = step.__closure__[0].cell_contents
    start = mf.finite.FiniteCNN(problem.architecture, run.network.kernels, run.network.readout)
    step()
    trained = mf.finite.train(problem, (4, 4), start=start, optimiser="sgd", schedule="constant", steps=1).network
    for ours, theirs in zip(run.network.parameters(), trained.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_the_plain_contender_has_the_penalties_of_the_library():
    settings = widths.Settings(samples=10, width=4, dtype="float64")
    problem = widths.problem(settings)
    generator = torch.Generator().manual_seed(0)
    network = mf.finite.FiniteCNN.random(problem.architecture, (4, 4), problem.inputs, generator)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1, bias=False),
        torch.nn.Conv2d(4, 4, 3, padding=1, bias=False),
        torch.nn.Linear(4, 10, bias=False),
    ).double()
    with torch.no_grad():
        for block, kernel in zip(plain, [network.kernels[0], network.kernels[1] / 4, network.readout / 4]):
            block.weight.copy_(kernel)
    terms = problem.terms(network.particles())
    expected = float(terms.source + terms.readout + terms.input)
    assert widths._penalties(plain, problem.penalty).item() == pytest.approx(expected, rel=1e-10)


def test_a_sweep_and_a_step_are_measured_and_shown():
    found = widths.run(
        widths.Settings(samples=4, width=2, repetitions=1, block=1, warm_up=1, cells=3, cell_seconds=0.01, jobs=1)
    )
    assert set(found["step"]["seconds_per_step"]) == set(widths.CONTENDERS)
    assert found["sweep"]["cell_seconds"] >= 0.03
    assert [table.row_count for table in tables.widths_tables(found)] == [3, 1]


def test_grafts_are_measured_and_agree_with_the_whole_design_matrix():
    settings = grafting.Settings(("conv4",), 12, 2, "conv4", (4, 8), 1, peer_images=6, repetitions=1, fresh=False)
    found = grafting.run(settings, lambda line: None)
    assert found["peer"]["largest_difference"] < 1e-4  # float32 networks
    (large,) = found["grafts"]
    assert (large["rows"], large["unknowns"]) == (12 * 16 * 16, 9 * 4)
    assert [each["images"] for each in found["memory"]] == [4, 8]
    assert [table.row_count for table in tables.grafting_tables(found)] == [3, 3]
