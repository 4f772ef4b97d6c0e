"""The claims in the order of the theory, and where to find them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from meanfield.validation import one_of
from theory_checks.claim import Claim

FAMILIES = (
    "definition",
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
    "filter_normalisation",
    "weak_duality",
    "one_layer_relation",
    "hybrids",
    "sampling",
    "transfer",
    "sphere",
    "grafts",
)


def claims(only: Sequence[str] = ()) -> list[Claim]:
    """All claims, or those whose name or family is in `only`; Misuse names what is neither."""
    every = [claim for family in FAMILIES for claim in importlib.import_module(f"theory_checks.{family}").CLAIMS]
    known = dict.fromkeys([*FAMILIES, *(claim.name for claim in every)])
    wanted = [one_of(name, "only", known) for name in only] or FAMILIES
    return [claim for claim in every if claim.name in wanted or family_of(claim.name) in wanted]


def claim(name: str) -> Claim:
    """The claim of that name, importing only its own family."""
    family = importlib.import_module(f"theory_checks.{family_of(name)}")
    return next(each for each in family.CLAIMS if each.name == name)


def family_of(name: str) -> str:
    """The file of theory_checks that a claim stands in."""
    return name.split(".")[0]
