"""The binary files of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from meanfield.data.folders import class_folders, has_images
from meanfield.data.memory import afford
from meanfield.data.source import Source
from meanfield.validation import one_of

CIFAR_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Layout:
    """Binary version of a CIFAR data set: `files` in `folder`, of records with one byte for every kind of label, then
    the pixels.
    """

    name: str
    folder: str
    files: tuple[str, ...]  # training images first, test images last
    labels: dict[str, int]  # kind -> number of classes, in the order of the bytes
    pickled_folder: str
    pickled_files: tuple[str, ...]  # all of them there: the Python version
    names: dict[str, str]  # kind -> file of the names of its classes, a line each


CIFAR_10_FILES = (*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin")
CIFAR = (
    Layout(
        "CIFAR-10",
        "cifar-10-batches-bin",
        CIFAR_10_FILES,
        {"fine": 10},
        "cifar-10-batches-py",
        ("data_batch_1",),
        {"fine": "batches.meta.txt"},
    ),
    Layout(
        "CIFAR-100",
        "cifar-100-binary",
        ("train.bin", "test.bin"),
        {"coarse": 20, "fine": 100},
        "cifar-100-python",
        ("train", "test"),
        {"coarse": "coarse_label_names.txt", "fine": "fine_label_names.txt"},
    ),
)


def find_cifar(path: Path) -> tuple[Layout, Path] | None:
    """The binary version that lies in a directory, or else in its customary folder there, and the place; None without
    CIFAR.
    """
    for places in ([(layout, path) for layout in CIFAR], [(layout, path / layout.folder) for layout in CIFAR]):
        found = [(layout, place) for layout, place in places if any((place / file).is_file() for file in layout.files)]
        # a stray file
        found = [each for each in found if _complete(*each) or not any(map(has_images, class_folders(path)))]
        if len(found) > 1:
            where = " and ".join(f"{layout.name} in {place}" for layout, place in found)
            raise ValueError(
                f"{path} holds two data sets, {where}; keep them in separate directories and give one of these"
            )
        if found:
            return found[0]
    return _refuse_pickled(path)


def _complete(layout: Layout, place: Path) -> bool:
    return all((place / file).is_file() for file in layout.files)


def _refuse_pickled(path: Path) -> None:
    for layout in CIFAR:
        for place in (path, path / layout.pickled_folder):
            if all((place / file).is_file() for file in layout.pickled_files):
                raise ValueError(
                    f"{place} holds the Python version of {layout.name}, pickled objects, which could run code and are "
                    f"refused; fetch the binary version, with the files {', '.join(layout.files)}"
                )


def read_cifar(layout: Layout, place: Path, labels: str | None) -> Source:
    """All files; labels: "coarse" or "fine", None for fine ones."""
    kinds = list(layout.labels)
    kind = one_of("fine" if labels in (None, "auto") else labels, f"{layout.name}: labels", kinds)
    missing = [file for file in layout.files if not (place / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{place / missing[0]} is missing; {layout.name} is read from all of {', '.join(layout.files)}"
        )
    afford(2 * sum((place / file).stat().st_size for file in layout.files), f"{layout.name} in {place}")
    records = np.concatenate([_records(layout, place / file) for file in layout.files])
    pixels = records[:, len(kinds) :].reshape(-1, *CIFAR_SHAPE)
    marks = torch.from_numpy(records[:, kinds.index(kind)].astype(np.int64))
    named = _names(place / layout.names[kind], layout.labels[kind])
    notes = ("divided by 255", "training images first, test images last")
    return Source(layout.name, torch.from_numpy(pixels), marks, named, notes, ordered=True)


def _names(file: Path, count: int) -> dict[int, str]:
    """None where the file is missing or of another kind."""
    try:
        lines = file.read_text().split() if file.is_file() and file.stat().st_size < 10**5 else []
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(enumerate(lines)) if len(lines) == count else {}


def _records(layout: Layout, file: Path) -> np.ndarray:
    """(N, bytes of a record) uint8, with labels in their range."""
    size, length = file.stat().st_size, len(layout.labels) + math.prod(CIFAR_SHAPE)
    if size == 0 or size % length:
        kind = "truncated or of another kind" if size else "empty"
        raise ValueError(
            f"{file} is {kind}: it has {size} bytes; expected a multiple of {length}, the length of a record of "
            f"{layout.name}"
        )
    records = np.fromfile(file, dtype=np.uint8).reshape(-1, length)
    for column, (kind, classes) in enumerate(layout.labels.items()):
        row = int((records[:, column] >= classes).argmax())
        if records[row, column] >= classes:
            raise ValueError(
                f"{file}: the {kind} label of record {row} (byte {row * length + column}) is {records[row, column]}; "
                f"expected 0..{classes - 1}, the file is damaged or not of {layout.name}"
            )
    return records
