"""Images shared among processes: the same answers as one, the same end for all, and no rank that waits for ever."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import rank_work
import torch
from command_line import run
from strategies import seeded

import meanfield as mf
from meanfield import folds, limits, starts
from meanfield.ranks import ALONE, Ranks
from meanfield.solvers import alternating
from meanfield.storage import states
from meanfield.validation import Misuse

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


@contextmanager
def one_thread():
    """As the ranks: two threads add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone():
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(folds, "LEAST_PIXELS", 1)
        return rank_work.findings(ALONE)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two ranks find; each test looks at a part of it."""
    return worked(2, tmp_path_factory.mktemp("two"), "two")


def same(found, alone):
    for name in found[0]:
        one, every = alone[name], [each[name] for each in found]
        images = [each["images"] for each in every]
        assert sum(images) == one["images"]
        assert max(images) - min(images) <= 1  # one image on two ranks: one has none
        for each in every:
            for key in one.keys() - {"images", "rounds"}:
                torch.testing.assert_close(each[key], one[key], rtol=1e-12, atol=1e-14)
            # a flow makes much of a last bit: three rounds agree because there is none
            torch.testing.assert_close(each["rounds"][:, :2], one["rounds"][:, :2], rtol=1e-10, atol=0)
            assert torch.equal(each["rounds"], every[0]["rounds"])


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(alone, both):
    same([each["findings"] for each in both], alone)


@pytest.mark.slow
def test_three_ranks_find_what_one_finds(alone, tmp_path):
    same(worked(3, tmp_path, "three"), alone)


@pytest.mark.slow
def test_ranks_that_keep_their_sums_find_something_else(alone, both):
    for each in both:
        found = each["deaf"]
        assert abs(found["loss"] / alone["average"]["loss"] - 1) > 0.1
        assert (found["velocity"] - alone["average"]["velocity"]).abs().max() > 0.1 * found["velocity"].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("work", "status"), [("late", "max_seconds"), ("interrupted", "interrupted")])
def test_all_ranks_end_at_the_same_record(both, work, status):
    """By the clock of rank 0, and by a signal to rank 1."""
    first, second = (each[work] for each in both)
    assert first == second
    assert first[0] == status
    assert first[3]  # certified


@pytest.mark.slow
def test_a_state_is_on_the_disk_of_rank_0_alone(both):
    (first, own), (second, other) = (each["resumed"] for each in both)
    assert (own, other) == (True, False)
    assert len(first) == 2
    assert first == second


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(tmp_path):
    began = time.monotonic()
    processes = begun(2, HERE / "rank_work.py", tmp_path, "failing")
    said = ended(processes)
    assert all(process.returncode for process in processes)
    assert "ZeroDivisionError" in said[1][1]
    assert "Lost: another rank has ended" in said[0][1]
    assert time.monotonic() - began < PATIENCE / 2


def test_what_ends_one_rank_alone_is_no_status():
    """Others would wait for it: memory that ran out, and an interrupt that did not come to all at one look."""

    class Clock(limits.Clock):
        def common(self, stop):
            return isinstance(stop, limits.TimeUp)

    with limits.timed(Clock()):
        assert limits.status(limits.TimeUp()) == "max_seconds"
        for stop in (MemoryError(), KeyboardInterrupt()):
            with pytest.raises(type(stop)):
                limits.status(stop)
    assert limits.status(MemoryError()) == "out_of_memory"


SOLVE = ["solve", "--samples=150", "--pool=1", "--widths=6,4", "--rounds=2", "--flow-steps=20"]


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    """Two runs of 75 images of 8x8, one on each rank; the first rank speaks and writes, and says what made it."""
    with one_thread():
        one = run(*SOLVE, "--json")
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


def test_a_state_is_of_the_data_however_many_ranks_share_them(monkeypatch):
    """Each rank knows the digests of its own runs; one image or one target changed is another problem."""
    whole, parts = shared(monkeypatch)
    assert [part.runs_of_ranks for part in parts] == [(2, 2, 3)] * 3
    told = []
    monkeypatch.setattr(Ranks, "gathered", lambda self, rows, shares: told.append(rows) or rows)
    described = [states.described(each) for each in (whole, *parts)]
    assert torch.equal(torch.cat(told[1:]), told[0])
    assert all({**each, "data": None} == {**described[0], "data": None} for each in described)
    inputs, targets = whole.inputs.clone(), whole.targets.clone()
    inputs[6, 0, 0, 0] += 2**-50
    targets[6, 0] += 2**-50
    for changed in ((inputs, whole.targets), (whole.inputs, targets)):
        other = mf.Problem(whole.architecture, *changed, "squared", whole.penalty)
        assert states.described(other)["data"] != described[0]["data"]


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
    whole, (part, *_) = shared(monkeypatch)
    with pytest.raises(ValueError, match="a start takes all images on one rank; this problem is sharded over 3"):
        starts.draw(part, (3, 2), seeded(0))
    network = starts.draw(whole, (3, 2), seeded(0))
    with pytest.raises(Misuse, match="grow=2 searches on one rank only, and there are 3; leave it at 0"):
        alternating.solve(part, network, grow=2)
    with pytest.raises(ValueError, match=r"finite\.train takes all images"):
        mf.finite.train(part, (3, 2))
