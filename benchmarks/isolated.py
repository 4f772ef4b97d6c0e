"""A function of this package run in a process of its own, on one thread: order and answer travel as JSON files.

`python -m benchmarks.isolated benchmarks.contenders:run ORDER.json ANSWER.json PARENT` is what is started.  A fresh
process gives every contender its own peak memory, its own thread settings and an end that cannot take the others along.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import one_thread
from meanfield.bench.workers import serve

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Failure(RuntimeError):
    """The process ended without an answer; the text says how."""


def call(function: str, order: dict[str, Any], *, timeout: float | None = None, fresh: bool = True) -> dict[str, Any]:
    """The answer of "module:function" to `order`.  fresh=False stays in this process, where peak memory means little.

    Raises Failure where the process dies, runs longer than `timeout` (wall seconds) or raises.
    """
    if not fresh:
        return here(function, order)
    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory, "order.json"), Path(directory, "answer.json")
        asked.write_text(json.dumps(order))
        command = [sys.executable, "-m", "benchmarks.isolated", function, str(asked), str(answered), str(os.getpid())]
        try:
            done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Failure(f"stopped after {timeout:.0f} s") from None
        if done.returncode or not answered.exists():
            raise Failure(_last_words(done))
        return json.loads(answered.read_text())


def here(function: str, order: dict[str, Any]) -> dict[str, Any]:
    """As `call`, in this process; the thread setting is put back."""
    module, name = function.split(":")
    with one_thread():
        return getattr(importlib.import_module(module), name)(order)


def _environment() -> dict[str, str]:
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **dict.fromkeys(THREAD_VARIABLES, "1")}


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"ended by signal {-done.returncode} (9: most likely out of memory)"
    return (done.stderr.strip().splitlines() or [f"ended with status {done.returncode} and no text"])[-1]


if __name__ == "__main__":
    serve(int(sys.argv[4]))
    Path(sys.argv[3]).write_text(json.dumps(here(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
