"""Every claim of the theory measured, each with controls that must come out the other way: `python
-m theory_checks`.  `run` measures a claim of one's own in the same frame.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from theory_checks.claim import Axes, Claim, Evidence, Series, Setting, Verdict, ranked
    from theory_checks.own import run

__all__ = ["Axes", "Claim", "Evidence", "Series", "Setting", "Verdict", "ranked", "run"]


def __getattr__(name: str) -> Any:  # late, as in meanfield: `python -m theory_checks --help` needs no torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{'own' if name == 'run' else 'claim'}"), name)
    globals()[name] = found
    return found
