"""Images of a study: read once in a process, and told of in a line (`Dataset.summary`) rather than warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from meanfield.data import Dataset, DataWarning, load, stamp
from meanfield.data.address import Address
from meanfield.validation import Misuse


def images(
    data: str,
    classes: tuple[int | str, ...] | None = None,
    samples: int | Callable[[int], int] | None = None,
    pool: int = 1,
    split: str | None = None,
    seed: int | None = None,
) -> Dataset:
    """As `data.load`; the same object for the same images."""
    wanted = {"classes": classes, "samples": samples, "pool": pool, "split": split, "seed": seed}
    return _read(data, tuple(wanted.items()), stamp(data))


def refuse_inside(out: Path, data: str) -> None:
    """A result among the folders of images would be read as one of them."""
    place = Path(Address.of(data).place)
    if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
        raise Misuse("out", str(out), f"lies in the directory of images --data={data!r}; give one outside it")


@lru_cache(maxsize=8)
def _read(data: str, wanted: tuple[tuple[str, Any], ...], stamp: int) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return load(data, **dict(wanted))
