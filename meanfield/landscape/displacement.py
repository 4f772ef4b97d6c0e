"""Displacement of features between two networks: McCann's interpolation, layer by layer from below.

Features are paired by an optimal transport plan, and a pair moves from the one to the other: the joined network is to
have the pre-activations g_t = (1 - t) g_A + t g_B.  Kernels of the first layer give them exactly.  Those of a later one
see features that the joined network really has, h(g_t) and no average of h(g_A) and h(g_B), and are fitted:

    w_t = (1 - t) w_A + t w_B + d,    d = argmin  mean |g_t - w_t f|^2 + ridge s sum_i p_i |d_i|^2,

over images and positions, p the masses of the pairs, f the features, s = sum_i p_i mean |f_i|^2; biases are free.  In
that metric nothing depends on how particles are split, and the ridge means the same at every width.  A large ridge
leaves the line of the matched kernels; without one they are the least-squares fit, free to become large where features
are nearly dependent.  At the ends d = 0: the line is exact there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meanfield.finite.network import from_sequential
from meanfield.fusion.channels import Channels, copied
from meanfield.grafting.connection import Connection
from meanfield.grafting.least_squares import Moments, moments
from meanfield.landscape.coupling import coupled
from meanfield.landscape.straight import straight
from meanfield.network import ParticleNetwork, along_axis
from meanfield.subject import Network
from meanfield.validation import Misuse

# Measured on two pairs of tanh networks of widths 64/64 on digits, of two classes and of ten, with ridges of 0 and 1e-8
# to 100: J rises least at 1e-2, and by less than a tenth more at 1e-3, where the loss rises little more than half as
# far.  Without a ridge the loss rises least, and J 490 and 26 times as far as at 1e-3.
RIDGE = 1e-3
Signals = list[tuple[Tensor, Tensor, Tensor]]  # batch by batch, of the joined, the first and the second network


class DisplacementPath:
    """The path between two networks as a function of t in [0, 1]; widths may differ.

    images: batches of inputs, on which features are compared and kernels fitted.  The signals of all of them at one
    layer, of three networks, are held at a time.
    A network on the path has as many channels, or particles, as the plans have pairs: those of either network where
    they have as many of equal mass, otherwise at most the sum of both less one.
    """

    def __init__(self, a: Network, b: Network, images: Sequence[Tensor], ridge: float = RIDGE) -> None:
        for network, argument in ((a, "a"), (b, "b")):
            _require_chain(Channels.of(copied(network, argument), argument), network, argument)
        ends = coupled(a, b, torch.cat(list(images)))
        self.images, self.ridge, self.masses = images, ridge, ends.masses
        self.first, self.second = ends.first, ends.second
        self._chains = copied(ends.first, "a"), copied(ends.second, "b")
        self._channels = Channels.of(self._chains[0], "a")
        _require_fitted(self._chains[0], self._channels)

    @torch.no_grad()
    def __call__(self, t: float) -> Network:
        if t in (0, 1):
            return self.first if t == 0 else self.second
        joined = straight(*self._chains, t)
        signals = [(batch.clone(), batch.clone(), batch.clone()) for batch in self.images]  # some work in place
        masses = dict(zip((layer.name for layer in self._channels.layers[1:]), self.masses))
        for name in self._channels.order:
            if name in masses:
                self._fit(joined, name, masses[name], signals, t)
            if name == self._channels.layers[-1].name:
                break
            here, first, second = (network.get_submodule(name) for network in (joined, *self._chains))
            signals = [(here(x), first(y), second(z)) for x, y, z in signals]
        return from_sequential(joined, self.first) if isinstance(self.first, ParticleNetwork) else joined

    def _fit(self, joined: nn.Module, name: str, masses: Tensor, signals: Signals, t: float) -> None:
        """Move the kernels of a layer off the line, to where the pre-activations are closer to the wanted ones."""
        layer, first, second = (network.get_submodule(name) for network in (joined, *self._chains))
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        connection = Connection(layer)
        # unknown and feature are divided by and multiplied with the root of the mass, for the metric
        roots = masses.sqrt().repeat_interleave(layer.weight.shape[1] // len(masses))
        found = moments(connection.weights.shape[0], len(layer.weight), layer.weight)
        size = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
        for here, a, b in signals:
            missing = connection.columns((1 - t) * first(a) + t * second(b) - layer(here))
            size += _add(found, connection, here, roots.to(here), missing)
        ridge = self.ridge * float(size) * len(masses) / (found.unknowns * found.samples)
        fit = found.solve(ridge, torch.finfo(layer.weight.dtype).eps, offset=layer.bias is not None)
        scales = roots.repeat_interleave(found.unknowns // len(roots))[:, None].to(fit.weights)
        layer.weight.add_((scales * fit.weights).T.reshape(layer.weight.shape).to(layer.weight))
        if layer.bias is not None and fit.offset is not None:
            layer.bias.add_(fit.offset.to(layer.bias))


def _add(found: Moments, connection: Connection, signal: Tensor, roots: Tensor, missing: Tensor) -> Tensor:
    """Take a batch into account, a block of images at a time; the sum of squares of what it adds to the design."""
    step, size = max(1, found.block // missing[0, :1].numel()), roots.new_zeros((), dtype=torch.float64)
    for first in range(0, len(signal), step):
        part = slice(first, first + step)
        design = connection.design(signal[part])
        design = design * along_axis(roots, design, 0)
        found.add(design, missing[:, part])
        size += design.double().square().sum()
    return size


def _require_chain(channels: Channels, network: Network, argument: str) -> None:
    if not channels.is_chain:
        raise Misuse(argument, type(network).__name__, "has residual blocks; displacement goes along a chain of layers")


def _require_fitted(network: nn.Module, channels: Channels) -> None:
    """Misuse where anything but the layers holds tensors."""
    layers = {layer.name for layer in channels.layers}
    for name in channels.order:
        module = network.get_submodule(name)
        if name not in layers and module.state_dict():
            remedy = "fold it into the layer in front of it (torch.nn.utils.fusion.fuse_conv_bn_eval), or join weights"
            raise Misuse("a", name, f"is a {type(module).__name__}, whose tensors no least squares gives; {remedy}")
