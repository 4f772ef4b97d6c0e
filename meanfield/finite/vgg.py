"""Ordinary image classifiers as torch modules: VGG without batch norm and small residual networks, started from a
given generator.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meanfield import validation
from meanfield.activations import Activation, Given, resolve
from meanfield.finite.layers import all_integers, convolution, image_shape, linear, norm, probability
from meanfield.signatures import checked
from meanfield.validation import Misuse

# convolutions per stage: Simonyan & Zisserman 2015, table 1, columns A, B and D; 8, one convolution a stage, is not in
# it
VGG_STAGES = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
VGG_MULTIPLES = (1, 2, 4, 8, 8)  # of the width of the first convolution, per stage: 64, 128, 256, 512, 512 in the table
FAN_INS = ("inside", "kernel")


@checked
def vgg(
    depth: int,
    input_shape: Sequence[int],
    classes: int,
    *,
    width: int = 64,
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    fan_in: str = "inside",
    activation: Given = "relu",
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """VGG-11, -13 or -16 (Simonyan & Zisserman 2015, table 1, columns A, B, D) without batch norm, (N, C, H, W) -> (N,
    classes).

    depth: 11, 13 or 16, or 8 for one convolution a stage.  It names the convolutions alone: the three fully connected
        layers that the numbers count are `hidden` and the last one, by default the last one only.
    input_shape: (C, H, W).  A 2x2 max pooling ends every stage whose map is at least 2x2; the others end without.
    width: channels of the first convolution; the stages have 1, 2, 4, 8, 8 times as many.
    hidden: widths of the fully connected layers before the last one.
    dropout: probability with which an input of a fully connected layer is dropped in training.
    fan_in: of a convolution in the start, "kernel" for the 9 c_in entries of a kernel, or "inside" for those that meet
    the
        map and not its padding, c_in (3 - 2/H)(3 - 2/W) on average over the positions of an HxW map.  On large maps
        they agree.  On 1x1 maps, where 8 of 9 entries meet zeros, "kernel" shrinks the signal threefold in every layer:
        VGG-11 has four such layers on 8x8 images, and hardly trains.

    activation: as of `Conv`.

    The layers with weights, convolutions first, are numbered from 1, and relu{k} (tanh{k}, ...: the activation's name)
    follows the k-th of them: conv1, relu1, conv2, ..., pool{s} at the end of stage s, flatten, then for the j-th fully
    connected layer dropout{j} (where dropout > 0) and linear{j}.  The start is Gaussian from `generator`: variance
    gain / fan-in with the activation's gain (2 for ReLU: He et al. 2015, eq. (10)), 1 / fan-in for the last layer,
    biases zero.  The global random numbers are not touched.
    """
    if validation.integer(depth, "depth") not in VGG_STAGES:
        raise Misuse("depth", depth, f"must be one of {', '.join(map(str, VGG_STAGES))}")
    shape, classes = image_shape(input_shape), validation.integer(classes, "classes", minimum=2)
    widths = all_integers(hidden, "hidden")
    rate, inside = probability(dropout), validation.one_of(fan_in, "fan_in", FAN_INS) == "inside"
    h = resolve(activation)
    width = validation.integer(width, "width")
    layers, flat = _convolutions(VGG_STAGES[depth], shape, width, inside, h, generator, dtype)
    layers["flatten"] = nn.Flatten()
    before = sum(VGG_STAGES[depth])
    for index, (source, target) in enumerate(zip((flat, *widths), (*widths, classes)), start=1):
        last = index == len(widths) + 1
        if rate > 0:
            layers[f"dropout{index}"] = nn.Dropout(rate)
        layers[f"linear{index}"] = linear(source, target, 1.0 if last else h.gain, generator, dtype)
        if not last:
            layers[f"{h}{before + index}"] = h.module()
    return nn.Sequential(layers)


def _convolutions(
    stages: Sequence[int],
    shape: tuple[int, int, int],
    width: int,
    inside: bool,
    h: Activation,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> tuple[OrderedDict[str, nn.Module], int]:
    """All stages, and the number of features they end in."""
    (channels, *sides), layers = shape, OrderedDict[str, nn.Module]()
    index = 0
    for stage, (count, multiple) in enumerate(zip(stages, VGG_MULTIPLES), start=1):
        # along a side of h pixels the two end positions lose one of three offsets each
        offsets = math.prod((3 * side - 2) / side for side in sides) if inside else 9
        for _ in range(count):
            index += 1
            layers[f"conv{index}"] = convolution(
                channels, multiple * width, 3, generator, dtype, gain=h.gain * 9 / offsets
            )
            layers[f"{h}{index}"] = h.module()
            channels = multiple * width
        if min(sides) >= 2:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
            sides = [side // 2 for side in sides]
    return layers, channels * math.prod(sides)


class ResidualBlock(nn.Module):
    """h(F(x) + shortcut(x)), F two 3x3 convolutions with h between, an activation: with ReLU the basic block of He et
    al. 2016, figure 2.

    (N, sources, H, W) -> (N, targets, H', W'), H' = ceil(H / stride).  The shortcut is the identity, or where shapes
    change a 1x1 convolution (their option B).  With batch norm every convolution is followed by one and has no bias.
    Without it convolutions have biases and conv2 starts at zero, so that a block starts as its shortcut: of the rules
    of Fixup (Zhang, Dauphin & Ma 2019, section 3.2) this one only.
    """

    def __init__(
        self,
        sources: int,
        targets: int,
        stride: int,
        batch_norm: bool,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        activation: Given = "relu",
    ) -> None:
        super().__init__()
        self.activation = resolve(activation)
        gain = self.activation.gain
        self.conv1 = convolution(sources, targets, 3, generator, dtype, gain=gain, stride=stride, bias=not batch_norm)
        self.norm1 = norm(targets, batch_norm, dtype)
        self.conv2 = convolution(
            targets, targets, 3, generator, dtype, gain=gain if batch_norm else 0.0, bias=not batch_norm
        )
        self.norm2 = norm(targets, batch_norm, dtype)
        self.shortcut: nn.Module = nn.Identity()
        if sources != targets or stride != 1:
            # no activation follows the shortcut alone: variance 1 / fan-in keeps the size of the signal
            projection = convolution(
                sources, targets, 1, generator, dtype, gain=1.0, stride=stride, bias=not batch_norm
            )
            self.shortcut = nn.Sequential(projection, norm(targets, batch_norm, dtype)) if batch_norm else projection

    def forward(self, signal: Tensor) -> Tensor:
        activate = self.activation.function
        inner = activate(self.norm1(self.conv1(signal)))
        return activate(self.norm2(self.conv2(inner)) + self.shortcut(signal))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


@checked
def residual(
    input_shape: Sequence[int],
    classes: int,
    *,
    width: int = 16,
    blocks: Sequence[int] = (1, 1, 1),
    batch_norm: bool = True,
    activation: Given = "relu",
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """A residual network for small images (He et al. 2016, section 4.2), (N, C, H, W) -> (N, classes).

    blocks: blocks per stage.  Stage s = 1, 2, ... has 2^(s-1) width channels; from the second on its first block has
        stride 2.  Blocks are the modules stage1.0, stage1.1, ..., stage2.0, ..., see ResidualBlock.
    batch_norm: with False, biases and a start in which every block is its shortcut.
    activation: as of `Conv`.

    Before the stages: conv1, norm1 (with batch norm), relu1 (tanh1, ...: the activation's name); after them: pool (the
    mean over positions), flatten and linear1.  The start is as in `vgg` with fan_in="kernel".
    """
    shape, classes = image_shape(input_shape), validation.integer(classes, "classes", minimum=2)
    batch_norm = validation.boolean(batch_norm, "batch_norm")
    counts = all_integers(blocks, "blocks")
    if not counts:
        raise Misuse("blocks", blocks, "must hold one integer per stage, at least one")
    channels = validation.integer(width, "width")
    h = resolve(activation)
    layers = OrderedDict[str, nn.Module](
        conv1=convolution(shape[0], channels, 3, generator, dtype, gain=h.gain, bias=not batch_norm)
    )
    if batch_norm:
        layers["norm1"] = norm(channels, True, dtype)
    layers[f"{h}1"] = h.module()
    for stage, count in enumerate(counts):
        targets, stride = channels if stage == 0 else 2 * channels, 1 if stage == 0 else 2
        first = ResidualBlock(channels, targets, stride, batch_norm, generator, dtype, h)
        rest = (ResidualBlock(targets, targets, 1, batch_norm, generator, dtype, h) for _ in range(count - 1))
        layers[f"stage{stage + 1}"], channels = nn.Sequential(first, *rest), targets
    layers |= {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "linear1": linear(channels, classes, 1.0, generator, dtype),
    }
    return nn.Sequential(layers)
