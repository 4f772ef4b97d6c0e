"""The connecting layer: what is fitted between the lower layers of one network and the upper layers of another."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

CHANNELS_FIRST = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose3d,
    nn.BatchNorm1d,
    nn.BatchNorm3d,
    nn.MaxPool1d,
    nn.MaxPool3d,
)


class Connection(nn.Module):
    """A layer, the size (height, width) to which maps are resampled first (None to leave them), and whether they are
    flattened.

    Larger maps are averaged down to the size, smaller ones are repeated (each output pixel is the mean of the input
    pixels that it overlaps), so that a layer at another depth of the lower network can be connected.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, size: tuple[int, int] | None = None, *, flat: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.size, self.flat = layer, size, flat

    def resampled(self, signal: Tensor) -> Tensor:
        """The signal as the layer takes it."""
        if self.flat:
            return signal.flatten(1)
        return signal if self.size is None else interpolate(signal, self.size, mode="area")

    def forward(self, signal: Tensor) -> Tensor:
        return self.layer(self.resampled(signal))

    @property
    def features(self) -> int:
        """Input channels, or units."""
        return self.layer.weight.shape[1]

    @property
    def weights(self) -> Tensor:
        """(d, K), in the order of the rows of `design`."""
        return self.layer.weight.flatten(1).T

    def design(self, signal: Tensor) -> Tensor:
        """What the layer multiplies with its weights: a view (C, kh, kw, N, H, W) of the padded map, or (D, n)."""
        signal = self.resampled(signal)
        if isinstance(self.layer, nn.Linear):
            return signal.flatten(0, -2).T
        view = _padded(self.layer, signal)
        for axis, size, step, dilation in zip((2, 3), self.layer.kernel_size, self.layer.stride, self.layer.dilation):
            view = view.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
        return view.permute(1, 4, 5, 0, 2, 3)

    def columns(self, output: Tensor) -> Tensor:
        """A pre-activation as a view (K, N, H, W) or (K, n)."""
        return output.flatten(0, -2).T if isinstance(self.layer, nn.Linear) else output.transpose(0, 1)

    def cloud(self, signal: Tensor) -> Tensor:
        """Features as vectors, (C, n): a channel's values over images and positions, or a unit's over images."""
        signal = self.resampled(signal)
        return (signal.movedim(-1, 0) if isinstance(self.layer, nn.Linear) else signal.transpose(0, 1)).flatten(1)

    def with_weights(self, weights: Tensor, offset: Tensor | None) -> Connection:
        """A copy with weights (d, K) and offset (K,), in this layer's dtype."""
        changed = copy.deepcopy(self)
        with torch.no_grad():
            changed.layer.weight.copy_(weights.T.reshape(self.layer.weight.shape))
            if changed.layer.bias is not None and offset is not None:
                changed.layer.bias.copy_(offset)
        return changed


def _padded(layer: nn.Conv2d, signal: Tensor) -> Tensor:
    """As the layer pads it, with the zeros of padding="same" where torch has them: the odd one on the right."""
    if isinstance(layer.padding, str):
        total = [
            dilation * (size - 1) if layer.padding == "same" else 0
            for dilation, size in zip(layer.dilation, layer.kernel_size)
        ]
        (top, bottom), (left, right) = ((each // 2, each - each // 2) for each in total)
    else:
        (top, bottom), (left, right) = ((each, each) for each in layer.padding)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return pad(signal, (left, right, top, bottom), mode) if left + right + top + bottom else signal


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a connecting layer by itself: a Conv2d without groups or a Linear, and nothing more.

    Subclasses with a forward of their own and modules with hooks may do something else besides.
    """
    plain = type(module).forward in (nn.Conv2d.forward, nn.Linear.forward) and getattr(module, "groups", 1) == 1
    return plain and not module._forward_hooks and not module._forward_pre_hooks


def own(module: nn.Module, signal: Tensor) -> nn.Conv2d | nn.Linear:
    """The connecting layer that the upper network has itself in front of or at `module`, whose input is `signal`.

    A Conv2d or Linear is its own; any other module gets the identity in front of it: a 1x1 convolution for maps
    (N, C, H, W), a matrix for (N, D) or (N, T, D).
    """
    if isinstance(module, (nn.Conv2d, nn.Linear)) and is_linear(module):
        return copy.deepcopy(module)
    if isinstance(module, CHANNELS_FIRST) or signal.ndim not in (2, 3, 4):
        raise ValueError(
            f"layer is a {type(module).__name__} on {tuple(signal.shape)}: only maps (N, C, H, W) and vectors (N, D), "
            "(N, T, D) can be connected"
        )
    channels = signal.shape[1] if signal.ndim == 4 else signal.shape[-1]
    identity = torch.eye(channels).to(signal)
    layer = _conv(channels, channels, signal) if signal.ndim == 4 else _linear(channels, channels, signal)
    with torch.no_grad():
        layer.weight.copy_(identity.reshape(layer.weight.shape))
        nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


def widened(layer: nn.Conv2d | nn.Linear, channels: int) -> nn.Conv2d | nn.Linear:
    """A layer of the same geometry for another number of input channels, its entries zero."""
    if isinstance(layer, nn.Linear):
        found: nn.Conv2d | nn.Linear = _linear(channels, layer.out_features, layer.weight, layer.bias is not None)
    else:
        found = _conv(
            channels,
            layer.out_channels,
            layer.weight,
            layer.bias is not None,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
        )
    for parameter in found.parameters():
        nn.init.zeros_(parameter)
    return found


def _conv(
    channels: int,
    outputs: int,
    like: Tensor,
    bias: bool = True,
    *,
    kernel_size: tuple[int, ...] = (1, 1),
    **geometry: object,
) -> nn.Conv2d:
    made = nn.utils.skip_init(
        nn.Conv2d, channels, outputs, kernel_size, bias=bias, dtype=like.dtype, device=like.device, **geometry
    )
    return cast(nn.Conv2d, made)


def _linear(channels: int, outputs: int, like: Tensor, bias: bool = True) -> nn.Linear:
    return cast(
        nn.Linear, nn.utils.skip_init(nn.Linear, channels, outputs, bias=bias, dtype=like.dtype, device=like.device)
    )
