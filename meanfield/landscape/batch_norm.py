"""Statistics of batch norm at a point of a plane: see `finite.statistics`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meanfield import limits
from meanfield.finite.statistics import WHOLE, buffers, in_order, settle
from meanfield.landscape.directions import Point
from meanfield.landscape.passes import ChainPasses, PlainPasses
from meanfield.subject import Parameters, Subject
from meanfield.validation import Misuse


class Statistics:
    """The statistics of a network over images, as a function of a point of a plane.

    In a chain they come out of its own pass, which is many times faster (`landscape.passes`), where all signals of all
    images take no more than WHOLE blocks.
    """

    def __init__(self, passes: ChainPasses | PlainPasses, batches: Sequence[Tensor]) -> None:
        """Misuse where a batch norm is called twice in a pass."""
        subject = passes.subject
        self.plain, self.batches = PlainPasses(subject, passes.plane), batches
        self.norms = _called(subject, batches[0])
        self.whole = self.names and isinstance(passes, ChainPasses) and _fit(passes, batches)
        self.passes = passes
        self.prepared = passes.prepared(torch.cat(list(batches))) if self.whole else ()

    @property
    def names(self) -> list[str]:
        """Of the buffers that are computed."""
        return [name for norm in self.norms for name in buffers(norm)]

    def __call__(self, point: Point) -> Parameters:
        """By name of the buffer; of a network without batch norm none."""
        if self.whole and isinstance(self.passes, ChainPasses):
            return self.passes.statistics(self.prepared, point, self.names)
        subject = self.plain.subject
        found = {name: subject.buffers[name].clone() for name in self.names}
        if found and isinstance(subject.network, nn.Module):
            settle(found, subject.network, self.norms, self.batches, lambda *given: self._pass(point, *given))
        return found

    def _pass(self, point: Point, statistics: Parameters, images: Tensor) -> Tensor:
        return next(self.plain.outputs(self.plain.prepared(images), [(point, statistics)]))


def _called(subject: Subject, images: Tensor) -> dict[str, int]:
    if not isinstance(subject.network, nn.Module):
        return {}
    try:
        return in_order(subject.network, lambda _, some: subject(subject.parameters, some), images, "network")
    except Misuse as error:
        remedy = f"takes every batch norm once in a pass; {error.value!r} is called more often: use 'kept'"
        raise Misuse("batch_norm", "recomputed", remedy) from error


def _fit(passes: ChainPasses, batches: Sequence[Tensor]) -> bool:
    alike = len({(batch.shape[1:], batch.dtype) for batch in batches}) == 1
    return alike and passes.bytes_each(batches[0]) * sum(map(len, batches)) <= WHOLE * limits.block_bytes()
