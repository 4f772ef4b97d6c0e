"""Displacements: sums by hand, what stays untouched, permutations that are one, and refusals."""

import pytest
import torch
from strategies import random_network, seeded
from torch import nn

import meanfield as mf
from meanfield import finite, measures
from meanfield.transfer import Displacement, StartLaw
from meanfield.validation import Misuse

IMAGES = torch.rand(7, 1, 6, 6, generator=seeded(1), dtype=torch.float64)
ARCHITECTURE = mf.Architecture((1, 6, 6), (mf.Conv(3, bias=True), mf.Conv(2, activation="tanh")), "flatten", 3)


def module(seed):
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 2), nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(45, 3)).double()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seeded(seed), dtype=torch.float64)
    return network


def cnn(seed):
    return finite.FiniteCNN.random(ARCHITECTURE, (4, 5), IMAGES, seeded(seed))


def particles(seed):
    return cnn(seed).particles()


MAKERS = pytest.mark.parametrize("make", [module, cnn, particles])


def tensors(network):
    return list(network.tensors()) if isinstance(network, mf.ParticleNetwork) else list(network.parameters())


@MAKERS
def test_another_start_gets_the_same_movement_times_alpha(make):
    start, end, other = make(0), make(1), make(2)
    before = [each.detach().clone() for each in (*tensors(start), *tensors(end), *tensors(other))]
    numbers = torch.get_rng_state()
    displacement = Displacement.between(start, end)
    moved = displacement.applied(other, 2.5, IMAGES)
    assert type(moved) is type(other)
    for name, tensor in displacement.subject.sibling(other, "other").items():
        gone = displacement.subject.sibling(moved, "moved")[name] - tensor
        torch.testing.assert_close(gone, 2.5 * displacement.delta[name], rtol=1e-12, atol=1e-12)
    own = displacement.applied(start, images=IMAGES)
    assert all(torch.allclose(a, b, rtol=1e-13, atol=1e-13) for a, b in zip(tensors(own), tensors(end)))
    assert all(torch.equal(a, b) for a, b in zip((*tensors(start), *tensors(end), *tensors(other)), before))
    assert torch.equal(torch.get_rng_state(), numbers)


def test_flags_and_modes_are_the_callers():
    start, other = module(0).train(), module(2).train()
    other[0].weight.requires_grad_(False)
    moved = Displacement.between(start, module(1)).applied(other, images=IMAGES)
    assert start.training
    assert other.training
    assert not moved.training
    assert [each.requires_grad for each in moved.parameters()] == [each.requires_grad for each in other.parameters()]


def test_running_statistics_are_those_of_the_images_and_nobodys_sum():
    start, end = module(0), module(1)
    end[1].running_mean.fill_(1e3)
    displacement = Displacement.between(start, end)
    moved = displacement.applied(module(2), images=IMAGES)
    entering = moved[0](IMAGES)
    torch.testing.assert_close(moved[1].running_mean, entering.mean((0, 2, 3)))
    torch.testing.assert_close(moved[1].running_var, entering.var((0, 2, 3), correction=0))
    assert moved[1].momentum == start[1].momentum
    with pytest.raises(Misuse, match="images=None must be given: the running statistics of 1"):
        displacement.applied(module(2))


@MAKERS
def test_a_consistent_shuffle_is_the_same_network_of_displacements(make):
    displacement = Displacement.between(make(0), make(1))
    shuffled = displacement.shuffled(seeded(5))
    outputs = [each.subject.at(each.delta)(IMAGES) for each in (displacement, shuffled)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    first = next(iter(displacement.delta))
    assert not torch.equal(shuffled.delta[first], displacement.delta[first])


def test_particles_are_permuted_as_measures_are():
    displacement = Displacement.between(particles(0), particles(1))
    generator = seeded(5)
    orders = [torch.randperm(width, generator=generator) for width in (4, 5)]
    wanted = measures.permute(displacement.subject.at(displacement.delta), orders)
    shuffled = displacement.shuffled(seeded(5))
    for found, other in zip(shuffled.subject.at(shuffled.delta).tensors(), wanted.tensors()):
        assert torch.equal(found, other)


@MAKERS
def test_layers_shuffled_apart_keep_their_rows_and_lose_the_function(make):
    displacement = Displacement.between(make(0), make(1))
    shuffled = displacement.shuffled(seeded(5), consistent=False)
    outputs = [each.subject.at(each.delta)(IMAGES) for each in (displacement, shuffled)]
    assert not torch.allclose(*outputs, rtol=1e-3)
    names = list(displacement.delta)
    last = "readout" if "readout" in names else "6.weight"
    for name in names:
        rows = [each.delta[name].flatten(1) if each.delta[name].ndim > 1 else each.delta[name][:, None]
                for each in (displacement, shuffled)]  # fmt: skip
        assert torch.equal(*(each[each.sum(1).argsort()] for each in rows))
    assert torch.equal(displacement.delta[last], shuffled.delta[last])


def test_any_module_is_shuffled_apart_and_chains_alone_consistently():
    start, end = (finite.residual((1, 6, 6), 3, width=2, generator=seeded(seed)) for seed in (0, 1))
    displacement = Displacement.between(start, end)
    assert displacement.shuffled(seeded(), consistent=False).delta.keys() == displacement.delta.keys()
    with pytest.raises(Misuse, match=r"displacement='stage1.0 \(ResidualBlock\)' is no layer of a chain"):
        displacement.shuffled(seeded())
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 2))
    with pytest.raises(Misuse, match=r"displacement='1 \(Conv2d\)' is no layer of a chain"):
        Displacement.between(grouped, grouped).shuffled(seeded())
    norm = nn.Sequential(nn.BatchNorm1d(4))  # no layer, and so no particles
    assert Displacement.between(norm, norm).shuffled(seeded(), consistent=False).delta.keys() == {"0.weight", "0.bias"}


def test_a_tied_weight_is_of_one_layer_and_has_no_particles_of_its_own():
    def tied(seed):
        network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        network[0].weight.data = torch.randn(4, 4, generator=seeded(seed), dtype=torch.float64)
        network[2].weight = network[0].weight
        return network

    displacement = Displacement.between(tied(0), tied(1))
    norms = displacement.norms()
    first = torch.cat([each.flatten() for name, each in displacement.delta.items() if name.startswith("0.")])
    assert norms["0"].displacement == pytest.approx(float(first.norm()))
    assert norms["2"].displacement == pytest.approx(float(displacement.delta["2.bias"].norm()))
    with pytest.raises(Misuse, match=r"displacement='2 \(Linear\)' shares parameters"):
        displacement.shuffled(seeded())


def test_norms_are_those_of_layers_with_their_biases():
    start, end = (cnn(seed).requires_grad_(False) for seed in (0, 1))
    norms = Displacement.between(start, end).norms()
    assert list(norms) == ["kernels.0", "kernels.1", "readout"]
    parts = [start.kernels[0], start.biases[0]]
    assert norms["kernels.0"].start == pytest.approx(float(torch.cat([each.flatten() for each in parts]).norm()))
    gone = (end.readout - start.readout).norm()
    assert norms["readout"].ratio == pytest.approx(float(start.readout.norm() / gone))
    still = Displacement.between(start, start).norms()["readout"]
    assert still.ratio == float("inf")
    assert list(Displacement.between(module(0), module(1)).norms()) == ["0", "1", "3", "6"]


def test_what_cannot_be_moved_is_refused():
    uneven = random_network(ARCHITECTURE, (4, 5), seed=1)
    with pytest.raises(Misuse, match=r"start='masses\[0\]' must be equal"):
        Displacement.between(uneven, uneven)
    with pytest.raises(Misuse, match=r"end='kernels\.0' is"):
        Displacement.between(cnn(0), finite.FiniteCNN.random(ARCHITECTURE, (3, 5), IMAGES, seeded()))
    with pytest.raises(Misuse, match=r"start='readout' is torch\.float32"):
        Displacement.between(cnn(0), cnn(1)).applied(cnn(2).float())
    with pytest.raises(Misuse, match="alpha="):
        Displacement.between(cnn(0), cnn(1)).applied(cnn(2), float("nan"))


class TestStartLaws:
    def test_he_is_that_of_the_networks_here(self):
        network = finite.vgg(8, (1, 6, 6), 10, width=16, fan_in="kernel", generator=seeded())
        told, found = StartLaw.he(network).deviations, StartLaw.measured(network).deviations
        assert told.keys() == found.keys()
        for name, deviation in told.items():
            entries = network.get_parameter(name).numel()  # a root mean square of n normals is known to 1 / sqrt(2 n)
            assert abs(found[name] - deviation) <= 5 * deviation / (2 * entries) ** 0.5

    @pytest.mark.parametrize("scaling", ["ntk", "standard", "mup", "mean_field"])
    def test_finite_networks_have_that_of_their_scaling(self, scaling):
        architecture = mf.Architecture((3, 6, 6), (mf.Conv(3, bias=True),), "flatten", 2)
        images = torch.rand(2, 3, 6, 6, dtype=torch.float64)
        network = finite.FiniteCNN.random(architecture, (300,), images, seeded(), scaling=scaling)
        law = (StartLaw.mean_field if scaling == "mean_field" else StartLaw.he)(network)
        found = StartLaw.measured(network).deviations
        for name, deviation in law.deviations.items():
            assert abs(found[name] - deviation) <= 5 * deviation / (2 * network.get_parameter(name).numel()) ** 0.5

    def test_a_drawn_start_has_its_law_and_leaves_batch_norm(self):
        network = module(0)
        law = StartLaw.he(network).scaled(0.5)
        drawn = law.draw(network, seeded(3))
        assert torch.equal(drawn[1].weight, network[1].weight)
        assert not drawn[0].bias.any()
        expected = 0.5 / 45**0.5
        assert abs(float(drawn[6].weight.detach().square().mean().sqrt()) - expected) < 5 * expected / (2 * 135) ** 0.5
        assert all(each.requires_grad for each in drawn.parameters())

    def test_a_start_of_the_other_kind_is_refused(self):
        with pytest.raises(Misuse, match=r"use StartLaw\.mean_field"):
            StartLaw.he(cnn(0))
        with pytest.raises(Misuse, match=r"use StartLaw\.he"):
            StartLaw.mean_field(finite.FiniteCNN.random(ARCHITECTURE, (2, 2), IMAGES, seeded(), scaling="ntk"))
