import math

import pytest
import torch
from strategies import random_inputs, seeded

import meanfield as mf
from meanfield import starts
from meanfield.problem import project_bounds

ARCH = mf.Architecture((1, 3, 3), (mf.Conv(2, bias=True), mf.Conv(2, padding=1)))


@pytest.mark.parametrize("kind", starts.STARTS)
@pytest.mark.parametrize("width", [8, 256])
def test_start_has_preactivations_of_order_one_at_every_width(kind, width):
    arch = mf.Architecture(
        (2, 5, 5), (mf.Conv(3, padding=1, activation="tanh", bias=True), mf.Conv(3, activation="relu"), mf.Conv(2))
    )
    inputs = random_inputs(arch, 6, 1)
    network = starts.start(arch, [width] * 3, inputs, seeded(0), kind)
    for g in network.responses(inputs).preactivations[1:]:
        assert g.square().mean().sqrt().item() == pytest.approx(1, rel=1e-9)
        assert g.mean((0, 2, 3)).square().mean().sqrt() < 1.5
        assert g.square().mean((0, 2, 3)).sqrt().median() > 0.1
    assert all(torch.equal(p, torch.full_like(p, 1 / width)) for p in network.masses)


@pytest.mark.parametrize("width", [8, 256])
def test_first_preactivations_do_not_shrink_with_the_number_of_channels(width):
    arch = mf.Architecture((16, 3, 3), (mf.Conv(1),))
    inputs = random_inputs(arch, 200, 3)
    g = starts.start(arch, [width], inputs, seeded(1)).responses(inputs).preactivations[0]
    # g = 16^(-1/2) sum_c zeta_c x_c is standard normal; the kernels, width x 16 of them, carry the spread
    assert g.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / (16 * width)))


def kernel_amplitude(kind, width):
    arch = mf.Architecture((1, 4, 4), (mf.Conv(2), mf.Conv(2)))
    network = starts.start(arch, [width, 32], random_inputs(arch, 4, 0), seeded(0), kind)
    return network.amplitudes(1, mf.Penalty().norms(network.kernels[1])).mean().item()


@pytest.mark.parametrize("kind", starts.STARTS)
def test_start_has_amplitudes_that_tend_to_a_limit(kind):
    assert kernel_amplitude(kind, 1024) == pytest.approx(kernel_amplitude(kind, 256), rel=0.5)


@pytest.mark.parametrize("kind", starts.STARTS)
def test_same_seed_same_start_and_another_seed_another(kind, device):
    inputs = random_inputs(ARCH, 3, 0).to(device)
    draw = lambda seed: starts.start(ARCH, (4, 3), inputs, seeded(seed), kind).tensors()  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(draw(5), draw(5)))
    assert not torch.equal(draw(5)[-1], draw(6)[-1])


@pytest.mark.parametrize("kind", starts.STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_start_follows_the_inputs(kind, dtype, device):
    inputs = random_inputs(ARCH, 3, 0, dtype).to(device)
    network = starts.start(ARCH, (6, 3), inputs, seeded(0), kind)
    assert {(t.dtype, t.device.type) for t in network.tensors()} == {(dtype, device.type)}
    assert network.responses(inputs).preactivations[1].square().mean().item() == pytest.approx(1, rel=1e-4)


def test_anchored_kernels_are_least_norm_on_the_anchors():
    arch = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="tanh"), mf.Conv(2)))
    inputs = random_inputs(arch, 2, 0)
    network = starts.start(arch, (20, 3), inputs, seeded(0))
    rows = arch.layers[1].patches(network.features(inputs)[0]).flatten(0, 1)
    kernels = network.kernels[1].flatten(1)  # rows of A^T alpha: no part outside the row space
    inside = kernels @ torch.linalg.pinv(rows) @ rows
    torch.testing.assert_close(inside, kernels, rtol=1e-9, atol=1e-9)


def test_anchors_are_sampled_from_many_images():
    arch = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="tanh"), mf.Conv(2)))
    inputs = random_inputs(arch, 300, 0)  # 300 images with 4 positions exceed the anchor rows
    network = starts.start(arch, (16, 3), inputs, seeded(0))
    assert network.responses(inputs).preactivations[1].square().mean().item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("kind", starts.STARTS)
def test_a_drawn_start_is_the_start_moved_inside_the_bounds(kind):
    inputs = random_inputs(ARCH, 3, 0)
    free = mf.Problem(ARCH, inputs, [1.0, -1.0, 0.0])
    plain = starts.start(ARCH, (6, 3), inputs, seeded(1), kind)
    assert all(torch.equal(a, b) for a, b in zip(starts.draw(free, (6, 3), seeded(1), kind).tensors(), plain.tensors()))
    tight = mf.Problem(ARCH, inputs, free.targets, penalty=mf.Penalty(input_bound=0.5, amplitude_bound=0.2))
    assert tight.excess(plain) > 0.1
    drawn = starts.draw(tight, (6, 3), seeded(1), kind)
    assert tight.excess(drawn) <= 1e-12
    expected = project_bounds(tight, plain).tensors()
    assert all(torch.equal(a, b) for a, b in zip(drawn.tensors(), expected))


def test_start_names_the_bad_argument():
    inputs = random_inputs(ARCH, 2, 0)
    with pytest.raises(ValueError, match=r"kind='anchor' is unknown.*did you mean 'anchored'"):
        starts.start(ARCH, (3, 2), inputs, seeded(0), "anchor")
    with pytest.raises(ValueError, match=r"widths=\(3,\) has 1 entries"):
        starts.start(ARCH, (3,), inputs, seeded(0))
    with pytest.raises(ValueError, match="inputs has shape"):
        starts.start(ARCH, (3, 2), inputs[0], seeded(0))


@pytest.mark.parametrize("kind", starts.STARTS)
def test_black_images_have_a_finite_start(kind):
    """Without a response there is no scale: kernels used to be infinite."""
    network = starts.start(ARCH, (4, 3), torch.zeros(3, 1, 3, 3, dtype=torch.float64), seeded(0), kind)
    bias_free = mf.Architecture((1, 3, 3), (mf.Conv(2), mf.Conv(2, padding=1), mf.Conv(2)))
    black = starts.start(bias_free, (4, 3, 2), torch.zeros(3, 1, 3, 3, dtype=torch.float64), seeded(0), kind)
    assert all(bool(each.isfinite().all()) for each in (*network.tensors(), *black.tensors()))
