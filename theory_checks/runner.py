"""Run claims over seeds, several at a time, keeping every verdict as soon as it is there.

A verdict travels as a record, the plain values of `Verdict.to_dict`; what is printed, drawn and written comes from
records alone, whether just measured or read back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed

import meanfield
from meanfield.pages.html import to_json
from meanfield.storage import write_atomically
from theory_checks.catalogue import claim
from theory_checks.claim import Setting, Verdict, judge

FRAME = ("claim", "statistics", "rounding", "instances")
Record = dict[str, Any]
Task = tuple[str, Setting]


def run(tasks: Sequence[Task], directory: Path | None = None, jobs: int = 1, resume: bool = False) -> Iterator[Record]:
    """Records in the order in which they are finished; with `directory` each is written there, and with `resume` read
    back.

    A stored record counts only if it was made by the same code.
    """
    waiting = []
    for task in tasks:
        stored = _stored(directory, task) if resume and directory is not None else None
        if stored is None:
            waiting.append(task)
        else:
            yield stored
    finished: Any = Parallel(n_jobs=jobs, return_as="generator_unordered")(
        delayed(_measure)(task, directory) for task in waiting
    )
    for record in finished:
        record["code"] = fingerprint(record["name"])
        if directory is not None:
            write_atomically(_record_path(directory, record["name"], record["seed"], record["full"]), to_json(record))
        yield record


def _measure(task: Task, directory: Path | None) -> Record:
    torch.set_num_threads(1)
    name, setting = task
    verdict = judge(claim(name), setting)
    if directory is not None:
        _save_witnesses(verdict, directory)
    return verdict.to_dict()


def _save_witnesses(verdict: Verdict, directory: Path) -> None:
    """Controls' witnesses against convexity, to be replayed: `convexity.Witness.load(path).replay(function)`."""
    for name, evidence in verdict.controls.items():
        if evidence.witness is not None and verdict.setting.seed == 0:
            (directory / "witnesses").mkdir(parents=True, exist_ok=True)
            evidence.witness.save(directory / "witnesses" / f"{verdict.claim.name}.{_slug(name)}.safetensors")


def _slug(text: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in text).split())


def _record_path(directory: Path, name: str, seed: int, full: bool) -> Path:
    return directory / "verdicts" / f"{name}.{'full' if full else 'quick'}.{seed}.json"


def _stored(directory: Path, task: Task) -> Record | None:
    path = _record_path(directory, task[0], task[1].seed, task[1].full)
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record.get("code") == fingerprint(task[0]) and record.get("device") == task[1].device else None


@cache
def fingerprint(name: str) -> str:
    """A digest of the sources that a claim's verdict depends on: the library, the frame of measurements and the
    claim's own file.
    """
    own = Path(__file__).parent
    paths = [
        *sorted(Path(meanfield.__file__).parent.rglob("*.py")),
        *(own / f"{module}.py" for module in (*FRAME, name.split(".")[0])),
    ]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
