"""What a user says of images: where they lie, and how they are to be read where their source leaves that open."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from meanfield.validation import Misuse, one_of

NAMES = ("digits", "mnist")


@dataclass(frozen=True)
class Address:
    """A place and what was said of it; None where nothing was said.

    place: the name of a data set or the path of a file or directory.  images, labels: keys of a file (for CIFAR-100
    labels is "coarse" or "fine").  axes: a letter for every axis, such as "NHWC".  range: "LOW..HIGH", the values that
    become 0 and 1.  split: "train", "test", ... where a file has several.
    """

    place: str
    images: str | None = None
    labels: str | None = None
    axes: str | None = None
    range: str | None = None
    split: str | None = None

    @classmethod
    def of(cls, source: Any, **said: str | None) -> Address:
        """From a name, a path, or PLACE:images=KEY,labels=KEY,axes=NHWC,range=0..16,split=train, any of these entries;
        said: entries that were given apart.
        """
        if not isinstance(source, (str, Path)) or not str(source) or "\0" in str(source):
            raise Misuse("data", source, f"must be one of {', '.join(NAMES)} or the path of a file or directory")
        place, entries = _parted(source)
        _refuse_too_long(place)
        for name, value in said.items():
            if value is not None and entries.setdefault(name, value) != value:
                raise Misuse(name, value, f"contradicts {str(source)!r}; give one of them")
        return replace(cls(place), **entries)

    @property
    def path(self) -> Path | None:
        """None for a name of the library, which comes before a directory of that name."""
        looks_like_one = self.place.endswith(".npz") or "/" in self.place or "\\" in self.place
        if self.place in NAMES or not (looks_like_one or exists(Path(self.place))):
            return None
        return Path(self.place)

    def refuse_all_but(self, known: Collection[str]) -> None:
        """Where entries do not concern the source."""
        for name in (each.name for each in fields(self)[1:]):
            if getattr(self, name) is not None and name not in known:
                kind = "names a key of a file" if name in ("images", "labels") else "concerns arrays in a file"
                own = "has labels of its own" if name == "labels" else "holds no arrays"
                raise Misuse(name, getattr(self, name), f"{kind}; {self.place!r} {own}, leave it out")

    @property
    def limits(self) -> tuple[float, float] | None:
        """`range` as numbers."""
        if self.range is None:
            return None
        low, dots, high = self.range.partition("..")
        try:
            found = float(low), float(high)
        except ValueError:
            found = (math.nan, math.nan)
        if not dots or not math.isfinite(found[1] - found[0]) or found[0] >= found[1]:
            raise Misuse("range", self.range, "must be LOW..HIGH with LOW < HIGH, such as 0..255")
        return found


def exists(path: Path) -> bool:
    """False as well for what no file system takes for a path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _refuse_too_long(place: str) -> None:
    try:
        os.stat(place)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            shown = f"{place[:40]}...{place[-10:]}"
            raise Misuse("data", shown, f"of {len(place)} characters is too long for a path") from None


def _parted(source: str | Path) -> tuple[str, dict[str, str]]:
    text = str(source)
    found = re.fullmatch(r"(.+):(\w+=[^,:]*(?:,\w+=[^,:]*)*)", text, re.DOTALL)
    if found is None or exists(Path(text)):
        return text, {}
    entries: dict[str, str] = {}
    known = [each.name for each in fields(Address)[1:]]
    for name, _, value in (entry.partition("=") for entry in found[2].split(",")):
        one_of(name, "data", known)
        if not value or name in entries:
            raise Misuse("data", text, f"must say {name}= once, with a value")
        entries[name] = value
    return found[1], entries
