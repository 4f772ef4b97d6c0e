"""`meanfield audit` of an exported module and of a solve."""

import json

import pytest
import torch
from command_line import run
from torch import nn

import meanfield as mf
from meanfield.storage import load_network


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).eval()
    path = tmp_path_factory.mktemp("exported") / "module.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(1, 1, 4, 4),), strict=False), path)
    return path


IMAGES = ("--classes=3,5", "--samples=20", "--pool=2")


@pytest.mark.slow
def test_a_module_gets_a_page(exported, tmp_path):
    done = run("audit", exported, *IMAGES, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "J falls by" in done.stdout
    page = (tmp_path / "audit.html").read_text()
    assert "derived from the network" in page
    assert "held-out images" in page
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["gap"] == pytest.approx(figures["value"] - figures["dual_value"])
    assert "right of 20 held-out" not in page
    table = {row["quantity"]: row for row in figures["table"]}
    reached = table["J"]["repopulated"]
    assert f"lowers J by {1 - reached / figures['value']:.2%}" in page
    digits = mf.data.load("digits", classes=(3, 5), samples=20, pool=2)
    repopulated = load_network(tmp_path / "repopulated.safetensors")
    posed = repopulated.architecture, digits.inputs.double(), digits.targets("softmax"), "softmax"
    problem = mf.Problem(*posed, mf.Penalty(**figures["penalty"]))
    assert float(problem.value(repopulated)) == pytest.approx(reached, rel=1e-12)
    again = run("audit", exported, *IMAGES, "--readout-penalty=0.1", "--json", "--quiet")
    assert json.loads(again.stdout)["penalty"]["source"] == 0.0


@pytest.mark.slow
def test_a_network_of_a_solve_is_audited_on_what_it_was_made_with(tmp_path):
    """Settings as `meanfield solve` leaves them in its file; those of the command line come first."""
    settings = {"data": "digits", "classes": [3, 5], "samples": 12, "pool": 2, "split": None, "loss": "squared"}
    settings |= {"source_penalty": 1e-3, "readout_penalty": 2e-3, "input_penalty": 3e-3, "kernel_norm": "l1"}
    digits = mf.data.load("digits", classes=(3, 5), samples=12, pool=2)
    layers = (mf.Conv(3, 1, activation="tanh"),) * 2
    penalty = mf.Penalty(source=1e-3, readout=2e-3, input=3e-3, kernel_norm="l1")
    architecture = mf.Architecture(digits.input_shape, layers)
    problem = mf.Problem(architecture, digits.inputs, digits.targets("squared"), "squared", penalty)
    network = mf.starts.draw(problem, (6, 4), torch.Generator().manual_seed(0))
    path = mf.save_network(network, tmp_path / "network.safetensors", {"settings": settings})
    found = json.loads(run("audit", path, "--json", "--quiet").stdout)
    assert found["value"] == pytest.approx(float(problem.value(network)), rel=1e-12)
    assert found["prices"] == "as they were given"
    free = json.loads(run("audit", path, "--samples=16", "--readout-penalty=1", "--json", "--quiet").stdout)
    assert (free["penalty"]["readout"], free["penalty"]["source"], free["penalty"]["kernel_norm"]) == (1.0, 0.0, "l1")
    assert "right of 16 training images" in free["accuracy"]


@pytest.mark.slow
def test_what_cannot_be_audited_is_one_line(exported, tmp_path):
    (tmp_path / "pickle.pt").write_bytes(b"")
    cases = [
        ([], "--network is missing"),
        ([tmp_path / "pickle.pt"], "MODULE.pt2 as torch.export.save writes it"),
        ([exported], "takes images (1, 4, 4), and --data='digits' has (1, 8, 8): see --pool"),
        ([exported, "--pool=2", "--classes=3,5,8"], "has 2 outputs; 3 classes with --loss=softmax need 3"),
    ]
    for arguments, said in cases:
        done = run("audit", *arguments)
        assert done.exit_code == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
