"""Solvers: each takes a network or a program and returns a Solution.

flow (network -> network), splitting (our convex solver), reference (cvxpy), alternating (the outer loop),
arrangements (one ReLU layer: the exact optimum over all measures, by cvxpy).
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from meanfield.solvers import alternating, flow, splitting

if TYPE_CHECKING:
    from meanfield.solvers import arrangements, reference

__all__ = ["alternating", "arrangements", "flow", "reference", "splitting"]


def __getattr__(name: str) -> ModuleType:
    if name in ("arrangements", "reference"):  # cvxpy takes most of a second to import: only when it is asked for
        return importlib.import_module(f"meanfield.solvers.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
