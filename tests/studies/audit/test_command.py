"""`meanfield audit` of an exported module and of a solve."""

import json

import pytest
import torch
from command_line import run, tiny
from torch import nn

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
    assert load_network(tmp_path / "repopulated.safetensors").widths[0] <= 5
    again = run("audit", exported, *IMAGES, "--readout-penalty=0.1", "--json", "--quiet")
    assert json.loads(again.stdout)["penalty"]["source"] == 0.0


@pytest.mark.slow
def test_a_solve_is_audited_on_what_it_was_made_with(tmp_path):
    assert run(*tiny("--flow-steps=5"), "--out", tmp_path / "solve", "--quiet").exit_code == 0
    known = json.loads((tmp_path / "solve" / "results.json").read_text())["solution"]
    done = run("audit", tmp_path / "solve", "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["value"] == pytest.approx(known["value"], rel=1e-9)
    assert found["dual_value"] == pytest.approx(known["value"] - known["gap"], rel=1e-3)


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
