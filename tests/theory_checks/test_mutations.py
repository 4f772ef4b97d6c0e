"""The proof that the theory checks can fail: bugs, one at a time, each of which turns a named claim red.

A bug is planted by replacing one function of the library; `test_theory_checks` shows the same claims green without it,
at the same seed.  Red means that the measurement itself refutes the claim, or that a control passes, not that something
raised.
"""

import importlib
from dataclasses import replace

import pytest
import torch

from meanfield import losses, measures
from meanfield.certificates import duality
from meanfield.convex import repopulation
from meanfield.convex.program import ConvexProgram
from meanfield.problem import Problem
from meanfield.solvers import arrangements, flow
from theory_checks.catalogue import FAMILIES, claim
from theory_checks.claim import Setting, judge

KEPT = {
    "to_program": repopulation.to_program,
    "mixture": measures.mixture,
    "split": measures.split,
    "terms": Problem.terms,
    "residual": ConvexProgram.residual,
    "tangent": flow._tangent,
}


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Claims keep trained networks; those of other tests, and those made with a bug, must not be seen."""
    forget()
    yield
    forget()


def forget():
    for family in FAMILIES:
        for member in vars(importlib.import_module(f"theory_checks.{family}")).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


def perspective_doubled(patch):
    patch.setattr("meanfield.convex.program.perspective", lambda s, p: 2 * s.square() / p)


def perspective_of_the_wrong_degree(patch):
    patch.setattr("meanfield.convex.program.perspective", lambda s, p: s.square() / p.square())


def readout_perspective_without_its_mass(patch):
    patch.setattr("meanfield.convex.program.perspective", lambda s, p: s.square())


def swapped_masses(patch):
    def swapped(network):
        return KEPT["to_program"](replace_masses(network, [p.flip(0) for p in network.masses]))

    patch.setattr(repopulation, "to_program", swapped)


def replace_masses(network, masses):
    return type(network)(network.architecture, masses, network.kernels, network.readout, network.biases)


def transposed_kernels(patch):
    def transposed(network):
        point = KEPT["to_program"](network)
        return replace(point, kernels=tuple(W.mT for W in point.kernels))

    patch.setattr(repopulation, "to_program", transposed)


def penalty_with_target_outside(patch):
    def terms(problem, network, output=None):
        kept = KEPT["terms"](problem, network, output)
        source = kept.source.new_zeros(())
        for layer in range(1, problem.architecture.depth):
            inflow = problem.penalty.norms(network.kernels[layer]) @ network.masses[layer - 1]
            source = source + network.masses[layer] @ inflow.square()
        return kept._replace(source=problem.penalty.source * source)

    patch.setattr(Problem, "terms", terms)


def realisation_with_the_wrong_sign(patch):
    def residual(program, point, layer):
        return KEPT["residual"](program, replace(point, masses=tuple(-p for p in point.masses)), layer)

    patch.setattr(ConvexProgram, "residual", residual)


def missing_mass_constraint(patch):
    """Without sum p = 1 its multiplier mu is zero."""
    patch.setattr(duality._PricedFeatures, "_masses", lambda self, scale: 0.0)


def wrong_conjugate(patch):
    """<s, y> forgotten: 1/2 |s|^2 in place of 1/2 |s|^2 + <s, y>."""
    patch.setattr(losses.SquaredLoss, "conjugate", lambda self, dual, targets: 0.5 * dual.square().sum(1))


def mass_multiplier_halved(patch):
    patch.setattr(duality, "_square_over", lambda amounts, strength: amounts.square() / (8 * strength))


def mixture_without_its_share(patch):
    """Block-diagonal kernels w in place of w_A/(1-t), w_B/t."""

    def mixed(first, second, t):
        union = KEPT["mixture"](first, second, t)
        rows = [len(p) for p in first.masses]
        kernels = [union.kernels[0]]
        for w, m in zip(union.kernels[1:], rows[1:]):
            kernels.append(torch.cat([(1 - t) * w[:m], t * w[m:]]))
        return type(union)(union.architecture, union.masses, kernels, union.readout, union.biases)

    patch.setattr(measures, "mixture", mixed)


def split_without_sharing(patch):
    def split(network, layer, particle, shares):
        cloned = KEPT["split"](network, layer, particle, shares)
        masses = list(cloned.masses)
        masses[layer] = torch.full_like(masses[layer], 1 / len(masses[layer]))
        return replace_masses(cloned, masses)

    patch.setattr(measures, "split", split)


def total_variation_weight_halved(patch):
    kept = arrangements._Layer.of

    def of(problem):
        layer = kept(problem)
        return replace(layer, price=layer.price / 2)

    patch.setattr(arrangements._Layer, "of", staticmethod(of))


def masses_uphill(patch):
    """The Fisher-Rao part of the flow with the wrong sign."""

    def tangent(network, gradients, masses):
        found = KEPT["tangent"](network, gradients, masses)
        return replace(found, masses=[None if rate is None else -rate for rate in found.masses])

    patch.setattr(flow, "_tangent", tangent)


def velocities_without_source_masses(patch):
    """dw_ij/dt = -(1/p_j) dJ/dw_ij: the source's mass forgotten."""

    def tangent(network, gradients, masses):
        found = KEPT["tangent"](network, gradients, masses)
        kernels = [found.kernels[0], *(w * p[None, :, None, None] for w, p in zip(found.kernels[1:], network.masses))]
        return replace(found, kernels=kernels)

    patch.setattr(flow, "_tangent", tangent)


BUGS = {
    perspective_doubled: "change_of_variables",
    perspective_of_the_wrong_degree: "joint_convexity.segments",
    readout_perspective_without_its_mass: "change_of_variables",
    swapped_masses: "change_of_variables",
    transposed_kernels: "change_of_variables",
    penalty_with_target_outside: "change_of_variables",
    realisation_with_the_wrong_sign: "change_of_variables",
    missing_mass_constraint: "weak_duality",
    wrong_conjugate: "zero_gap",
    mass_multiplier_halved: "weak_duality",
    mixture_without_its_share: "mixture",
    split_without_sharing: "invariances.particles",
    total_variation_weight_halved: "one_layer_relation",
    masses_uphill: "dissipation.identity",
    velocities_without_source_masses: "dissipation.identity",
}


QUICK = ("change_of_variables", "invariances.particles", "dissipation.identity")  # claims that take no second


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(bug, id=bug.__name__, marks=[] if name in QUICK else [pytest.mark.slow])
        for bug, name in BUGS.items()
    ],
)
def test_a_bug_turns_a_claim_red(bug, monkeypatch):
    bug(monkeypatch)
    verdict = judge(claim(BUGS[bug]), Setting())
    assert not verdict.error, verdict.error
    assert not verdict.passed
    assert not verdict.holds or verdict.passing_controls
