"""Images of a study: read once in a process, and told of in a line (`Dataset.summary`) rather than warned of."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

from meanfield.data import Dataset, DataWarning, load, stamp


def images(
    data: str,
    classes: tuple[int | str, ...] | None = None,
    samples: int | None = None,
    pool: int = 1,
    split: str | None = None,
    seed: int | None = None,
) -> Dataset:
    """As `data.load`; the same object for the same images."""
    wanted = {"classes": classes, "samples": samples, "pool": pool, "split": split, "seed": seed}
    return _read(data, tuple(wanted.items()), stamp(data))


@lru_cache(maxsize=8)
def _read(data: str, wanted: tuple[tuple[str, Any], ...], stamp: int) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return load(data, **dict(wanted))
