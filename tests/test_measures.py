import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SMOOTH, architectures, cases, normal, random_inputs, random_network, seeded, seeds

import meanfield as mf
from meanfield import measures

ARCH = mf.Architecture((1, 3, 3), (mf.Conv(2, bias=True), mf.Conv(2, padding=1)))


def same_function(first, second, problem):
    torch.testing.assert_close(first(problem.inputs), second(problem.inputs), rtol=1e-11, atol=1e-11)


def same_value(first, second, problem):
    torch.testing.assert_close(problem.value(first), problem.value(second), rtol=1e-11, atol=1e-11)


@given(cases(zero_mass=(False, True)))
def test_permuting_particles_changes_nothing(case):
    orders = [torch.randperm(m, generator=seeded(case.seed)) for m in case.network.widths]
    permuted = measures.permute(case.network, orders)
    same_function(case.network, permuted, case.problem)
    same_value(case.network, permuted, case.problem)
    back = measures.permute(permuted, [order.argsort() for order in orders])
    assert all(torch.equal(a, b) for a, b in zip(back.tensors(), case.network.tensors()))


@given(cases(), st.data())
def test_splitting_changes_nothing_and_merging_the_clones_undoes_it(case, data):
    layer = data.draw(st.integers(0, case.network.architecture.depth - 1))
    particle = data.draw(st.integers(0, case.network.widths[layer] - 1))
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    cloned = measures.split(case.network, layer, particle, shares)
    assert cloned.widths[layer] == case.network.widths[layer] + 2
    same_function(case.network, cloned, case.problem)
    same_value(case.network, cloned, case.problem)
    merged = measures.merge(cloned, layer, [particle, particle + 1, particle + 2])
    for got, expected in zip(merged.tensors(), case.network.tensors(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@given(cases(bounds=(None,)), st.data())
def test_merging_clones_keeps_the_function_whatever_their_outgoing_kernels(case, data):
    """Equal features, different roads out: the mass average acts, and the convex penalties cannot rise."""
    layer = data.draw(st.integers(0, case.network.architecture.depth - 1))
    cloned = measures.split(case.network, layer, 0, torch.tensor([0.4, 0.6], dtype=torch.float64))
    kernels, readout = list(cloned.kernels), cloned.readout
    if layer + 1 < len(kernels):
        kernels[layer + 1] = normal(kernels[layer + 1].shape, case.seed + 1)
    else:
        readout = normal(readout.shape, case.seed + 1)
    cloned = mf.ParticleNetwork(cloned.architecture, cloned.masses, kernels, readout, cloned.biases)
    merged = measures.merge(cloned, layer, [0, 1])
    same_function(cloned, merged, case.problem)
    assert case.problem.value(merged) <= case.problem.value(cloned) * (1 + 1e-12)


@given(cases(zero_mass=(False, True)), seeds, st.floats(0.05, 0.95), st.integers(1, 3))
def test_mixture_has_the_linear_output_and_a_convex_value(case, seed, t, width):
    arch, first, problem = case.problem.architecture, case.network, case.problem
    second = random_network(arch, [width] * arch.depth, seed)
    free = mf.Problem(
        arch, problem.inputs, problem.targets, problem.loss.name, mf.Penalty(kernel_norm=problem.penalty.kernel_norm)
    )
    mixed = measures.mixture(first, second, t)
    expected = (1 - t) * first(problem.inputs) + t * second(problem.inputs)
    torch.testing.assert_close(mixed(problem.inputs), expected, rtol=1e-11, atol=1e-11)
    line = (1 - t) * free.value(first) + t * free.value(second)
    assert free.value(mixed) <= line * (1 + 1e-12)
    terms = [free.terms(network) for network in (mixed, first, second)]
    for mixed_term, a, b in list(zip(*terms))[1:]:  # the penalties are linear along the line
        torch.testing.assert_close(mixed_term, (1 - t) * a + t * b, rtol=1e-11, atol=1e-11)


@given(cases(bounds=(1.3,)), st.floats(0.05, 0.95))
def test_mixture_keeps_the_bounds(case, t):
    mixed = measures.mixture(
        case.network, measures.permute(case.network, [torch.arange(m).flip(0) for m in case.network.widths]), t
    )
    for (name, reached, _), (_, expected, _) in zip(
        case.problem.bounds(mixed), case.problem.bounds(case.network), strict=True
    ):
        assert reached == pytest.approx(expected, rel=1e-12), name


@given(architectures(), seeds, st.floats(0, 1))
def test_interpolation_is_the_straight_line_in_weights(arch, seed, t):
    first, second = (random_network(arch, [2] * arch.depth, s) for s in (seed, seed + 1))
    line = measures.interpolate(first, second, t)
    for got, a, b in zip(line.tensors(), first.tensors(), second.tensors(), strict=True):
        torch.testing.assert_close(got, (1 - t) * a + t * b, rtol=1e-13, atol=1e-13)


@given(cases(zero_mass=(False, True)), st.integers(0, 3))
def test_extend_adds_candidates_of_zero_mass(case, count):
    network = case.network
    grown = measures.extend(network, [count] * network.architecture.depth, 0.1, seeded(case.seed))
    added = [min(count, int((p > 0).sum())) for p in network.masses]
    assert list(grown.widths) == [m + extra for m, extra in zip(network.widths, added)]
    for old, new in zip(network.masses, grown.masses):
        assert torch.equal(new[: len(old)], old)
        assert not bool(new[len(old) :].any())
    same_function(network, grown, case.problem)
    same_value(network, grown, case.problem)


def test_extend_clones_the_heaviest_particles_with_noise_of_the_stated_size():
    network = random_network(ARCH, (3, 4), 0)
    heavy = int(network.masses[1].argmax())
    exact = measures.extend(network, [0, 1], 0.0, seeded(0))
    assert torch.equal(exact.kernels[1][-1], network.kernels[1][heavy])
    noisy = measures.extend(network, [0, 1], 0.5, seeded(0))
    moved = (noisy.kernels[1][-1] - network.kernels[1][heavy]).square().mean().sqrt()
    parent = network.kernels[1][heavy].square().mean().sqrt()
    assert 0.2 * parent < moved < 1.0 * parent
    assert torch.equal(noisy.kernels[1][:-1], network.kernels[1])


def test_split_accepts_shares_of_single_precision():
    network = random_network(ARCH, (3, 2), 0, dtype=torch.float32)
    shares = torch.full((10,), 0.1)
    assert shares.sum().item() != 1
    cloned = measures.split(network, 1, 1, shares)
    assert cloned.masses[1].dtype == torch.float32
    assert cloned.masses[1].sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("layer", "particle", "shares", "message"),
    [
        (0, 0, [0.5, 0.6], r"shares=\[0.5, 0.6\] must be positive and sum to 1"),
        (0, 0, [1.5, -0.5], "shares="),
        (0, 0, [[1.0]], "shares="),
        (0, 0, [float("nan"), 1.0], r"shares\[0\] is nan"),
        (2, 0, [1.0], "layer=2, particle=0 is not a particle of widths"),
        (0, 3, [1.0], "layer=0, particle=3"),
        (-1, 0, [1.0], "layer=-1"),
    ],
)
def test_split_names_the_bad_argument(layer, particle, shares, message):
    with pytest.raises(ValueError, match=message):
        measures.split(random_network(ARCH, (3, 2), 0), layer, particle, torch.tensor(shares, dtype=torch.float64))


@pytest.mark.parametrize(
    ("layer", "particles", "message"),
    [
        (0, [1], r"particles=\[1\] must name at least two different particles"),
        (0, [1, 1], r"particles=\[1, 1\]"),
        (0, [0, 0, 1], r"particles=\[0, 0, 1\]"),
        (0, [0, 3], r"layer=0, particle=3 is not a particle of widths \(3, 2\)"),
        (0, [0, -1], "particles=-1"),
        (2, [0, 1], "layer=2"),
        (-1, [0, 1], "layer=-1"),
    ],
)
def test_merge_names_the_bad_argument(layer, particles, message):
    with pytest.raises(ValueError, match=message):
        measures.merge(random_network(ARCH, (3, 2), 0), layer, particles)


def test_merge_of_massless_particles_is_refused():
    network = random_network(ARCH, (4, 2), 0)
    masses = (torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64), network.masses[1])
    network = mf.ParticleNetwork(ARCH, masses, network.kernels, network.readout, network.biases)
    with pytest.raises(ValueError, match=r"particles=\[2, 3\] have no mass to merge"):
        measures.merge(network, 0, [2, 3])


@pytest.mark.parametrize("t", [0.0, 1.0, -0.1, float("nan")])
def test_mixture_names_t(t):
    network = random_network(ARCH, (3, 2), 0)
    with pytest.raises(ValueError, match=r"t=(nan must be a finite number|.* must lie strictly between 0 and 1)"):
        measures.mixture(network, network, t)


def test_mixture_and_interpolation_refuse_another_architecture():
    first, second = (
        random_network(mf.Architecture((1, 3, 3), mf.Conv(activation=name)), (2,), 0) for name in SMOOTH[:2]
    )
    with pytest.raises(ValueError, match="first and second must have the same architecture"):
        measures.mixture(first, second, 0.5)
    with pytest.raises(ValueError, match="first and second must have the same architecture"):
        measures.interpolate(first, second, 0.5)


def test_interpolation_refuses_other_widths():
    with pytest.raises(ValueError, match=r"widths differ, \(3, 2\) and \(2, 2\)"):
        measures.interpolate(random_network(ARCH, (3, 2), 0), random_network(ARCH, (2, 2), 0), 0.5)


def test_adjoined_particles_keep_output_and_value():
    problem = mf.Problem(ARCH, random_inputs(ARCH, 4, 0), normal((4, 1), 1))
    network, others = random_network(ARCH, (3, 2), 0), random_network(ARCH, (2, 4), 1)
    joined = measures.adjoin(network, others)
    assert joined.widths == (5, 6)
    same_function(joined, network, problem)
    same_value(joined, network, problem)
    torch.testing.assert_close(joined.kernels[1][2:, 3:], others.kernels[1])
    preactivations = joined.responses(problem.inputs).preactivations
    assert not any(p[m:].any() for p, m in zip(joined.masses, network.widths))
    torch.testing.assert_close(preactivations[0][:, 3:], others.responses(problem.inputs).preactivations[0])


@pytest.mark.parametrize("bias", [False, True])
def test_balance_keeps_the_output_at_the_least_penalty(bias):
    arch = mf.Architecture((2, 3, 3), (mf.Conv(2, bias=bias),), outputs=2)
    network = random_network(arch, (5,), 3, zero_mass=True)
    inputs = random_inputs(arch, 4, 0)
    problem = mf.Problem(arch, inputs, normal((4, 2), 1), penalty=mf.Penalty(input=0.02, readout=0.3))
    balanced = measures.balance(network, 0.02, 0.3)
    torch.testing.assert_close(balanced(inputs), network(inputs), rtol=1e-10, atol=1e-12)
    total = 0.0
    for j in range(5):
        squares = network.kernels[0][j].square().sum().item() + (network.biases[0][j].item() ** 2 if bias else 0.0)
        total += network.masses[0][j].item() * math.sqrt(squares) * network.readout[:, j].norm().item()
    terms = problem.terms(balanced)
    assert (terms.input + terms.readout).item() == pytest.approx(2 * math.sqrt(0.02 * 0.3) * total, rel=1e-12)
