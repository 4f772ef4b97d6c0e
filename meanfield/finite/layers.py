"""Layers of classifiers, started from a given generator, and what their sizes may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from meanfield import validation
from meanfield.starts import normal
from meanfield.validation import Misuse


def convolution(
    sources: int,
    targets: int,
    side: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    gain: float,
    stride: int = 1,
    bias: bool = True,
) -> nn.Conv2d:
    """Of side x side kernels, padded to keep the size of the map, drawn with variance gain / fan-in."""
    # the constructor of a layer draws from the global random numbers: skip_init does not
    layer: Any = skip_init(nn.Conv2d, sources, targets, side, stride=stride, padding=side // 2, bias=bias, dtype=dtype)
    return _drawn(layer, gain, generator)


def linear(sources: int, targets: int, gain: float, generator: torch.Generator, dtype: torch.dtype) -> nn.Linear:
    """Drawn with variance gain / fan-in."""
    layer: Any = skip_init(nn.Linear, sources, targets, dtype=dtype)
    return _drawn(layer, gain, generator)


@torch.no_grad()
def _drawn(layer: Any, gain: float, generator: torch.Generator) -> Any:
    """Fill the weight (targets, sources, ...) with normals of variance gain / fan-in, the bias with zeros."""
    deviation = math.sqrt(gain / layer.weight[0].numel())
    layer.weight.copy_(normal(layer.weight.shape, generator, layer.weight) * deviation)
    if layer.bias is not None:
        layer.bias.zero_()
    return layer


def norm(channels: int, batch_norm: bool, dtype: torch.dtype) -> nn.Module:
    """Batch norm, or nothing."""
    return nn.BatchNorm2d(channels, dtype=dtype) if batch_norm else nn.Identity()


def image_shape(value: Any) -> tuple[int, int, int]:
    """(C, H, W)."""
    entries = all_integers(value, "input_shape")
    if len(entries) != 3:
        raise Misuse("input_shape", value, "must be three integers (C, H, W)")
    channels, height, width = entries
    return channels, height, width


def all_integers(value: Any, argument: str) -> tuple[int, ...]:
    """Positive ones."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise Misuse(argument, value, "must be a sequence of integers")
    return tuple(validation.integer(entry, argument) for entry in value)


def probability(value: Any) -> float:
    if validation.nonnegative(value, "dropout") >= 1:
        raise Misuse("dropout", value, "must be at least 0 and less than 1")
    return float(value)
