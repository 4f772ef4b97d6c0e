"""Finite networks: the four scalings, the exact passage to particles and back, sampling and its rate."""

import copy
import math

import pytest
import torch
from hypothesis import given
from strategies import architectures, normal, random_inputs, random_network, seeded, seeds
from torch import nn

import meanfield as mf
from meanfield import starts
from meanfield.finite import FiniteCNN, sample, sequential
from meanfield.finite.network import from_sequential

SCALINGS = ("mean_field", "ntk", "standard", "mup")


def architecture(*, layers=2, bias=True, readout="flatten", activation="tanh", outputs=2, channels=3):
    stack = (
        mf.Conv(3, padding=1, stride=2, activation=activation, bias=bias),
        mf.Conv((2, 1), activation="relu", pooling="average"),
    )
    if layers == 2:
        return mf.Architecture((channels, 7, 6), stack, readout, outputs)
    return mf.Architecture(
        (channels, 4, 4), (mf.Conv(3, padding=1, activation=activation, bias=bias),), readout, outputs
    )


def inputs_for(arch, count=5, dtype=torch.float64):
    return torch.rand((count, *arch.input_shape), generator=seeded(99), dtype=torch.float64).to(dtype)


def drawn_parameters(arch, widths, dtype=torch.float64):
    kernels = [normal(shape, seed, dtype) for seed, shape in enumerate(arch.kernel_shapes(widths))]
    biases = [normal((m,), 20 + m, dtype) if layer.bias else None for m, layer in zip(widths, arch.layers)]
    return kernels, normal(arch.readout_shape(widths[-1]), 10, dtype), biases


def uneven(arch, widths, seed=0):
    """A particle network with uneven masses."""
    kernels, readout, biases = drawn_parameters(arch, widths)
    masses = [torch.rand(m, generator=seeded(seed + m), dtype=torch.float64).square() + 0.01 for m in widths]
    return mf.ParticleNetwork(arch, [p / p.sum() for p in masses], kernels, readout, biases)


def by_torch_layers(network, inputs):
    """The same network from torch.nn.Conv2d layers with the divisions of the scaling written out."""
    divisor = {"mean_field": lambda m: m, "ntk": math.sqrt, "standard": lambda m: 1, "mup": lambda m: 1}[
        network.scaling.name
    ]
    signal = inputs
    for layer, kernel, bias in zip(network.architecture.layers, network.kernels, network.biases):
        plain = nn.Conv2d(
            kernel.shape[1], kernel.shape[0], layer.kernel, layer.stride, layer.padding, bias=False, dtype=inputs.dtype
        )
        with torch.no_grad():
            plain.weight.copy_(kernel)
        g = plain(signal) / divisor(kernel.shape[1]) + (0 if bias is None else bias[:, None, None])
        signal = torch.tanh(g) if layer.h.name == "tanh" else g.relu()
        signal = nn.AvgPool2d(layer.pool_size)(signal) if layer.pooling == "average" else signal
    if network.architecture.readout == "average":
        return torch.einsum("km,nmhw->nk", network.readout, signal) / signal[0, 0].numel() / divisor(network.widths[-1])
    return (
        torch.einsum("kmq,nmq->nk", network.readout, signal.flatten(2))
        / signal[0, 0].numel()
        / divisor(network.widths[-1])
    )


class TestFunction:
    @pytest.mark.parametrize("scaling", SCALINGS)
    @pytest.mark.parametrize("readout", ["average", "flatten"])
    def test_equals_torch_layers_with_the_divisions_written_out(self, scaling, readout):
        arch = architecture(readout=readout)
        network = FiniteCNN(arch, *drawn_parameters(arch, (5, 4)), scaling)
        torch.testing.assert_close(
            network(inputs_for(arch)), by_torch_layers(network, inputs_for(arch)), rtol=1e-12, atol=1e-13
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_mean_field_equals_uniform_particles_bit_for_bit(self, dtype):
        arch = architecture()
        kernels, readout, biases = drawn_parameters(arch, (5, 4), dtype)
        masses = [torch.full((m,), 1 / m, dtype=dtype) for m in (5, 4)]
        network = mf.ParticleNetwork(arch, masses, kernels, readout, biases)
        inputs = inputs_for(arch, dtype=dtype)
        output = FiniteCNN.from_particles(network)(inputs)
        assert torch.equal(output, network(inputs))
        assert output.dtype == dtype

    @pytest.mark.parametrize("scaling", SCALINGS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_particles_compute_the_same_function(self, scaling, bias):
        arch = architecture(bias=bias)
        network = FiniteCNN(arch, *drawn_parameters(arch, (5, 4)), scaling)
        particles = network.particles()
        torch.testing.assert_close(
            particles(inputs_for(arch)), network(inputs_for(arch)).detach(), rtol=1e-12, atol=1e-13
        )
        assert [p.tolist() for p in particles.masses] == [[1 / 5] * 5, [1 / 4] * 4]
        back = FiniteCNN.from_particles(particles, scaling)
        for ours, theirs in zip(back.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)

    def test_stored_sizes_of_the_scalings(self):
        """One function, three sizes of the stored kernels: w, w / sqrt(m), w / m (twice)."""
        arch = architecture(channels=4)
        particles = FiniteCNN(arch, *drawn_parameters(arch, (16, 9))).particles()
        stored = {scaling: FiniteCNN.from_particles(particles, scaling) for scaling in SCALINGS}
        for scaling, power in (("mean_field", 0), ("ntk", 0.5), ("standard", 1), ("mup", 1)):
            tensors = [*stored[scaling].kernels, stored[scaling].readout]
            for tensor, whole, m in zip(tensors, [*particles.kernels, particles.readout], (4, 16, 9), strict=True):
                torch.testing.assert_close(tensor.detach(), whole / m**power, rtol=1e-13, atol=0)

    def test_particles_are_a_frozen_copy_unless_attached(self):
        arch = architecture()
        network = FiniteCNN(arch, *drawn_parameters(arch, (5, 4)))
        frozen, before = network.particles(), network(inputs_for(arch)).detach()
        assert not any(tensor.requires_grad for tensor in frozen.tensors())
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
        assert torch.equal(frozen(inputs_for(arch)), before)
        network.particles(attached=True)(inputs_for(arch)).sum().backward()
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in network.parameters())

    def test_state_dict_and_copy(self):
        arch = architecture()
        network = FiniteCNN(arch, *drawn_parameters(arch, (5, 4)))
        other = copy.deepcopy(network)
        with torch.no_grad():
            other.readout.zero_()
        assert not other(inputs_for(arch)).any()
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(inputs_for(arch)), network(inputs_for(arch)))
        assert "widths=(5, 4), scaling='mean_field'" in repr(network)


class TestRandomStart:
    @pytest.mark.parametrize("scaling", SCALINGS)
    def test_order_one_at_every_width(self, scaling):
        """Root mean square of features and of the output (times sqrt(m) for mean_field and mup) does not drift from
        width 16 to 256.
        """
        arch = mf.Architecture((1, 5, 5), (mf.Conv(3, padding=1), mf.Conv(3, padding=1)), "flatten", outputs=40)
        inputs = inputs_for(arch, 8)
        sizes = []
        for width in (16, 256):
            network = FiniteCNN.random(arch, (width, width), inputs, seeded(1), scaling)
            output = network(inputs).detach().square().mean().sqrt()
            features = network.particles().features(inputs)
            sizes.append(
                [
                    *(f.square().mean().sqrt() for f in features),
                    output * (math.sqrt(width) if scaling in ("mean_field", "mup") else 1),
                ]
            )
        small, large = torch.tensor(sizes)
        # over 16 channels a root mean square has a relative deviation of about 1/4; a factor of width would be 4 or 16
        assert bool(((small / large).log().abs() < math.log(2)).all())
        assert bool(((large > 0.1) & (large < 4)).all())

    def test_ntk_and_standard_start_at_the_same_function(self):
        arch = architecture()
        ntk, standard = (
            FiniteCNN.random(arch, (6, 5), inputs_for(arch), seeded(3), scaling) for scaling in ("ntk", "standard")
        )
        torch.testing.assert_close(ntk(inputs_for(arch)), standard(inputs_for(arch)), rtol=1e-12, atol=1e-13)

    def test_mup_divides_the_readout_of_standard_by_the_root_of_its_width(self):
        arch = architecture()
        mup, standard = (
            FiniteCNN.random(arch, (6, 5), inputs_for(arch), seeded(3), scaling) for scaling in ("mup", "standard")
        )
        assert all(torch.equal(a, b) for a, b in zip(mup.kernels, standard.kernels, strict=True))
        torch.testing.assert_close(mup.readout, standard.readout / math.sqrt(5), rtol=1e-14, atol=0)

    @pytest.mark.parametrize(("activations", "gains"), [(("relu", "tanh"), (2, 1)), (("gelu", "softplus"), (2, 1))])
    def test_he_variance(self, activations, gains):
        """He et al. 2015, eq. (10): variance gain / fan-in; 5 standard errors of 4,000 and more draws."""
        arch = mf.Architecture((3, 8, 8), [mf.Conv(3, activation=each) for each in activations], outputs=1)
        network = FiniteCNN.random(arch, (160, 40), inputs_for(arch), seeded(0), "standard")
        for kernel, expected in zip(network.kernels, (gains[0] / 27, gains[1] / (160 * 9)), strict=True):
            assert abs(float(kernel.detach().square().mean()) / expected - 1) < 5 * math.sqrt(2 / kernel.numel())

    @pytest.mark.parametrize(("scaling", "power"), [("standard", 1), ("mup", 2)])
    @pytest.mark.parametrize(("readout", "positions"), [("average", 1), ("flatten", 9)])
    def test_readout_variance(self, readout, positions, scaling, power):
        """positions / m (mup: m^2), as a flattened readout is divided by its positions; 5 standard errors of 4,000
        draws.
        """
        arch = mf.Architecture((1, 5, 5), (mf.Conv(3),), readout, outputs=40)
        drawn = FiniteCNN.random(arch, (100,), inputs_for(arch), seeded(0), scaling).readout.detach()
        assert abs(float(drawn.square().mean()) * 100**power / positions - 1) < 5 * math.sqrt(2 / 4000)

    def test_mean_field_is_the_particle_start(self):
        arch = architecture()
        network = FiniteCNN.random(arch, (6, 5), inputs_for(arch), seeded(3))
        start = starts.start(arch, (6, 5), inputs_for(arch), seeded(3))
        assert all(torch.equal(a, b) for a, b in zip(network.particles().kernels, start.kernels))

    def test_dtype_follows_the_inputs(self):
        arch = architecture()
        for scaling in SCALINGS:
            network = FiniteCNN.random(arch, (6, 5), inputs_for(arch, dtype=torch.float32), seeded(), scaling)
            assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


class TestSample:
    def contributions(self, network, inputs):
        """c_i(x) = <u_i, f_i(x)>, (M, N, K): for one layer F = sum_i p_i c_i and F_m is a mean of m draws of it."""
        read = network.architecture.readout_features(network.features(inputs)[0])
        return torch.einsum("km,nm->mnk", network.readout, read)

    def one_layer(self):
        arch = architecture(layers=1, readout="average")
        return uneven(arch, (12,)), inputs_for(arch)

    def test_unbiased_with_the_exact_variance_for_one_layer(self):
        """Mean and mean square of F_m - F over 600 seeds against their exact values, and the control without masses."""
        network, inputs = self.one_layer()
        c, p, width, seeds = self.contributions(network, inputs), network.masses[0], 8, 600
        exact = torch.einsum("m,mnk->nk", p, c)
        torch.testing.assert_close(network(inputs), exact, rtol=1e-12, atol=1e-13)
        variance = torch.einsum("m,mnk->nk", p, (c - exact).square())
        with torch.no_grad():
            outputs = torch.stack([sample(network, (width,), seeded(seed))(inputs) for seed in range(seeds)])
        standard_error = (variance / width / seeds).sqrt()
        assert bool(((outputs.mean(0) - exact).abs() < 4.5 * standard_error).all())
        # the mean square is within 5 of its own standard errors, about sqrt(2 / seeds)
        ratio = (outputs - exact).square().mean(0) * width / variance
        assert bool(((ratio - 1).abs() < 5 * math.sqrt(2 / seeds)).all())
        # control: drawing uniformly has another mean, which this test would see
        assert bool(((c.mean(0) - exact).abs() > 9 * standard_error).any())

    def test_channels_are_drawn_with_their_kernels(self):
        """Every channel is one of the particles, and the kernel between two channels is that of the drawn pair."""
        arch = architecture(channels=1)
        network = uneven(arch, (7, 5))
        drawn = sample(network, (9, 8), seeded(4))
        first = (drawn.kernels[0][:, None] == network.kernels[0][None]).flatten(2).all(2)  # (9, 7)
        last = (drawn.readout[:, :, None] == network.readout[:, None]).movedim(0, 2).flatten(2).all(2)  # (8, 5)
        assert first.sum(1).tolist() == [1] * 9
        assert last.sum(1).tolist() == [1] * 8
        i, j = first.int().argmax(1), last.int().argmax(1)
        assert torch.equal(drawn.kernels[1], network.kernels[1][j][:, i])
        assert torch.equal(drawn.biases[0], network.biases[0][i])

    def squared_errors(self, network, inputs, exact, width, seeds=150):
        """|F_m - exact|^2, averaged over images and outputs, of networks sampled with `seeds` seeds, (seeds,)."""
        with torch.no_grad():
            draws = torch.stack([sample(network, (width, width), seeded(seed))(inputs) for seed in range(seeds)])
        return (draws - exact).square().mean((1, 2))

    def influence(self, network, inputs):
        """lim m E|F_m - F|^2 = sum over layers of the variance, under p, of dF/dp (the delta method), averaged as
        above.
        """
        masses = [p.clone().requires_grad_() for p in network.masses]
        varied = mf.ParticleNetwork.unchecked(
            network.architecture, masses, network.kernels, network.readout, network.biases
        )
        outputs = varied(inputs).flatten()
        total = 0.0
        for output in outputs:
            for p, slope in zip(network.masses, torch.autograd.grad(output, masses, retain_graph=True)):
                total += float(p @ (slope - p @ slope).square())
        return total / len(outputs)

    def test_error_falls_like_one_over_m_with_the_exact_constant(self):
        """Two layers, m = 32, 128, 512: slope -1 of log E|F_m - F|^2 and the delta-method constant at the largest m.

        Intervals: four standard errors of the measured means, and 0.2 (slope), 0.1 (constant) for the terms of order
        m^-2.
        """
        network = uneven(architecture(channels=1), (12, 10))
        inputs = inputs_for(network.architecture)
        errors = [self.squared_errors(network, inputs, network(inputs), m) for m in (32, 128, 512)]
        means = torch.stack([e.mean() for e in errors])
        relative = torch.stack([e.std() / len(e) ** 0.5 for e in errors]) / means
        # least squares on three points a factor 4 apart is the difference of the outer two
        slope = float((means[2] / means[0]).log()) / math.log(16)
        assert abs(slope + 1) < 4 * float(relative[[0, 2]].norm()) / math.log(16) + 0.2
        constant = 512 * float(means[2]) / self.influence(network, inputs)
        assert abs(constant - 1) < 4 * float(relative[2]) + 0.1

    def test_control_without_the_masses_does_not_converge_to_f(self):
        network = uneven(architecture(channels=1), (12, 10))
        inputs = inputs_for(network.architecture)
        even_masses = [torch.full_like(p, 1 / len(p)) for p in network.masses]
        even = mf.ParticleNetwork(network.architecture, even_masses, network.kernels, network.readout, network.biases)
        exact, bias = network(inputs), float((even(inputs) - network(inputs)).square().mean())
        ignored = self.squared_errors(even, inputs, exact, 256, seeds=10).mean()
        assert 0.5 * bias < float(ignored) < 2 * bias
        assert bias > 20 * float(self.squared_errors(network, inputs, exact, 256, seeds=10).mean())

    def test_massless_particles_are_never_drawn(self):
        network, _ = self.one_layer()
        masses = network.masses[0].clone()
        masses[::2] = 0
        thinned = mf.ParticleNetwork(
            network.architecture, [masses / masses.sum()], network.kernels, network.readout, network.biases
        )
        drawn = sample(thinned, (400,), seeded())
        assert not bool((drawn.kernels[0][:, None] == network.kernels[0][None, ::2]).flatten(2).all(2).any())

    def test_generator_decides(self):
        network, inputs = self.one_layer()
        first, again, other = (sample(network, (6,), seeded(seed))(inputs) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestBadInput:
    def test_names(self):
        arch = architecture()
        with pytest.raises(ValueError, match=r"scaling='meanfield' is unknown.*did you mean 'mean_field'"):
            FiniteCNN(arch, *drawn_parameters(arch, (5, 4)), "meanfield")
        with pytest.raises(ValueError, match="scaling='nkt' is unknown"):
            FiniteCNN.random(arch, (5, 4), inputs_for(arch), seeded(), "nkt")

    def test_uneven_masses(self):
        with pytest.raises(
            ValueError, match=r"masses\[0\] are not uniform \(up to .* relative\).*draw one with finite.sample"
        ):
            FiniteCNN.from_particles(uneven(architecture(), (5, 4)))

    def test_widths_and_shapes(self):
        arch = architecture()
        with pytest.raises(ValueError, match=r"widths=\(5,\) has 1 entries; the architecture has 2 layers"):
            sample(uneven(arch, (5, 4)), (5,), seeded())
        with pytest.raises(ValueError, match="widths=0 must be an integer of at least 1"):
            FiniteCNN.random(arch, (5, 0), inputs_for(arch), seeded(), "standard")
        kernels, readout, biases = drawn_parameters(arch, (5, 4))
        with pytest.raises(ValueError, match=r"kernels\[1\] has shape .* expected"):
            FiniteCNN(arch, [kernels[0], kernels[1][:, :3]], readout, biases)
        with pytest.raises(ValueError, match=r"readout\[0, 0, 0\] is nan"):
            FiniteCNN(arch, kernels, readout * torch.nan, biases)
        with pytest.raises(ValueError, match="the architecture expects"):
            FiniteCNN(arch, kernels, readout, biases)(torch.zeros(2, 1, 7, 6))


@given(architectures(), seeds)
def test_a_particle_network_as_a_sequential_is_the_same_function(arch, seed):
    network, inputs = random_network(arch, (3, 4, 2)[: arch.depth], seed), random_inputs(arch, 3, seed)
    torch.testing.assert_close(sequential(network)(inputs).detach(), network(inputs), rtol=1e-10, atol=1e-12)
    back = from_sequential(sequential(network), network)
    for tensor, own in zip(back.tensors(), network.tensors()):
        torch.testing.assert_close(tensor, own, rtol=1e-12, atol=0)
