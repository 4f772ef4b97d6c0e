"""Figures and lists in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float) -> str:
    """Eight digits."""
    return f"{value:.8g}"


def two(number: float) -> str:
    """Two digits, zeros as well."""
    return f"{number:#.2g}".rstrip(".") if number < 100 else f"{number:.0f}"


def scientific(value: float | None) -> str:
    return "unknown" if value is None or not math.isfinite(value) else "0" if value == 0 else f"{value:.2e}"


def finite(number: float) -> str:
    return f"{number:.2f}" if math.isfinite(number) else "undefined"


def by(widths: Sequence[int]) -> str:
    return " × ".join(map(str, widths))


def listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def percent_more(excess: float) -> str:
    return f"{abs(excess):.1%} {'more' if excess > 0 else 'less'}"
