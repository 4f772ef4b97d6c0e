"""Several processes on one problem, on one machine or on many: ranks, as `torchrun` starts them.

Every rank holds its share of the images.  What is small, every rank holds whole: network, program, targets, outputs,
readout features.  All ranks call the same functions in the same order; what they have to tell each other goes through
the plain collectives of `Ranks`, which for one rank do nothing.

Equal sums on equal machines make equal bits.  On machines that round differently the ranks could part where something
is decided on such numbers, so that rank 0 decides, `Ranks.decided`, and its networks and points count, `Ranks.agreed`.
Limits of time and interrupts are decided together as well, by a clock that all ranks share.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from meanfield import limits
from meanfield.folds import Fold, Span, branches, edges

Value = TypeVar("Value", bool, float)


class Lost(RuntimeError):
    """Another rank has ended, or cannot be reached any more."""


@dataclass(frozen=True)
class Ranks:
    """The number of this rank among `count` of them."""

    own: int = 0
    count: int = 1

    def span(self, parts: int, rank: int | None = None) -> Span:
        """Which of so many parts are this rank's, or another one's: neighbours, in the order of the ranks."""
        found = edges(parts, self.count)
        rank = self.own if rank is None else rank
        return found[rank], found[rank + 1]

    def total(self, fold: Fold[Tensor], zero: Tensor) -> Tensor:
        """The sum over all runs, from the vectors (n,) of each rank's own, in the order of the tree; zero (n,).

        As an all-reduce: every rank gets its part of the entries from all, adds them up and gives the sums to all.
        """
        if self.count == 1 or not len(zero):
            return zero if not len(zero) else fold.result
        spans = [branches(fold.count, self.span(fold.count, rank)) for rank in range(self.count)]
        size = math.ceil(len(zero) / self.count)
        own = zero.new_zeros(len(fold.values), self.count, size)
        for row, value in zip(own.flatten(1), fold.values):
            row[: len(value)] = value
        counts = [len(each) * size for each in spans]
        received, every = zero.new_empty(sum(map(len, spans)), size), Fold(fold.count, torch.add)
        with _reached():
            dist.all_to_all_single(
                received.flatten(), own.transpose(0, 1).flatten(), counts, [len(own) * size] * self.count
            )
        for span, part in zip(chain(*spans), received):
            every.add(span, part)
        sums = zero.new_empty(self.count, size)
        with _reached():
            dist.all_gather(list(sums), every.result.contiguous())
        return sums.flatten()[: len(zero)]

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over the ranks, entry by entry; NaN where any has it.  For a few numbers."""
        if self.count == 1:
            return tensor
        found = tensor.new_empty(self.count, *tensor.shape)
        with _reached():
            dist.all_gather(list(found), tensor)  # of so few numbers half the bytes of an all-reduce
        return found.amax(0)

    def gathered(self, rows: Tensor, shares: tuple[int, ...]) -> Tensor:
        """The rows of all ranks one after the other, from those of each, `shares` of them."""
        if self.count == 1:
            return rows
        whole = rows.new_empty(sum(shares), *rows.shape[1:])
        parts = whole.split(shares)
        parts[self.own].copy_(rows)
        for rank, part in enumerate(parts):
            if part.numel():
                with _reached():
                    dist.broadcast(part, rank)
        return whole

    def handed_over(self, fold: Fold[Tensor], like: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """On rank 0 the branches of all runs in order, rows (any number, columns) as `like`, one at a time; those of
        other ranks are sent by them, who get nothing.
        """
        spans = [branches(fold.count, self.span(fold.count, rank)) for rank in range(self.count)]
        own = torch.tensor([len(rows) for rows in fold.values], dtype=torch.int64)
        sizes = self.gathered(own, tuple(map(len, spans))).tolist()
        values = iter(fold.values)
        senders = [(rank, span) for rank, each in enumerate(spans) for span in each]
        for (rank, span), size in zip(senders, sizes):
            if self.own not in (0, rank):
                continue
            rows = next(values) if rank == self.own else like.new_empty(size, like.shape[1])
            if rank and size:
                rows = rows.contiguous()
                with _reached():
                    dist.send(rows, 0) if self.own else dist.recv(rows, rank)
            if self.own == 0:
                yield span, rows

    def agreed(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in the shape that all have."""
        if self.count == 1:
            return tensor
        told = tensor.detach().clone(memory_format=torch.contiguous_format)
        with _reached():
            dist.broadcast(told, 0)
        return told

    def told(self, content: bytes | None) -> bytes | None:
        """Rank 0's bytes; None where it has none."""
        if self.count == 1:
            return content
        size = int(self.decided(-1.0 if content is None else float(len(content))))
        if size < 0:
            return None
        copy = torch.empty(size, dtype=torch.uint8)
        if content:
            copy.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return self.agreed(copy).numpy().tobytes()

    def decided(self, value: Value) -> Value:
        """Rank 0's."""
        if self.count == 1:
            return value
        return type(value)(self.agreed(torch.tensor(float(value), dtype=torch.float64)))


ALONE = Ranks()


class _Clock(limits.Clock):
    """Rank 0's time as of the last look in step, and an end to which all ranks come there, whoever was asked."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.ended = ranks, False
        self.time = ranks.decided(time.perf_counter())

    def now(self) -> float:
        return self.time

    def look(self, in_step: bool) -> None:
        if not in_step:
            return
        asked: KeyboardInterrupt | None = None
        try:
            super().look(in_step)
        except KeyboardInterrupt as stop:
            asked = stop
        here = (time.perf_counter() if self.ranks.own == 0 else -math.inf, asked is not None)
        self.time, any_asked = self.ranks.largest(torch.tensor(here, dtype=torch.float64)).tolist()
        if any_asked:
            self.ended = True
            raise asked or KeyboardInterrupt

    def common(self, stop: BaseException) -> bool:
        return isinstance(stop, limits.TimeUp) or (isinstance(stop, KeyboardInterrupt) and self.ended)


@contextmanager
def together() -> Iterator[Ranks]:
    """The ranks of this process while what is inside runs: those that the environment names, as `torchrun` sets it, or
    one.

    Inside, all ranks have to do the same.  Tensors of the CPU go by gloo, those of CUDA by NCCL.
    """
    if started() == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _reached():
        dist.init_process_group(backend)
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
        with limits.timed(_Clock(ranks)):
            yield ranks
    finally:
        dist.destroy_process_group()


def started(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks were started together with this one, itself included."""
    return int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1


def first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0, which speaks and writes for all."""
    return started(environment) == 1 or environment["RANK"] == "0"


def program(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The words that start meanfield as it was started."""
    if started(environment) == 1:
        return ("meanfield",)
    here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    return ("torchrun", f"--nnodes={started(environment) // here}", f"--nproc-per-node={here}", "-m", "meanfield")


def device(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """The device of this process where `name` says only of what kind: every rank of a machine has a card of its own."""
    return f"cuda:{environment.get('LOCAL_RANK', '0')}" if name == "cuda" and started(environment) > 1 else name


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if limits.is_shortage(error):
            raise
        raise Lost(f"another rank has ended or cannot be reached: {str(error).splitlines()[0]}") from error
