"""A learning task in plain values: which images, which architecture, which objective; what a study or a command line
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any

import torch

from meanfield.architecture import Architecture, Conv
from meanfield.data import Dataset, load
from meanfield.data.readers import stamp
from meanfield.penalties import Penalty
from meanfield.problem import Problem
from meanfield.validation import one_of

BOUNDS = 1.5  # of amplitudes and of first kernels, where `bounded` asks for both


@dataclass(frozen=True)
class Task:
    """Images of some classes, `depth` equal convolutions of odd kernel size, padded to keep the image size, and J.

    data, classes, samples, pool: as in `data.load`.  The other fields are those of Conv, Architecture, Problem and
    Penalty.  Plain values throughout: a Task travels as JSON and is equal where its values are.
    """

    data: str = "digits"
    classes: tuple[int, ...] | None = (3, 5)
    samples: int = 16
    pool: int = 2
    depth: int = 2
    activation: str = "tanh"
    kernel_size: int = 3
    stride: int = 1
    pooling: str = "none"
    readout: str = "average"
    loss: str = "squared"
    source_penalty: float = 3e-4
    readout_penalty: float = 3e-3
    input_penalty: float = 3e-4
    kernel_norm: str = "l2"
    amplitude_bound: float | None = None
    input_bound: float | None = None
    dtype: str = "float64"
    device: str = "cpu"

    def __post_init__(self) -> None:
        one_of(self.dtype, ("float32", "float64"), "dtype")
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """From the entries of a dict that are fields of a Task; others are left alone."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def variant(self, **changes: Any) -> Task:
        return replace(self, **changes)

    def bounded(self) -> Task:
        """With both bounds, under which a minimum exists for every activation."""
        return replace(self, amplitude_bound=BOUNDS, input_bound=BOUNDS)

    def images(self) -> Dataset:
        """The selected images; those held out are their `rest`."""
        return _load(self.data, self.classes, self.samples, self.pool, stamp(self.data))

    def digest(self) -> str:
        """Of the images and their labels, so that a file that was changed is not taken for the same."""
        images = self.images()
        content = sha256(images.inputs.numpy().tobytes())
        content.update(images.labels.numpy().tobytes())
        return content.hexdigest()[:16]

    def architecture(self, images: Dataset) -> Architecture:
        conv = Conv(self.kernel_size, (self.kernel_size - 1) // 2, self.stride, self.activation, self.pooling)
        return Architecture(images.input_shape, (conv,) * self.depth, self.readout, images.outputs_for(self.loss))

    def problem(self, images: Dataset | None = None) -> Problem:
        """The problem on these images (default: the selected ones), on the task's device in its dtype."""
        images = self.images() if images is None else images
        penalty = Penalty(
            source=self.source_penalty,
            readout=self.readout_penalty,
            input=self.input_penalty,
            kernel_norm=self.kernel_norm,
            amplitude_bound=self.amplitude_bound,
            input_bound=self.input_bound,
        )
        problem = Problem(self.architecture(images), images.inputs, images.targets(self.loss), self.loss, penalty)
        return problem.to(dtype=getattr(torch, self.dtype), device=self.device)


@lru_cache(maxsize=8)
def _load(data: str, classes: Sequence[int] | None, samples: int, pool: int, stamp: int) -> Dataset:
    return load(data, classes=classes, samples=samples, pool=pool)
