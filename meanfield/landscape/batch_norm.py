"""Statistics of batch norm at a point: mean and variance over all images of what enters every batch norm there.

They are those of one pass in training mode with all images in one batch (variances divided by the number of images and
positions), whatever the batches: every batch norm takes what the ones before it make of the same statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from meanfield import limits
from meanfield.landscape.directions import Point
from meanfield.landscape.passes import ChainPasses, PlainPasses
from meanfield.subject import Parameters, Subject
from meanfield.validation import Misuse

WHOLE = 8  # times the bytes of a block: up to that, all images pass through a chain at once


class Statistics:
    """The statistics of a network over images, as a function of a point of a plane.

    In one pass over all images where they go through a chain and their signals take no more than WHOLE blocks;
    otherwise layer by layer, a pass over the batches for each batch norm.  Both are exact.
    """

    def __init__(self, passes: ChainPasses | PlainPasses, batches: Sequence[Tensor]) -> None:
        """Misuse where a batch norm is called other than once in a pass."""
        subject = passes.subject
        self.plain, self.batches = PlainPasses(subject, passes.plane), batches
        self.norms = _in_order(subject, batches[0])
        self.whole = self.names and isinstance(passes, ChainPasses) and _fit(passes, batches)
        self.passes = passes
        self.prepared = passes.prepared(torch.cat(list(batches))) if self.whole else ()

    @property
    def names(self) -> list[str]:
        """Of the buffers that are computed."""
        return [f"{norm}.{kind}" for norm in self.norms for kind in ("running_mean", "running_var")]

    def __call__(self, point: Point) -> Parameters:
        """By name of the buffer; of a network without batch norm none."""
        if self.whole and isinstance(self.passes, ChainPasses):
            return self.passes.statistics(self.prepared, point, self.names)
        found: Parameters = {}
        for norm in self.norms:
            moments = _Moments()
            for batch in self.batches:
                limits.look()
                moments.add(self._entering(norm, point, found, batch))
            like = self.plain.subject.buffers[f"{norm}.running_mean"]
            found |= {f"{norm}.running_mean": moments.mean.to(like), f"{norm}.running_var": moments.variance.to(like)}
        return found

    def _entering(self, norm: str, point: Point, statistics: Parameters, batch: Tensor) -> Tensor:
        """What enters a batch norm, of a pass that ends there."""
        reached = _Reached()
        handle = _module(self.plain.subject, norm).register_forward_pre_hook(reached)
        try:
            next(self.plain.outputs(self.plain.prepared(batch), [(point, statistics)]))
        except _Reached:
            return reached.signal
        finally:
            handle.remove()
        raise AssertionError(f"{norm} was called when the passes began")


class _Reached(Exception):
    """A hook that ends a pass, and keeps what it was called with."""

    signal: Tensor

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.signal = arguments[0]
        raise self


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


def _in_order(subject: Subject, images: Tensor) -> list[str]:
    """Names of the batch norms that go by running statistics, in the order of their calls."""
    if not isinstance(subject.network, nn.Module):
        return []
    calls: list[str] = []
    normed = {name: each for name, each in subject.network.named_modules() if isinstance(each, _BatchNorm)}
    normed = {name: each for name, each in normed.items() if each.running_mean is not None}
    handles = [
        each.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, each in normed.items()
    ]
    try:
        if handles:
            subject(subject.parameters, images[:2])
    finally:
        for handle in handles:
            handle.remove()
    for name in normed:
        if calls.count(name) != 1:
            remedy = f"takes every batch norm once in a pass; {name!r} is called {calls.count(name)} times: use 'kept'"
            raise Misuse("batch_norm", "recomputed", remedy)
    return calls


def _module(subject: Subject, name: str) -> nn.Module:
    assert isinstance(subject.network, nn.Module)
    return subject.network.get_submodule(name)


def _fit(passes: ChainPasses, batches: Sequence[Tensor]) -> bool:
    alike = len({(batch.shape[1:], batch.dtype) for batch in batches}) == 1
    return alike and passes.bytes_each(batches[0]) * sum(map(len, batches)) <= WHOLE * limits.block_bytes()
