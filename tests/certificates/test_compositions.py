"""Compositional features, each realised by kernels of its own, against explicit loops and against networks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given
from strategies import architectures, normal, random_inputs, random_network, seeds

import meanfield as mf
from meanfield import measures
from meanfield.certificates import compositions
from meanfield.certificates.compositions import Compositions

FEATURES = 3
archs = architectures(sides=(2, 4))


def drawn(arch, seed, sources=2, features=FEATURES):
    shapes = arch.kernel_shapes([sources] * (arch.depth - 1) + [1])
    kernels = tuple(normal((features, *shape), seed + k) for k, shape in enumerate(shapes))
    biases = tuple(normal(k.shape[:2], seed + 9) if conv.bias else None for k, conv in zip(kernels, arch.layers))
    return Compositions(arch, kernels, biases)


def problem_of(arch, seed, **penalty):
    penalty = mf.Penalty(**({"source": 0.03, "readout": 0.5, "input": 0.02} | penalty))
    return mf.Problem(arch, random_inputs(arch, 2, seed), normal((2, arch.outputs), seed), penalty=penalty)


def slow_preactivation(found, feature, image):
    """g of one feature on one image; flows are summed without masses, channels of the image are averaged."""
    arch, signal, weights = found.architecture, list(image), np.full(len(image), 1 / len(image))
    for layer, conv in enumerate(arch.layers):
        kernels = slow.array(found.kernels[layer][feature])
        bias = found.biases[layer]
        g = [
            slow.convolve(signal, kernel, weights, 0.0 if bias is None else float(bias[feature, j]), conv)
            for j, kernel in enumerate(kernels)
        ]
        signal, weights = [slow.activate(each, conv) for each in g], np.ones(len(g))
    return g[0]


@given(archs, seeds)
def test_preactivations_and_responses_match_explicit_loops(arch, seed):
    problem, found = problem_of(arch, seed), drawn(arch, seed)
    output, conv = normal((2, arch.outputs), seed + 5), arch.layers[-1]
    expected = [[slow_preactivation(found, r, image) for r in range(FEATURES)] for image in slow.array(problem.inputs)]
    np.testing.assert_allclose(slow.array(found.preactivations(problem.inputs)), expected, atol=1e-11)
    for r in range(FEATURES):
        q = 0.0  # (outputs, positions) or (outputs,)
        for n in range(2):
            h = slow.activate(expected[n][r], conv).flatten() / slow.activate(expected[n][r], conv).size
            q = q + np.outer(slow.array(output)[n], h if arch.readout == "flatten" else [h.sum()])
        assert found.responses(problem, output)[r].item() == pytest.approx((q**2).sum(), rel=1e-9, abs=1e-12)


@given(archs, seeds)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_costs_follow_the_recursion(norm, arch, seed):
    """gamma_1 = lambda_1 |(z, b)|^2, gamma_{l+1} = sum_i 2 sqrt(lambda_s (mu_l + gamma_l,i)) |a_i|."""
    problem, found, mu = problem_of(arch, seed, kernel_norm=norm), drawn(arch, seed), [0.3, 1.7][: arch.depth - 1]
    for r in range(FEATURES):
        first = found.biases[0]
        gamma = [
            0.02 * (float(z.square().sum()) + (0.0 if first is None else float(first[r, i]) ** 2))
            for i, z in enumerate(found.kernels[0][r])
        ]
        for layer in range(1, arch.depth):
            price = [2 * math.sqrt(0.03 * (mu[layer - 1] + each)) for each in gamma]
            flows = found.kernels[layer][r]
            gamma = [
                sum(c * slow.kernel_norm(slow.array(a), problem.penalty) for c, a in zip(price, row)) for row in flows
            ]
        assert found.costs(problem, mu)[r].item() == pytest.approx(gamma[0], rel=1e-10)


@given(archs, seeds)
def test_features_as_a_network_are_its_last_layer(arch, seed):
    """Each has its own sources; masses are uniform, so that kernels are flows times the number of sources."""
    problem, found = problem_of(arch, seed), drawn(arch, seed)
    network = found.network(problem)
    assert network.widths == (*[2 * FEATURES] * (arch.depth - 1), FEATURES)
    torch.testing.assert_close(
        network.responses(problem.inputs).preactivations[-1], found.preactivations(problem.inputs), rtol=1e-9, atol=1e-9
    )
    assert all(torch.equal(p, torch.full_like(p, 1 / len(p))) for p in network.masses)
    assert not network.readout.any()


def test_sources_that_carry_next_to_nothing_are_left_out():
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh", bias=True), mf.Conv(2, activation="tanh")))
    problem, found = problem_of(arch, 0), drawn(arch, 0, sources=4)
    flows = found.kernels[1].clone()
    flows[0, 0, 1] = 0
    flows[1, 0, 2] *= 0.5 * compositions.LEAST_SHARE / flows[1, 0, 2].norm() * flows[1, 0].flatten(1).norm(dim=1).max()
    network = replace(found, kernels=(found.kernels[0], flows)).network(problem)
    assert network.widths == (4 * FEATURES - 2, FEATURES)
    kept = [0, 2, 3, 4, 5, 7, *range(8, 4 * FEATURES)]
    assert torch.equal(network.kernels[0], found.kernels[0].flatten(0, 1)[kept])
    assert torch.equal(network.biases[0], found.biases[0].flatten()[kept])


def sizes(found):
    """|(z, b)| of every first-layer kernel."""
    squares = found.kernels[0].flatten(2).square().sum(2)
    return (squares if found.biases[0] is None else squares + found.biases[0].square()).sqrt()


@given(archs, seeds)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_projection_scales_down_what_breaks_a_bound_and_nothing_else(norm, arch, seed):
    problem = problem_of(arch, seed, kernel_norm=norm, input_bound=1.5, amplitude_bound=1.2)
    found = drawn(arch, seed)
    moved = found.projected(problem)
    shrink = (1.5 / sizes(found)).clamp_max(1)
    torch.testing.assert_close(sizes(moved), sizes(found).clamp_max(1.5), rtol=1e-12, atol=0)
    torch.testing.assert_close(moved.kernels[0], found.kernels[0] * shrink[:, :, None, None, None])
    if found.biases[0] is not None:
        torch.testing.assert_close(moved.biases[0], found.biases[0] * shrink)
    for layer in range(1, arch.depth):
        for r, j in np.ndindex(*found.kernels[layer].shape[:2]):
            flow = sum(slow.kernel_norm(slow.array(a), problem.penalty) for a in found.kernels[layer][r, j])
            expected = found.kernels[layer][r, j] * min(1.0, 1.2 / flow)
            torch.testing.assert_close(moved.kernels[layer][r, j], expected, rtol=1e-12, atol=0)
        if found.biases[layer] is not None:
            torch.testing.assert_close(moved.biases[layer], found.biases[layer].clamp(-1.2, 1.2))
    free = found.projected(problem_of(arch, seed))
    assert all(torch.equal(a, b) for a, b in zip(free.tensors(), found.tensors()))


@given(archs, seeds)
def test_own_features_are_those_of_the_living_particles(arch, seed):
    problem, network = problem_of(arch, seed), random_network(arch, (3, 4, 2)[: arch.depth], seed, zero_mass=True)
    own = compositions.own_features(problem, network, 4)
    alive = network.masses[-1] > 0
    expected = network.responses(problem.inputs).preactivations[-1][:, alive]
    torch.testing.assert_close(own.preactivations(problem.inputs), expected, rtol=1e-10, atol=1e-10)


def test_of_many_sources_the_heaviest_are_kept():
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh", bias=True), mf.Conv(2, activation="tanh")))
    network, problem = random_network(arch, (5, 2), 0), problem_of(arch, 0)
    heavy = network.masses[0].argsort(descending=True)[:2]
    few = measures.select(network, [heavy, torch.arange(2)])
    own = compositions.own_features(problem, network, 2)
    assert own.kernels[0].shape[1] == 2
    expected = few.responses(problem.inputs).preactivations[-1]
    torch.testing.assert_close(own.preactivations(problem.inputs), expected, rtol=1e-12, atol=1e-12)


@given(archs, seeds)
def test_joined_chosen_and_rebuilt_features_stay_themselves(arch, seed):
    first, second = drawn(arch, seed), drawn(arch, seed + 100)
    whole = Compositions(arch, *compositions.joined([first, second]))
    assert len(whole) == 2 * FEATURES
    inputs, order = random_inputs(arch, 2, seed), torch.tensor([4, 0, 3])
    expected = torch.cat([first.preactivations(inputs), second.preactivations(inputs)], 1)
    torch.testing.assert_close(whole.preactivations(inputs), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole[order].preactivations(inputs), expected[:, order], rtol=1e-12, atol=1e-12)
    rebuilt = compositions.with_tensors(first, [2 * t for t in first.tensors()])
    assert all(torch.equal(2 * a, b) for a, b in zip(first.tensors(), rebuilt.tensors()))
    assert [b is None for b in rebuilt.biases] == [b is None for b in first.biases]


@given(archs)
def test_features_of_zero_kernels_are_zero_before_the_last_activation(arch):
    nothing = compositions.zeros_like(problem_of(arch, 0), 2)
    assert [b is None for b in nothing.biases] == [not conv.bias for conv in arch.layers]
    assert len(nothing) == 2
    assert not nothing.preactivations(random_inputs(arch, 2, 0)).any()


def test_blocks_lie_on_the_diagonal_and_nothing_beside_them():
    blocks = [normal((2, 3, 1, 2), 0), normal((1, 1, 1, 2), 1), normal((3, 2, 1, 2), 2)]
    whole = compositions.block_diagonal(blocks)
    expected = torch.zeros(6, 6, 1, 2, dtype=torch.float64)
    expected[:2, :3], expected[2:3, 3:4], expected[3:, 4:] = blocks
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("kernel", [1, (1, 2), 2, (2, 3), 3])
@pytest.mark.parametrize(("padding", "stride"), [(0, 1), (1, 2), ((1, 0), (1, 2)), (0, (2, 1))])
def test_each_feature_is_convolved_as_torch_does(kernel, padding, stride):
    conv = mf.Conv(kernel, padding, stride)
    signal, kernels = normal((2, 3, 4, 5, 6), 0), normal((3, 2, 4, *conv.kernel), 1)
    found = compositions.convolve_each(conv, signal, kernels)
    for r in range(3):
        expected = torch.nn.functional.conv2d(signal[:, r], kernels[r], stride=stride, padding=padding)
        torch.testing.assert_close(found[:, r], expected, rtol=1e-12, atol=1e-12)
