"""Statistics of batch norm, taken of images: mean and variance of what enters every batch norm.

They are those of one pass in training mode with all images in one batch, whatever the batches: every batch norm takes
what the ones before it make of the same statistics.  Variances are divided by the number of images and positions, as
that pass does it (torch's running ones by one less): on these images, evaluation is then what training is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from meanfield import limits
from meanfield.validation import Misuse

WHOLE = 8  # times the bytes of a block: what all images may take where they pass at once

Tensors = dict[str, Tensor]
# a pass of images (N, ...), with statistics, by the name of their buffer, in the place of the network's own
Forward = Callable[[Tensors, Tensor], object]


def norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms with running statistics, by name."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm))
    return {name: module for name, module in found if module.running_mean is not None}


@torch.no_grad()
def recompute(network: nn.Module, batches: Sequence[Tensor], argument: str = "network") -> None:
    """Set the running statistics of a network in evaluation mode to those of all images, batches (N, ...) of them.

    argument: of the caller, the name of the network in errors.
    """
    own = dict(network.named_buffers())

    def forward(_: Tensors, images: Tensor) -> None:
        network(images.clone())  # some modules work in place

    called = in_order(network, forward, batches[0], argument) if norms(network) else {}
    if called:
        settle({name: own[name] for norm in called for name in buffers(norm)}, network, called, batches, forward)


def buffers(norm: str) -> tuple[str, str]:
    """Names of its running statistics."""
    return f"{norm}.running_mean", f"{norm}.running_var"


def in_order(network: nn.Module, forward: Forward, images: Tensor, argument: str) -> dict[str, int]:
    """The batch norms that a pass calls, in the order of their calls, and the bytes of what enters each of an image.

    Misuse where one is called twice: no statistics are those of both calls.
    """
    found: dict[str, int] = {}

    def note(name: str, signal: Tensor) -> None:
        if name in found:
            raise Misuse(argument, name, "is a batch norm that is called twice in a pass: statistics are of one call")
        found[name] = signal.nbytes // len(signal)

    with _listening(network, norms(network), note):
        forward({}, images[:2])
    return found


@torch.no_grad()
def settle(
    found: Tensors, network: nn.Module, called: Mapping[str, int], batches: Sequence[Tensor], forward: Forward
) -> None:
    """Set the tensors `found`, by the names of the buffers whose place they take in `forward`, to the statistics of all
    images.

    called: see `in_order`.  In one pass where what enters the batch norms takes no more than WHOLE blocks; otherwise
    batch norm by batch norm, in passes of the batches that end there.
    """
    alike = len({(batch.shape[1:], batch.dtype) for batch in batches}) == 1
    if alike and sum(called.values()) * sum(map(len, batches)) <= WHOLE * limits.block_bytes():
        with taking(network, called, found):
            forward(found, torch.cat(list(batches)))
        return
    for norm in called:
        moments = _Moments()
        for batch in batches:
            limits.look()
            moments.add(_entering(network, norm, lambda batch=batch: forward(found, batch)))
        _set(found, norm, moments)


@contextmanager
def taking(network: nn.Module, called: Sequence[str] | Mapping[str, int], found: Tensors) -> Iterator[None]:
    """Within it, every pass sets the tensors `found` to the statistics of its images, each before they are used."""

    def take(name: str, signal: Tensor) -> None:
        moments = _Moments()
        moments.add(signal)
        _set(found, name, moments)

    with _listening(network, called, take):
        yield


def _set(found: Tensors, norm: str, moments: _Moments) -> None:
    for name, value in zip(buffers(norm), (moments.mean, moments.variance)):
        found[name].copy_(value)


@contextmanager
def _listening(
    network: nn.Module, names: Sequence[str] | Mapping[str, Any], heard: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Calls `heard` with what enters the modules of these names, before they do anything."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, arguments: heard(name, arguments[0])

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(network.get_submodule(name).register_forward_pre_hook(hook(name)))
        yield


class _Reached(Exception):
    """Ends a pass."""


def _entering(network: nn.Module, norm: str, forward: Callable[[], object]) -> Tensor:
    """What enters a batch norm, of a pass that ends there."""
    reached: list[Tensor] = []

    def end(_: str, signal: Tensor) -> None:
        reached.append(signal)
        raise _Reached

    with _listening(network, [norm], end):
        try:
            forward()
        except _Reached:
            return reached[0]
    raise AssertionError(f"{norm} was called in the first pass")


class _Moments:
    """Mean and variance by channel in float64, batch by batch (Chan, Golub & LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, signal: Tensor) -> None:
        axes = [axis for axis in range(signal.ndim) if axis != 1]
        variance, mean = torch.var_mean(signal.double(), axes, correction=0)
        count = signal.numel() // signal.shape[1]
        if not self.count:
            self.mean, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
        total, shift = self.count + count, mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.squares = self.squares + variance * count + shift.square() * (self.count * count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        return self.squares / self.count
