"""The plainest image classifiers as torch modules: two fully connected layers, two convolutions."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from meanfield import validation
from meanfield.activations import Given, resolve
from meanfield.finite.layers import all_integers, convolution, image_shape, linear
from meanfield.signatures import checked


@checked
def mlp(
    input_shape: Sequence[int],
    classes: int,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: Given = "relu",
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """A fully connected classifier, (N, C, H, W) -> (N, classes): flatten, linear1, relu1, linear2, ..., the last
    linear layer.

    hidden: units of the layers before the last one.  activation: as of `Conv`; its name is that of the layers.
    The start is Gaussian from `generator`: variance gain / fan-in, the activation's gain, 1 / fan-in for the last
    layer, biases zero.  The global random numbers are not touched.
    """
    shape, classes = image_shape(input_shape), validation.integer(classes, "classes", minimum=2)
    widths, layers = all_integers(hidden, "hidden"), OrderedDict[str, nn.Module](flatten=nn.Flatten())
    kind = resolve(activation)
    for index, (source, target) in enumerate(zip((math.prod(shape), *widths), (*widths, classes)), start=1):
        last = index == len(widths) + 1
        layers[f"linear{index}"] = linear(source, target, 1.0 if last else kind.gain, generator, dtype)
        if not last:
            layers[f"{kind}{index}"] = kind.module()
    return nn.Sequential(layers)


@checked
def cnn(
    input_shape: Sequence[int],
    classes: int,
    *,
    width: int = 16,
    activation: Given = "relu",
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Two 3x3 convolutions of `width` and 2 `width` channels and a linear layer, (N, C, H, W) -> (N, classes): conv1,
    relu1, pool1 (2x2 maxima, where the map is at least 2x2), conv2, relu2, flatten, linear1.

    9,930 parameters at width 16 on 8x8 grey images of ten classes.  Activation and start as in `mlp`.
    """
    (channels, *sides), classes = image_shape(input_shape), validation.integer(classes, "classes", minimum=2)
    first = validation.integer(width, "width")
    kind = resolve(activation)
    layers = OrderedDict[str, nn.Module](conv1=convolution(channels, first, 3, generator, dtype, gain=kind.gain))
    layers[f"{kind}1"] = kind.module()
    if min(sides) >= 2:
        layers["pool1"], sides = nn.MaxPool2d(2), [side // 2 for side in sides]
    layers["conv2"] = convolution(first, 2 * first, 3, generator, dtype, gain=kind.gain)
    layers[f"{kind}2"] = kind.module()
    layers |= {
        "flatten": nn.Flatten(),
        "linear1": linear(2 * first * math.prod(sides), classes, 1.0, generator, dtype),
    }
    return nn.Sequential(layers)
