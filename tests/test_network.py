import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import architectures, normal, random_inputs, random_network, seeds

import meanfield as mf
from meanfield.network import along_axis

ARCH = mf.Architecture((2, 3, 3), (mf.Conv(2, bias=True), mf.Conv(2)), outputs=2)


@st.composite
def networks(draw, **options):
    arch = draw(architectures(**options))
    return random_network(
        arch, [draw(st.integers(1, 3)) for _ in arch.layers], draw(seeds), zero_mass=draw(st.booleans())
    )


@given(networks(), seeds)
def test_responses_match_the_explicit_sums(network, seed):
    inputs = random_inputs(network.architecture, 2, seed)
    found = network.responses(inputs)
    for n, (g, f, F) in enumerate(slow.respond(network, inputs)):
        np.testing.assert_allclose(found.output[n], F, atol=1e-12)
        for layer in range(network.architecture.depth):
            np.testing.assert_allclose(found.preactivations[layer][n], g[layer], atol=1e-12)
            np.testing.assert_allclose(found.features[layer][n], f[layer], atol=1e-12)


@given(networks(), seeds)
def test_call_and_features_are_parts_of_the_responses(network, seed):
    inputs = random_inputs(network.architecture, 2, seed)
    found = network.responses(inputs)
    assert torch.equal(network(inputs), found.output)
    assert all(torch.equal(a, b) for a, b in zip(network.features(inputs), found.features, strict=True))
    assert torch.equal(network.read(found.features[-1]), found.output)


@given(networks(depths=(2, 3)), seeds)
def test_amplitudes_average_over_the_source_masses(network, seed):
    norms = normal(network.kernels[1].shape[:2], seed).abs()
    expected = [sum(norms[j, i] * p for i, p in enumerate(network.masses[0])) for j in range(len(norms))]
    np.testing.assert_allclose(network.amplitudes(1, norms), expected, rtol=1e-13)


@given(networks(), seeds)
def test_uniform_masses_are_a_standard_network_divided_by_its_channels(network, seed):
    widths, arch = network.widths, network.architecture
    uniform = mf.ParticleNetwork(
        arch,
        [torch.full((m,), 1 / m, dtype=torch.float64) for m in widths],
        network.kernels,
        network.readout,
        network.biases,
    )
    signal = random_inputs(arch, 2, seed)
    output = uniform(signal)
    for conv, kernel, bias in zip(arch.layers, network.kernels, network.biases):
        signal = conv.activate(
            conv.convolve(signal, kernel, None) / signal.shape[1] + (0 if bias is None else bias[None, :, None, None])
        )
    flat = signal.flatten(2)
    read = flat.mean(2) if arch.readout == "average" else flat / flat.shape[2]
    torch.testing.assert_close(
        output, torch.einsum("kj...,nj...->nk", network.readout, read) / widths[-1], rtol=1e-12, atol=1e-12
    )


@given(networks(), seeds)
def test_massless_particles_do_not_act(network, seed):
    inputs = random_inputs(network.architecture, 2, seed)
    kept = mf.measures.drop_massless(network)
    torch.testing.assert_close(kept(inputs), network(inputs), rtol=1e-13, atol=1e-13)
    assert all(bool((p > 0).all()) for p in kept.masses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_are_kept(dtype, device):
    network = random_network(ARCH, (3, 2), 0).to(dtype=dtype, device=device)
    responses = network.responses(random_inputs(ARCH, 2, 0, dtype).to(device))
    for tensor in [responses.output, *responses.features, *responses.preactivations, *network.tensors()]:
        assert tensor.dtype == dtype
        assert tensor.device.type == device.type


def test_float32_agrees_with_float64(device):
    network, inputs = random_network(ARCH, (3, 2), 0), random_inputs(ARCH, 2, 0)
    single = network.to(dtype=torch.float32, device=device)(inputs.float().to(device))
    torch.testing.assert_close(single.cpu().double(), network(inputs), rtol=1e-5, atol=1e-5)


def test_detach_and_map_keep_every_tensor():
    network = random_network(ARCH, (3, 2), 0).map(lambda t: t.clone().requires_grad_())
    assert all(t.requires_grad for t in network.tensors())
    assert not any(t.requires_grad for t in network.detach().tensors())
    assert len(network.tensors()) == 6
    assert network.map(lambda t: 2 * t).biases[1] is None


def test_repr_names_widths():
    assert repr(random_network(ARCH, (3, 2), 0)) == "ParticleNetwork(widths=(3, 2), dtype=torch.float64, device=cpu)"


def parts(**changes):
    network = random_network(ARCH, (3, 2), 0)
    stated = {
        "masses": network.masses,
        "kernels": network.kernels,
        "readout": network.readout,
        "biases": network.biases,
    }
    return {**stated, **changes}


P, W = parts()["masses"], parts()["kernels"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masses": P[:1]}, "masses has 1 entries; the architecture has 2 layers"),
        ({"kernels": W[:1]}, "kernels has 1 entries"),
        ({"biases": parts()["biases"][:1]}, "biases has 1 entries"),
        (
            {"masses": (P[0][None], P[1])},
            r"masses\[0\] must be a tensor of shape \(M,\), M >= 1, got a tensor of shape \(1, 3\)",
        ),
        ({"masses": (P[0], P[1][:0])}, r"masses\[1\] must be a tensor of shape"),
        ({"masses": ([1.0], P[1])}, r"masses\[0\] must be a torch.Tensor .*not list"),
        ({"kernels": (W[0], W[1][:, :2])}, r"kernels\[1\] has shape \(2, 2, 2, 2\); expected \(2, 3, 2, 2\)"),
        ({"readout": torch.zeros(2, 3, dtype=torch.float64)}, r"readout has shape \(2, 3\); expected \(2, 2\)"),
        ({"biases": None}, r"biases\[0\] is None but layers\[0\].bias=True"),
        (
            {"biases": (parts()["biases"][0], P[1])},
            r"biases\[1\] is a tensor of shape \(2,\) but layers\[1\].bias=False",
        ),
        ({"biases": (P[1], None)}, r"biases\[0\] has shape \(2,\); expected \(3,\)"),
        ({"readout": parts()["readout"].float()}, "all tensors must share one dtype"),
        ({"masses": (P[0] * 1.01, P[1])}, r"masses\[0\] sums to 1.01; masses must sum to 1"),
        (
            {"masses": (torch.tensor([1.2, -0.1, -0.1], dtype=torch.float64), P[1])},
            r"masses\[0\] has the negative entry -0.1",
        ),
        ({"masses": (P[0] * torch.nan, P[1])}, r"masses\[0\]\[0\] is nan"),
        ({"kernels": (W[0] / 0, W[1])}, r"kernels\[0\]\[0, 0, 0, 0\] is -?inf"),
        ({"readout": parts()["readout"] * torch.nan}, r"readout\[0, 0\] is nan"),
        ({"biases": (parts()["biases"][0] / 0, None)}, r"biases\[0\]\[0\] is -?inf"),
    ],
)
def test_constructor_names_the_bad_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        mf.ParticleNetwork(ARCH, **parts(**changes))


def test_half_precision_is_refused():
    half = random_network(ARCH, (3, 2), 0).map(torch.Tensor.half)
    with pytest.raises(ValueError, match=r"one dtype, float32 or float64.*torch.float16"):
        mf.ParticleNetwork(ARCH, half.masses, half.kernels, half.readout, half.biases)


def test_kernels_must_be_tensors():
    with pytest.raises(TypeError, match=r"kernels\[0\] must be a torch.Tensor"):
        mf.ParticleNetwork(ARCH, **parts(kernels=(W[0].numpy(), W[1])))


def test_inputs_of_another_shape_or_dtype_are_refused():
    network = random_network(ARCH, (3, 2), 0)
    with pytest.raises(ValueError, match=r"inputs has shape \(1, 1, 3, 3\); the architecture expects \(N, 2, 3, 3\)"):
        network(torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match=r"inputs are torch.float32 on cpu, the network is torch.float64"):
        network.features(torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize(("shape", "axis"), [((3, 2), 0), ((4, 3), 1), ((4, 3, 5), 1), ((2, 5, 4, 3), 3), ((3,), 0)])
def test_a_vector_along_one_axis(shape, axis):
    vector, tensor = torch.arange(1.0, 4.0), normal(shape, 0).float()
    scaled = tensor * along_axis(vector, tensor, axis)
    for index in range(3):
        assert torch.equal(scaled.select(axis, index), tensor.select(axis, index) * (index + 1))
