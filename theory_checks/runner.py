"""Run claims over seeds, several at a time, every verdict kept as soon as it is there.

A verdict travels as a record, the plain values of `Verdict.to_dict`; what is printed, drawn and written comes from
records alone, whether just measured or read back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meanfield.bench import sweep
from meanfield.bench.sweep import Cell
from theory_checks import catalogue
from theory_checks.claim import Setting, Verdict, judge

FRAME = ("runner", "claim", "statistics", "rounding", "instances", "lines")  # what every verdict depends on
Record = dict[str, Any]


def cells(names: Sequence[str], seeds: Sequence[int], full: bool, device: str) -> list[Cell]:
    """One for every claim and seed, seeds running fastest."""
    return sweep.product_of({"full": full, "device": device}, claim=names, seed=seeds)


def run(
    cells: Sequence[Cell],
    directory: Path | None = None,
    jobs: int = 1,
    announce: Callable[[Cell, bool], None] = lambda cell, kept: None,
) -> list[Record]:
    """Records in the order of the cells, kept in `directory`/cells, witnesses beside them.

    A kept record counts as long as the library, the frame of measurements and the claim's own file stay.  An error is
    not kept: what was out of memory today may not be tomorrow.
    """
    return sweep.run(
        measure,
        cells,
        None if directory is None else directory / "cells",
        jobs=jobs,
        announce=announce,
        places={} if directory is None else {"witnesses": str(directory / "witnesses")},
        sources=sources,
        lasting=lambda records: not any(record["error"] for record in records),
    )


def measure(cell: Cell, witnesses: str | None = None) -> list[Record]:
    """The record of one claim at one seed; its controls' witnesses are saved in the directory `witnesses`."""
    verdict = judge(catalogue.claim(cell["claim"]), Setting(cell["seed"], cell["full"], cell["device"]))
    if witnesses is not None:
        save_witnesses(verdict, Path(witnesses))
    return [verdict.to_dict()]


def sources(cell: Cell) -> list[Path]:
    """The files of theory_checks that a cell's record depends on."""
    return [Path(__file__).with_name(f"{module}.py") for module in (*FRAME, catalogue.family_of(cell["claim"]))]


def save_witnesses(verdict: Verdict, directory: Path) -> None:
    """Controls' witnesses against convexity, to be replayed: `convexity.Witness.load(path).replay(function)`."""
    for name, evidence in verdict.controls.items():
        if evidence.witness is not None and verdict.setting.seed == 0:
            directory.mkdir(parents=True, exist_ok=True)
            evidence.witness.save(directory / f"{verdict.claim.name}.{_slug(name)}.safetensors")


def _slug(text: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in text).split())
