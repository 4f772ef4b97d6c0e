import json
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import flow_step
from meanfield.solvers import flow

TINY = flow_step.Settings(samples=20, widths=(3, 2), dtypes=("float64",), repetitions=2, block=1, warm_up=1, memory_steps=1, training_steps=3)


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


@pytest.mark.parametrize("arguments", [[], ["flow", "--samples", "0"], ["flow", "--dtypes", "float16"], ["slow"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "usage" in capsys.readouterr().err
