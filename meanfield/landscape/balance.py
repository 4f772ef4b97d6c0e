"""The same function with its scale spread evenly over channels: as much comes into each as goes out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from meanfield.landscape.caution import is_plain
from meanfield.network import ParticleNetwork, along_axis
from meanfield.subject import Network, Subject
from meanfield.validation import Misuse

SWEEPS = 10_000
BALANCED = 1e-13  # in the logarithm of a factor
CHANNELS = 4  # of a signal that is tried

N = TypeVar("N", bound=Network)


def balanced(network: N) -> N:
    """The network with every hidden channel rescaled so that the norm of what comes in (kernels and bias) equals that
    of what goes out: the least sum of squared weights among all rescalings that leave the function as it is.

    Multiplying what comes into a channel by c > 0 and what goes out by 1/c changes nothing where the activation is
    positively homogeneous.  The least sum is unique (it is convex in log c), so that networks which differ by such
    rescalings have one balanced form; channels without what comes in or goes out stay as they are.

    network: an nn.Sequential of convolutions (without groups) and linear layers with positively homogeneous modules
    between, or a ParticleNetwork of homogeneous layers, whose masses stay.  A copy comes back, in evaluation mode.
    """
    subject = Subject(network)
    chain = _chain(subject)
    weights = [subject.parameters[weight] for weight, _ in chain]
    biases = [None if bias is None else subject.parameters[bias] for _, bias in chain]
    factors = _factors(weights, biases)
    moved = dict(subject.parameters)
    for index, (weight, bias) in enumerate(chain):
        if index < len(factors):
            moved[weight] = moved[weight] * along_axis(factors[index], moved[weight], 0)
            if bias is not None:
                moved[bias] = moved[bias] * factors[index]
        if index:
            columns = _by_source(moved[weight], len(factors[index - 1]))
            moved[weight] = (columns / along_axis(factors[index - 1], columns, 1)).reshape(moved[weight].shape)
    return subject.at(moved)


def _factors(weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """One per hidden channel and layer; each sweep balances all channels of one layer after the other."""
    squares = [
        _by_source(weight, source).square().flatten(2).sum(2).double()
        for weight, source in zip(weights, [weights[0].shape[1], *(len(weight) for weight in weights)])
    ]
    offsets = [torch.zeros(len(w)) if b is None else b.square() for w, b in zip(weights, biases)]
    offsets = [each.to(squares[0]) for each in offsets]
    logs = [square.new_zeros(len(square)) for square in squares[:-1]]  # of the squared factors
    for _ in range(SWEEPS):
        largest = squares[0].new_zeros(())
        for layer, (below, above) in enumerate(pairwise(squares)):
            scale = logs[layer - 1].neg().exp() if layer else below.new_ones(below.shape[1])
            beyond = logs[layer + 1].exp() if layer + 1 < len(logs) else above.new_ones(len(above))
            incoming, outgoing = below @ scale + offsets[layer], beyond @ above
            alive = (incoming > 0) & (outgoing > 0)
            wanted = torch.where(alive, (outgoing / incoming).log() / 2, 0.0)
            largest = torch.maximum(largest, (wanted - logs[layer]).abs().max())
            logs[layer] = wanted
        if float(largest) < BALANCED:
            break
    return [(each / 2).exp().to(weights[0]) for each in logs]


def _by_source(weight: Tensor, sources: int) -> Tensor:
    """(targets, sources, ...): of a linear layer behind flattened maps the positions of a channel apart."""
    return weight.reshape(len(weight), sources, -1)


def _chain(subject: Subject) -> list[tuple[str, str | None]]:
    """Names of weights and biases, layer by layer; Misuse where rescaling channels changes the function."""
    network = subject.network
    if isinstance(network, ParticleNetwork):
        for index, layer in enumerate(network.architecture.layers):
            if not layer.h.homogeneous:
                raise _refusal(f"layers.{index} ({layer.h})")
        biases = [None if bias is None else f"biases.{index}" for index, bias in enumerate(network.biases)]
        return [*((f"kernels.{index}", bias) for index, bias in enumerate(biases)), ("readout", None)]
    if not isinstance(network, nn.Sequential) or type(network).forward is not nn.Sequential.forward:
        raise Misuse("network", type(network).__name__, "cannot be balanced: give an nn.Sequential or particles")
    found, signal = [], _probe(4)
    for name, module in network._modules.items():  # also one that stands there twice, such as an activation
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            axes = 2 if isinstance(module, nn.Linear) else 4
            if found and signal.ndim != axes:
                raise _refusal(f"{name} ({type(module).__name__})")
            found.append((f"{name}.weight", None if module.bias is None else f"{name}.bias"))
            signal = _probe(axes)
        else:
            signal = _passed(module, signal, name)
    if len({weight for weight, _ in found} & subject.parameters.keys()) < len(found) or not found:
        raise Misuse("network", type(network).__name__, "cannot be balanced: its layers share weights, or have none")
    return found


def _probe(axes: int) -> Tensor:
    """A signal of CHANNELS channels: a vector of them, or maps that pooling leaves something of."""
    shape = (2, CHANNELS, 32, 32)[:axes]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _passed(module: Any, signal: Tensor, name: str) -> Tensor:
    """What a module makes of a signal; Misuse unless it makes c times that of a signal whose channels are multiplied by
    c > 0, each by another.
    """
    factors = torch.arange(1.0, CHANNELS + 1, dtype=signal.dtype)
    try:
        once, found = (module(each.clone()) for each in (signal, _times(signal, factors)))
        alone = torch.allclose(found, _times(once, factors), rtol=1e-9, atol=0)
    except Exception as error:  # whatever is raised by what takes other signals: it is not known
        raise _refusal(f"{name} ({type(module).__name__})") from error
    if not (is_plain(module) and alone):
        raise _refusal(f"{name} ({type(module).__name__})")
    return once


def _times(signal: Tensor, factors: Tensor) -> Tensor:
    """A signal (N, D, ...) with each of its channels, D / CHANNELS entries one after the other, times a factor."""
    channels = signal.unflatten(1, (CHANNELS, -1))
    return (channels * along_axis(factors, channels, 1)).flatten(1, 2)


def _refusal(place: str) -> Misuse:
    remedy = (
        "cannot be balanced: not positively homogeneous, channel by channel, or no layer of a chain; use balance=False"
    )
    return Misuse("network", place, remedy)
