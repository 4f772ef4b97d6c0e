"""A network of fewer channels with nearly the same function, from images without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from meanfield import limits, validation
from meanfield.finite.network import FiniteCNN
from meanfield.fusion.channels import Channels, Layer, chosen, copied, moved
from meanfield.fusion.elimination import Reader, eliminate, keep
from meanfield.fusion.repopulation import masses
from meanfield.fusion.signals import Signal, checked_images, signals
from meanfield.grafting.connection import Connection
from meanfield.grafting.least_squares import Products
from meanfield.network import ParticleNetwork
from meanfield.penalties import Penalty
from meanfield.precision import full_float32
from meanfield.signatures import Seed, checked
from meanfield.subject import Network
from meanfield.validation import Misuse, choice

CHOICES = ("elimination", "masses", "random")
NEGLIGIBLE = 1e-6  # of the largest scale of a batch norm


@checked
@torch.inference_mode(False)
@torch.no_grad()
@full_float32()
def reduce(
    network: Network,
    widths: Any,
    images: Tensor,
    by: Annotated[str, choice(CHOICES)] = "elimination",
    *,
    penalty: Penalty | None = None,
    seed: Seed = 0,
) -> nn.Module:
    """The network with fewer channels, in evaluation mode; labels are not used.

    From the images to the outputs, space by space (a residual stream is one): channels are left out, and the layers
    that read them get the kernels and biases whose pre-activations are, in least squares over images and positions,
    closest to those of the whole network; what was left out below is made up for in that, what a shortcut misses by the
    layer that is added to it.

    widths: how many are kept of every space between images and outputs (`Channels.of(network).hidden_widths` is how
        many there are), or a network of the same form that has as many: a parent of a union.
    images: (N, ...).
    by: which are kept.  "elimination": one after the other that one goes whose readers can do best without it, exactly
        (see `fusion.elimination`).  "masses": of particles, or a FiniteCNN, the heaviest of the convex program on the
        frozen features whose targets are the network's own outputs.  "random": any, from `seed`, as a control.
    penalty: of "masses", that of the program; default Penalty().

    Batch norm keeps its scales and variances; where a layer has no bias, a shift of its running means stands for one.
    """
    whole = copied(network, "network")
    channels, images = Channels.of(whole), checked_images(images, whole)
    for name, tensor in whole.state_dict().items():
        validation.finite(tensor, f"network.{name}")
    counts = _counts(widths, channels)
    if by != "masses" and penalty is not None:
        raise Misuse("penalty", penalty, f"is of by='masses'; by={by!r} solves no convex program")
    kept = _kept(network, by, channels, counts, images, penalty, seed)
    reduction = _Reduction(whole, channels, images)
    for space in channels.hidden:
        reduction.reduce(space, counts[space], kept.get(space))
    if not (channels.is_chain or reduction.is_whole):
        reduction.refit()  # what a stream brings to its readers has changed since
    return reduction.network


def _counts(widths: Any, channels: Channels) -> dict[int, int]:
    """Space -> how many of its channels are kept."""
    have = channels.hidden_widths
    if isinstance(widths, (nn.Module, ParticleNetwork)):
        parent = Channels.of(copied(widths, "widths"), "widths")
        channels.require_alike(parent, "widths")
        widths = parent.hidden_widths
    if isinstance(widths, (str, bytes)) or not isinstance(widths, Sequence):
        raise Misuse("widths", widths, f"must be {len(have)} integers, one per space of channels, or a network")
    wanted = [validation.integer(width, "widths") for width in widths]
    if len(wanted) != len(have) or any(few > many for few, many in zip(wanted, have)):
        raise Misuse("widths", tuple(wanted), f"must be {len(have)} integers of at most {have}")
    return dict(zip(channels.hidden, wanted))


def _kept(
    network: Network,
    by: str,
    channels: Channels,
    counts: dict[int, int],
    images: Tensor,
    penalty: Penalty | None,
    seed: int,
) -> dict[int, Tensor]:
    """Space -> indices in increasing order; nothing where elimination is to find them."""
    if by == "elimination":
        return {}
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(channels.widths[space], generator=generator) for space in channels.hidden]
    else:
        if not isinstance(network, (ParticleNetwork, FiniteCNN)):
            raise Misuse("by", by, f"is of particles, and network a {type(network).__name__}: choose 'elimination'")
        particles = network.detach() if isinstance(network, ParticleNetwork) else network.particles()
        orders = [each.argsort(descending=True) for each in masses(particles, images, penalty)]
    return {space: order[: counts[space]].sort().values for space, order in zip(channels.hidden, orders)}


class _Reduction:
    """A network on its way from the whole one to fewer channels.

    kept: space -> the indices of what is left of it, in the whole network.
    """

    def __init__(self, whole: nn.Module, channels: Channels, images: Tensor) -> None:
        self.whole, self.network, self.channels, self.images = whole, whole, channels, images
        self.kept = {space: torch.arange(width, device=images.device) for space, width in enumerate(channels.widths)}

    @property
    def is_whole(self) -> bool:
        return all(len(kept) == width for kept, width in zip(self.kept.values(), self.channels.widths))

    def reduce(self, space: int, count: int, kept: Tensor | None) -> None:
        """Leave `count` channels of a space, `kept` (count,) if these are given, and refit what reads them."""
        width = self.channels.widths[space]
        if self.is_whole and count == width:
            return
        layers = self.channels.readers(space)
        moments = self._moments(layers)
        readers = [self._problem(layer, found) for layer, found in zip(layers, moments)]
        if kept is None:
            kept, readers = eliminate(readers, count)
        else:
            kept, readers = kept.to(self.images.device), keep(readers, kept)
        self.network = moved(self.network, self.channels, {space: chosen(kept, width)})
        self.kept[space] = kept
        for layer, found, reader in zip(layers, moments, readers):
            self._write(layer, found, reader, kept)

    def refit(self) -> None:
        """Every layer that reads hidden channels, to what now enters it."""
        for layer in self.channels.layers:
            if layer.source in self.channels.hidden:
                (found,) = self._moments([layer])
                left = torch.arange(len(self.kept[layer.source]), device=self.images.device)
                self._write(layer, found, self._problem(layer, found), left)

    def _moments(self, layers: Sequence[Layer]) -> list[Products]:
        """Of what enters the layers now and what leaves them in the whole network, in units of `_scale`."""
        connections = [self._connection(layer) for layer in layers]
        found = [
            Products(connection.weights.shape[0], connection.weights.shape[1], self.images.device)
            for connection in connections
        ]
        names = [name for layer in layers for name in (layer.name, layer.beside) if name is not None]
        for now, wanted in zip(*(signals(each, names, self.images) for each in (self.network, self.whole))):
            limits.look()
            for layer, connection, moments in zip(layers, connections, found):
                goal = self._goal(layer, connection, now, wanted)
                self._add(connection, moments, now[layer.name].entering, goal)
        return found

    def _goal(
        self, layer: Layer, connection: Connection, now: Mapping[str, Signal], wanted: Mapping[str, Signal]
    ) -> Tensor:
        """What the layer is to put out, (K, N, ...) in units of `_scale`: what it does in the whole network, and what
        is missing of that to which it is added.
        """
        kept = self.kept[layer.target]
        goal = connection.columns(wanted[layer.name].leaving)[kept].double()
        shape = (-1, *[1] * (goal.ndim - 1))
        goal = goal * self._scale(layer).reshape(shape)
        if layer.beside is None:
            return goal
        have, want = (connection.columns(heard[layer.beside].leaving) for heard in (now, wanted))
        return goal + self._sign(layer).reshape(shape) * (want[kept].double() - have.double())

    def _add(self, connection: Connection, moments: Products, entering: Tensor, goal: Tensor) -> None:
        each = goal[:, :1].numel() // max(len(goal), 1)  # positions of an image
        for part in torch.arange(len(entering)).split(max(1, moments.block // each)):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            moments.add(connection.design(entering[rows]), goal[:, rows])

    def _connection(self, layer: Layer) -> Connection:
        return Connection(self._module(layer))

    def _module(self, layer: Layer) -> Any:
        return self.network.get_submodule(layer.name)

    def _problem(self, layer: Layer, moments: Products) -> Reader:
        weights = self._connection(layer).weights.double() * self._scale(layer)
        return Reader.of(moments, weights, len(self.kept[layer.source]), offset=self._is_free(layer))

    def _is_free(self, layer: Layer) -> bool:
        """Whether a constant can be added to what the layer puts out."""
        return layer.norm is not None or self._module(layer).bias is not None

    def _scale(self, layer: Layer) -> Tensor:
        """(K,), what batch norm makes of a unit of the layer's output: errors are counted behind it.  Where that is
        nothing, what is next to nothing, so that weights can be counted back.
        """
        kept = self.kept[layer.target]
        if layer.norm is None:
            return torch.ones(len(kept), dtype=torch.float64, device=self.images.device)
        norm: Any = self.whole.get_submodule(layer.norm)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.abs()
        scale = scale[kept]
        return scale.clamp_min(NEGLIGIBLE * scale.max()) if bool((scale > 0).any()) else torch.ones_like(scale)

    def _sign(self, layer: Layer) -> Tensor:
        """(K,), that of what batch norm multiplies the layer's output with: 1, -1, or 0 where it gives nothing."""
        kept = self.kept[layer.target]
        norm: Any = None if layer.norm is None else self.whole.get_submodule(layer.norm)
        if norm is None or norm.weight is None:
            return torch.ones(len(kept), dtype=torch.float64, device=self.images.device)
        return norm.weight.double().sign()[kept]

    def _write(self, layer: Layer, moments: Products, reader: Reader, left: Tensor) -> None:
        """Take the solution into the layer; left: which of the channels that the moments saw it is of."""
        module, scale = self._module(layer), self._scale(layer)
        module.weight.copy_((reader.weights / scale).T.reshape(module.weight.shape))
        if not self._is_free(layer):
            return
        means, wanted = moments.sums(offset=True).means
        offset = (wanted - means.unflatten(0, (-1, reader.size))[left].flatten() @ reader.weights) / scale
        if module.bias is not None:
            module.bias.copy_(offset)
        elif layer.norm is not None:
            before: Any = self.whole.get_submodule(layer.norm)
            after: Any = self.network.get_submodule(layer.norm)
            after.running_mean.copy_(before.running_mean[self.kept[layer.target]] - offset)
