"""Which arrays of a file are the images and which their labels, by their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from meanfield.data.address import Address
from meanfield.data.source import printable
from meanfield.validation import Misuse

IMAGES = ("inputs", "x", "images", "data")
LABELS = ("targets", "y", "labels", "target")
NAMES = ("target_names", "class_names", "label_names")
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")


class Keys(NamedTuple):
    """The wanted keys; with others that may as well be meant, and what was guessed."""

    images: str
    labels: str
    other_images: tuple[str, ...] = ()
    other_labels: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def chosen(keys: Sequence[str], path: Path, address: Address) -> Keys:
    """Keys that the user named, or else those of customary names: x, y; x_train, y_train; train_images, ..."""
    images = _found(keys, path, "images", address.images, IMAGES)
    labels = _found(keys, path, "labels", address.labels, LABELS)
    if address.images is not None and address.labels is not None:
        if address.split is not None:
            raise Misuse("split", address.split, f"has no meaning where keys of {path} are named; leave it out")
        return Keys(address.images, address.labels)
    pairs = {split: (images[split], labels[split]) for split in images if split in labels}
    named = address.images is not None or address.labels is not None
    if not pairs and named and len(images) == len(labels) == 1:  # a key of any name goes with the only ones
        pairs = {"": (next(iter(images.values())), next(iter(labels.values())))}
    if not pairs:
        raise ValueError(
            f"{path} has images {_listed(chain(*images.values()))} and labels {_listed(chain(*labels.values()))}, "
            f"of different splits; name them as {path}:images=KEY,labels=KEY"
        )
    found = [] if named else [*images.items(), *labels.items()]
    single = [key for split, each in found if split not in pairs for key in each]
    return _of_split(pairs, single, path, address)


def _of_split(
    pairs: dict[str, tuple[list[str], list[str]]], single: Sequence[str], path: Path, address: Address
) -> Keys:
    """single: keys of images without labels, or of labels without images."""
    named = [split for split in pairs if split]
    if address.split is not None:
        if address.split not in pairs:
            has = f"has {' and '.join(named)}" if named else "has no splits, leave it out"
            raise Misuse("split", address.split, f"is not in {path}, which {has}")
        return _first(*pairs[address.split])
    if len(pairs) + len(single) > 1 and not {"", "train"} & set(pairs):
        alone = f"; {_listed(single)} has no partner" if single else ""
        raise Misuse("split", None, f"must say which images of {path} to read: {' or '.join(named)}{alone}")
    split = "" if "" in pairs else "train" if "train" in pairs else named[0]
    left = [other for other in named if other != split]
    found = _first(*pairs[split])
    of = f"split {split} of the file" if split else f"{found.images!r} of the file"
    taken = [f"{', '.join(left)}, which split={left[0]} takes"] if left else []
    alone = [f"{_listed(single)}, without a partner"] if single else []
    if not split and not taken and not alone:
        return found
    return found._replace(doubts=("; left out: ".join([of, *taken, *alone]),))


def _first(images: list[str], labels: list[str]) -> Keys:
    return Keys(images[0], labels[0], tuple(images[1:]), tuple(labels[1:]))


def _found(
    keys: Sequence[str], path: Path, what: str, named: str | None, customary: Sequence[str]
) -> dict[str, list[str]]:
    """Split -> keys, in the order of the customary names; the one that was named alone."""
    if named is not None:
        if named not in keys:
            raise ValueError(f"{path} has no {what}: expected the key {named!r}, found {_listed(keys)}")
        return {_parted(named)[1]: [named]}
    found: dict[str, list[str]] = {}
    for base, key in product(customary, keys):
        name, split = _parted(key)
        if name in (base, base.removesuffix("s")) and key not in found.get(split, ()):  # image, label
            found.setdefault(split, []).append(key)
    if not found:
        raise ValueError(
            f"{path} has no {what}: expected the key {' or '.join(map(repr, customary))}, or such as "
            f"{customary[1]}_train and train_{customary[2]}, found {_listed(keys)}; name it as {path}:{what}=KEY"
        )
    return found


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
