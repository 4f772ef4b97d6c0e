"""The proof that the theory checks can fail: bugs, one at a time, each of which turns a named claim red.

A bug is planted by replacing one function of the library.  Every claim is measured on the first few of its quick
instances, enough for the bugs that it is to see; `test_theory_checks` shows the same claims green without a bug on all
of them, at the same seed.  Red means that the measurement itself refutes the claim, or that a control passes, not that
something raised, and not that nothing could be said.
"""

import importlib
import math
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from meanfield import losses, measures
from meanfield.architecture import Architecture, Conv
from meanfield.certificates import compositions, duality
from meanfield.certificates.sphere.pairs import Pairs
from meanfield.convex import repopulation
from meanfield.convex.program import ConvexProgram
from meanfield.finite import kernel
from meanfield.finite import network as finite_network
from meanfield.fusion import Ensemble
from meanfield.grafting import least_squares
from meanfield.landscape import directions
from meanfield.network import ParticleNetwork
from meanfield.outer import Outer
from meanfield.penalties import Penalty
from meanfield.problem import Problem
from meanfield.solvers import arrangements, splitting, velocities
from meanfield.transfer import prediction
from theory_checks.catalogue import FAMILIES, claim
from theory_checks.claim import Setting

KEPT = {
    "to_program": repopulation.to_program,
    "mixture": measures.mixture,
    "split": measures.split,
    "terms": Problem.terms,
    "image_residuals": ConvexProgram.image_residuals,
    "tangent": velocities._tangent,
    "activate": Conv.activate,
    "merge": measures.merge,
    "balance": measures.balance,
    "squared_distance": velocities.squared_distance,
    "source_prox": velocities._source_prox,
    "draw": finite_network._draw,
    "composed_costs": compositions.Compositions.costs,
    "own_costs": compositions.OwnFeatures.costs,
    "least_kappa": duality._PricedFeatures._least_kappa,
    "price_layer": duality._price_layer,
    "above_pairs": Pairs.above,
    "row_prox": splitting.row_prox,
    "pair_kernel": kernel._pair_kernel,
    "linear": finite_network._linear,
    "softmax_conjugate": losses.SoftmaxLoss.conjugate,
    "logistic_conjugate": losses.LogisticLoss.conjugate,
    "constant": prediction.constant,
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
    patch.setattr(Outer, "perspective", lambda outer, s, p: 2 * s.square() / p)


def perspective_of_the_wrong_degree(patch):
    patch.setattr(Outer, "perspective", lambda outer, s, p: s.square() / p.square())


def readout_perspective_without_its_mass(patch):
    patch.setattr(Outer, "perspective", lambda outer, s, p: s.square())


def swapped_masses(patch):
    def swapped(network):
        return KEPT["to_program"](replace_masses(network, [p.flip(0) for p in network.masses]))

    patch.setattr(repopulation, "to_program", swapped)


def replace_masses(network, masses):
    return type(network)(network.architecture, masses, network.kernels, network.readout, network.biases)


def kernels_turned(patch):
    def turned(network):
        point = KEPT["to_program"](network)
        return replace(point, kernels=tuple(W.flip((2, 3)) for W in point.kernels))

    patch.setattr(repopulation, "to_program", turned)


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
    def residuals(program, point, inputs):
        return KEPT["image_residuals"](program, replace(point, masses=tuple(-p for p in point.masses)), inputs)

    patch.setattr(ConvexProgram, "image_residuals", residuals)


def missing_mass_constraint(patch):
    """Without sum p = 1 its multiplier mu is zero."""
    patch.setattr(duality._PricedFeatures, "_masses", lambda self, scale: 0.0)


def wrong_conjugate(patch):
    """<s, y> forgotten: 1/2 |s|^2 in place of 1/2 |s|^2 + <s, y>."""
    patch.setattr(losses.SquaredLoss, "conjugate", lambda self, dual, targets: 0.5 * dual.square().sum(1))


def mass_multiplier_halved(patch):
    patch.setattr(Outer, "conjugate", lambda outer, pulls, strength: pulls.square() / (8 * strength))


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


def modules_mixed_the_wrong_way_round(patch):
    kept = Ensemble.forward
    patch.setattr(Ensemble, "forward", lambda self, inputs: kept(_turned(self), inputs))


def _turned(ensemble):
    return Ensemble(ensemble.members, ensemble.shares[::-1])


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

    patch.setattr(velocities, "_tangent", tangent)


def velocities_without_source_masses(patch):
    """dw_ij/dt = -(1/p_j) dJ/dw_ij: the source's mass forgotten."""

    def tangent(network, gradients, masses):
        found = KEPT["tangent"](network, gradients, masses)
        kernels = [found.kernels[0], *(w * p[None, :, None, None] for w, p in zip(found.kernels[1:], network.masses))]
        return replace(found, kernels=kernels)

    patch.setattr(velocities, "_tangent", tangent)


# --- missed by an earlier version of the claims ---------------------------------------------------------------------


def average_pooling_as_max(patch):
    def activate(layer, preactivations):
        pooling = "max" if layer.pooling == "average" else layer.pooling
        return KEPT["activate"](replace(layer, pooling=pooling), preactivations)

    patch.setattr(Conv, "activate", activate)


def merging_with_uniform_shares(patch):
    def merge(network, layer, particles):
        masses = [p.clone() for p in network.masses]
        masses[layer][particles] = masses[layer][particles].mean()
        return KEPT["merge"](replace_masses(network, masses), layer, particles)

    patch.setattr(measures, "merge", merge)


def mass_term_of_the_distance_without_one_over_p(patch):
    def squared_distance(start, end):
        changes = [(b - a).square() for a, b in zip(start.masses, end.masses)]
        mass_term = sum((change / p).sum() for change, p in zip(changes, start.masses))
        return KEPT["squared_distance"](start, end) - mass_term + sum(change.sum() for change in changes)

    patch.setattr(velocities, "squared_distance", squared_distance)


def masses_of_a_sample_rolled_by_one(patch):
    patch.setattr(
        finite_network, "_draw", lambda masses, count, generator: KEPT["draw"](masses.roll(1), count, generator)
    )


def dearer(problem):
    """A source strength of 9/4: 3 (lambda (mu + gamma))^(1/2) for 2 (...)^(1/2)."""
    penalty = replace(problem.penalty, source=2.25 * problem.penalty.source)
    return Problem(problem.architecture, problem.inputs, problem.targets, problem.loss.name, penalty)


def factor_three_in_the_price_of_compositions(patch):
    costs = lambda self, problem, mu: KEPT["composed_costs"](self, dearer(problem), mu)  # noqa: E731
    patch.setattr(compositions.Compositions, "costs", costs)


def factor_three_in_the_price_of_own_features(patch):
    costs = lambda self, problem, mu: KEPT["own_costs"](self, dearer(problem), mu)  # noqa: E731
    patch.setattr(compositions.OwnFeatures, "costs", costs)


def kappa_with_its_sign_flipped(patch):
    """<beta, g> + B kappa for <beta, g> - B kappa."""
    patch.setattr(duality._PricedFeatures, "_least_kappa", lambda *given: -KEPT["least_kappa"](*given))


def multipliers_of_a_free_bias_not_centred(patch):
    patch.setattr(duality, "_orthogonal", lambda rows, direction: rows)


def flattened_readout_not_divided(patch):
    def readout_features(architecture, features):
        flat = features.flatten(2)
        return flat.mean(2) if architecture.readout == "average" else flat

    patch.setattr(Architecture, "readout_features", readout_features)


def slack_of_the_sphere_halved(patch):
    def above(*given):
        found = KEPT["above_pairs"](*given)
        return replace(found, slack=found.slack / 2)

    patch.setattr(Pairs, "above", above)


# --- more, over all modules of the mathematics ----------------------------------------------------------------------


def pairings_of_neighbours(patch):
    """<beta_j, g_j> of another feature."""

    def price(*given):
        norms, pairing = KEPT["price_layer"](*given)
        return norms, pairing.roll(1)

    patch.setattr(duality, "_price_layer", price)


def entropy_in_bits(patch):
    conjugate = lambda *given: KEPT["logistic_conjugate"](*given) / math.log(2)  # noqa: E731
    patch.setattr(losses.LogisticLoss, "conjugate", conjugate)


def softmax_entropy_twice(patch):
    patch.setattr(losses.SoftmaxLoss, "conjugate", lambda *given: 2 * KEPT["softmax_conjugate"](*given))


def dual_of_the_l1_norm_as_a_mean(patch):
    dual = lambda self, kernels: self.atoms(kernels).mean(2)  # noqa: E731
    patch.setattr(Penalty, "dual_norms", dual)


def bound_on_biases_forgotten(patch):
    """<beta, g> without - B |sum beta|."""

    def price(frozen, layer, pulls):
        norms, pairing = KEPT["price_layer"](frozen, layer, pulls)
        bound, bias = frozen.problem.penalty.amplitude_bound, frozen.problem.architecture.layers[layer].bias
        right = frozen.bases[layer - 1]
        return norms, pairing + (bound * (pulls @ right @ right[-1]).abs() if bias and bound is not None else 0.0)

    patch.setattr(duality, "_price_layer", price)


def input_price_forgotten(patch):
    """gamma_1 = 0 in the search."""

    def costs(self, problem, mu):
        penalty = replace(problem.penalty, input=0.0)
        free = Problem(problem.architecture, problem.inputs, problem.targets, problem.loss.name, penalty)
        return KEPT["composed_costs"](self, free, mu)

    patch.setattr(compositions.Compositions, "costs", costs)


def row_prox_with_half_its_strength(patch):
    def prox(kernels, masses, penalty, strength, *more):
        return KEPT["row_prox"](kernels, masses, penalty, strength / 2, *more)

    patch.setattr(splitting, "row_prox", prox)


def cone_projection_that_keeps_the_masses(patch):
    def project(kernels, masses, penalty, bound, *weights):
        amounts = penalty.norms(kernels).sum(1)
        factor = torch.where(amounts > bound * masses, bound * masses / amounts, 1.0).clamp_min(0)
        return kernels * factor[:, None, None, None], masses

    patch.setattr(splitting, "cone_projection", project)


def prox_of_the_squared_loss_with_twice_its_weight(patch):
    prox = lambda self, center, targets, weight: (targets + 2 * weight * center) / (1 + 2 * weight)  # noqa: E731
    patch.setattr(losses.SquaredLoss, "prox", prox)


def bound_projected_without_the_masses(patch):
    """Kernels alone; masses as they came."""

    def project(kernels, logits, targets, penalty, bound, kernel_steps, mass_steps):
        masses = torch.softmax(logits, 0)
        level = torch.full_like(targets[:, None, None], bound)
        theta = velocities.shrinkage_root(penalty.atoms(kernels), 1.0, masses[None, :, None], (1, 2), level=level)
        return penalty.shrink(kernels, theta), masses, theta.flatten()

    patch.setattr(velocities, "inflow_projection", project)


def source_pull_with_equal_masses(patch):
    def prox(problem, kernels, target, steps):
        return KEPT["source_prox"](problem, kernels, torch.full_like(target, 1 / len(target)), steps)

    patch.setattr(velocities, "_source_prox", prox)


def bias_velocity_times_its_mass(patch):
    def tangent(network, gradients, masses):
        found = KEPT["tangent"](network, gradients, masses)
        slow = [None if b is None else b * p for b, p in zip(found.biases, network.masses)]
        return replace(found, biases=slow)

    patch.setattr(velocities, "_tangent", tangent)


def input_penalty_without_masses(patch):
    def terms(problem, network, output=None):
        kept = KEPT["terms"](problem, network, output)
        sizes = network.kernels[0].flatten(1).square().sum(1)
        sizes = sizes if network.biases[0] is None else sizes + network.biases[0].square()
        return kept._replace(input=problem.penalty.input * sizes.mean())

    patch.setattr(Problem, "terms", terms)


def bias_left_out_where_masses_are_read(patch):
    """The bias of a later layer averaged over sources: b times the sum of squares of the masses below."""
    kept = ParticleNetwork.responses

    def responses(network, inputs):
        masses = [None, *network.masses[:-1]]
        biases = [b if b is None or p is None else b * p.square().sum() for b, p in zip(network.biases, masses)]
        moved = ParticleNetwork.unchecked(
            network.architecture, network.masses, network.kernels, network.readout, biases
        )
        return kept(moved, inputs)

    patch.setattr(ParticleNetwork, "responses", responses)


def modules_read_out_twice_as_much(patch):
    patch.setattr(finite_network, "_linear", lambda weight: KEPT["linear"](2 * weight))


def balance_the_wrong_way_round(patch):
    patch.setattr(measures, "balance", lambda network, first, second: KEPT["balance"](network, second, first))


def tangent_kernel_without_the_positions(patch):
    """E u^2 = 1 for the flattened readout as well."""

    def pairs(architecture, left, right):
        return KEPT["pair_kernel"](replace(architecture, readout="average"), left, right)

    patch.setattr(kernel, "_pair_kernel", pairs)


def ridge_not_times_the_samples(patch):
    for kind in (least_squares.Triangle, least_squares.Products):
        kept = kind.solve

        def solve(self, ridge, precision, *, offset, kept=kept):
            return kept(self, ridge / self.samples, precision, offset=offset)

        patch.setattr(kind, "solve", solve)


def restoration_without_the_layer_step(patch):
    """Masses are clipped and normalised, kernels stay."""
    patch.setattr(ConvexProgram, "_restore_layer", lambda program, point, layer: point)


def restoration_that_stays_outside_the_bounds(patch):
    patch.setattr("meanfield.convex.program.into_bounds", lambda rows, *more: rows)


def filters_of_the_readout_left_as_drawn(patch):
    kept = directions._normalised

    def normalised(direction, weight, normalise, axis):
        return direction if weight.ndim == 2 else kept(direction, weight, normalise, axis)

    patch.setattr(directions, "_normalised", normalised)


# bug -> (claim, instances: None for all that the claim has at quick effort)
def start_that_smooths_nothing(patch):
    """The prediction of the displacement alone."""
    patch.setattr(prediction, "constant", lambda subject, law: KEPT["constant"](subject, law.scaled(0)))


BUGS = {
    perspective_doubled: ("change_of_variables", 3),
    perspective_of_the_wrong_degree: ("joint_convexity.segments", 3),
    readout_perspective_without_its_mass: ("change_of_variables", 3),
    swapped_masses: ("change_of_variables", 3),
    kernels_turned: ("change_of_variables", 3),
    penalty_with_target_outside: ("definition", 3),
    realisation_with_the_wrong_sign: ("change_of_variables", 3),
    missing_mass_constraint: ("weak_duality", 3),
    wrong_conjugate: ("zero_gap.programs", 3),
    mass_multiplier_halved: ("weak_duality", 3),
    mixture_without_its_share: ("mixture", None),
    modules_mixed_the_wrong_way_round: ("mixture.loss", None),
    split_without_sharing: ("invariances.particles", 3),
    total_variation_weight_halved: ("one_layer_relation", None),
    masses_uphill: ("dissipation.identity", 3),
    velocities_without_source_masses: ("dissipation.identity", 3),
    average_pooling_as_max: ("definition", 6),
    merging_with_uniform_shares: ("invariances.particles", 3),
    mass_term_of_the_distance_without_one_over_p: ("dissipation.identity", 3),
    masses_of_a_sample_rolled_by_one: ("sampling", 3),
    factor_three_in_the_price_of_compositions: ("weak_duality.all_measures", 3),
    factor_three_in_the_price_of_own_features: ("weak_duality.all_measures", 3),
    kappa_with_its_sign_flipped: ("weak_duality.section5", 9),
    multipliers_of_a_free_bias_not_centred: ("weak_duality.section5", 9),
    flattened_readout_not_divided: ("definition", 6),
    slack_of_the_sphere_halved: ("sphere", 3),
    pairings_of_neighbours: ("weak_duality.section5", 3),
    entropy_in_bits: ("weak_duality", 6),
    softmax_entropy_twice: ("weak_duality", 6),
    dual_of_the_l1_norm_as_a_mean: ("weak_duality", 6),
    bound_on_biases_forgotten: ("weak_duality.section5", 6),
    input_price_forgotten: ("weak_duality.all_measures", 3),
    row_prox_with_half_its_strength: ("zero_gap.programs", 3),
    cone_projection_that_keeps_the_masses: ("zero_gap.programs", 3),
    prox_of_the_squared_loss_with_twice_its_weight: ("zero_gap.programs", 6),
    bound_projected_without_the_masses: ("dissipation.bounded", None),
    source_pull_with_equal_masses: ("dissipation.identity", 3),
    bias_velocity_times_its_mass: ("dissipation.identity", 6),
    input_penalty_without_masses: ("definition", 3),
    bias_left_out_where_masses_are_read: ("definition", 6),
    modules_read_out_twice_as_much: ("definition", 3),
    balance_the_wrong_way_round: ("invariances.scale", 3),
    tangent_kernel_without_the_positions: ("sampling.tangent_kernel", 2),
    ridge_not_times_the_samples: ("grafts", 4),
    filters_of_the_readout_left_as_drawn: ("filter_normalisation", 3),
    start_that_smooths_nothing: ("transfer", None),
    restoration_without_the_layer_step: ("zero_gap.restoration", 3),
    restoration_that_stays_outside_the_bounds: ("zero_gap.restoration", 6),
}

# claims that take no second on these instances
QUICK = {"change_of_variables", "definition", "dissipation.identity", "grafts", "invariances.particles"}
QUICK |= {"filter_normalisation", "invariances.scale", "zero_gap.restoration"}


@dataclass(frozen=True)
class Few(Setting):
    """The quick effort, on the first `most` instances; None takes all."""

    most: int | None = None

    def instances(self, quick, full):
        return quick if self.most is None else min(quick, self.most)


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(bug, id=bug.__name__, marks=[] if name in QUICK else [pytest.mark.slow])
        for bug, (name, _) in BUGS.items()
    ],
)
def test_a_bug_turns_a_claim_red(bug, monkeypatch):
    """Red is what the same instances, without the bug, are not: a refuted claim, or a control that passes."""
    refuted, passed, text = judged(*BUGS[bug])
    assert not refuted, text
    bug(monkeypatch)
    refuted_now, passed_now, text = judged(*BUGS[bug])
    assert refuted_now or passed_now - passed, text


def judged(name, most):
    """Whether a claim is refuted on its first instances, which of its controls pass, and the evidence."""
    for module in [each for name, each in sys.modules.items() if name.startswith("theory_checks.")]:
        for found in vars(module).values():
            if hasattr(found, "cache_clear"):  # measured with a bug, or without
                found.cache_clear()
    measured, setting = claim(name), Few(most=most)
    evidence = measured.measure(setting)
    passed = {name for name, control in measured.controls.items() if measured.supported(control(setting).statistic)}
    return measured.refuted(evidence.statistic), passed, evidence.text
