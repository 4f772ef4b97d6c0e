"""Workers: as many as there is work, one thread each, and none of them outlives what started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info

from meanfield.bench import signals, workers


def threads(order):
    return order, os.getpid(), torch.get_num_threads(), max(each["num_threads"] for each in threadpool_info())


def killed(order):
    os.kill(os.getpid(), signal.SIGKILL)


def test_in_this_process_calls_take_one_thread_and_leave_the_setting(monkeypatch):
    """Two threads sum in another order than one: J of the default problem differed by 0.6%."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for backend in ("loky", "threading", "sequential"):
            ((order, process, own, others),) = workers.results(threads, [(5,)], 1, backend)
            assert (order, process, own, others) == (5, os.getpid(), 1, 1)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_no_more_workers_than_work(monkeypatch):
    """`--jobs 24` for 6 cells used to start 27 processes."""
    asked = []

    class Parallel:
        def __init__(self, **options):
            pass

        def __call__(self, calls):
            return (function(*arguments) for function, arguments, _ in calls)

    def config(*, n_jobs, **options):
        asked.append(n_jobs)
        return signals.held()

    monkeypatch.setattr(workers, "Parallel", Parallel)
    monkeypatch.setattr(workers, "parallel_config", config)
    for count in (0, 1, 6):
        assert len(list(workers.results(threads, [(n,) for n in range(count)], 24, "loky"))) == count
    assert asked == [1, 6]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_worker_that_the_system_ends_is_told_in_a_sentence():
    """It used to end in 69 lines."""
    with pytest.raises(workers.Lost, match=r"^the system ended a worker.*with --jobs=1$"):
        list(workers.results(killed, [(n,) for n in range(3)], 2, "loky"))


ORPHAN = """
import os, sys, time
from meanfield.bench import workers
if os.fork() == 0:
    workers.PATROL = 0.05
    workers.serve(os.getppid())
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_a_worker_ends_after_its_parent():
    """After kill -9 of the parent, workers used to stay for minutes."""
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, signal.SIGINT)  # a terminal's Ctrl-C is the parent's to act on
        time.sleep(0.2)
        os.kill(worker, 0)
        parent.kill()
    until = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_signal_waits_until_the_workers_have_been_started(monkeypatch):
    """Broken off in the middle, the process used to wait for ever at its end for the thread that manages workers."""
    started, closed = [], []

    class Starting:
        def __init__(self, **options):
            pass

        def __call__(self, calls):
            os.kill(os.getpid(), signal.SIGTERM)
            started.append(True)

            def results():
                try:
                    yield from ()
                finally:
                    closed.append(True)

            found = results()
            next(found, None)
            return found

    monkeypatch.setattr(workers, "Parallel", Starting)
    with pytest.raises(signals.Stopped), signals.heard():
        list(workers.results(abs, [(1,), (2,)], 2, "loky"))
    assert started
    assert closed
