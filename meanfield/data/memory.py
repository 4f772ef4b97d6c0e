"""Memory that images take, asked for before it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from meanfield import limits


def afford(size: int, what: str) -> None:
    """Refuse `size` bytes that may not be taken."""
    most = limits.available()
    if size > most:
        raise ValueError(
            f"{what} would take {spelled(size)} of memory, and {spelled(most)} may be taken; give fewer or smaller "
            f"images, {most / size:.0%} of them would fit"
        )


@contextmanager
def shortage_of(what: str) -> Iterator[None]:
    """Memory that ran out all the same is no damage of a file: said in one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not limits.is_shortage(error):
            raise
        free = spelled(limits.available())
        raise ValueError(f"memory ran out over {what}, {free} may be taken; give fewer or smaller images") from error


def spelled(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
