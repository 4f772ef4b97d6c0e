"""What is proven over all measures, and a proof on its way: the best bound so far, and the file that keeps it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, replace
from typing import Any

from torch import Tensor

from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.storage.states import StateFile

SAVING = 0.02  # of the time may go into writing the state
FIRST = 1 / 12  # of the time is for the first bound


@dataclass(frozen=True, eq=False)
class ProvenBound:
    """J >= value for every network, proven.

    share: value over the J of the network in hand.  curve: (seconds, value) whenever the bound rose, nondecreasing.
    kind: the method, and what it knows of max |q|.  output (N, K): the multipliers that attain it, scaled.  kernels
    (m, d): unit kernels, bias included, that the network lacked.  Where no method applies value is -inf and `reason`
    says why.
    """

    value: float
    share: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    kind: str = ""
    output: Tensor | None = None
    kernels: Tensor | None = None
    seconds: float = 0.0
    reason: str = ""

    def summary(self) -> str:
        """One line."""
        if self.reason:
            return f"nothing is proven over all measures: {self.reason}"
        return f"J >= {self.value:.8g} for every network, proven: {self.share:.2%} of J ({self.kind})"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        kept = ("value", "share", "kind", "seconds", "reason")
        curve = [list(point) for point in self.curve]
        return {name: getattr(self, name) for name in kept if not self.reason} | {"curve": curve, "reason": self.reason}

    def state(self) -> dict[str, Any]:
        """For a `StateFile`."""
        return dict(vars(self))

    @classmethod
    def restored(cls, state: dict[str, Any]) -> ProvenBound:
        """What `state` described."""
        return cls(**{**state, "curve": tuple((float(at), float(value)) for at, value in state["curve"])})


@dataclass
class Proof:
    """The best bound so far, and the file that keeps it."""

    problem: Problem
    network: ParticleNetwork
    seconds: float
    callback: Callable[[dict[str, Any]], None] | None
    file: StateFile | None
    state_seconds: float
    before: InitVar[ProvenBound | None]

    def __post_init__(self, before: ProvenBound | None) -> None:
        self.value = float(self.problem.value(self.network))
        self.best = ProvenBound(-math.inf) if before is None else replace(before, share=self._share(before.value))
        self.began = time.perf_counter() - self.best.seconds
        self.saved, self.cost = time.perf_counter(), 0.0

    def _share(self, value: float) -> float:
        """Of J; all of it where J is 0, as of a network of nothing."""
        return value / self.value if self.value > 0 else float(value >= 0)

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def answer(self) -> ProvenBound:
        return replace(self.best, seconds=self.elapsed())

    def keep(self, value: float, kind: str, output: Tensor) -> None:
        """Take a bound if it is the best, and say how far the proof is."""
        if value > self.best.value:
            curve = (*self.best.curve, (self.elapsed(), value))
            self.best = replace(self.best, value=value, share=self._share(value), curve=curve, kind=kind, output=output)
        if self.callback is not None:
            figures = {"seconds": self.elapsed(), "bound": self.best.value, "share": self.best.share}
            self.callback({"phase": "proof", **figures})
        self.save_in_time()

    def save_in_time(self) -> None:
        if time.perf_counter() - self.saved >= max(self.state_seconds, self.cost / SAVING):
            self.save()

    def save(self) -> None:
        if self.file is None:
            return
        began = time.perf_counter()
        self.file.save(self.state())
        self.saved = time.perf_counter()
        self.cost = self.saved - began

    def state(self) -> dict[str, Any]:
        return {"best": self.answer().state()}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` knows beside the best bound."""
