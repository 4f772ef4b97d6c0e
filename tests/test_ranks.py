"""Images shared among processes: the same answers as one, the same end for all, and no rank that waits for ever."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_work
import torch
from strategies import seeded

import meanfield as mf
from meanfield import folds, starts
from meanfield.ranks import ALONE, Ranks

HERE = Path(__file__).parent
PATIENCE = 120  # seconds for ranks that take a few on an idle machine


def environment(**more):
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def begun(count, *words):
    """`count` ranks of python WORDS, as torchrun starts them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **group),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes):
    """What each said, once all have ended: a rank that waits for ever fails the test."""
    try:
        return [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()


def worked(count, directory, work):
    processes = begun(count, HERE / "rank_work.py", directory, work)
    said = ended(processes)
    assert [process.returncode for process in processes] == [0] * count, said
    return [torch.load(directory / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def alone():
    patch = pytest.MonkeyPatch()
    patch.setattr(folds, "LEAST_PIXELS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield rank_work.findings(ALONE)
    torch.set_num_threads(threads)
    patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_find_what_one_finds(alone, tmp_path, count):
    found = worked(count, tmp_path, "findings")
    for name, one in alone.items():
        images = [each[name].pop("images") for each in found]
        assert sum(images) == one["images"]
        assert max(images) - min(images) <= 1  # one image on two ranks: one has none
        for each in found:
            rounds = each[name].pop("rounds")
            torch.testing.assert_close(each[name], {key: one[key] for key in each[name]}, rtol=1e-12, atol=1e-14)
            # a flow makes much of a last bit: this holds because there is none
            torch.testing.assert_close(rounds[:, :2], one["rounds"][:, :2], rtol=1e-10, atol=0)
            torch.testing.assert_close(rounds, found[0][name]["rounds"] if each is not found[0] else rounds)
            each[name]["rounds"] = rounds


@pytest.mark.slow
def test_ranks_that_keep_their_sums_find_something_else(alone, tmp_path):
    for found in worked(2, tmp_path, "deaf"):
        assert abs(found["loss"] / alone["average"]["loss"] - 1) > 0.1
        assert (found["velocity"] - alone["average"]["velocity"]).abs().max() > 0.1 * found["velocity"].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("work", "status"), [("late", "max_seconds"), ("interrupted", "interrupted")])
def test_all_ranks_end_at_the_same_record(tmp_path, work, status):
    first, second = worked(2, tmp_path, work)
    assert first == second
    assert first["status"] == status
    assert first["certified"]


@pytest.mark.slow
@pytest.mark.parametrize(("work", "error"), [("failing", "ZeroDivisionError"), ("short", "MemoryError")])
def test_a_rank_that_fails_ends_the_others(tmp_path, work, error):
    began = time.monotonic()
    processes = begun(2, HERE / "rank_work.py", tmp_path, work)
    said = ended(processes)
    assert all(process.returncode for process in processes)
    assert error in said[1][1]
    assert "Lost: another rank has ended" in said[0][1]
    assert time.monotonic() - began < PATIENCE / 2


SOLVE = ["solve", "--samples=150", "--pool=1", "--widths=6,4", "--rounds=2", "--flow-steps=20"]


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    """Two runs of 75 images of 8x8, one on each rank; the first rank speaks and writes, and says what made it."""
    one = subprocess.run(
        [sys.executable, "-m", "meanfield", *SOLVE, "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "meanfield"]
    two = subprocess.run(
        [*torchrun, *SOLVE, "--json"], env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert two.stderr.count("data: digits") == 1
    assert two.stderr.count("round 2 of at most 2") == 1
    one, two = json.loads(one.stdout), json.loads(two.stdout)
    assert two["made"]["command"].startswith("torchrun --nnodes=1 --nproc-per-node=2 -m meanfield solve --")
    values = [[row["value"] for row in each["rounds"]] for each in (one, two)]
    assert values[1] == pytest.approx(values[0], rel=1e-10)
    assert two["solution"]["status"] == one["solution"]["status"]


@pytest.mark.slow
def test_a_stopped_command_keeps_its_network_whichever_rank_was_asked(tmp_path):
    solve = [*SOLVE[:-1], "--flow-steps=10000"]
    processes = begun(2, "-m", "meanfield", *solve, "--out", tmp_path / "out")
    lock = tmp_path / "out" / ".lock"
    patience = time.monotonic() + PATIENCE
    while not lock.exists() and time.monotonic() < patience:
        time.sleep(0.1)
    time.sleep(8)
    processes[1].send_signal(signal.SIGTERM)
    said = ended(processes)
    assert all(process.returncode >= 128 for process in processes), said
    assert said[1] == ("", "")
    assert "the best network so far" in said[0][1]
    assert mf.load_network(tmp_path / "out").widths[0] == 6


@pytest.mark.slow
def test_a_search_is_refused_in_one_line():
    processes = begun(2, "-m", "meanfield", *SOLVE, "--grow=2", "--quiet")
    for (_, said), process in zip(ended(processes), processes):
        assert said == "error: --grow=2 searches on one rank only, and there are 2; leave it at 0\n"
        assert process.returncode == 2


def shared(monkeypatch, count=7, ranks=3):
    monkeypatch.setattr(folds, "LEAST_PIXELS", 1)
    whole = rank_work.problem(count, 2, "squared", mf.Penalty(), "average")
    return whole, [whole.sharded(Ranks(rank, ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_every_image_is_on_one_rank(monkeypatch, count):
    whole, parts = shared(monkeypatch, count)
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.own_targets for part in parts]), whole.targets)
    assert all(part.count == count and part.runs == whole.runs for part in parts)
    assert all(part.inputs.untyped_storage().nbytes() == part.inputs.nbytes for part in parts)  # its own, no more


@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_batch_is_shared_as_its_images_are(monkeypatch, size):
    whole, parts = shared(monkeypatch)
    indices = torch.randperm(7, generator=seeded(size))[:size]
    batches = [part.batch(indices) for part in parts]
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), whole.inputs[indices.sort().values])
    for batch in batches:
        assert batch.count == size
        assert torch.equal(batch.targets, whole.targets[indices.sort().values])
    assert torch.equal(torch.cat([batch.own_targets for batch in batches]), whole.targets[indices.sort().values])


def test_what_needs_all_images_refuses_a_part(monkeypatch):
    part = shared(monkeypatch)[1][0]
    with pytest.raises(ValueError, match="a start takes all images on one rank; this problem is sharded over 3"):
        starts.draw(part, (3, 2), seeded(0))
    with pytest.raises(ValueError, match=r"finite\.train takes all images"):
        mf.finite.train(part, (3, 2))
