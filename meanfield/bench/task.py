"""A learning task in plain values: which images, which architecture, which objective; what a study or a command line
names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Annotated

import torch

from meanfield.activations import ACTIVATIONS
from meanfield.architecture import POOLINGS, READOUTS, Architecture, Conv
from meanfield.bench import reading
from meanfield.bench.options import (
    MODEL,
    OBJECTIVE,
    Classes,
    Data,
    Device,
    Dtype,
    Pool,
    Samples,
    Settings,
    Split,
    at_least,
    choice,
    option,
)
from meanfield.data import Dataset
from meanfield.losses import LOSSES
from meanfield.penalties import KERNEL_NORMS, Penalty
from meanfield.problem import Problem
from meanfield.validation import nonnegative, positive

BOUNDS = 1.5  # of amplitudes and of first kernels, where `bounded` asks for both


Activation = Annotated[
    str, option(f"{', '.join(ACTIVATIONS)}: the activation of every layer.", MODEL), choice(ACTIVATIONS)
]
KernelSize = Annotated[
    int, option("Kernels of N x N pixels, padded by (N - 1) // 2 on every side.", MODEL), at_least(1)
]
Stride = Annotated[int, option("Stride of every convolution.", MODEL), at_least(1)]
Pooling = Annotated[str, option(f"{', '.join(POOLINGS)}: 2 x 2 pooling after every layer.", MODEL), choice(POOLINGS)]
Readout = Annotated[
    str,
    option(f"{', '.join(READOUTS)}: over positions, or one weight per position.", MODEL),
    choice(READOUTS),
]
Loss = Annotated[str, option(f"{', '.join(LOSSES)}.", OBJECTIVE), choice(LOSSES)]
SourcePenalty = Annotated[
    float,
    option("Strength of the penalty on the flow out of every feature, between layers.", OBJECTIVE),
    nonnegative,
]
ReadoutPenalty = Annotated[float, option("Strength of the penalty on the readout.", OBJECTIVE), nonnegative]
InputPenalty = Annotated[float, option("Strength of the penalty on first-layer kernels.", OBJECTIVE), nonnegative]
KernelNorm = Annotated[
    str,
    option(f"{', '.join(KERNEL_NORMS)}: norm of a kernel in the source penalty and the amplitude bound.", OBJECTIVE),
    choice(KERNEL_NORMS),
]
AmplitudeBound = Annotated[
    float | None,
    option(
        "Bound on the total kernel into a feature of layers 2 and up; with unbounded activations such as relu a "
        "minimum exists only with both bounds. Without it: no bound.",
        OBJECTIVE,
    ),
    positive,
]
InputBound = Annotated[
    float | None, option("Bound on the norm of a first-layer kernel. Without it: no bound.", OBJECTIVE), positive
]


@dataclass(frozen=True, kw_only=True)
class Images(Settings):
    """Which images; as in `data.load`."""

    data: Data = "digits"
    classes: Classes = (3, 5)
    samples: Samples = 16
    pool: Pool = 2
    split: Split = None


@dataclass(frozen=True, kw_only=True)
class Machine(Settings):
    """In which numbers, and where."""

    dtype: Dtype = "float64"
    device: Device = "cpu"


@dataclass(frozen=True, kw_only=True)
class Learning(Images, Machine):
    """Images, what all layers have in common, and J: the fields of Conv, Architecture, Problem and Penalty."""

    activation: Activation = "tanh"
    kernel_size: KernelSize = 3
    stride: Stride = 1
    pooling: Pooling = "none"
    readout: Readout = "average"
    loss: Loss = "squared"
    source_penalty: SourcePenalty = 3e-4
    readout_penalty: ReadoutPenalty = 3e-3
    input_penalty: InputPenalty = 3e-4
    kernel_norm: KernelNorm = "l2"
    amplitude_bound: AmplitudeBound = None
    input_bound: InputBound = None


@dataclass(frozen=True, kw_only=True)
class Task(Learning):
    """Images of some classes, `depth` equal convolutions of odd kernel size, padded to keep the image size, and J.

    Plain values throughout: a Task travels as JSON and is equal where its values are.
    """

    depth: Annotated[int, at_least(1)] = 2

    def bounded(self) -> Task:
        """With both bounds, under which a minimum exists for every activation."""
        return replace(self, amplitude_bound=BOUNDS, input_bound=BOUNDS)

    def images(self) -> Dataset:
        """The selected images; those held out are their `rest`."""
        return reading.images(self.data, self.classes, self.samples, self.pool, self.split)

    def digest(self) -> str:
        """Of all images of these classes and their labels, so that a file that was changed is not taken for the same:
        those held out as well and at full size, since a study takes more of them, and larger ones, than its task.
        """
        self.images()  # refuses a selection that these images do not allow
        every = reading.images(self.data, self.classes, split=self.split)
        content = sha256(every.inputs.contiguous().numpy().data)
        content.update(every.labels.contiguous().numpy().data)
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
