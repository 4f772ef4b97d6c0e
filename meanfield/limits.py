"""Limits of a run, time and memory: what a long piece of work looks at, and what becomes of it where they are met.

Images are taken in blocks, so that memory does not grow with their number: of BLOCK_BYTES, larger ones are no faster,
or of BLOCK_SHARE of `memory` where that is less.  A block never follows from what happens to be free: the same call
gives the same figures.  What is free decides only what is refused, by `available`.

Work that takes long calls `look` every few seconds at most.  Past its time that raises TimeUp, which passes through
everything up to the solver that set the limit and holds the best answer so far; an interrupt by the user and a shortage
of memory take the same way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from meanfield import validation

if TYPE_CHECKING:
    import torch

__all__ = ["memory", "within"]  # for those who set limits; what keeps to them uses the rest

GRACE = 3.0  # seconds for the certificate of a run that was stopped
BLOCK_BYTES = 2**25  # of what is computed of a block of images
BLOCK_SHARE = 2**-5  # of the memory that was allowed
FREE_SHARE = 0.8  # of what is free may be taken where nothing else was said

T = TypeVar("T")


class Clock:
    """What limits go by, of this process alone; `ranks` has one that several share."""

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def look(self, in_step: bool) -> None:
        """Let whoever watches break the work off; in_step: whether it has come to this place everywhere."""
        _watch.get()()

    def common(self, stop: BaseException) -> bool:
        """Whether `stop` has ended the work everywhere, at the same place."""
        return True


_clock: ContextVar[Clock] = ContextVar("clock", default=Clock())  # noqa: B039 - of no state
_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)
_memory: ContextVar[float] = ContextVar("memory", default=math.inf)
_watch: ContextVar[Callable[[], None]] = ContextVar("watch", default=lambda: None)


class TimeUp(Exception):
    """The time of the present piece of work has passed."""


# what ends a run early with its best answer kept, if `status` says so: torch tells of a shortage by a RuntimeError
STOPS = (KeyboardInterrupt, TimeUp, MemoryError, RuntimeError)


def within(seconds: float) -> AbstractContextManager[None]:
    """Limit what is done inside to so many seconds from now, or to the time around it where that is shorter."""
    return _with(_deadline, min(_deadline.get(), now() + seconds))


def grace(seconds: float = GRACE) -> AbstractContextManager[None]:
    """Allow what is done inside so many seconds from now, even if the time around it has passed."""
    return _with(_deadline, max(_deadline.get(), now() + seconds))


def memory(max_memory: float | str) -> AbstractContextManager[None]:
    """Limit this process to so much memory while what is inside runs, what it holds already included, or to the limit
    around it where that is less.

    max_memory: GiB, or a text such as "500MiB".  Blocks of images become smaller where it is scarce, and what is known
    not to fit is refused before it begins (`solve`, reading images).  Misuse where more is held already.
    """
    size = 2**30 * validation.gibibytes(max_memory, "max_memory")
    if size < math.inf and size < (held := held_memory()):
        remedy = f"is less than the {held / 2**20:.0f} MiB that this process holds already; give more"
        raise validation.Misuse("max_memory", max_memory, remedy)
    return _with(_memory, min(_memory.get(), size))


def watched(by: Callable[[], None]) -> AbstractContextManager[None]:
    """Call `by` wherever what is done inside looks at its limits; a KeyboardInterrupt that it raises ends the work at a
    place where its best answer is whole.
    """
    return _with(_watch, by)


@contextmanager
def timed(by: Clock) -> Iterator[None]:
    """Let what is done inside go by another clock, which is to leave it as much time as it had."""
    left = _deadline.get() - now()
    with _with(_clock, by), _with(_deadline, now() + left):
        yield


@contextmanager
def _with(variable: ContextVar[T], value: T) -> Iterator[None]:
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def now() -> float:
    """Seconds on the clock that limits go by."""
    return _clock.get().now()


def passed(in_step: bool = True) -> bool:
    """Whether the time has passed; for work that goes on to its next record, which all ranks come to (in_step)."""
    _clock.get().look(in_step)
    return now() > _deadline.get()


def look(in_step: bool = False) -> None:
    """Raise TimeUp where the time has passed."""
    if passed(in_step):
        raise TimeUp


def block_bytes() -> int:
    """What a block of images may take."""
    return int(min(BLOCK_BYTES, BLOCK_SHARE * _memory.get()))


def blocks(count: int, bytes_each: int) -> Iterator[slice]:
    """Slices of `count` images that take so many bytes each, a block at a time and one image at least; looks at the
    time between them.
    """
    step = _block(bytes_each)
    for first in range(0, max(count, 1), step):  # of no images an empty one
        if first:
            look(in_step=True)
        yield slice(first, min(first + step, count))


def blocks_in(count: int, bytes_each: int) -> int:
    """How many blocks these are."""
    return math.ceil(count / _block(bytes_each))


def _block(bytes_each: int) -> int:
    return max(1, block_bytes() // bytes_each)


def status(stop: BaseException) -> str:
    """The status of a solver that `stop`, one of STOPS, ended; raises what is an error of another kind, or ended this
    rank alone.
    """
    if not _clock.get().common(stop):
        raise stop
    if isinstance(stop, KeyboardInterrupt):
        return "interrupted"
    if isinstance(stop, TimeUp):
        return "max_seconds"
    if is_shortage(stop):
        return "out_of_memory"
    raise stop


def available(device: torch.device | str = "cpu") -> int:
    """Bytes that new work may take: FREE_SHARE of what is free, or what `memory` leaves beside what is held already."""
    return int(max(0, min(FREE_SHARE * free_memory(device), _memory.get() - held_memory(device))))


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that are free on the device."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil  # a twentieth of a second, which `--help` does not need

    return psutil.virtual_memory().available


def held_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process holds on the device."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def is_shortage(error: BaseException) -> bool:
    """Whether an error tells of too little memory, of the host or of a device."""
    words = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in words or "out of memory" in words
