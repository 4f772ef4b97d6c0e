"""Contenders timed side by side: alternating blocks of steps, in CPU seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Step = Callable[[], None]


def alternating(steps: dict[str, Step], warm_up: int, repetitions: int, block: int) -> dict[str, list[float]]:
    """Name -> CPU seconds per step of each of `repetitions` blocks; every other round goes in reverse order."""
    for step in steps.values():
        cpu_seconds(step, warm_up)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions):
        for name in steps if repetition % 2 else reversed(steps):
            found[name].append(cpu_seconds(steps[name], block))
    return found


def cpu_seconds(step: Step, count: int) -> float:
    """Per step, over `count` steps."""
    began = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - began) / max(1, count)


def medians(blocks: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Name -> median of its blocks."""
    return {name: statistics.median(seconds) for name, seconds in blocks.items()}


def ratios(blocks: Mapping[str, Sequence[float]], first: str, second: str) -> list[float]:
    """Seconds of the first over those of the second, block by block."""
    return [one / other for one, other in zip(blocks[first], blocks[second])]
