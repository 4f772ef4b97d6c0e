"""The claims in the order of the theory, and where to find them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from theory_checks.claim import Claim

FAMILIES = (
    "change_of_variables",
    "joint_convexity",
    "degeneracy",
    "weight_nonconvexity",
    "stationary_points",
    "zero_gap",
    "attainment",
    "dissipation",
    "mixture",
    "invariances",
    "weak_duality",
    "one_layer_relation",
    "hybrids",
)


def claims(only: Sequence[str] = ()) -> list[Claim]:
    """All claims, or those whose name or family is in `only`."""
    every = [claim for family in FAMILIES for claim in importlib.import_module(f"theory_checks.{family}").CLAIMS]
    if not only:
        return every
    unknown = [name for name in only if not any(_matches(claim, name) for claim in every)]
    if unknown:
        raise ValueError(
            f"--only {', '.join(unknown)}: no such claim; there are {', '.join(claim.name for claim in every)}"
        )
    return [claim for claim in every if any(_matches(claim, name) for name in only)]


def _matches(claim: Claim, name: str) -> bool:
    return claim.name == name or claim.name.split(".")[0] == name


def claim(name: str) -> Claim:
    """The claim of that name, importing only its own family."""
    family = importlib.import_module(f"theory_checks.{name.split('.')[0]}")
    return next(each for each in family.CLAIMS if each.name == name)
