"""One command to a folder: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

LOCK = ".lock"


class Taken(Exception):
    """Another process has the folder; the text names it."""


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; Taken where another process has it.

    The lock is flock's on a file in the directory, which is removed at the end; one that a killed process left behind
    is not locked.  Where a file system has no such locks, as some of clusters, a warning says so.
    """
    path = directory / LOCK
    file = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever opened it finds another file there, see _locked
        os.close(file)


def _locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            _lock(file, path)
            if _same(file, path):
                with suppress(OSError):  # a full disk can still be locked
                    os.ftruncate(file, 0)
                    os.pwrite(file, str(os.getpid()).encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Taken(f"process {os.pread(file, 20, 0).decode(errors='replace') or 'unknown'}") from None
    except OSError as error:
        text = f"{path.parent} cannot be locked ({error.strerror}): two commands at a time would mix in it"
        warnings.warn(text, stacklevel=2)


def _same(file: int, path: Path) -> bool:
    """Whether the locked file is still the one of that name: its owner may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
