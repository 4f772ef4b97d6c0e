"""Where a solve is: a live line on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

FLOW_SHARE = 0.75  # of the time of a round
LINE_SECONDS = 30.0  # between two lines of a flow


class Progress:
    """On stderr; called with every row that a solver tells of.  rounds: at most so many; flow_steps: of the first flow;
    max_seconds: of the solve.
    """

    def __init__(self, rounds: int, flow_steps: int, max_seconds: float | None, *, live: bool, lines: bool) -> None:
        self.rounds, self.flow_steps, self.max_seconds = rounds, flow_steps, max_seconds
        self.live, self.lines = live, lines and not live
        self.began, self.said = time.perf_counter(), time.perf_counter()
        self.bar, self.task = None, None
        self.value = self.gap = self.pace = math.nan
        self.first: float | None = None  # how much had been done before: more than nothing after a resumption
        self.last: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
            )
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("start", total=self.rounds, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def say(self, text: str) -> None:
        """A stage of the report."""
        if self.bar is not None and self.task is not None:
            self.bar.update(
                self.task, description=f"report: {text}", completed=None, total=None, figures=f"J {self.value:.6g}"
            )
        elif self.lines:
            print(f"report: {text}", file=sys.stderr)

    def __call__(self, row: dict[str, Any]) -> None:
        if row["phase"] == "proof":
            self._prove(row)
        else:
            self._solve(row)

    def _solve(self, row: dict[str, Any]) -> None:
        self.value, self.gap = row.get("value", self.value), row.get("gap", self.gap)
        self._measure(row)
        where = f"round {row['round'] + 1} of at most {self.rounds}"
        if self.bar is not None and self.task is not None:
            self.bar.update(
                self.task,
                description=f"{where}, {row['phase']}",
                completed=row["round"] + self._share(row),
                figures=self._figures(row),
            )
        elif self.lines and row["phase"] == "round":
            print(f"{where}: {self._figures(row)}, {row['seconds']:.0f} s", file=sys.stderr)
        elif self.lines and time.perf_counter() - self.said > LINE_SECONDS:
            self.said = time.perf_counter()
            print(f"{where}, {row['phase']}: {self._figures(row)}", file=sys.stderr)

    def _prove(self, row: dict[str, Any]) -> None:
        text = f"J >= {row['bound']:.6g}, {row['share']:.2%} of J"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, description="proof", completed=None, total=None, figures=text)
        elif self.lines and (self.last.get("phase") != "proof" or time.perf_counter() - self.said > LINE_SECONDS):
            self.said = time.perf_counter()
            print(f"proof: {text}, {row['seconds']:.0f} s", file=sys.stderr)
        self.last = row

    def _measure(self, row: dict[str, Any]) -> None:
        """The pace of a flow, images per second, since the row before."""
        if self.first is None:
            self.first = row["round"] + self._share(row)
        before, self.last = self.last, row
        same = before.get("phase") == row["phase"] == "flow" and before["round"] == row["round"]
        if same and row["seconds"] > before["seconds"]:
            self.pace = (row["images"] - before["images"]) / (row["seconds"] - before["seconds"])

    def _share(self, row: dict[str, Any]) -> float:
        """How much of the round is done."""
        if row["phase"] == "flow":
            steps = self.flow_steps if row["round"] == 0 else max(1, self.flow_steps // 2)
            return FLOW_SHARE * min(1.0, row["step"] / steps)
        return FLOW_SHARE if row["phase"] == "program" else 1.0

    def _figures(self, row: dict[str, Any]) -> str:
        text = f"J {self.value:.6g}" + ("" if math.isnan(self.gap) else f", gap {self.gap:.1e}")
        if row["phase"] == "round":
            return text + f", flow ended {row['flow_gap']:.1e} above the dual bound"
        if row["phase"] == "flow" and not math.isnan(self.pace):
            text += f", {self.pace:,.0f} images/s"
        return text + self._left(row)

    def _left(self, row: dict[str, Any]) -> str:
        """Time left at the pace so far, to the round limit or to the time limit, whichever comes first."""
        elapsed, done = time.perf_counter() - self.began, row["round"] + self._share(row)
        here = done - (self.first or 0.0)
        if here < 0.02:
            return ""
        left = elapsed * (self.rounds - done) / here
        if self.max_seconds is not None:
            left = min(left, max(0.0, self.max_seconds - elapsed))
        return f", at most about {left:.0f} s left"
