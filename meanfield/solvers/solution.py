"""What every solver returns, and the texts for what went wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from meanfield.architecture import Architecture
from meanfield.certificates import Certificate, Multipliers, ProvenBound
from meanfield.convex.repopulation import ProgramPoint
from meanfield.network import ParticleNetwork
from meanfield.storage import states

STATUS_TEXTS = {
    "optimal": "the duality gap on this support is below the tolerance",
    "converged": "the metric speed fell below the tolerance",
    "alternation_converged": "after a flow the value is within the tolerance of the convex program's optimum",
    "search_converged": "no search found a feature that would lower the value by more than the tolerance; that is no "
    "proof",
    "max_iterations": "stopped at the iteration limit before the tolerance was met; raise the limit or loosen the "
    "tolerance",
    "max_rounds": "stopped at the round limit before the tolerance was met; raise rounds or the steps of a flow",
    "max_seconds": "stopped at the time limit before the tolerance was met; raise max_seconds",
    "stalled": "no step lowers the value any more, before the tolerance was met; try another descent or float64",
    "interrupted": "stopped by the user; the best network so far is kept",
    "out_of_memory": "memory ran out; the best network so far is kept; take fewer images, smaller ones or fewer "
    "particles",
    "inaccurate": "the solver stopped short of its tolerance; the reported gap tells how far",
    "failed": "the solver returned no point",
}

ENDED_EARLY = ("interrupted", "max_seconds", "out_of_memory")


@dataclass(frozen=True, eq=False)
class Solution:
    """A solver's answer, certified outside the solver in float64.

    value: the objective at the answer.  gap: value minus the dual value of the convex program on this support;
    infinite, with no certificate and no multipliers, where a run was stopped and left no time to prove anything, or the
    penalty has an `uncertified` term.
    lower_bound: valid for the problem over ALL measures; None until one is proven.  proven: how that of
    `solve(..., prove=seconds)` came about, None without.  status: a key of STATUS_TEXTS.
    history: one dict of figures per recorded iteration.  network, point: the answer in both forms.
    """

    value: float
    gap: float
    status: str
    message: str
    network: ParticleNetwork
    point: ProgramPoint
    lower_bound: float | None = None
    proven: ProvenBound | None = field(default=None, repr=False)
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    certificate: Certificate | None = field(default=None, repr=False)
    multipliers: Multipliers | None = field(default=None, repr=False)
    seconds: float = 0.0

    @property
    def relative_gap(self) -> float:
        """gap / |value|."""
        return self.gap / max(abs(self.value), 1e-300)

    def state(self) -> dict[str, Any]:
        """The answer, without the history that led to it, for a `StateFile`."""
        multipliers = self.multipliers
        return {
            "network": states.entries(self.network),
            "point": states.entries(self.point),
            "multipliers": None if multipliers is None else {**vars(multipliers)},
            "certificate": None if self.certificate is None else {**vars(self.certificate)},
            **{name: getattr(self, name) for name in ("value", "gap", "status", "message", "seconds")},
        }

    @classmethod
    def restored(cls, state: dict[str, Any], architecture: Architecture) -> Solution:
        """What `state` described."""
        point, multipliers, certificate = (state[name] for name in ("point", "multipliers", "certificate"))
        return cls(
            **{
                **state,
                "network": ParticleNetwork(architecture, **state["network"]),
                "point": ProgramPoint(**point),
                "multipliers": None if multipliers is None else Multipliers(**multipliers),
                "certificate": None if certificate is None else Certificate(**certificate),
            }
        )


def proven(certificate: Certificate, tolerance: float) -> bool:
    """Whether the certificate alone makes its point optimal to a relative `tolerance`: nothing else earns the status
    "optimal".  A gap as far below zero is no proof: it tells of rounding, or of constraints that the point breaks.
    """
    return abs(certificate.relative_gap) <= tolerance


UNCERTIFIED = "there was no time or memory left to certify it"


def message(status: str, detail: str = "", *, certified: bool = True, reason: str = UNCERTIFIED) -> str:
    """The text of a status, with a detail in front; without a certificate it says so, and why."""
    text = STATUS_TEXTS[status] + ("" if certified else f"; {reason}")
    return f"{detail}: {text}" if detail else text
