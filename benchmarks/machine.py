"""The machine a figure was taken on, its threads, and the memory of one process."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def description() -> dict[str, Any]:
    """Processor, memory and system, without anything that names the computer or its user."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": platform.system(),
        "architecture": platform.machine(),
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread; the number that it had is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fresh_peak() -> int:
    """Start the peak again, as far as the system can, and return it: `peak_bytes` minus this is what was added."""
    gc.collect()
    with contextlib.suppress(OSError):  # Linux only; elsewhere the old peak stays
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Peak resident memory of this process.

    VmHWM where /proc has it: ru_maxrss of a child counts what its parent held when it was started.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
