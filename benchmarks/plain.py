"""The training problem on which the library and plain torch are compared, and its network in plain torch.

The first of the ten digits, 8x8; two layers of 3x3 kernels, padding 1, tanh, average readout, softmax.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

import meanfield as mf

DEPTH = 2
PENALTY = mf.Penalty(source=3e-5, readout=3e-5, input=3e-5)


def problem(samples: int, dtype: str) -> tuple[mf.Problem, mf.data.Dataset]:
    """The problem on the first images, and the images that are left."""
    chosen, rest = mf.data.load("digits", samples=samples).split()
    layers = (mf.Conv(3, padding=1, activation="tanh"),) * DEPTH
    architecture = mf.Architecture(chosen.input_shape, layers, outputs=chosen.outputs_for("softmax"))
    inputs = chosen.inputs.to(getattr(torch, dtype))
    return mf.Problem(architecture, inputs, chosen.targets("softmax"), "softmax", PENALTY), rest


def network(task: mf.Problem, widths: Sequence[int]) -> nn.Sequential:
    """nn.Conv2d without biases and tanh for every layer, mean over positions, nn.Linear; torch's own start."""
    channels = (task.architecture.input_shape[0], *widths)
    blocks = [
        block
        for pair in itertools.pairwise(channels)
        for block in (nn.Conv2d(*pair, 3, padding=1, bias=False), nn.Tanh())
    ]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], task.architecture.outputs, bias=False))
    return nn.Sequential(*blocks, *head).to(task.inputs.dtype)
