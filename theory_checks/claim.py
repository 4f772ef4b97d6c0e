"""A claim of the theory, the measurement that would refute it, and the controls that have to come out the other way."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from meanfield.studies.convexity import Witness


@dataclass(frozen=True)
class Setting:
    """What the runner hands to a measurement: the seed, the effort and the device."""

    seed: int = 0
    full: bool = False
    device: str = "cpu"

    def either(self, quick: int, full: int) -> int:
        """A size of the measurement at this effort."""
        return full if self.full else quick

    def instances(self, quick: int, full: int) -> int:
        """How many instances, numbered from 0, are measured at this effort."""
        return self.either(quick, full)

    def generator(self, *place: int) -> torch.Generator:
        """A generator of its own for every place (instance, width, ...), on the CPU: the same draws on every device."""
        return torch.Generator().manual_seed(self.derived_seed(*place))

    def derived_seed(self, *place: int) -> int:
        """An int of 32 bits that this seed and the place determine, for what takes no generator."""
        return int(np.random.SeedSequence([self.seed, *place]).generate_state(1)[0])


@dataclass(frozen=True)
class Series:
    """What a figure shows of a measurement: y over x, as a "line", "dashed" line, "points" or "hollow" points."""

    name: str
    x: list[float]
    y: list[float]
    style: str = "line"


def ranked(name: str, values: Sequence[float]) -> Series:
    """Points: the values by size, over their places."""
    return Series(name, [float(place) for place in range(len(values))], sorted(values), "points")


@dataclass(frozen=True)
class Axes:
    """Labels and scales of a claim's figure; `log` names the logarithmic axes: "", "x", "y" or "xy"; `level` is drawn
    dotted.
    """

    x: str
    y: str
    log: str = ""
    level: float | None = None
    level_name: str = "threshold"


@dataclass(frozen=True, eq=False)
class Evidence:
    """The outcome of one measurement: its statistic, what it says in words, how many instances were looked at.

    beyond: how many of them lie on the other side of the claim's threshold, where the statistic is their worst.
    witness: a replayable pair of points, where there is one.
    """

    statistic: float
    text: str
    instances: int = 1
    beyond: int | None = None
    series: tuple[Series, ...] = ()
    witness: Witness | None = None


@dataclass(frozen=True, eq=False)
class Claim:
    """A statement with the measurement that could refute it and controls in which an assumption of it is dropped.

    The claim holds where statistic <= threshold (>= with at_least).  A control takes the same measurement without an
    assumption and is rejected where its statistic is on the other side.  derivation says where the threshold comes
    from; limits says what the claim does not prove.
    """

    name: str
    statement: str
    source: str
    statistic: str
    threshold: float
    derivation: str
    limits: str
    measure: Callable[[Setting], Evidence]
    controls: Mapping[str, Callable[[Setting], Evidence]]
    axes: Axes
    at_least: bool = False

    def supported(self, statistic: float) -> bool:
        """NaN supports nothing."""
        return statistic >= self.threshold if self.at_least else statistic <= self.threshold

    def refuted(self, statistic: float) -> bool:
        """NaN refutes nothing."""
        return statistic < self.threshold if self.at_least else statistic > self.threshold


@dataclass(frozen=True, eq=False)
class Verdict:
    """What became of a claim at one seed; `error` holds the traceback of a measurement that failed."""

    claim: Claim
    setting: Setting
    evidence: Evidence | None
    controls: dict[str, Evidence] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def statistic(self) -> float:
        """That of the evidence, nan where the measurement failed."""
        return self.evidence.statistic if self.evidence is not None else float("nan")

    @property
    def threshold(self) -> float:
        """That of the claim."""
        return self.claim.threshold

    @property
    def holds(self) -> bool:
        """Whether the evidence is on the claim's side of the threshold, whatever its controls are."""
        return self.evidence is not None and self.claim.supported(self.evidence.statistic)

    @property
    def control_statistic(self) -> float:
        """That of the control which comes closest to passing."""
        found = [each.statistic for each in self.controls.values()]
        if not found or any(np.isnan(found)):
            return float("nan")
        return max(found) if self.claim.at_least else min(found)

    @property
    def passing_controls(self) -> list[str]:
        """The controls that are not rejected: each makes the check worthless."""
        return [name for name, each in self.controls.items() if not self.claim.refuted(each.statistic)]

    @property
    def control_rejected(self) -> bool:
        """Whether there are controls and every one is on the other side."""
        return bool(self.controls) and not self.passing_controls

    @property
    def passed(self) -> bool:
        """Whether the claim holds, every control is rejected, and nothing was raised."""
        return not self.error and self.holds and self.control_rejected

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, numbers that are not finite as text."""
        claim, setting = self.claim, self.setting
        return {
            "name": claim.name,
            "statement": claim.statement,
            "source": claim.source,
            "measured": claim.statistic,
            "threshold": claim.threshold,
            "at_least": claim.at_least,
            "derivation": claim.derivation,
            "limits": claim.limits,
            "seed": setting.seed,
            "full": setting.full,
            "device": setting.device,
            "statistic": _number(self.statistic),
            "holds": self.holds,
            "control_statistic": _number(self.control_statistic),
            "control_rejected": self.control_rejected,
            "passing_controls": self.passing_controls,
            "passed": self.passed,
            "seconds": self.seconds,
            "error": self.error,
            "evidence": _plain(self.evidence),
            "controls": {name: _plain(each) for name, each in self.controls.items()},
        }


def _number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))


def _plain(evidence: Evidence | None) -> dict[str, Any] | None:
    if evidence is None:
        return None
    series = [
        {"name": s.name, "x": list(map(_number, s.x)), "y": list(map(_number, s.y)), "style": s.style}
        for s in evidence.series
    ]
    return {
        "statistic": _number(evidence.statistic),
        "text": evidence.text,
        "instances": evidence.instances,
        "beyond": evidence.beyond,
        "series": series,
    }


def judge(claim: Claim, setting: Setting) -> Verdict:
    """Measure a claim and its controls; a measurement that raises is a failed check, not the end of the run."""
    began = time.perf_counter()
    evidence, controls, error = None, {}, ""
    try:
        evidence = claim.measure(setting)
        for name, control in claim.controls.items():
            controls[name] = control(setting)
    except Exception:
        error = traceback.format_exc(limit=-4)
    return Verdict(claim, setting, evidence, controls, time.perf_counter() - began, error)
