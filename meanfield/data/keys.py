"""Which arrays of a file are the images and which their labels, by their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from meanfield.data.address import Address
from meanfield.data.source import printable
from meanfield.validation import Misuse

IMAGES = ("inputs", "x", "images", "data")
LABELS = ("targets", "y", "labels", "target")
NAMES = ("target_names", "class_names", "label_names")
SPLITS = ("train", "test", "val", "valid", "validation")


class Keys(NamedTuple):
    """The wanted keys; with others that may as well be meant, and what was guessed."""

    images: str
    labels: str
    other_images: tuple[str, ...] = ()
    other_labels: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def chosen(keys: Sequence[str], path: Path, address: Address) -> Keys:
    """Keys that the user named, or else those of customary names: x, y; x_train, y_train; train_images, ..."""
    images = _named(keys, path, "images", address.images) or _customary(keys, IMAGES)
    labels = _named(keys, path, "labels", address.labels) or _customary(keys, LABELS)
    for what, found, customary in (("images", images, IMAGES), ("labels", labels, LABELS)):
        if not found:
            raise ValueError(
                f"{path} has no {what}: expected the key {' or '.join(map(repr, customary))}, or such as "
                f"{customary[1]}_train and train_{customary[2]}, found {_listed(keys)}; name it as {path}:{what}=KEY"
            )
    both_named = address.images is not None and address.labels is not None
    pairs = {"": (images, labels)} if both_named else _pairs(images, labels, address)
    if not pairs:
        raise ValueError(
            f"{path} has images {_listed(chain(*images.values()))} and labels {_listed(chain(*labels.values()))}, "
            f"of different splits; name them as {path}:images=KEY,labels=KEY"
        )
    if both_named:
        if address.split is not None:
            raise Misuse("split", address.split, f"has no meaning where keys of {path} are named; leave it out")
        return Keys(str(address.images), str(address.labels))
    return _of_split(pairs, path, address)


def _of_split(pairs: dict[str, tuple[list[str], list[str]]], path: Path, address: Address) -> Keys:
    named = [split for split in pairs if split]
    if address.split is not None:
        if address.split not in pairs:
            has = f"has {' and '.join(named)}" if named else "has no splits, leave it out"
            raise Misuse("split", address.split, f"is not in {path}, which {has}")
        return _first(*pairs[address.split])
    if len(pairs) > 1 and not {"", "train"} & set(pairs):
        raise Misuse("split", None, f"must say which images of {path} to read: {' or '.join(named)}")
    split = "" if "" in pairs else "train" if "train" in pairs else named[0]
    left = [other for other in named if other != split]
    found = _first(*pairs[split])
    if not left:
        return found
    of = f"split {split} of the file" if split else f"{found.images!r} of the file"
    return found._replace(doubts=(f"{of}; left out: {', '.join(left)}, which split={left[0]} takes",))


def _first(images: list[str], labels: list[str]) -> Keys:
    return Keys(images[0], labels[0], tuple(images[1:]), tuple(labels[1:]))


def _named(keys: Sequence[str], path: Path, what: str, key: str | None) -> dict[str, list[str]]:
    if key is None:
        return {}
    if key not in keys:
        raise ValueError(f"{path} has no {what}: expected the key {key!r}, found {_listed(keys)}")
    return {_parted(key)[1]: [key]}


def _customary(keys: Iterable[str], customary: Sequence[str]) -> dict[str, list[str]]:
    """Split -> keys, in the order of the customary names."""
    found: dict[str, list[str]] = {}
    for base in customary:
        for key in keys:
            name, split = _parted(key)
            if name == base:
                found.setdefault(split, []).append(key)
    return found


def _pairs(
    images: dict[str, list[str]], labels: dict[str, list[str]], address: Address
) -> dict[str, tuple[list[str], list[str]]]:
    """Split -> images and labels; a key that was named goes with the others of its own split, or with the only ones."""
    both = {split: (images[split], labels[split]) for split in images if split in labels}
    if both or (address.images is None and address.labels is None):
        return both
    return (
        {"": (found[0], marks[0])} if len(found := [*images.values()]) == len(marks := [*labels.values()]) == 1 else {}
    )


def _parted(key: str) -> tuple[str, str]:
    """x_train, X_train, train_x -> ("x", "train"); x -> ("x", "")."""
    name = key.lower()
    for split in SPLITS:
        if name.endswith(f"_{split}"):
            return name.removesuffix(f"_{split}"), split
        if name.startswith(f"{split}_"):
            return name.removeprefix(f"{split}_"), split
    return name, ""


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(repr(printable(key)) for key in list(keys)[:12]) or "none"
