"""Continuous-limit convolutional networks: particle measures, their convex program, certified optima."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meanfield import (
        activations,
        certificates,
        data,
        finite,
        forgetting,
        fusion,
        grafting,
        landscape,
        limits,
        losses,
        measures,
        solvers,
        starts,
        studies,
        transfer,
    )
    from meanfield.activations import Activation
    from meanfield.architecture import Architecture, Conv
    from meanfield.auditing import Audit, audit
    from meanfield.convex.program import ConvexProgram
    from meanfield.convex.repopulation import ProgramPoint
    from meanfield.network import ParticleNetwork
    from meanfield.penalties import Penalty
    from meanfield.problem import Problem
    from meanfield.solvers.main_job import solve
    from meanfield.solvers.solution import Solution
    from meanfield.storage import load_network, save_network

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Architecture",
    "Audit",
    "Conv",
    "ConvexProgram",
    "ParticleNetwork",
    "Penalty",
    "Problem",
    "ProgramPoint",
    "Solution",
    "activations",
    "audit",
    "certificates",
    "data",
    "finite",
    "forgetting",
    "fusion",
    "grafting",
    "landscape",
    "limits",
    "load_network",
    "losses",
    "measures",
    "save_network",
    "solve",
    "solvers",
    "starts",
    "studies",
    "transfer",
]

# Names are imported when they are first asked for (PEP 562): torch takes a second, and `meanfield --help` needs none
# of it.
_HOMES = {
    "Activation": "activations",
    "Architecture": "architecture",
    "Audit": "auditing",
    "Conv": "architecture",
    "ConvexProgram": "convex.program",
    "ParticleNetwork": "network",
    "Penalty": "penalties",
    "Problem": "problem",
    "ProgramPoint": "convex.repopulation",
    "Solution": "solvers.solution",
    "audit": "auditing",
    "load_network": "storage",
    "save_network": "storage",
    "solve": "solvers.main_job",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _HOMES:
        return importlib.import_module(f"{__name__}.{name}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
