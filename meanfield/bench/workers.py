"""Calls of a function side by side, in workers that end with the process that started them, however that ends."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from threadpoolctl import threadpool_info, threadpool_limits

from meanfield.bench import signals
from meanfield.validation import Misuse

BATCHED = ("dask", "ray")  # these hand results back all at once: they get a few calls per worker at a time
BATCH = 4
PACKAGES = {"dask": ("distributed", "dask[distributed]"), "ray": ("ray", "ray")}  # modules, and what pip calls them
# joblib replaces a worker whose memory has grown between two calls: nothing is lost, and there is nothing to do
warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
PATROL = 1.0  # seconds between two looks at the parent
IGNORED = ("SIGINT", "SIGHUP")  # which a terminal sends to all of its processes: the parent decides


class Lost(RuntimeError):
    """The system ended a worker, as it does with the largest process when memory runs out."""


def threads() -> dict[str, int]:
    """How many threads this process computes with: torch's, and those of the BLAS under numpy and scipy (the most of
    any that is loaded).  Sums in another order round differently, and a long descent follows what they round to.
    """
    blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return {"torch": torch.get_num_threads(), "blas": max(blas, default=1)}


def require_backend(backend: str) -> None:
    """Misuse, before any work is done, where the package of joblib's backend is not installed."""
    module, package = PACKAGES.get(backend, (None, ""))
    if module is not None and find_spec(module) is None:
        raise Misuse("backend", backend, f"needs a package that is not installed: pip install '{package}'")


def results(function: Callable[..., Any], orders: Sequence[tuple[Any, ...]], jobs: int, backend: str) -> Iterator[Any]:
    """function(*order) of every order, as they are finished.

    At an end of any kind, an error, a signal or one of the generator itself, all workers end.  Raises Lost.
    """
    jobs = min(jobs, len(orders))
    if not orders:
        return
    threads = torch.get_num_threads()
    try:
        with threadpool_limits(limits=1):
            yield from _results(function, orders, jobs, backend)
    except TerminatedWorkerError as error:
        signals.look()
        raise Lost(
            "the system ended a worker, most likely because memory ran out; what was finished is kept, and the same "
            f"command goes on from there: give it less at a time, with --jobs={max(1, jobs // 2)}"
        ) from error
    finally:
        torch.set_num_threads(threads)


def _results(function: Callable[..., Any], orders: Sequence[tuple[Any, ...]], jobs: int, backend: str) -> Iterator[Any]:
    if backend == "ray":  # which joblib does not know by itself
        importlib.import_module("ray.util.joblib").register_ray()
    if backend not in BATCHED:
        own = {"initializer": serve, "initargs": (os.getpid(),)} if backend == "loky" else {}
        # broken off between the start of the thread that manages workers and its entry in joblib's list of those to be
        # told of an end, this process would wait for it for ever
        with signals.held(), parallel_config(backend=backend, n_jobs=jobs, **own):
            found = Parallel(return_as="generator_unordered")(delayed(_one)(function, order) for order in orders)
        try:
            signals.look()
            yield from found  # type: ignore[misc]
        finally:
            with signals.held():  # a second signal would leave workers behind
                found.close()  # type: ignore[union-attr]
        return
    for first in range(0, len(orders), BATCH * jobs):
        with parallel_config(backend=backend, n_jobs=jobs):
            yield from Parallel()(delayed(_one)(function, order) for order in orders[first : first + BATCH * jobs])  # type: ignore[misc]


def _one(function: Callable[..., Any], order: tuple[Any, ...]) -> Any:
    """On one thread: calls run side by side, and the same sums come out on every number of cores."""
    torch.set_num_threads(1)
    with threadpool_limits(limits=1):
        return function(*order)


def serve(parent: int) -> None:
    """Make this process a worker of `parent`: it leaves Ctrl-C to it, and ends within seconds after it."""
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """The system gives orphans another parent."""
    while os.getppid() == parent:
        time.sleep(PATROL)
    os._exit(1)
