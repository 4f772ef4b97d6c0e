"""Networks made one: unions and ensembles, averages and their statistics, what must stay untouched."""

import copy
import random

import pytest
import torch
from strategies import normal, random_network
from torch import nn
from torch_networks import KINDS, SMALL, blocks, drawn, normed, normed_blocks, shuffled, tensors

import meanfield as mf
from meanfield.fusion import METHODS, Ensemble, fuse
from meanfield.fusion.signals import by_channel, signals
from meanfield.validation import Misuse

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_union_is_the_ensemble_of_networks_of_any_widths(kind, dtype, tolerance):
    networks = [KINDS[kind](width, seed).to(dtype) for seed, width in enumerate((4, 4, 6))]
    images = SMALL.to(dtype)
    found = fuse(*networks[:2], images, "union", others=networks[2:])
    mean = sum(network(images) for network in networks) / 3
    assert float((found(images) - mean).abs().max()) < tolerance
    assert float((fuse(*networks[:2], images, "ensemble", others=networks[2:])(images) - mean).abs().max()) < tolerance
    assert float((found(images) - networks[0](images)).abs().max()) > 1e-2


def test_a_union_of_particles_is_their_mixture():
    architecture = mf.Architecture((1, 8, 8), (mf.Conv(3, bias=True), mf.Conv(2, activation="tanh")), "flatten", 3)
    a, b = random_network(architecture, (3, 4), 0), random_network(architecture, (5, 2), 1)
    mixed = mf.measures.mixture(a, b, 0.5)
    torch.testing.assert_close(fuse(a, b, SMALL, "union")(SMALL), mixed(SMALL), rtol=0, atol=1e-12)


def test_a_network_of_one_layer_and_one_that_ends_in_its_maps_have_unions():
    ends = [
        lambda seed: drawn(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), seed),
        lambda seed: drawn(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AvgPool2d(4), nn.Flatten()), seed
        ),
    ]
    for make in ends:
        a, b = make(0), make(1)
        torch.testing.assert_close(fuse(a, b, SMALL)(SMALL), (a(SMALL) + b(SMALL)) / 2, rtol=0, atol=1e-13)


def test_a_nonlinear_end_has_an_ensemble_and_no_union():
    a, b = (drawn(nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh()), seed) for seed in (0, 1))
    with pytest.raises(Misuse, match="nonlinear"):
        fuse(a, b, SMALL, "union")
    torch.testing.assert_close(fuse(a, b, SMALL, "ensemble")(SMALL), (a(SMALL) + b(SMALL)) / 2)


@pytest.mark.parametrize("method", ["weights", "activations", "transport"])
def test_a_network_fused_with_itself_in_another_order_is_itself(method):
    """Smooth activations: channels that are constant have no order of their own."""
    network = drawn(nn.Sequential(nn.Conv2d(1, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(180, 3)), 0)
    other = shuffled(network, 1)
    torch.testing.assert_close(fuse(network, other, SMALL, method)(SMALL), network(SMALL), rtol=0, atol=1e-12)
    assert float((fuse(network, other, SMALL, "average")(SMALL) - network(SMALL)).abs().max()) > 1e-2


def test_batch_norm_of_an_average_has_the_statistics_of_the_images():
    a, b = normed_blocks(4, 0), normed_blocks(4, 1)
    found = fuse(a, b, SMALL, "average")
    norms = {"conv1": "norm1", "stage1.0.conv2": "stage1.0.norm2", "stage2.0.shortcut.0": "stage2.0.shortcut.1"}
    (heard,) = signals(found, norms, SMALL)
    for layer, norm in norms.items():
        variance, mean = torch.var_mean(
            by_channel(heard[layer].leaving, len(a.get_submodule(norm).weight)), 1, correction=0
        )
        torch.testing.assert_close(found.get_submodule(norm).running_mean, mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.get_submodule(norm).running_var, variance, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.norm1.weight, (a.norm1.weight + b.norm1.weight) / 2)  # pyright: ignore
    union = fuse(a, b, SMALL, "union")
    assert torch.equal(union.norm1.running_var, torch.cat([a.norm1.running_var, b.norm1.running_var]))  # pyright: ignore


def test_a_repair_changes_hidden_layers_without_batch_norm_alone():
    a, b = normed(4, 0), normed(4, 1)
    found = fuse(a, b, SMALL, "average", repair=True)
    for name in ("0.weight", "8.weight", "11.weight", "11.bias"):
        states = [each.state_dict()[name] for each in (a, b, found)]
        torch.testing.assert_close(states[2], (states[0] + states[1]) / 2, rtol=0, atol=1e-15)
    assert not torch.allclose(found[4].weight, (a[4].weight + b[4].weight) / 2)  # pyright: ignore
    (heard,) = signals(found, ["0", "8"], SMALL)
    for layer, norm in (("0", "1"), ("8", "9")):
        signal = heard[layer].leaving
        variance, mean = torch.var_mean(by_channel(signal, signal.shape[1]), 1, correction=0)
        torch.testing.assert_close(found.get_submodule(norm).running_mean, mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.get_submodule(norm).running_var, variance, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [normed, blocks])
def test_a_repaired_average_has_the_mean_statistics_of_its_parents(make):
    a, b = make(4, 0), make(4, 1)
    names = ["4"] if make is normed else ["conv1", "stage1.1.conv2", "stage2.0.shortcut"]
    found, worse = (fuse(a, b, SMALL, "average", repair=repair) for repair in (True, False))
    heard = [next(signals(each, names, SMALL)) for each in (a, b, found, worse)]
    for name in names:
        spreads = [
            torch.std_mean(by_channel(each[name].leaving, each[name].leaving.shape[1]), 1, correction=0)
            for each in heard
        ]
        for here, there, repaired, _ in zip(*spreads):
            torch.testing.assert_close(repaired, (here + there) / 2, rtol=1e-9, atol=1e-12)
        here, there, _, unrepaired = (deviation for deviation, _ in spreads)
        assert float((unrepaired / ((here + there) / 2)).min()) < 0.9


def test_transport_takes_unequal_widths_and_three_networks():
    for make in (normed, blocks, normed_blocks):
        a, b, c = make(4, 0), make(6, 1), make(3, 2)
        found = fuse(a, b, SMALL, "transport", others=[c], repair=True)
        assert [each.shape for each in tensors(a)[:2]] == [each.shape for each in tensors(found)[:2]]
        assert bool(found(SMALL).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_the_callers_stays(method):
    a, b = normed_blocks(4, 0).train().requires_grad_(), normed_blocks(4, 1)
    a.conv1.weight.requires_grad_(False)  # pyright: ignore
    before = [copy.deepcopy(each.state_dict()) for each in (a, b)]
    numbers = torch.get_rng_state(), random.getstate()
    found = fuse(a, b, SMALL, method)
    assert torch.equal(numbers[0], torch.get_rng_state())
    assert random.getstate() == numbers[1]
    for network, state in zip((a, b), before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert (a.training, b.training, found.training) == (True, False, False)
    assert torch.is_grad_enabled()
    assert not {each.data_ptr() for each in found.parameters()} & {each.data_ptr() for each in a.parameters()}
    assert not next(found.parameters()).requires_grad
    assert list(found.parameters())[1].requires_grad
    with torch.inference_mode():
        inside = fuse(a, b, SMALL, method)
    inside(SMALL).sum().backward()


def test_modules_that_work_in_place_change_no_image_and_no_result():
    """Also in front of the first layer, where it is the caller's images that they are given."""

    def make(seed, in_place):
        layers = [nn.Conv2d(1, 4, 3), nn.ReLU(in_place), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)]
        return drawn(nn.Sequential(nn.Hardtanh(-0.5, 0.5, in_place), *layers), seed)

    images = SMALL.clone()
    for method in METHODS:
        for repair in {False, method not in ("ensemble", "union")}:
            found = [fuse(make(0, each), make(1, each), images, method, repair=repair) for each in (True, False)]
            assert torch.equal(*(each(SMALL.clone()) for each in found))
    fuse(make(0, True), make(1, True), images, "ensemble")(images)
    assert torch.equal(images, SMALL)


def test_shares_of_an_ensemble_are_one_for_each_member():
    a, b = normed(4, 0).train(), normed(4, 1).eval()
    mixed = Ensemble([a, b], (0.25, 0.75))
    assert (a.training, b.training) == (True, False)
    torch.testing.assert_close(mixed.eval()(SMALL), 0.25 * a(SMALL) + 0.75 * b(SMALL))
    for shares in ([1.0], (0.5, 0.6)):
        with pytest.raises(Misuse, match="must be 2 numbers whose sum is one"):
            Ensemble([a, b], shares)
    with pytest.raises(Misuse, match=r"members=\[\] must be at least one"):
        Ensemble([])


def test_a_slope_of_one_channel_goes_beside_slopes_of_many():
    def make(width, seed):
        return drawn(nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.PReLU(width), nn.Linear(width, 3)), seed)

    a, b = make(1, 0), make(4, 1)
    torch.testing.assert_close(fuse(a, b, SMALL)(SMALL), (a(SMALL) + b(SMALL)) / 2, rtol=0, atol=1e-13)


def test_misuse_names_its_argument():
    a, b = normed(4, 0), normed(6, 1)
    calls = {
        "method": lambda: fuse(a, a, SMALL, "weight"),
        "b": lambda: fuse(a, b, SMALL, "weights"),
        "others[0]": lambda: fuse(a, a, SMALL, "average", others=[b]),
        "repair": lambda: fuse(a, a, SMALL, "union", repair=True),
        "images": lambda: fuse(a, a, SMALL.float()),
        "others": lambda: fuse(a, a, SMALL, others=3),  # pyright: ignore
    }
    for argument, call in calls.items():
        with pytest.raises(Misuse) as caught:
            call()
        assert caught.value.argument == argument
        assert "\n" not in str(caught.value)
    with pytest.raises(Misuse, match=r"b=\(4,\) is the shape of its outputs, not \(3,\)"):
        fuse(a, drawn(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), 0), SMALL, "ensemble")
    with pytest.raises(Misuse, match=r"images=\(40, 1, 8, 7\) is a shape that the network does not take"):
        fuse(a, a, SMALL[..., :7])
    with pytest.raises(Misuse, match="a='ReLU' has no Conv2d and no Linear"):
        fuse(nn.ReLU(), nn.ReLU(), SMALL)
    with pytest.raises(Misuse, match=r"b='torch\.float32"):
        fuse(a, normed(4, 1).float(), SMALL)
    with pytest.raises(ValueError, match=r"images\[1, 0, 2, 3\] is nan"):
        fuse(a, a, SMALL.index_put([torch.tensor(each) for each in (1, 0, 2, 3)], torch.tensor(torch.nan).double()))
    with pytest.raises(Misuse, match="images"):
        fuse(a, a, normal((0, 1, 8, 8), 0))
