"""A solve that was broken off, and --resume."""

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import kills
import pytest
import torch
from command_line import run, tiny

from meanfield import load_network
from meanfield.certificates import ProvenBound, one_layer
from meanfield.storage import tensors
from meanfield.studies.solve import command, measure

SAVING = (
    "import functools; from meanfield.solvers import alternating; "
    "alternating.solve = functools.partial(alternating.solve, state_seconds=0.0); "
)
OPTIONS = tiny("--widths=6,4", "--samples=10", "--rounds=3", "--flow-steps=200", "--batch-size=4")


def started(out, *more):
    words = [sys.executable, "-c", SAVING + kills.QUICK_REPORT, *OPTIONS, "--out", str(out), *more]
    process = subprocess.Popen(words, env=kills.environment(), stderr=subprocess.PIPE, text=True)
    kills.until(lambda: process.poll() is not None or kills.hears(process.pid), "the command does not start")
    return process


@pytest.mark.slow
def test_killed_at_five_moments_it_ends_at_the_same_network(tmp_path):
    whole = started(tmp_path / "whole")
    began = time.perf_counter()
    _, stderr = whole.communicate(timeout=kills.PATIENCE)
    assert whole.returncode == 0, stderr
    share = (time.perf_counter() - began) / 6
    for moment in range(5):
        process = started(tmp_path / "out", "--resume")
        time.sleep(share * (1 + moment % 2))
        process.kill()
        process.communicate(timeout=kills.PATIENCE)
        assert process.returncode == -9
    last = started(tmp_path / "out", "--resume")
    _, stderr = last.communicate(timeout=kills.PATIENCE)
    assert last.returncode == 0, stderr
    networks = [load_network(tmp_path / name) for name in ("whole", "out")]
    assert all(map(torch.equal, *(network.tensors() for network in networks)))
    rounds = [json.loads((tmp_path / name / "results.json").read_text())["rounds"] for name in ("whole", "out")]
    assert [row["value"] for row in rounds[0]] == [row["value"] for row in rounds[1]]
    assert (tmp_path / "out" / "state.safetensors").exists()  # the round limit ended it, and may be raised


@pytest.mark.slow
def test_a_limit_leaves_what_a_later_run_goes_on_from(tmp_path, monkeypatch):
    """Other options are refused in words of the command line; without --resume a run starts anew, once it is sure to
    run, and touches no file of others.
    """
    monkeypatch.setattr(measure, "TRAINED_WIDTHS", ())
    monkeypatch.setattr(measure, "SAMPLED_WIDTHS", (4,))
    monkeypatch.setattr(measure, "PEER_STEPS", 20)
    out, options = tmp_path / "out", (*OPTIONS, "--quiet")
    fewer = [word.replace("--rounds=3", "--rounds=1") for word in options]
    assert run(*fewer, "--out", out).exit_code == 0
    kept = out / "state.safetensors"
    before = kept.read_bytes()
    (out / "states.safetensors").write_text("of somebody else")
    assert run(*options, "--out", out, "--pair=3,4").exit_code == 2
    assert kept.read_bytes() == before
    other = run(*options, "--seed=1", "--out", out, "--resume")
    assert (other.exit_code, other.stderr) == (
        2,
        f"error: --resume cannot go on from {kept}, which is of another run: its seed is 0, here 1; repeat the "
        "arguments of that run, give another path or delete the file\n",
    )
    assert run(*options, "--out", out, "--resume").exit_code == 0
    anew = run(*OPTIONS, "--resume", "--out", tmp_path / "whole")  # of a script that always says --resume
    assert anew.exit_code == 0
    assert f"nothing to go on from in {tmp_path / 'whole'}: the solve starts anew\n" in anew.stderr
    assert all(map(torch.equal, load_network(out).tensors(), load_network(tmp_path / "whole").tensors()))
    assert run(*fewer, "--out", out, "--max-seconds", "0.001").exit_code == 0  # anew
    assert json.loads((out / "results.json").read_text())["rounds"] == []
    assert (out / "states.safetensors").exists()


@pytest.mark.slow
def test_a_larger_prove_goes_on_from_the_tree(tmp_path, monkeypatch):
    """Of a solve that had ended, too, while its proof is open."""
    monkeypatch.setattr(measure, "TRAINED_WIDTHS", ())
    monkeypatch.setattr(measure, "SAMPLED_WIDTHS", (4,))
    monkeypatch.setattr(measure, "PEER_STEPS", 20)
    monkeypatch.setattr(one_layer, "FIRST", 1.0)  # all the time is for one tree
    out, kept = tmp_path / "out", tmp_path / "out" / "state.proof.safetensors"
    options = (*tiny("--widths=6", "--activation=relu", "--tolerance=0.5", "--quiet"), "--resume", "--out", out)
    proven, cells, seconds = [], [], 0.2
    for _ in range(2):
        assert run(*options, f"--prove={seconds}").exit_code == 0
        solution = json.loads((out / "results.json").read_text())["solution"]
        assert solution["status"] == "alternation_converged"
        proven.append(solution["proven"])
        cells.append(len(tensors.unpack(kept.read_bytes(), kept)[0]["state/tree/search/cells"]))
        seconds = proven[0]["seconds"] + 0.2
    assert proven[1]["curve"][: len(proven[0]["curve"])] == proven[0]["curve"]
    assert cells[1] > cells[0]
    kept.write_bytes(b"torn")
    torn = run(*options, "--prove=1")
    assert torn.exit_code == 2
    assert torn.stderr.startswith(f"error: --resume cannot go on from {kept}, which cannot be used: {kept} is not a")


@pytest.mark.parametrize(
    ("status", "proven", "kept"),
    [
        ("search_converged", None, False),
        ("max_rounds", None, True),
        ("search_converged", ProvenBound(0.5, seconds=10.2), True),  # time ended it
        ("search_converged", ProvenBound(0.5, seconds=9.0), False),  # nothing was left to prove
        ("search_converged", ProvenBound(-math.inf, reason="no method"), False),
    ],
)
def test_a_state_is_left_where_there_is_something_to_go_on_with(status, proven, kept):
    assert command._goes_on(SimpleNamespace(status=status, proven=proven), 10.0) == kept


def test_resume_needs_a_place():
    ended = run(*OPTIONS, "--resume")
    assert ended.exit_code == 2
    assert ended.stderr == "error: --resume needs --out, the directory of the solve that is to go on\n"
