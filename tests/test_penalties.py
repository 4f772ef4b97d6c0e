import math
from dataclasses import FrozenInstanceError

import cvxpy as cp
import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from strategies import NORMS, normal, random_masses, seeded, seeds

from meanfield import Penalty
from meanfield.penalties import (
    cone_projection,
    inflow_projection,
    input_norms,
    input_projection,
    kernel_projection,
    row_prox,
    shrinkage_root,
)

norms = st.sampled_from(NORMS)
strengths = st.sampled_from([1e-3, 0.3, 10.0])
metrics = st.sampled_from([0.2, 1.0, 5.0])
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))


@st.composite
def centers(draw, mass_axis):
    """Kernels, some of them zero, and masses, some of them negative."""
    shape, seed = draw(shapes), draw(seeds)
    kernels = normal(shape, seed) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    dead = torch.rand(shape[:2], generator=seeded(seed)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return torch.where(dead[:, :, None, None], 0.0, kernels), normal((shape[mass_axis],), seed + 1)


@given(shapes, seeds, norms)
def test_norms_are_sums_over_entries_or_euclidean(shape, seed, norm):
    kernels, penalty = normal(shape, seed), Penalty(kernel_norm=norm)
    expected = [[slow.kernel_norm(w, penalty) for w in row] for row in kernels.numpy()]
    np.testing.assert_allclose(penalty.norms(kernels), expected, rtol=1e-14)


@given(shapes, seeds, norms)
def test_dual_norm_is_the_largest_pairing_with_the_unit_ball(shape, seed, norm):
    kernels, penalty = normal(shape, seed), Penalty(kernel_norm=norm)
    flat = kernels.flatten(2)
    hot = torch.nn.functional.one_hot(flat.abs().argmax(2), flat.shape[2]) * flat.sign()
    best = hot if norm == "l1" else flat / flat.norm(dim=2, keepdim=True)
    torch.testing.assert_close(penalty.norms(best.reshape(shape)), torch.ones(shape[:2], dtype=flat.dtype))
    torch.testing.assert_close(penalty.dual_norms(kernels), (best * flat).sum(2))
    other = normal(shape, seed + 1)
    pairing = (other * kernels).sum((2, 3)).abs()
    assert bool((pairing <= penalty.norms(other) * penalty.dual_norms(kernels) * (1 + 1e-14)).all())


@given(shapes, seeds, norms, st.floats(0, 3))
def test_shrink_is_the_proximal_map_of_the_norm(shape, seed, norm, threshold):
    kernels, penalty = normal(shape, seed), Penalty(kernel_norm=norm)
    shrunk = penalty.shrink(kernels, threshold)
    removed = kernels - shrunk
    rounding = 4e-16 * penalty.dual_norms(kernels)
    assert bool((penalty.dual_norms(removed) <= threshold * (1 + 1e-12) + rounding).all())
    torch.testing.assert_close(
        (removed * shrunk).sum((2, 3)), threshold * penalty.norms(shrunk), rtol=1e-12, atol=1e-12
    )


def test_shrink_of_zero_kernels_is_zero():
    for norm in NORMS:
        assert (
            Penalty(kernel_norm=norm).shrink(torch.zeros(1, 1, 2, 2), 0.0).tolist() == torch.zeros(1, 1, 2, 2).tolist()
        )


@given(shapes, seeds)
def test_input_norms_join_kernel_and_bias(shape, seed):
    kernels, bias = normal(shape, seed), normal(shape[:1], seed + 1)
    plain = [math.sqrt((w**2).sum()) for w in kernels.numpy()]
    joined = [math.sqrt((w**2).sum() + b**2) for w, b in zip(kernels.numpy(), bias.numpy())]
    np.testing.assert_allclose(input_norms(kernels, None), plain, rtol=1e-14)
    np.testing.assert_allclose(input_norms(kernels, bias), joined, rtol=1e-14)


def root_sides(r, magnitudes, slopes, weights, level, mass, curvature, power=2.0):
    left = sum(w * max(m - s * r ** (power - 1), 0) for m, s, w in zip(magnitudes, slopes, weights))
    return left, level + r * max(mass + curvature * r**power, 0)


@settings(max_examples=100)
@given(
    seeds,
    st.integers(1, 5),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.sampled_from([0.0, 0.1, 3.0]),
    st.sampled_from([None, 0.0, 0.3, 100.0]),
    st.sampled_from([2.0, 1.1, 1.5, 3.0]),
)
def test_root_balances_both_sides(seed, count, level, mass, curvature, start, power):
    mass = abs(mass) + 0.1 if curvature == 0 and level <= 0 else mass  # a root exists
    magnitudes, slopes, weights = (normal((count,), seed + k).abs() for k in range(3))
    begin = None if start is None else torch.full((1,), start, dtype=torch.float64)
    given_mass = torch.tensor([mass], dtype=torch.float64)
    r = shrinkage_root(
        magnitudes, slopes, weights, (0,), level=level, mass=given_mass, curvature=curvature, power=power, start=begin
    )
    numbers = (magnitudes.tolist(), slopes.tolist(), weights.tolist(), level, mass, curvature, power)
    excess = lambda x: root_sides(x, *numbers)[1] - root_sides(x, *numbers)[0]  # noqa: E731
    if excess(0.0) >= 0:
        assert r.item() == 0
    else:
        high = 1.0
        while excess(high) < 0:
            high *= 2
        expected = optimize.brentq(excess, 0, high, xtol=1e-15, rtol=1e-14)
        flat = abs(excess(r.item())) <= 1e-13 * (1 + abs(level))
        assert flat or r.item() == pytest.approx(expected, rel=1e-12)


def test_roots_of_terms_of_very_different_sizes():
    draw = lambda seed, *shape: 10 ** (16 * torch.rand(shape, generator=seeded(seed), dtype=torch.float64) - 8)  # noqa: E731
    magnitudes, slopes, weights = draw(0, 6, 500, 1), draw(1, 6, 500, 1), draw(2, 6, 1, 1)
    roots = shrinkage_root(magnitudes, slopes, weights, (0, 2), mass=1.0)
    for change in (-1e-12, 1e-12):
        r = (1 + change) * roots
        excess = r - (weights * (magnitudes - slopes * r).clamp_min(0)).sum((0, 2), keepdim=True)
        assert bool((excess.sign() == math.copysign(1, change)).all())


@given(seeds)
def test_roots_of_a_batch_are_the_roots_one_by_one(seed):
    magnitudes, mass = normal((4, 3, 2), seed).abs(), normal((1, 3, 1), seed + 1)
    together = shrinkage_root(magnitudes, 0.5, 1.0, (0, 2), mass=mass, curvature=0.7)
    alone = [
        shrinkage_root(magnitudes[:, i : i + 1], 0.5, 1.0, (0, 2), mass=mass[:, i : i + 1], curvature=0.7)
        for i in range(3)
    ]
    assert together.shape == (1, 3, 1)
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-12, atol=1e-12)


def row_value(W, p, center, masses, penalty, strength, kernel_weight, mass_weight):
    amounts = [sum(slow.kernel_norm(W[j, i], penalty) for j in range(W.shape[0])) for i in range(W.shape[1])]
    rows = sum(slow.perspective(amount, mass, penalty.power) for amount, mass in zip(amounts, p))
    return (
        strength * rows
        + 0.5 * kernel_weight * ((W - center) ** 2).sum()
        + 0.5 * mass_weight * ((p - masses) ** 2).sum()
    )


def amounts_by_cvxpy(W, shape, norm):
    """One row of |W_ij| per target, columns are sources."""
    size = shape[2] * shape[3]
    atom = lambda j, i: W[(j * shape[1] + i) * size : (j * shape[1] + i + 1) * size]  # noqa: E731
    return [[cp.norm(atom(j, i), 2 if norm == "l2" else 1) for i in range(shape[1])] for j in range(shape[0])]


@given(centers(1), norms, strengths, metrics, metrics)
def test_row_prox_attains_the_minimum(center, norm, strength, kernel_weight, mass_weight):
    kernels, masses = center
    penalty, setting = Penalty(kernel_norm=norm), (strength, kernel_weight, mass_weight)
    found, p = row_prox(kernels, masses, penalty, *setting)[:2]
    W, q = cp.Variable(kernels.numel()), cp.Variable(len(masses), nonneg=True)
    amounts = amounts_by_cvxpy(W, kernels.shape, norm)
    rows = sum(cp.quad_over_lin(cp.sum([row[i] for row in amounts]), q[i]) for i in range(len(masses)))
    distance = 0.5 * kernel_weight * cp.sum_squares(W - kernels.flatten().numpy()) + 0.5 * mass_weight * cp.sum_squares(
        q - masses.numpy()
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # cvxpy evaluates s^2 / p at p = 0
        problem = cp.Problem(cp.Minimize(strength * rows + distance))
        problem.solve(solver="CLARABEL")
    assert bool((p >= 0).all())
    value = row_value(found.numpy(), p.numpy(), kernels.numpy(), masses.numpy(), penalty, *setting)
    assert value == pytest.approx(problem.solution.opt_val, rel=1e-7, abs=1e-7)


@settings(max_examples=100)
@given(centers(1), norms, strengths, metrics, metrics, st.sampled_from([2.0, 1.5, 3.0]))
def test_row_prox_meets_its_optimality_conditions(center, norm, strength, kernel_weight, mass_weight, power):
    kernels, masses = center
    penalty = Penalty(kernel_norm=norm, power=power)
    W, p = row_prox(kernels, masses, penalty, strength, kernel_weight, mass_weight)[:2]
    pull, rise = kernel_weight * (kernels - W), mass_weight * (p - masses)  # minus the gradients of the distance
    scale = 1e-11 * (1 + kernel_weight * kernels.abs().max().item()) ** 2 * (1 + 1 / strength) * (1 + mass_weight)
    for i in range(len(p)):
        norm_row, strongest = penalty.norms(W)[:, i], penalty.dual_norms(pull)[:, i].max().item()
        if p[i] > 0:
            r = (norm_row.sum() / p[i]).item()
            slope = power * strength * r ** (power - 1)  # of the perspective in an amount
            assert strongest <= slope + scale * (1 + slope)
            np.testing.assert_allclose((pull * W).sum((2, 3))[:, i], slope * norm_row, atol=scale * (1 + slope))
            assert rise[i].item() == pytest.approx((power - 1) * strength * r**power, rel=1e-8, abs=scale)
        else:
            assert W[:, i].abs().max().item() == 0
            assert slow.largest_gain(strongest, strength, power) <= rise[i].item() + scale


@given(centers(1), norms)
def test_row_prox_of_zero_strength_clips_masses_only(center, norm):
    kernels, masses = center
    W, p = row_prox(kernels, masses, Penalty(kernel_norm=norm), 0.0, 1.0, 1.0)[:2]
    assert torch.equal(W, kernels)
    assert torch.equal(p, masses.clamp_min(0))


@given(centers(1), norms, strengths)
def test_row_prox_is_firmly_nonexpansive(center, norm, strength):
    kernels, masses = center
    penalty = Penalty(kernel_norm=norm)
    other = (kernels + normal(kernels.shape, 1), masses + normal(masses.shape, 2))
    (W, p), (V, q) = (row_prox(*c, penalty, strength, 1.0, 1.0)[:2] for c in ((kernels, masses), other))
    moved = (W - V).square().sum() + (p - q).square().sum()
    pairing = ((W - V) * (kernels - other[0])).sum() + ((p - q) * (masses - other[1])).sum()
    assert moved.item() <= pairing.item() + 1e-9 * (1 + abs(pairing.item()))


@given(centers(0), norms, strengths, metrics, metrics)
def test_cone_projection_is_the_nearest_point_of_the_cone(center, norm, bound, kernel_weight, mass_weight):
    kernels, masses = center
    penalty = Penalty(kernel_norm=norm)
    W, p = cone_projection(kernels, masses, penalty, bound, kernel_weight, mass_weight)
    reached = penalty.norms(W).sum(1)
    scale = 1e-12 * (1 + kernels.abs().sum().item() + masses.abs().max().item()) * (1 + bound)
    assert bool((reached <= bound * p + scale).all())
    V, q = cp.Variable(kernels.numel()), cp.Variable(len(masses))
    amounts = amounts_by_cvxpy(V, kernels.shape, norm)
    distance = 0.5 * kernel_weight * cp.sum_squares(V - kernels.flatten().numpy()) + 0.5 * mass_weight * cp.sum_squares(
        q - masses.numpy()
    )
    optimum = cp.Problem(cp.Minimize(distance), [cp.sum(row) <= bound * q[j] for j, row in enumerate(amounts)]).solve(
        solver="CLARABEL"
    )
    value = 0.5 * kernel_weight * (W - kernels).square().sum() + 0.5 * mass_weight * (p - masses).square().sum()
    assert value.item() == pytest.approx(optimum, rel=1e-7, abs=1e-7)


@settings(max_examples=100)
@given(centers(0), norms, strengths, metrics, metrics)
def test_cone_projection_splits_the_center_into_orthogonal_parts(center, norm, bound, kernel_weight, mass_weight):
    kernels, masses = center
    penalty = Penalty(kernel_norm=norm)
    W, p = cone_projection(kernels, masses, penalty, bound, kernel_weight, mass_weight)
    removed, lifted = kernel_weight * (kernels - W), mass_weight * (masses - p)
    scale = (
        1e-12
        * (1 + kernels.abs().sum().item() + masses.abs().max().item()) ** 2
        * (1 + bound) ** 2
        * max(kernel_weight, mass_weight, 1)
    )
    np.testing.assert_allclose((removed * W).sum((1, 2, 3)) + lifted * p, 0, atol=scale)
    strongest = penalty.dual_norms(removed).amax(1)
    assert bool((lifted + bound * strongest <= scale).all())  # the removed part lies in the polar cone


@given(st.builds(lambda seed: (normal((3, 2, 2, 1), seed), random_masses(3, seed)), seeds), norms)
def test_cone_projection_keeps_points_of_the_cone(point, norm):
    kernels, masses = point
    penalty = Penalty(kernel_norm=norm)
    bound = 1.001 * (penalty.norms(kernels).sum(1) / masses).max().item()
    W, p = cone_projection(kernels, masses, penalty, bound, 2.0, 0.5)
    torch.testing.assert_close(W, kernels, rtol=1e-15, atol=0)
    torch.testing.assert_close(p, masses, rtol=1e-15, atol=0)


@st.composite
def inflows(draw):
    """Kernels, some of them zero, logits of masses that do not sum to one, target masses, a bound that most features
    exceed and step lengths: uneven ones, or the same number twice.
    """
    shape, seed = draw(shapes), draw(seeds)
    kernels = normal(shape, seed) * (torch.rand(shape[:2], generator=seeded(seed)) < 0.8)[:, :, None, None]
    logits = random_masses(shape[1], seed + 1).log() + 0.3 * normal(shape[1:2], seed + 2)
    length = draw(st.sampled_from([1e-2, 0.3, 3.0]))
    uneven = normal(shape[:2], seed + 3).exp() * length, normal(shape[1:2], seed + 4).exp() * length
    steps = draw(st.sampled_from([uneven, (length, length)]))
    return kernels, logits, random_masses(shape[0], seed + 5), draw(st.sampled_from([0.1, 0.5, 2.0])), steps


def inflow_distance(kernels, logits, targets, steps, moved, masses):
    """The distance that `inflow_projection` makes smallest, in loops."""
    kernel_steps, mass_steps = (step if isinstance(step, float) else step.tolist() for step in steps)
    total = 0.0
    for i, p in enumerate(masses.tolist()):
        start = math.exp(float(logits[i]))
        total += (p * math.log(p / start) - p + start) / (
            mass_steps if isinstance(mass_steps, float) else mass_steps[i]
        )
        for j, target in enumerate(targets.tolist()):
            step = kernel_steps if isinstance(kernel_steps, float) else kernel_steps[j][i]
            total += p * target * float((moved - kernels)[j, i].square().sum()) / (2 * step)
    return total


@settings(max_examples=40, deadline=None)
@given(inflows(), norms)
def test_inflow_projection_is_the_nearest_point_within_the_bound(case, norm):
    kernels, logits, targets, bound, steps = case
    penalty = Penalty(kernel_norm=norm)
    moved, masses, kappa = inflow_projection(kernels, logits, targets, penalty, bound, *steps)
    excess = penalty.norms(moved) @ masses - bound
    size = 16 * torch.finfo(torch.float64).eps * (bound + float((penalty.norms(kernels) @ masses).max()))
    assert bool((excess <= size).all())
    assert bool((kappa >= 0).all())
    assert bool(((kappa == 0) | (excess.abs() <= size)).all())  # complementary
    assert masses.sum().item() == pytest.approx(1, abs=1e-14)
    # in (p, p w) the program is convex: cvxpy's answer is the least distance
    count, sources = kernels.shape[:2]
    p, flows = (
        cp.Variable(sources),
        [[cp.Variable(kernels[0, 0].numel()) for _ in range(sources)] for _ in range(count)],
    )
    inverse = [
        torch.as_tensor(1 / step, dtype=torch.float64).expand(shape)
        for step, shape in zip(steps, ((count, sources), (sources,)))
    ]
    cost = cp.sum(cp.multiply(inverse[1].numpy(), cp.kl_div(p, logits.exp().numpy())))
    for j in range(count):
        for i in range(sources):
            weight = float(targets[j] * inverse[0][j, i]) / 2
            cost += weight * cp.quad_over_lin(flows[j][i] - p[i] * kernels[j, i].flatten().numpy(), p[i])
    order = 2 if norm == "l2" else 1
    within = [sum(cp.norm(flow, order) for flow in row) <= bound for row in flows]
    optimum = cp.Problem(cp.Minimize(cost), [cp.sum(p) == 1, *within]).solve(solver="CLARABEL")
    assert inflow_distance(kernels, logits, targets, steps, moved, masses) == pytest.approx(optimum, rel=1e-5, abs=1e-6)


@given(inflows(), norms)
def test_inflow_projection_keeps_what_is_within_the_bound(case, norm):
    kernels, logits, targets, _, steps = case
    penalty, masses = Penalty(kernel_norm=norm), torch.softmax(logits, 0)
    bound = 1.001 * (penalty.norms(kernels) @ masses).max().item() + 1e-3
    moved, kept, kappa = inflow_projection(kernels, masses.log(), targets, penalty, bound, *steps)
    assert torch.equal(moved, kernels)
    torch.testing.assert_close(kept, masses, rtol=1e-13, atol=0)
    assert not kappa.any()


@given(inflows(), norms)
def test_kernel_projection_is_the_nearest_point_in_its_metric(case, norm):
    """Where it puts w, the same multiplier theta_j pulls on all kernels in the units of their steps, and w + steps
    theta w / |w| comes back to w: a velocity that the bound takes up moves nothing, whatever the steps.
    """
    kernels, logits, _, bound, (steps, _) = case
    penalty, masses = Penalty(kernel_norm=norm), torch.softmax(logits, 0)
    moved = kernel_projection(kernels, masses, penalty, bound, steps)
    reached, before = penalty.norms(moved) @ masses, penalty.norms(kernels) @ masses
    assert bool((reached <= bound * (1 + 1e-12)).all())
    torch.testing.assert_close(reached, before.clamp_max(bound), rtol=1e-12, atol=1e-14)
    lengths = torch.as_tensor(steps, dtype=torch.float64).expand(kernels.shape[:2])
    lost = penalty.atoms(kernels - moved) / lengths[:, :, None]
    theta = lost.amax((1, 2))
    alive = penalty.atoms(moved) > 0
    assert bool((theta[before <= bound] == 0).all())
    pulled = theta[:, None, None].expand_as(lost)
    torch.testing.assert_close(lost[alive], pulled[alive], rtol=1e-9, atol=1e-11)
    pushed = moved.flatten(2) + torch.where(
        alive, (lengths * theta[:, None])[:, :, None] * moved.flatten(2) / penalty.atoms(moved).clamp_min(1e-300), 0.0
    )
    again = kernel_projection(pushed.view_as(moved), masses, penalty, bound, steps)
    torch.testing.assert_close(again, moved, rtol=1e-9, atol=1e-11)


@given(shapes, seeds, st.sampled_from([1e-6, 0.1, 1.0, 30.0, 1e6]), st.sampled_from([0.3, 1.0, 3.0]))
def test_input_projection_is_the_nearest_point_in_its_metric(shape, seed, bias_steps, bound):
    kernels, bias = normal(shape, seed), 3 * normal(shape[:1], seed + 1)
    z, b = input_projection(kernels, bias, bound, bias_steps)
    before, after = input_norms(kernels, bias), input_norms(z, b)
    torch.testing.assert_close(after, before.clamp_max(bound), rtol=1e-13, atol=0)
    inside = before <= bound
    assert torch.equal(z[inside], kernels[inside])
    assert torch.equal(b[inside], bias[inside])
    # x = (1 + mu steps) y with one mu >= 0: the cross products of what the two parts lose vanish
    losses = (kernels - z).flatten(1), (bias - b) / bias_steps
    mu = (losses[0] * z.flatten(1)).sum(1) / z.flatten(1).square().sum(1)
    assert bool((mu >= -1e-12).all())
    size = (1 + mu) * (1 + bias_steps) / bias_steps
    assert bool(((losses[1] - mu * b).abs() <= 1e-9 * size * (bias.abs() + 1)).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(4))
def test_float32_proximal_maps_agree_with_float64(norm, seed, device):
    penalty = Penalty(kernel_norm=norm)
    kernels, masses = normal((5, 4, 2, 2), seed), normal((4,), seed + 9)
    single = kernels.float().to(device), masses.float().to(device)
    exact = row_prox(kernels, masses, penalty, 0.3, 1.0, 2.0)[:2]
    rough = row_prox(*single, penalty, 0.3, 1.0, 2.0)[:2]
    exact += cone_projection(kernels.transpose(0, 1), masses, penalty, 1.5, 1.0, 2.0)
    rough += cone_projection(single[0].transpose(0, 1), single[1], penalty, 1.5, 1.0, 2.0)
    targets = random_masses(5, seed)
    exact += inflow_projection(kernels, masses, targets, penalty, 0.5, 0.3, 0.2)
    rough += inflow_projection(*single, targets.to(single[0]), penalty, 0.5, 0.3, 0.2)
    for got, expected in zip(rough, exact):
        assert got.dtype == torch.float32
        assert got.device.type == device.type
        torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": -1}, "source=-1"),
        ({"readout": float("nan")}, "readout=nan"),
        ({"input": "1"}, "input='1'"),
        ({"kernel_norm": "l3"}, "kernel_norm='l3' is unknown"),
        ({"amplitude_bound": 0}, "amplitude_bound=0"),
        ({"input_bound": -1.0}, "input_bound=-1.0"),
    ],
)
def test_penalty_names_the_bad_argument(options, message):
    with pytest.raises(ValueError, match=message):
        Penalty(**options)


def test_penalty_is_frozen_and_by_keyword_only():
    with pytest.raises(FrozenInstanceError):
        Penalty().source = 1.0
    with pytest.raises(TypeError):
        Penalty(1.0)
