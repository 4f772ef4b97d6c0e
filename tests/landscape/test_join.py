import copy

import pytest
import torch
from strategies import normal, random_network, seeded
from torch import nn
from torch_networks import chain, filled, shuffled

import meanfield as mf
from meanfield import landscape, measures
from meanfield.finite import residual
from meanfield.finite.statistics import recompute
from meanfield.landscape.displacement import DisplacementPath
from meanfield.landscape.join import Joined
from meanfield.landscape.paths import WAYS
from meanfield.landscape.straight import straight
from meanfield.network import ParticleNetwork
from meanfield.validation import Misuse

ARCHITECTURE = mf.Architecture(
    (2, 6, 6),
    (mf.Conv(3, activation="tanh", bias=True, pooling="average"), mf.Conv(2, activation="gelu", bias=True)),
    "flatten",
    outputs=3,
)
IMAGES, LABELS = normal((30, 2, 6, 6), 5), torch.arange(30) % 3
EPS = torch.finfo(torch.float64).eps


def particles(seed, widths=(5, 4)):
    return random_network(ARCHITECTURE, widths, seed)


def normed(seed):
    network = residual((2, 6, 6), 3, width=4, blocks=(1,), generator=seeded(seed), dtype=torch.float64)
    network(normal((20, 2, 6, 6), seed))  # running statistics that are not the default
    return network.eval()


def outputs(network, images=IMAGES):
    with torch.no_grad():
        return network(images)


PAIRS = {"particles": (particles(0), particles(1)), "chain": (chain(0), chain(1)), "residual": (normed(0), normed(1))}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", PAIRS)
def test_a_path_leads_from_the_one_to_the_other(kind, how):
    a, b = PAIRS[kind]
    if kind == "residual" and how == "displacement":
        with pytest.raises(Misuse, match=r"a='Sequential' has residual blocks; displacement goes along a chain"):
            landscape.join(a, b, IMAGES, LABELS, how)
        return
    joined = landscape.join(a, b, IMAGES, LABELS, how, times=3)
    for t, end in ((0, a), (1, b)):
        if kind == "residual" and how != "mixture":
            end = copy.deepcopy(end)
            recompute(end, [IMAGES])
        torch.testing.assert_close(outputs(joined.at(t)), outputs(end), rtol=1e-10, atol=1e-12)
        loss = float(nn.functional.cross_entropy(outputs(end), LABELS))
        assert float(joined.figures["train loss"][t * 2]) == pytest.approx(loss, rel=1e-10)
    middle, score = joined.at(0.5), joined.figures
    assert float(score["train loss"][1]) == pytest.approx(float(nn.functional.cross_entropy(outputs(middle), LABELS)))
    assert float(score["train accuracy"][1]) == float((outputs(middle).argmax(1) == LABELS).double().mean())
    assert isinstance(middle, ParticleNetwork) == (kind == "particles")


@pytest.mark.parametrize("kind", ["particles", "chain"])
def test_fitted_kernels_come_to_the_ends_continuously(kind):
    """At the ends there is nothing to fit; near them little."""
    for ridge in (0.0, 1e-3):
        path = DisplacementPath(*PAIRS[kind], [IMAGES], ridge)
        for t, end in zip((1e-7, 1 - 1e-7), PAIRS[kind]):
            torch.testing.assert_close(outputs(path(t)), outputs(end), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_mixture_has_the_line_of_outputs_and_no_barrier(kind):
    a, b = PAIRS[kind]
    joined = landscape.join(a, b, IMAGES, LABELS, "mixture")
    for t, network in zip(joined.times.tolist(), joined.networks()):
        wanted = (1 - t) * outputs(a) + t * outputs(b)
        torch.testing.assert_close(outputs(network), wanted, rtol=1e-11, atol=1e-12)
    # some hundred roundings of outputs of order one enter a loss of order one, whose slope is at most 2
    assert joined.barrier["train loss"] <= 1000 * EPS
    assert float(joined.rise("train loss").min()) < -1e-3
    assert not joined.warnings


@pytest.mark.parametrize("kind", PAIRS)
def test_a_copy_in_another_order_is_joined_by_its_features_and_not_by_its_weights(kind):
    network, squared = PAIRS[kind][0], nn.functional.mse_loss
    if isinstance(network, ParticleNetwork):
        moved = measures.permute(network, [torch.randperm(width, generator=seeded(width)) for width in network.widths])
    else:
        moved = shuffled(network, 0)
    ways = [how for how in WAYS if (kind, how) != ("residual", "displacement")]
    joins = {how: landscape.join(network, moved, IMAGES, outputs(network), how, loss=squared) for how in ways}
    height = {how: joined.barrier["train loss"] for how, joined in joins.items()}
    assert height["weights"] > 1e-3
    assert max(height[how] for how in ways if how != "weights") < 1e-20


def test_finite_networks_are_matched_and_displaced_as_chains():
    architecture = mf.Architecture((2, 6, 6), (mf.Conv(3, activation="tanh"),) * 2, outputs=3)
    a, b = (mf.finite.FiniteCNN.random(architecture, (4, 3), IMAGES, seeded(seed), scaling="mup") for seed in (0, 1))
    for how in ("matched", "displacement"):
        joined = landscape.join(a, b, IMAGES, LABELS, how, times=3)
        for t, end in ((0, a), (1, b)):
            torch.testing.assert_close(outputs(joined.at(t)), outputs(end), rtol=1e-10, atol=1e-12)


def single(first, second, read):
    """F = read * second * first * x on one pixel."""
    architecture = mf.Architecture((1, 1, 1), (mf.Conv(1, activation="identity"),) * 2)
    one = torch.ones(1, dtype=torch.float64)
    kernels = [first * one.reshape(1, 1, 1, 1), second * one.reshape(1, 1, 1, 1)]
    return ParticleNetwork(architecture, [one, one], kernels, read * one[None])


def test_the_displacement_of_one_particle_is_known():
    """f_t = z_t x, wanted (1 - t) w_A z_A x + t w_B z_B x: the quotient less the line of kernels, over 1 + ridge."""
    (z, w, u), (y, v, r), ridge, t = (1.0, 2.0, -1.0), (3.0, 0.5, 2.0), 0.25, 0.3
    inputs = normal((7, 1, 1, 1), 0)
    found = DisplacementPath(single(z, w, u), single(y, v, r), [inputs[:4], inputs[4:]], ridge)(t)
    line = [(1 - t) * a + t * b for a, b in zip((z, w, u), (y, v, r))]
    second = line[1] + (((1 - t) * w * z + t * v * y) / line[0] - line[1]) / (1 + ridge)
    wanted = ((1 - t) * u * w * z + t * r * v * y) / (second * line[0])
    third = line[2] + (wanted - line[2]) / (1 + ridge)
    for tensor, value in zip((*found.kernels, found.readout), (line[0], second, third)):
        assert float(tensor) == pytest.approx(value, rel=1e-12)


def test_a_large_ridge_leaves_the_kernels_of_the_matched_line_and_none_the_wanted_preactivations():
    a, b = PAIRS["chain"]
    path = DisplacementPath(a, b, [IMAGES], 1e12)
    for parameter, wanted in zip(path(0.3).parameters(), straight(a, path.second, 0.3).parameters()):
        if parameter.ndim > 1:  # biases are free
            torch.testing.assert_close(parameter, wanted, rtol=1e-8, atol=1e-8)
    few = IMAGES[:3]  # twelve positions for twenty unknowns and a bias
    path = DisplacementPath(a, b, [few], 0.0)
    found = outputs(path(0.3)[:4], few)
    torch.testing.assert_close(found, 0.7 * outputs(a[:4], few) + 0.3 * outputs(path.second[:4], few))


def test_particles_split_into_clones_move_as_the_whole():
    a, b = particles(0), particles(1, (3, 6))
    clones = measures.split(a, 0, 2, torch.tensor([0.25, 0.75], dtype=torch.float64))
    whole, parts = (DisplacementPath(each, b, [IMAGES], 1e-2)(0.4) for each in (a, clones))
    assert parts.widths[0] > whole.widths[0]
    torch.testing.assert_close(outputs(parts), outputs(whole), rtol=1e-9, atol=1e-10)


def test_networks_of_other_widths():
    a, b = particles(0), particles(1, (3, 6))
    penalty = mf.Penalty()
    for how in ("displacement", "mixture"):
        joined = landscape.join(a, b, IMAGES, LABELS, how, times=(0.25, 0.5), penalty=penalty)
        assert joined.times.tolist() == [0, 0.25, 0.5, 1]
        assert joined.at(0.25).widths == ((7, 9) if how == "displacement" else (8, 10))
    for how, message in (("weights", "only mixture and displacement"), ("matched", "a matching needs equal ones")):
        with pytest.raises(Misuse, match=message):
            landscape.join(a, b, IMAGES, LABELS, how)


def test_J_is_the_problems_own():
    bounded = mf.Penalty(source=0.1, readout=0.2, input=0.3, amplitude_bound=100.0, input_bound=50.0)
    problem = mf.Problem(ARCHITECTURE, IMAGES, LABELS, "softmax", bounded)
    held_out = (IMAGES[:8] + 1, LABELS[:8])
    joined = landscape.join(
        particles(0), particles(1), IMAGES, LABELS, times=4, penalty=bounded, loss=problem.loss.value, held_out=held_out
    )
    for index, network in enumerate(joined.networks()):
        assert float(joined.figures["train J"][index]) == pytest.approx(float(problem.value(network)), rel=1e-12)
        terms = problem.terms(network)
        for name in ("source", "readout", "input"):
            assert float(joined.figures[name][index]) == pytest.approx(float(getattr(terms, name)), rel=1e-12)
    assert set(joined.barrier) == {
        *(f"{data} {figure}" for data in ("train", "held out") for figure in ("loss", "accuracy", "J")),
        *("source", "readout", "input"),
    }
    other = mf.Problem(ARCHITECTURE, *held_out, "softmax", bounded)
    assert float(joined.figures["held out J"][0]) == pytest.approx(float(other.value(particles(0))), rel=1e-12)
    tight = mf.Penalty(input_bound=1.0)
    broken = landscape.join(particles(0), particles(1), IMAGES, LABELS, penalty=tight)
    assert bool(broken.figures["train J"].isinf().all())


def test_barriers_are_largest_rises_above_the_chord():
    times = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    figures = {name: torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64) for name in ("train loss", "train accuracy")}
    joined = Joined("weights", times, figures, lambda t: chain(0))
    assert joined.chord("train loss").tolist() == [1, 1.25, 2]
    assert joined.barrier == {"train loss": 1.75, "train accuracy": 0.0}
    assert joined.relative["train loss"] == 1.4


def test_batch_norm_has_the_statistics_of_the_images_and_says_so():
    a, b = PAIRS["residual"]
    joined = landscape.join(a, b, IMAGES, LABELS, times=3)
    assert "norm1, stage1.0.norm1" in joined.warnings[0]
    middle = joined.at(0.5)
    signal = middle.conv1(IMAGES)
    torch.testing.assert_close(middle.norm1.running_mean, signal.mean((0, 2, 3)).detach())
    torch.testing.assert_close(middle.norm1.running_var, signal.var((0, 2, 3), correction=0).detach())
    assert not middle.training
    assert middle.norm1.momentum == 0.1
    wanted = a.conv1.weight.lerp(b.conv1.weight, 0.5)
    torch.testing.assert_close(middle.conv1.weight, wanted.detach())


def test_a_loss_of_which_nothing_is_known_is_named():
    a, b = PAIRS["chain"]
    concave = landscape.join(a, b, IMAGES, LABELS, "mixture", loss=lambda outputs, targets: -outputs.square().sum(1))
    assert concave.barrier["train loss"] > 0
    assert "if it is convex in the outputs" in concave.warnings[0]
    targets = normal((30, 3), 1)
    squared = mf.losses.make("squared").value
    assert not landscape.join(a, b, IMAGES, targets, "mixture", loss=squared).warnings


def test_float32_goes_through_every_way():
    a, b = (particles(seed).to(dtype=torch.float32) for seed in (0, 1))
    for how in WAYS:
        joined = landscape.join(a, b, IMAGES.float(), LABELS, how, times=3)
        assert joined.at(0.5).dtype == torch.float32
        assert bool(joined.figures["train loss"].isfinite().all())


def test_what_does_not_fit_is_refused():
    a, b = PAIRS["chain"]
    first = PAIRS["particles"][0]
    cases = [
        ((a, first, IMAGES, LABELS), {}, "b='ParticleNetwork' joins none of another kind"),
        ((a, b, IMAGES, LABELS), {"penalty": mf.Penalty()}, "penalty=.* is of ParticleNetworks"),
        ((a, b, IMAGES, LABELS), {"times": (0.5, 1.5)}, "times=1.5 must lie between 0 and 1"),
        ((a, b, IMAGES, LABELS), {"how": "line"}, "how='line' is unknown"),
        ((a, chain(1, nn.Tanh), IMAGES, LABELS), {}, r"b='1' is Tanh\(\) there and ReLU\(\)"),
        ((a, chain(1, nn.Tanh), IMAGES, LABELS), {"how": "displacement"}, r"b='Tanh\(\)' is where the first"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(Misuse, match=message):
            landscape.join(*arguments, **options)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    networks = [filled(nn.Sequential(*layers), 0)] * 2
    with pytest.raises(Misuse, match="a='1' is a BatchNorm2d, whose tensors no least squares gives"):
        landscape.join(*networks, IMAGES, LABELS, "displacement")


@pytest.mark.parametrize("how", WAYS)
def test_networks_and_random_numbers_stay_as_they_were(how):
    a, b = (network.train() for network in (normed(0), normed(1)))
    before = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in (a, b)]
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def fails(outputs, targets):
        raise RuntimeError("no loss")

    for loss in (None, fails):
        try:
            landscape.join(a, b, IMAGES, LABELS, how, loss=loss, times=3)
        except (RuntimeError, Misuse):
            assert loss is fails or how == "displacement"
    assert torch.equal(torch.get_rng_state(), state)
    for network, kept in zip((a, b), before):
        assert network.training
        assert all(parameter.requires_grad for parameter in network.parameters())
        assert all(torch.equal(tensor, kept[name]) for name, tensor in network.state_dict().items())


def test_batch_norm_along_a_line_is_that_of_a_surface_with_its_statistics_recomputed():
    """One image as well, which leaves a linear layer's norm no variance; torch's running ones divide by one less."""
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    a, b = (filled(nn.Sequential(*copy.deepcopy(layers)), seed) for seed in (0, 1))
    images, targets = normal((5, 1, 4, 4), 3), torch.tensor([0, 1, 2, 3, 0])
    for count in (5, 1):
        data = images[:count], targets[:count]
        joined = landscape.join(a, b, *data, times=3).figures["train loss"]
        surface = landscape.surface(a, landscape.line(a, b), *data, None, batch_norm="recomputed", extent=0.5)
        torch.testing.assert_close(joined, surface.at([[t, 0.0] for t in (-0.5, 0.0, 0.5)]), rtol=1e-12, atol=0)
