"""The machine a figure was taken on, and the memory of one process."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import meanfield as mf

LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "cvxpy", "clarabel", "scs", "pyscnn")


def description() -> dict[str, Any]:
    """Processor, memory, system and versions, without anything that names the computer or its user."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    versions = {"meanfield": mf.__version__, "python": platform.python_version()} | {
        name: _version(name) for name in LIBRARIES
    }
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "threads": 1,
        "system": platform.system(),
        "architecture": platform.machine(),
        "versions": versions,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def peak_bytes() -> int:
    """Peak resident memory of this process.

    VmHWM where /proc has it: ru_maxrss of a child counts what its parent held when it was started.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Start the peak again from what is resident now, where the system can (Linux); elsewhere the old peak stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
