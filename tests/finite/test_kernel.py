"""The tangent kernel: against plain autograd, as the mean over draws of finite networks, and its convergence in the
width.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import architectures, normal, random_inputs, seeded, seeds

import meanfield as mf
from meanfield import data, limits
from meanfield.finite import FiniteCNN, kernel
from meanfield.finite.scaling import SCALINGS


def by_autograd(network, inputs):
    """The slow, obvious twin: one backward pass per image through FiniteCNN.forward, then inner products."""
    rows = []
    for image in inputs:
        gradients = torch.autograd.grad(network(image[None]).sum(), list(network.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def perceptron_kernel(inputs, bias=False):
    """F = m^-1/2 sum_j u_j relu(<w_j, x> / sqrt(d) + b_j), w_j ~ N(0, 2), by quadrature over the direction of w in the
    plane of x, x'.

    w = r (cos t, sin t) with E r^2 = 4 in the plane, which leaves averages over t; the trapezoidal rule is spoilt by
    the kinks to order 1/M^2 for the features, and to 1/M for the share of directions in which both are active.
    """
    dimension, points = inputs.shape[1], 400_000
    turn = (np.arange(points) + 0.5) / points * 2 * np.pi
    result = np.zeros((len(inputs), len(inputs)))
    for i, x in enumerate(inputs):
        for j, y in enumerate(inputs):
            lengths, inner = np.linalg.norm(x) * np.linalg.norm(y), x @ y
            apart = np.arccos(np.clip(inner / lengths, -1, 1))
            g, other = np.cos(turn), np.cos(turn - apart)
            features = 4 * lengths / dimension * np.mean(np.maximum(g, 0) * np.maximum(other, 0))
            active = np.mean((g > 0) & (other > 0))
            result[i, j] = features + active * (inner / dimension + bias)
    return result


def digits(count=20):
    return data.load("digits", samples=count).inputs


def layer_architecture(shape, readout="average", **layer):
    return mf.Architecture(shape, (mf.Conv(**layer),), readout)


class TestEmpirical:
    @given(architectures(depths=(1, 2), outputs=(1,)), seeds)
    def test_equals_the_gram_matrix_of_autograd(self, arch, seed):
        inputs = random_inputs(arch, 4, seed)
        for scaling in SCALINGS:
            network = FiniteCNN.random(arch, [3] * arch.depth, inputs, seeded(seed), scaling)
            torch.testing.assert_close(
                kernel.empirical(network, inputs), by_autograd(network, inputs), rtol=1e-10, atol=1e-10
            )

    def test_parameters_are_left_alone(self):
        arch = layer_architecture((1, 4, 4), bias=True)
        inputs = random_inputs(arch, 3, 0)
        network = FiniteCNN.random(arch, (5,), inputs, seeded(0), "ntk")
        with torch.no_grad():
            result = kernel.empirical(network, inputs)
        assert not result.requires_grad
        assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
        assert not inputs.requires_grad

    def test_chunks_do_not_matter(self, monkeypatch):
        arch = mf.Architecture((2, 5, 4), (mf.Conv(2, padding=1, bias=True), mf.Conv(2)))
        inputs = random_inputs(arch, 5, 1)
        network = FiniteCNN.random(arch, (4, 3), inputs, seeded(1), "ntk")
        whole = kernel.empirical(network, inputs)
        monkeypatch.setattr(limits, "BLOCK_BYTES", 1)
        torch.testing.assert_close(kernel.empirical(network, inputs), whole, rtol=1e-13, atol=0)

    def test_dtype_of_the_network(self):
        arch = layer_architecture((1, 3, 3), kernel_size=2)
        inputs = random_inputs(arch, 2, 2, torch.float32)
        network = FiniteCNN.random(arch, (4,), inputs, seeded(2), "ntk")
        assert kernel.empirical(network, inputs).dtype == torch.float32
        assert kernel.infinite(arch, inputs).dtype == torch.float32


COVERED = [
    {"readout": "average"},
    {"readout": "flatten"},
    {"readout": "average", "padding": 1, "stride": (2, 1), "bias": True},
    {"readout": "flatten", "padding": 1, "stride": (1, 2), "bias": True},
    {"readout": "average", "kernel_size": 2, "pooling": "average", "pool_size": 2, "bias": True},
    {"readout": "flatten", "kernel_size": 2, "pooling": "average", "pool_size": (2, 1), "bias": True},
    {"readout": "flatten", "kernel_size": (1, 2), "pooling": "average", "pool_size": (3, 2)},
]


class TestInfinite:
    @pytest.mark.parametrize("layer", COVERED, ids=str)
    def test_is_the_mean_of_the_empirical_kernel_at_a_finite_width(self, layer):
        """With one layer Theta is an average over independent channels: unbiased at every width."""
        arch = layer_architecture((2, 4, 5), **layer)
        inputs = normal((4, *arch.input_shape), 7)
        inputs[0, :, :, :3] = 0  # blank patches
        numbers = seeded(11)
        draws = torch.stack(
            [kernel.empirical(FiniteCNN.random(arch, (16,), inputs, numbers, "ntk"), inputs) for _ in range(400)]
        )
        error = draws.std(0) / math.sqrt(len(draws))
        limit = kernel.infinite(arch, inputs)
        assert bool(((draws.mean(0) - limit).abs() < 4.5 * error).all())
        assert float((error / limit.abs().max()).max()) < 0.05  # a test with power

    def test_one_blank_image(self):
        """g = 0 everywhere: neither features nor slopes, with or without bias, as torch differentiates ReLU at 0."""
        for bias in (False, True):
            arch = layer_architecture((1, 4, 4), bias=bias)
            inputs = torch.stack([torch.zeros(1, 4, 4, dtype=torch.float64), normal((1, 4, 4), 0)])
            network = FiniteCNN.random(arch, (8,), inputs, seeded(0), "ntk")
            for found in (kernel.infinite(arch, inputs), kernel.empirical(network, inputs)):
                assert float(found[0].abs().max()) == 0
                assert float(found[1, 1]) > 0

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("readout", ["average", "flatten"])
    def test_images_of_one_pixel_are_the_fully_connected_case(self, bias, readout):
        inputs = normal((4, 3, 1, 1), 3)
        inputs[3] = -2 * inputs[2]  # opposite directions
        found = kernel.infinite(layer_architecture((3, 1, 1), readout, kernel_size=1, bias=bias), inputs)
        np.testing.assert_allclose(
            found.numpy(), perceptron_kernel(inputs[:, :, 0, 0].numpy(), bias), rtol=0, atol=2e-5
        )

    def test_one_pixel_on_the_diagonal_is_twice_the_mean_square(self):
        """a = 0: A = |x|^2 / C_0 and D = 1/2, hence Theta(x, x) = 3/2 |x|^2 / C_0."""
        inputs = normal((5, 3, 1, 1), 4)
        found = kernel.infinite(layer_architecture((3, 1, 1), kernel_size=1), inputs).diagonal()
        torch.testing.assert_close(found, 1.5 * inputs.flatten(1).square().mean(1), rtol=1e-7, atol=0)

    @given(architectures(depths=(1,), outputs=(1,), activations=("relu",), poolings=("none", "average")), seeds)
    def test_symmetric_positive_and_homogeneous(self, arch, seed):
        inputs = random_inputs(arch, 5, seed)
        found = kernel.infinite(arch, inputs)
        assert torch.equal(found, found.T)
        assert float(torch.linalg.eigvalsh(found).min()) > -1e-7 * float(found.abs().max())
        if not arch.layers[0].bias:
            torch.testing.assert_close(kernel.infinite(arch, 3 * inputs), 9 * found, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("readout", ["average", "flatten"])
    @pytest.mark.parametrize("limit", [30, 200, 3000, 2**22])
    def test_blocks_do_not_matter(self, monkeypatch, readout, limit):
        arch = layer_architecture((2, 5, 5), readout, kernel_size=2, pooling="average", bias=True)
        inputs = random_inputs(arch, 5, 5)
        whole = kernel.infinite(arch, inputs)
        monkeypatch.setattr(kernel, "PAIR_ENTRIES", limit)
        torch.testing.assert_close(kernel.infinite(arch, inputs), whole, rtol=1e-7, atol=0)

    def test_dropped_positions_do_not_count(self):
        """5 x 5 pixels, kernel 2, windows of 3: of 4 x 4 positions the first 3 x 3 are read, which see the first 4 x 4
        pixels.
        """
        arch = layer_architecture((1, 5, 5), kernel_size=2, pooling="average", pool_size=3)
        inputs = random_inputs(arch, 3, 6)
        changed = inputs.clone()
        changed[:, :, 4] = changed[:, :, :, 4] = 9.0
        assert torch.equal(kernel.infinite(arch, changed), kernel.infinite(arch, inputs))

    def test_device(self, device):
        arch = layer_architecture((1, 4, 4), bias=True)
        inputs = random_inputs(arch, 3, 8)
        network = FiniteCNN.random(arch, (6,), inputs, seeded(8), "ntk")
        moved = inputs.to(device)
        torch.testing.assert_close(kernel.infinite(arch, moved).cpu(), kernel.infinite(arch, inputs), rtol=1e-7, atol=0)
        expected = kernel.empirical(network, inputs)
        torch.testing.assert_close(kernel.empirical(network.to(device), moved).cpu(), expected, rtol=1e-10, atol=1e-12)


class TestConvergence:
    WIDTHS = (16, 64, 256, 1024)

    def test_relative_error_falls_like_one_over_the_root_of_the_width(self):
        inputs, arch = digits(20), layer_architecture((1, 8, 8))
        limit = kernel.infinite(arch, inputs)
        errors = np.empty((len(self.WIDTHS), 12))
        for row, width in enumerate(self.WIDTHS):
            for seed in range(12):
                network = FiniteCNN.random(arch, (width,), inputs, seeded(1000 * row + seed), "ntk")
                errors[row, seed] = float((kernel.empirical(network, inputs) - limit).norm() / limit.norm())
        medians = np.median(errors, 1)
        print("median relative Frobenius errors:", dict(zip(self.WIDTHS, medians.round(4).tolist())))
        slope = np.polyfit(np.log(self.WIDTHS), np.log(errors).mean(1), 1)[0]
        # -1/2 by theory; with 12 seeds the fitted slope varies by 0.08 (standard deviation)
        assert -0.65 < slope < -0.35


class TestMisuse:
    @pytest.mark.parametrize(
        ("layers", "outputs", "message"),
        [
            (
                (mf.Conv(2), mf.Conv(2)),
                1,
                "architecture has 2 layers; the limit is in closed form for one layer, see kernel.empirical",
            ),
            ((mf.Conv(2, activation="tanh"),), 1, r"layers\[0\] has activation='tanh'; .* for 'relu'"),
            ((mf.Conv(2, pooling="max"),), 1, r"layers\[0\] has pooling='max'; .* 'none' and 'average'"),
            ((mf.Conv(2),), 3, "architecture has outputs=3; .* take outputs=1"),
        ],
    )
    def test_what_the_limit_does_not_cover(self, layers, outputs, message):
        arch = mf.Architecture((1, 6, 6), layers, outputs=outputs)
        with pytest.raises(ValueError, match=message):
            kernel.infinite(arch, torch.zeros(2, 1, 6, 6))

    def test_one_output_and_the_right_shape(self):
        for outputs, inputs, message in (
            (2, torch.rand(2, 1, 3, 3), "outputs=2"),
            (1, torch.rand(2, 3, 3), r"inputs has shape \(2, 3, 3\)"),
        ):
            arch = mf.Architecture((1, 3, 3), (mf.Conv(2),), outputs=outputs)
            network = FiniteCNN.random(arch, (3,), torch.rand(1, 1, 3, 3), seeded(0), "ntk")
            with pytest.raises(ValueError, match=message):
                kernel.empirical(network, inputs)

    def test_images_are_finite_and_of_a_dtype_in_which_the_kernel_is_a_number(self):
        """The limit of images of whole numbers was a matrix of zeros."""
        arch, images = mf.Architecture((1, 3, 3), (mf.Conv(2),)), torch.ones(2, 1, 3, 3)
        network = FiniteCNN.random(arch, (3,), images, seeded(0), "ntk")
        for of in (partial(kernel.infinite, arch), partial(kernel.empirical, network)):
            with pytest.raises(ValueError, match=r"inputs.dtype=torch.int64 must be torch.float32 or torch.float64"):
                of(images.long())
            with pytest.raises(ValueError, match=r"inputs\[0, 0, 0, 0\] is nan; every entry must be finite"):
                of(images * torch.nan)
        with pytest.raises(ValueError, match=r"inputs are torch.float64, the network is torch.float32; convert"):
            kernel.empirical(network, images.double())


class TestGradient:
    """Of the closed form in the inputs."""

    @staticmethod
    def compare(architecture, inputs, step=1e-5):
        """Against central differences; where a patch turns through the direction of another one they are those of |t|,
        0 up to the step times second derivatives.
        """
        weights = normal((len(inputs), len(inputs)), 7)
        value = lambda images: (kernel.infinite(architecture, images) * weights).sum()  # noqa: E731
        leaf = inputs.clone().requires_grad_()
        (found,) = torch.autograd.grad(value(leaf), leaf)
        moves = step * torch.eye(inputs.numel(), dtype=inputs.dtype).view(-1, *inputs.shape)
        slopes = [(value(inputs + move) - value(inputs - move)) / (2 * step) for move in moves]
        torch.testing.assert_close(found.flatten(), torch.stack(slopes), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("readout", ["average", "flatten"])
    @pytest.mark.parametrize(
        "layer", [{"bias": True, "padding": 1}, {"pooling": "average", "pool_size": 2}, {"stride": 2}], ids=str
    )
    def test_is_that_of_finite_differences(self, readout, layer):
        architecture = layer_architecture((2, 3, 4), readout, kernel_size=2, **layer)
        self.compare(architecture, normal((3, 2, 3, 4), 0))

    def test_where_patches_are_parallel_or_opposite(self):
        first = normal((2, 3, 3), 1)
        inputs = torch.stack([first, 2 * first, -first, torch.full_like(first, 0.7)])  # the last one with itself, too
        self.compare(layer_architecture((2, 3, 3), kernel_size=2, bias=True), inputs)

    def test_of_a_patch_with_itself(self):
        """Theta(x, x) = |x|^2 (1 / d + 1 / d) for one patch of d entries without bias: A = |x|^2 / d, D = 1 / 2."""
        leaf = normal((1, 1, 2, 2), 2).requires_grad_()
        found = kernel.infinite(layer_architecture((1, 2, 2), kernel_size=2), leaf)
        torch.testing.assert_close(found[0, 0], leaf.square().sum() * (1 / 4 + 1 / 2), rtol=1e-14, atol=0)
        (slope,) = torch.autograd.grad(found.sum(), leaf)
        torch.testing.assert_close(slope, 2 * leaf * (1 / 4 + 1 / 2), rtol=1e-13, atol=0)

    def test_is_zero_at_blank_patches_and_right_beside_them(self):
        architecture = layer_architecture((1, 3, 3), kernel_size=2, bias=True)
        inputs = normal((3, 1, 3, 3), 3)
        inputs[0] = 0
        leaf = inputs.clone().requires_grad_()
        (slope,) = torch.autograd.grad(kernel.infinite(architecture, leaf).sum(), leaf)
        assert not slope[0].any()
        rest = inputs[1:].clone().requires_grad_()  # Theta of a blank image and any other one is constant
        (alone,) = torch.autograd.grad(kernel.infinite(architecture, rest).sum(), rest)
        torch.testing.assert_close(slope[1:], alone, rtol=1e-12, atol=1e-14)

    def test_of_second_order_and_in_blocks(self, monkeypatch):
        architecture, leaf = layer_architecture((1, 3, 3), kernel_size=2), normal((5, 1, 3, 3), 4).requires_grad_()
        along, step = normal(leaf.shape, 5), 1e-6
        slope = lambda at, **kept: torch.autograd.grad(kernel.infinite(architecture, at).square().sum(), at, **kept)[0]  # noqa: E731
        monkeypatch.setattr(kernel, "PAIR_ENTRIES", 36)
        found = slope(leaf, create_graph=True)
        (bent,) = torch.autograd.grad((found * along).sum(), leaf)
        monkeypatch.undo()
        torch.testing.assert_close(found.detach(), slope(leaf), rtol=1e-12, atol=1e-14)
        change = (slope(leaf + step * along) - slope(leaf - step * along)) / (2 * step)
        torch.testing.assert_close(bent, change, rtol=1e-6, atol=1e-8)
