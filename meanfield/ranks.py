"""Several processes on one problem, on one machine or on many: ranks, as `torchrun` starts them.

Every rank holds its share of the images.  What is small, every rank holds whole: network, program, targets, outputs,
readout features.  All ranks call the same functions in the same order; what they have to tell each other goes through
the plain collectives of `Ranks`, which for one rank do nothing.

Equal sums on equal machines make equal bits.  On machines that round differently the ranks could part where something
is decided on such numbers, so that rank 0 decides, `Ranks.decided`, and its networks and points count, `Ranks.agreed`.
Limits of time and interrupts are decided together as well, by a clock that all ranks share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from meanfield import limits

Value = TypeVar("Value", bool, float)


class Lost(RuntimeError):
    """Another rank has ended, or cannot be reached any more."""


@dataclass(frozen=True)
class Ranks:
    """The number of this rank among `count` of them."""

    own: int = 0
    count: int = 1

    def shares(self, rows: int) -> tuple[int, ...]:
        """How many of so many rows every rank takes, in runs, in the order of the ranks: numbers that differ by one at
        most.
        """
        edges = (rank * rows // self.count for rank in range(self.count + 1))
        return tuple(last - first for first, last in pairwise(edges))

    def slice(self, shares: tuple[int, ...]) -> slice:
        """Which rows are this rank's."""
        edges = [0, *accumulate(shares)]
        return slice(edges[self.own], edges[self.own + 1])

    def total(self, *tensors: Tensor) -> list[Tensor]:
        """Every tensor's sum over the ranks: one message for all, which share one dtype."""
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _reached():
            dist.all_reduce(flat)
        return [part.view(each.shape) for part, each in zip(flat.split([t.numel() for t in tensors]), tensors)]

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over the ranks, entry by entry; NaN where any has it."""
        if self.count == 1:
            return tensor
        found = torch.where(tensor.isnan(), torch.inf, tensor)  # what a maximum makes of NaN, no two libraries agree on
        odd = tensor.isnan().to(tensor.dtype)
        both = torch.stack([found, odd])
        with _reached():
            dist.all_reduce(both, dist.ReduceOp.MAX)
        return torch.where(both[1] > 0, torch.nan, both[0])

    def gathered(self, rows: Tensor, shares: tuple[int, ...]) -> Tensor:
        """The rows of all ranks one after the other, from those of each, `shares` of them."""
        if self.count == 1:
            return rows
        whole = rows.new_empty(sum(shares), *rows.shape[1:])
        whole[self.slice(shares)] = rows
        for rank, part in enumerate(whole.split(shares)):
            if len(part):
                with _reached():
                    dist.broadcast(part, rank)
        return whole

    def collected(self, rows: Tensor) -> Iterator[Tensor]:
        """On rank 0 the rows of every other rank, any number of them, one rank at a time and in order; on those
        nothing.
        """
        sizes = self.gathered(torch.tensor([len(rows)]), (1,) * self.count).tolist()
        for other, size in enumerate(sizes):
            if size and other and self.own in (0, other):
                part = rows.contiguous() if self.own else rows.new_empty(size, *rows.shape[1:])
                with _reached():
                    dist.send(part, 0) if self.own else dist.recv(part, other)
                if not self.own:
                    yield part

    def agreed(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in the shape that all have."""
        if self.count == 1:
            return tensor
        told = tensor.detach().clone(memory_format=torch.contiguous_format)
        with _reached():
            dist.broadcast(told, 0)
        return told

    def decided(self, value: Value) -> Value:
        """Rank 0's."""
        if self.count == 1:
            return value
        return type(value)(self.agreed(torch.tensor(float(value), dtype=torch.float64)))


ALONE = Ranks()


class _Clock(limits.Clock):
    """Rank 0's time as of the last tick, and an end to which all ranks come at the same one, whoever was asked."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.ended = ranks, False
        self.time = ranks.decided(time.perf_counter())

    def now(self) -> float:
        return self.time

    def tick(self) -> None:
        asked: KeyboardInterrupt | None = None
        try:
            super().tick()
        except KeyboardInterrupt as stop:
            asked = stop
        here = (time.perf_counter() if self.ranks.own == 0 else 0.0, asked is not None)
        self.time, any_asked = self.ranks.total(torch.tensor(here, dtype=torch.float64))[0].tolist()
        if any_asked:
            self.ended = True
            raise asked or KeyboardInterrupt

    def glance(self) -> None:
        """Where ranks may not be in step, none can be asked."""

    def most(self, number: int) -> int:
        return int(self.ranks.largest(torch.tensor(float(number), dtype=torch.float64)))

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
