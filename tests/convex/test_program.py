import math
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import architectures, cases, costly, normal, random_inputs, random_masses, random_network
from torch.utils._python_dispatch import TorchDispatchMode

import meanfield as mf
from meanfield import certificates, limits
from meanfield.convex.repopulation import ProgramPoint
from meanfield.solvers import splitting

deep = architectures(depths=(2, 3))
roomy = architectures(depths=(2,), sides=(2, 3), poolings=("none", "average"))


def random_point(program, seed):
    """Any point with positive masses; it meets no constraint."""
    point = program.point(program.frozen).map(lambda t: normal(t.shape, seed))
    return replace(point, masses=tuple(random_masses(len(p), seed + k) for k, p in enumerate(point.masses)))


def feasible_neighbour(program, point, seed):
    """A feasible point with other masses, the bounds left aside: kernels follow their target's
    mass, readout is free.
    """
    masses = tuple(random_masses(len(p), seed + k) for k, p in enumerate(point.masses))
    ratios = [new / old for new, old in zip(masses[1:], point.masses[1:])]
    kernels = tuple(W * ratio[:, None, None, None] for W, ratio in zip(point.kernels, ratios))
    biases = tuple(None if b is None else b * ratio for b, ratio in zip(point.biases, ratios))
    return ProgramPoint(masses, kernels, normal(point.readout.shape, seed), biases)


@given(cases())
def test_value_matches_the_explicit_sums_at_any_point(case):
    program = case.freeze
    point = random_point(program, case.seed)
    assert program.value(point).item() == pytest.approx(slow.program_value(program, point), rel=1e-11)
    assert program.value(point) == sum(program.terms(point))


@given(cases(archs=deep))
def test_residuals_match_the_explicit_sums_at_any_point(case):
    program = case.freeze
    point = random_point(program, case.seed)
    for layer, (residual, wanted) in enumerate(program.image_residuals(point, case.problem.inputs), start=1):
        expected = slow.realisation_residual(program, point, layer)
        np.testing.assert_allclose(residual, expected, atol=1e-11)
        flows = slow.array(point.masses[layer])[:, None, None] * slow.frozen_maps(program)[0][layer]
        np.testing.assert_allclose(wanted, flows, atol=1e-11)


@given(cases(archs=deep))
def test_the_residual_in_coordinates_has_the_size_of_its_rows_seen_by_the_images(case):
    """A V times it is the residual on images and positions, whose rows are A's."""
    program = case.freeze
    point = random_point(program, case.seed)
    features = slow.frozen_maps(program)[1]
    for layer in range(1, program.depth):
        A = slow.design(features[layer - 1], case.problem.architecture.layers[layer])
        expected = slow.realisation_residual(program, point, layer)
        seen = A @ slow.array(program.bases[layer - 1] @ program.residual(point, layer).T)
        size = np.abs(A).max() * float(point.kernels[layer - 1].abs().max() + 1)
        np.testing.assert_allclose(seen, np.moveaxis(expected, 1, 3).reshape(seen.shape), atol=1e-9 * size)


@given(cases(archs=deep))
def test_coordinates_are_those_of_the_flows_in_the_row_space(case):
    program = case.freeze
    for layer, space in enumerate(program.spaces, start=1):
        flows = case.network.kernels[layer] * case.network.masses[layer - 1][None, :, None, None]
        torch.testing.assert_close(program.flows[layer], flows)
        rows = flows.flatten(1)
        if case.network.biases[layer] is not None:
            rows = torch.cat([rows, case.network.biases[layer][:, None]], 1)
        torch.testing.assert_close(program.coordinates[layer - 1], rows @ space.right)


@given(cases(), st.floats(0, 1))
def test_value_is_jointly_convex_along_any_segment(case, t):
    program = case.freeze
    first, second = random_point(program, case.seed), random_point(program, case.seed + 100)
    line = (1 - t) * program.value(first) + t * program.value(second)
    assert program.value(first.combine(second, t)) <= line * (1 + 1e-12)


@given(cases(archs=deep, bounds=(None,)), st.floats(0, 1))
def test_feasible_points_form_a_convex_set(case, t):
    program = case.freeze
    first = program.point(case.network)
    second = feasible_neighbour(program, first, case.seed)
    middle = first.combine(second, t)
    assert max(program.violation(first), program.violation(second), program.violation(middle)) < 1e-12
    line = (1 - t) * program.value(first) + t * program.value(second)
    assert program.value(middle) <= line * (1 + 1e-12)
    assert case.problem.value(program.network(middle)).item() == pytest.approx(program.value(middle).item(), rel=1e-10)


@costly(12)
@given(cases(archs=roomy, max_width=3))
def test_value_is_convex_between_the_network_and_the_optimum(case):
    program = case.freeze
    start, end = program.point(case.network), slow.solve(program).point
    values = [program.value(start.combine(end, t)).item() for t in np.linspace(0, 1, 9)]
    assert (np.diff(values, 2) >= -1e-12 * max(values)).all()
    assert values[-1] <= values[0] * (1 + 1e-7)


@given(cases(archs=deep, bounds=(None,), zero_mass=(True,), max_width=3))
def test_perspectives_at_zero_mass(case):
    program = case.freeze
    point = program.point(case.network)
    assert program.value(point).isfinite()
    readout = point.readout.clone()
    readout[:, -1] += 1e-9
    massless = float(point.masses[-1][-1]) == 0
    assert program.value(replace(point, readout=readout)).isfinite() == (not massless)
    kernels = (point.kernels[0].clone(), *point.kernels[1:])
    kernels[0][:, -1] += 1e-9
    massless = float(point.masses[0][-1]) == 0
    assert program.value(replace(point, kernels=kernels)).isfinite() == (not massless)


def test_terms_of_zero_strength_count_nothing_even_at_zero_mass():
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2), mf.Conv(2)))
    network = random_network(arch, (3, 3), 0, zero_mass=True)
    penalty = mf.Penalty(source=0, readout=0, input=0)
    program = mf.ConvexProgram.freeze(
        mf.Problem(arch, random_inputs(arch, 3, 0), [0.0, 1.0, 2.0], penalty=penalty), network
    )
    point = program.point(network).map(lambda t: t + 0.1 if t.ndim != 1 else t)
    assert program.terms(point)[1:] == (0, 0, 0)


PLAIN = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="tanh", bias=True), mf.Conv(2, bias=True)), outputs=2)


def bounded_program(norm="l2", slack=1.2, width=(3, 3), count=4):
    network = random_network(PLAIN, width, 1)
    free = mf.Problem(
        PLAIN,
        random_inputs(PLAIN, count, 1),
        normal((count, 2), 3),
        penalty=mf.Penalty(kernel_norm=norm, amplitude_bound=1.0),
    )
    reached = free.bounds(network)[0][1]
    penalty = mf.Penalty(kernel_norm=norm, amplitude_bound=slack * reached)
    return mf.ConvexProgram.freeze(mf.Problem(PLAIN, free.inputs, free.targets, penalty=penalty), network)


def edited(tensor, index, change):
    tensor = tensor.clone()
    tensor[index] += change
    return tensor


def test_violation_of_the_mass_sum():
    program = bounded_program()
    point = program.point(program.frozen)
    for layer in (0, 1):
        masses = tuple(edited(p, 0, 1e-4) if k == layer else p for k, p in enumerate(point.masses))
        assert program.violation(replace(point, masses=masses)) >= 1e-4 * (1 - 1e-9)


def test_violation_of_a_negative_mass():
    program = bounded_program()
    point = program.point(program.frozen)
    first = point.masses[0]
    moved = edited(edited(first, 0, -first[0] - 1e-4), 1, first[0] + 1e-4)
    assert program.violation(replace(point, masses=(moved, point.masses[1]))) == pytest.approx(3e-4, rel=1e-9)


def test_violation_of_the_realisation_is_relative_to_the_flow():
    program = bounded_program()
    point = program.point(program.frozen)
    moved = replace(point, biases=(edited(point.biases[0], 1, 1e-4),))
    preactivations, features = program.maps(program.problem.inputs)
    scale = (point.masses[1][None, :, None, None] * preactivations[1]).abs().max().item()
    assert program.violation(moved) == pytest.approx(1e-4 / scale, rel=1e-8)
    kernels = (edited(point.kernels[0], (1, 2, 0, 1), 1e-3),)
    expected = 1e-3 * features[0][:, 2].abs().max().item() / scale
    assert 0.1 * expected < program.violation(replace(point, kernels=kernels)) <= expected * (1 + 1e-9)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_violation_of_the_amplitude_bound(norm):
    program = bounded_program(norm)
    point, bound = program.point(program.frozen), program.problem.penalty.amplitude_bound
    assert program.violation(point) < 1e-12
    tight = replace(program.problem.penalty, amplitude_bound=bound / 1.2 / 1.001)
    problem = mf.Problem(PLAIN, program.problem.inputs, program.problem.targets, penalty=tight)
    tightened = replace(program, problem=problem)
    # of every feature relative to its own mass: a light one that breaks its bound makes J infinite all the same
    assert problem.excess(program.frozen) == pytest.approx(1e-3, rel=1e-9)
    assert tightened.violation(point) == pytest.approx(1e-3, rel=1e-9)


def test_violation_of_the_bias_bound():
    arch = mf.Architecture((1, 4, 4), (mf.Conv(2), mf.Conv(2, bias=True)))
    network = random_network(arch, (3, 2), 1)
    small = mf.ParticleNetwork(
        arch, network.masses, [network.kernels[0], 1e-3 * network.kernels[1]], network.readout, network.biases
    )
    bound = network.biases[1].abs().max().item()
    problem = mf.Problem(arch, random_inputs(arch, 2, 1), [0.0, 1.0], penalty=mf.Penalty(amplitude_bound=bound))
    program = mf.ConvexProgram.freeze(problem, small)
    assert program.violation(program.point(small)) < 1e-12
    tight = replace(
        program,
        problem=mf.Problem(arch, problem.inputs, problem.targets, penalty=mf.Penalty(amplitude_bound=bound / 1.01)),
    )
    assert tight.violation(program.point(small)) > 1e-3


@pytest.mark.parametrize("part", ["masses", "kernels", "biases"])
def test_violation_of_a_point_that_is_not_a_number_is_not_a_number(part):
    program = bounded_program()
    point = program.point(program.frozen)
    spoilt = tuple(tensor * torch.nan for tensor in getattr(point, part))
    assert math.isnan(program.violation(replace(point, **{part: spoilt})))


@given(cases(archs=roomy, bounds=(None,), zero_mass=(False, True)), st.floats(1e-8, 1e-3))
def test_restore_returns_a_perturbed_point_to_the_constraints(case, size):
    program = case.freeze
    point = program.point(case.network)
    noise = lambda t: t + size * t.abs().max() * torch.where(t != 0, normal(t.shape, case.seed + 5), 0.0)  # noqa: E731
    perturbed = point.map(noise)
    # masses whose sum differs from one by a common factor need no new feature directions
    perturbed = replace(perturbed, masses=tuple((1 + size) * p for p in point.masses))
    restored = program.restore(perturbed)
    assert program.violation(restored) < 1e-10
    assert all(torch.equal(a > 0, b > 0) for a, b in zip(restored.masses, point.masses))
    assert all(p.sum().item() == pytest.approx(1, abs=1e-14) for p in restored.masses)
    for W, target, source in zip(restored.kernels, restored.masses[1:], restored.masses[:-1]):
        assert not bool(W[target == 0].any())
        assert not bool(W[:, source == 0].any())
    torch.testing.assert_close(restored.readout, perturbed.readout, rtol=0, atol=0)


@given(cases(archs=roomy, bounds=(None,)))
def test_restore_leaves_a_feasible_point_alone(case):
    program = case.freeze
    point = program.point(case.network)
    restored = program.restore(point)
    for got, expected in zip(
        (*restored.masses, *restored.kernels, restored.readout), (*point.masses, *point.kernels, point.readout)
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_restore_clips_negative_masses():
    program = bounded_program(width=(40, 3))
    point = program.point(program.frozen)
    masses = (edited(point.masses[0], 0, -point.masses[0][0] - 1e-6), point.masses[1])
    restored = program.restore(replace(point, masses=masses))
    assert restored.masses[0][0] == 0
    assert not bool(restored.kernels[0][:, 0].any())
    assert program.violation(restored) < 1e-10


@given(
    cases(archs=roomy, bounds=(1.01,), zero_mass=(False, True)),
    st.sampled_from([1e-8, 1e-6, 1e-4, 1e-2]),
    st.booleans(),
)
def test_restore_ends_inside_every_constraint(case, size, dead):
    """Kernels beyond their bound by `size`, a hundredth inside or not realised at all: masses may be new, or gone."""
    program = case.freeze
    point = program.point(case.network)
    bound = program.problem.penalty.amplitude_bound
    masses = [random_masses(len(p), case.seed + k) * (p > 0) for k, p in enumerate(point.masses)]
    if dead:  # a source without mass takes its anchor away, so that only the linear constraints may stay open
        masses[0][0] = 0.0
    masses = tuple(p / p.sum() for p in masses) if all(float(p.sum()) > 0 for p in masses) else point.masses
    kernels = tuple(
        (1 + size) * W / p.clamp_min(1e-300)[:, None, None, None] * q[:, None, None, None]
        for W, p, q in zip(point.kernels, point.masses[1:], masses[1:])
    )
    restored = program.restore(replace(point, masses=masses, kernels=kernels))
    alive = restored.masses[1] > 0
    reached = program.problem.penalty.norms(restored.kernels[0]).sum(1)
    if restored.biases[0] is not None:
        reached = torch.maximum(reached, restored.biases[0].abs())
    if not dead:
        assert program.violation(restored) < 1e-10
        assert (reached[alive] <= bound * restored.masses[1][alive] * (1 + 1e-10)).all()
        assert program.admits(restored)
    assert all(torch.equal(a > 0, b > 0) for a, b in zip(restored.masses, masses))
    for W, target, source in zip(restored.kernels, restored.masses[1:], restored.masses[:-1]):
        assert not bool(W[target == 0].any())
        assert not bool(W[:, source == 0].any())


def crossing_program():
    """One tanh layer pair where the images leave some freedom, bound at what the frozen network reaches."""
    return bounded_program(slack=1.0, width=(6, 3), count=1)


def test_restore_brings_a_point_that_realises_its_features_back_inside_the_bound():
    """A step along the null space that raises the amplitude by 1e-7 to 1e-3, as a solver's point would be off."""
    program = crossing_program()
    point, right = program.point(program.frozen), program.bases[0]
    rows = torch.cat([point.kernels[0].flatten(1), point.biases[0][:, None]], 1)
    step = normal(rows.shape, 3)
    step = step - (step @ right) @ right.T
    assert right.shape[1] < right.shape[0]
    slope = (point.kernels[0] * step[:, :-1].reshape(point.kernels[0].shape)).sum((1, 2, 3)).sign()[:, None]
    for size in (1e-7, 1e-5, 1e-3):
        moved = rows + size * slope * step
        moved = replace(
            point, kernels=(moved[:, :-1].reshape(point.kernels[0].shape),), biases=(moved[:, -1].contiguous(),)
        )
        restored = program.restore(moved)
        assert program.violation(restored) < 1e-12
        assert program.admits(restored)


def test_restore_falls_back_on_the_frozen_kernels_where_nothing_else_is_inside():
    """As many constraints as columns fix every kernel: those that rounding, here 1e-5, left outside become the frozen
    ones, and no other.
    """
    program = bounded_program(slack=1.0, width=(2, 3))
    point = program.point(program.frozen)
    rows = torch.cat([point.kernels[0].flatten(1), point.biases[0][:, None]], 1)
    rows = rows / (program.problem.penalty.amplitude_bound * point.masses[1][:, None])
    off = (1 + 1e-5) * rows
    reached = torch.maximum(program.problem.penalty.norms(off[:, :-1].reshape(3, 2, 2, 2)).sum(1), off[:, -1].abs())
    fixed = torch.eye(rows.shape[1], dtype=torch.float64)
    program = replace(program, spaces=(program.spaces[0]._replace(right=fixed),))
    found = program._bounded(1, torch.arange(3), off, torch.clone, fixed.diagonal())
    assert 0 < int((reached > 1).sum()) < 3
    torch.testing.assert_close(found, torch.where((reached > 1)[:, None], rows, off), rtol=1e-12, atol=0)


def test_a_source_that_lost_its_mass_gets_what_its_features_need():
    """No source penalty: a solver leaves all the mass with one source, and the kernels of the other need some."""
    program = bounded_program(width=(2, 3), slack=1.5)
    point = program.point(program.frozen)
    lost = replace(point, masses=(torch.tensor([1.0, 0.0], dtype=torch.float64), point.masses[1]))
    restored = program.restore(lost)
    assert not program.admits(restored)
    found = program.admitted(lost)
    assert program.violation(found) < 1e-10
    share = program.violation(restored)
    assert any(float(found.masses[0][1]) == pytest.approx(share * part / 2, rel=1e-9) for part in (1.0, 1e-2, 1e-4))
    # an admitted point is returned as it is restored
    assert torch.equal(program.admitted(point).vector(), program.restore(point).vector())


@given(cases())
def test_network_of_the_point_is_the_frozen_network(case):
    program = case.freeze
    back = program.network(program.point(case.network))
    for got, expected in zip(back.tensors(), case.network.tensors(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        program.output(program.point(case.network)), case.network(case.problem.inputs), rtol=1e-11, atol=1e-12
    )


@given(cases())
def test_feature_costs_are_the_input_penalties(case):
    expected = [case.problem.penalty.input * slow.input_cost(case.network, i) for i in range(case.network.widths[0])]
    np.testing.assert_allclose(case.freeze.feature_costs, expected, rtol=1e-13)


def test_freezing_cuts_the_graph():
    network = bounded_program().frozen.map(lambda t: t.clone().requires_grad_())
    problem = mf.Problem(PLAIN, random_inputs(PLAIN, 4, 1), normal((4, 2), 3))
    program = mf.ConvexProgram.freeze(problem, network)
    held = (*program.flows, *program.coordinates, program.readout_features, *program.frozen.tensors())
    assert not any(t.requires_grad for t in held)
    assert not program.point(network).readout.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_are_kept(dtype, device):
    program = bounded_program().to(dtype=dtype, device=device)
    point = program.restore(program.point(program.frozen))
    tensors = [*program.flows, program.feature_costs, program.readout_features, program.value(point), *point.masses]
    tensors += [
        *program.bases,
        *program.coordinates,
        *point.kernels,
        point.readout,
        *program.network(point).tensors(),
    ]
    assert {(t.dtype, t.device.type) for t in tensors} == {(dtype, device.type)}
    assert program.violation(point) < (1e-4 if dtype == torch.float32 else 1e-11)


def test_freeze_refuses_a_network_beyond_a_bound():
    program = bounded_program()
    problem = mf.Problem(
        PLAIN, program.problem.inputs, program.problem.targets, penalty=mf.Penalty(amplitude_bound=1e-3)
    )
    with pytest.raises(ValueError, match=r"amplitude_bound=0.001 makes the network infeasible"):
        mf.ConvexProgram.freeze(problem, program.frozen)


def test_point_refuses_other_widths():
    program = bounded_program()
    with pytest.raises(
        ValueError, match=r"the network has widths \(2, 2\); the program froze the features of widths \(3, 3\)"
    ):
        program.point(random_network(PLAIN, (2, 2), 0))


@pytest.mark.parametrize("changed", [0, 1])
def test_point_refuses_other_features(changed):
    program = bounded_program()
    network = program.frozen
    kernels = [1.1 * w if k == changed else w for k, w in enumerate(network.kernels)]
    other = mf.ParticleNetwork(PLAIN, network.masses, kernels, network.readout, network.biases)
    with pytest.raises(ValueError, match="the network's features differ from the frozen ones"):
        program.point(other)


def test_point_refuses_another_first_bias():
    program = bounded_program()
    network = program.frozen
    other = mf.ParticleNetwork(
        PLAIN, network.masses, network.kernels, network.readout, [network.biases[0] + 1, network.biases[1]]
    )
    with pytest.raises(ValueError, match="the network's features differ from the frozen ones"):
        program.point(other)


def test_point_accepts_a_feature_that_no_image_sees():
    """Kernels of sum zero on constant images: their coordinates are rounding, and so is what they are held against."""
    arch = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="tanh"), mf.Conv(2, activation="tanh")))
    network, inputs = (
        random_network(arch, (3, 3), 0),
        torch.ones(3, 1, 4, 4) * torch.tensor([0.3, 0.7, 1.1])[:, None, None, None],
    )
    blind = network.kernels[1] - torch.eye(3, dtype=torch.float64)[:1].T[:, :, None, None] * network.kernels[1].mean(
        (2, 3), keepdim=True
    )
    kernels = [network.kernels[0], blind]
    unseen = mf.ParticleNetwork(arch, network.masses, kernels, network.readout)
    program = mf.ConvexProgram.freeze(mf.Problem(arch, inputs.double(), [0.0, 1.0, 2.0]), unseen)
    sizes = program.coordinates[0].norm(dim=1)
    assert 0 < float(sizes[0]) < 1e-14 < float(sizes[1])
    assert program.discord(program.point(unseen)) < 1e-12


def test_converting_to_what_it_is_keeps_what_was_computed():
    program = bounded_program()
    assert program.to(dtype=torch.float64, device="cpu") is program
    assert program.to(dtype=torch.float32) is not program


def test_point_accepts_the_same_features_with_other_readout_and_masses():
    program = bounded_program()
    network = program.frozen
    masses = [network.masses[0], network.masses[1].flip(0)]
    other = mf.ParticleNetwork(PLAIN, masses, network.kernels, 2 * network.readout, network.biases)
    point = program.point(other)
    assert program.value(point).item() == pytest.approx(program.problem.value(other).item(), rel=1e-12)


def test_dead_features_are_harmless():
    """All ReLU features zero: no direction in the basis, no violation."""
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2), mf.Conv(2)))
    network = random_network(arch, (2, 2), 0)
    dead = mf.ParticleNetwork(arch, network.masses, [-network.kernels[0].abs(), network.kernels[1]], network.readout)
    program = mf.ConvexProgram.freeze(mf.Problem(arch, random_inputs(arch, 3, 0).abs(), [0.0, 1.0, 2.0]), dead)
    point = program.restore(program.point(dead))
    assert program.spaces[0].rank == 0
    assert program.violation(point) == 0
    assert math.isfinite(program.value(point))


@pytest.mark.parametrize("bias", [False, True])
def test_a_program_with_candidates_starts_at_the_network_and_gains(bias):
    arch = mf.Architecture((1, 3, 4), tuple(mf.Conv(2, activation="tanh", bias=bias) for _ in range(2)))
    problem = mf.Problem(
        arch, random_inputs(arch, 3, 0), normal((3, 1), 1), penalty=mf.Penalty(source=1e-4, readout=1e-3, input=1e-4)
    )
    network, others = random_network(arch, (3, 2), 0), random_network(arch, (2, 3), 1)
    alone, joined = (
        mf.ConvexProgram.freeze(problem, network),
        mf.ConvexProgram.with_candidates(problem, network, others),
    )
    start = joined.point(joined.frozen)
    assert joined.value(start).item() == pytest.approx(problem.value(network).item(), rel=1e-12)
    assert joined.violation(start) < 1e-10
    assert joined.widths == (5, 5)
    found = joined.maps(problem.inputs)
    for layer in range(2):
        for maps, own, expected in zip(found, network.responses(problem.inputs), others.responses(problem.inputs)):
            torch.testing.assert_close(maps[layer], torch.cat([own[layer], expected[layer]], 1))
    few, many = splitting.solve(alone, 1e-4), splitting.solve(joined, 1e-4)
    assert many.value < few.value - few.gap - many.gap
    assert problem.value(many.network).item() == pytest.approx(many.value, rel=1e-6)


def two_layers(count, bias=True, pooling="average", widths=(3, 2), seed=0, **penalty):
    """tanh layers with 2x2 pooling between, images of 6x6: 9 positions each on the second layer."""
    layers = (mf.Conv(3, 1, activation="tanh", pooling=pooling, bias=bias), mf.Conv(3, 1, activation="tanh", bias=bias))
    arch = mf.Architecture((1, 6, 6), layers, outputs=2)
    strengths = mf.Penalty(**({"source": 1e-3, "readout": 2e-3, "input": 1e-3} | penalty))
    problem = mf.Problem(arch, random_inputs(arch, count, seed), normal((count, 2), 3), penalty=strengths)
    return problem, random_network(arch, widths, seed)


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("joined", [False, True])
def test_the_size_of_a_block_changes_nothing(monkeypatch, images, joined):
    """Blocks of so many images; 7 in all: the last block is smaller."""
    problem, network = two_layers(7)
    others = random_network(problem.architecture, (2, 3), 9)

    def frozen():
        if joined:
            return mf.ConvexProgram.with_candidates(problem, network, others)
        return mf.ConvexProgram.freeze(problem, network)

    def figures(program):
        point = program.point(program.frozen)
        moved = point.map(lambda tensor: 1.01 * tensor)
        multipliers = certificates.stationary_multipliers(program, point)
        found = [
            program.violation(moved),
            splitting.solve(program, 1e-8).value,
            *(space.rank for space in program.spaces),
        ]
        projections = [space.right @ space.right.T for space in program.spaces]
        return [*found, program.readout_features, multipliers.output, *multipliers.realisation, *projections]

    whole = figures(frozen())
    monkeypatch.setattr(limits, "blocks", lambda count, *_: (slice(k, k + images) for k in range(0, count, images)))
    for one, other in zip(whole, figures(frozen()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


def test_memory_does_not_grow_with_images(monkeypatch):
    """Blocks of two images: nothing that any pass makes is larger for 120 images than for 24; A has 73 columns."""
    monkeypatch.setattr(limits, "BLOCK_BYTES", 2 * 8 * 1200)
    found = []
    for count in (24, 120):
        problem, network = two_layers(count, widths=(8, 2))
        with Largest() as largest:
            program = mf.ConvexProgram.freeze(problem, network)
            point = program.point(program.frozen)
            program.violation(point)
            problem.value(network)
            certificates.dual_value(program, certificates.stationary_multipliers(program, point))
        found.append(largest.bytes)
    assert found[0] == found[1] == 8 * 73 * 2 * 73


def test_a_tall_layer_of_full_rank_leaves_masses_and_readout_alone():
    """More positions than columns force W_j = p_j w^_j: the program in (p, U), stated for cvxpy on its own."""
    problem, network = two_layers(8, widths=(4, 5))
    program = mf.ConvexProgram.freeze(problem, network)
    assert program.spaces[0].right.shape == (37, 37)
    solution = splitting.solve(program, 1e-7)
    for part, expected in (
        (solution.point.kernels[0], program.flows[1]),
        (solution.point.biases[0], program.frozen.biases[1]),
    ):
        wanted = expected * solution.point.masses[1].reshape(-1, *[1] * (expected.ndim - 1))
        torch.testing.assert_close(part, wanted, rtol=1e-9, atol=1e-12)
    source, target, readout = cp.Variable(4, nonneg=True), cp.Variable(5, nonneg=True), cp.Variable((5, 2))
    sizes = np.linalg.norm(slow.array(network.kernels[1]).reshape(5, 4, 9), axis=2) * slow.array(network.masses[0])
    outflow = sizes.T @ target
    features = np.array([maps[-1].mean((1, 2)) for _, maps, _ in slow.respond(network, problem.inputs)])
    penalty = problem.penalty
    objective = (
        cp.sum_squares(features @ readout - slow.array(problem.targets)) / (2 * len(features))
        + penalty.source * cp.sum([cp.quad_over_lin(outflow[i], source[i]) for i in range(4)])
        + penalty.readout * cp.sum([cp.quad_over_lin(readout[j], target[j]) for j in range(5)])
        + penalty.input * np.array([slow.input_cost(network, i) for i in range(4)]) @ source
    )
    model = cp.Problem(cp.Minimize(objective), [cp.sum(source) == 1, cp.sum(target) == 1])
    model.solve(solver="CLARABEL")
    assert solution.status == "optimal"
    assert solution.value == pytest.approx(model.value, rel=1e-6)
    assert solution.value < 0.9 * problem.value(network).item()


def test_a_candidate_outside_its_bound_falls_back_on_the_flows_that_made_it():
    """Its sources are candidates themselves, with mass at the point though none in the frozen network."""
    problem, network = two_layers(6)
    others = random_network(problem.architecture, (2, 3), 9)
    bound = max(problem.penalty.norms(net.flows[1]).sum(1).max().item() for net in (network, others))
    bound = max(bound, *(net.biases[1].abs().max().item() for net in (network, others)))
    tight = mf.Problem(
        problem.architecture,
        problem.inputs,
        problem.targets,
        penalty=replace(problem.penalty, amplitude_bound=bound * (1 + 1e-9)),
    )
    program = mf.ConvexProgram.with_candidates(tight, network, others)
    masses = tuple(torch.full_like(p, 1 / len(p)) for p in program.frozen.masses)
    flows, biases = program.flows[1], program.frozen.biases[1]
    kernels = (1 + 1e-3) * flows * masses[1][:, None, None, None]
    restored = program.restore(ProgramPoint(masses, (kernels,), program.frozen.readout * 0.1, (biases * masses[1],)))
    assert program.admits(restored)
    torch.testing.assert_close(restored.kernels[0], flows * masses[1][:, None, None, None], rtol=1e-8, atol=1e-10)
