import math
from dataclasses import replace

import pytest
import torch
from networks_at_random import network_at_random
from strategies import random_network
from torch import nn
from torch_networks import residual as users_residual

import meanfield as mf
from meanfield import limits
from meanfield.finite.vgg import residual, vgg
from meanfield.landscape import plane
from meanfield.landscape.evaluation import Evaluation
from meanfield.landscape.objective import Objective
from meanfield.subject import Subject
from meanfield.validation import Misuse

POINTS = torch.tensor([[0.0, 0.0], [0.3, -0.4], [0.3, 0.7], [-0.9, 0.1]], dtype=torch.float64)
RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-12}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(count, shape, seed, dtype, classes=4):
    images = torch.randn(count, *shape, generator=seeded(seed), dtype=torch.float64).to(dtype)
    return images, torch.randint(classes, (count,), generator=seeded(seed + 1))


def plainly(subject, where, images, labels):
    """Loss and accuracy at POINTS by functional_call on all images at once."""
    rows = []
    for a, b in POINTS.tolist():
        outputs = subject(where.at(a, b), images)
        right = (outputs.argmax(1) == labels).double().mean()
        rows.append(torch.stack([nn.functional.cross_entropy(outputs.double(), labels), right]))
    return torch.stack(rows)


def compare(network, images, labels, known=True, where=None):
    """Holds an evaluation against functional_call; known: whether its layers must be known."""
    where = plane(network, seed=1, normalise="layer") if where is None else where
    subject = Subject(network)
    with torch.no_grad():
        wanted = plainly(subject, where, images, labels)
    found = Evaluation(where, {"train": Objective(subject, images, labels)})
    assert (found.plain is None) == known, found.plain
    got = found(POINTS)
    assert torch.allclose(got[:, 0], wanted[:, 0], rtol=RELATIVE[images.dtype], atol=0)
    assert (got[:, 1] - wanted[:, 1]).abs().max() <= (1.5 / len(images) if images.dtype == torch.float32 else 0)
    return found


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("seed", range(25))
def test_chains_of_random_layers_do_what_functional_call_does(seed, dtype):
    network, shape = network_at_random(seed, dtype)
    compare(network, *data(9, shape, seed, dtype))


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("batch_norm", "activation"), [(True, "relu"), (False, "gelu")])
def test_networks_of_the_library_go_in_chains(batch_norm, activation, dtype):
    images, labels = data(20, (1, 8, 8), 3, dtype)
    kind = {"batch_norm": batch_norm, "activation": activation}
    network = residual((1, 8, 8), 4, width=3, **kind, generator=seeded(1), dtype=dtype)
    network.train()(images)  # running statistics that are not the default
    compare(network, images, labels)
    compare(vgg(11, (1, 8, 8), 4, width=2, dropout=0.5, generator=seeded(2), dtype=dtype), images, labels)
    for readout, pooling in (("average", "max"), ("flatten", "average")):
        layers = (mf.Conv(3, padding=1, activation="tanh", pooling=pooling, bias=True), mf.Conv(2, activation="gelu"))
        architecture = mf.Architecture((1, 8, 8), layers, readout, outputs=4)
        particles = random_network(architecture, (5, 3), seed=4).to(dtype=dtype)
        compare(particles, images, labels)
        compare(nn.Sequential(mf.finite.sample(particles, (4, 4), seeded(5)), nn.Tanh()), images, labels)


def unknown():
    """Networks of which a chain would, or might, do something else."""

    class Negated(nn.Conv2d):
        def forward(self, signal):
            return -super().forward(signal)

    hooked = nn.Conv2d(1, 3, 3)
    hooked.register_forward_hook(lambda module, arguments, output: 2 * output)
    entered = nn.ReLU()
    entered.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))
    overridden = nn.Conv2d(1, 3, 3)
    overridden.register_buffer("shift", torch.ones(()))
    parametrised = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 3, 3))
    fixed = nn.Conv2d(1, 3, 3)
    weight = fixed.weight.detach()
    del fixed.weight
    fixed.register_buffer("weight", weight)
    return {
        "a subclass": [Negated(1, 3, 3), nn.ReLU()],
        "a hook": [hooked, nn.ReLU()],
        "a hook before": [nn.Conv2d(1, 3, 3), entered],
        "a parametrisation": [parametrised, nn.ReLU()],
        "a weight that is no parameter": [fixed, nn.ReLU()],
        "circular padding": [nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), nn.MaxPool2d(3, 1), nn.ReLU()],
        "statistics of the batch": [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)],
        "another norm": [nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3)],
        "another activation": [nn.Conv2d(1, 3, 3), nn.Hardshrink()],
    }


@pytest.mark.parametrize("kind", unknown())
def test_what_is_not_known_goes_as_it_is(kind):
    torch.manual_seed(0)
    network = nn.Sequential(*unknown()[kind], nn.Flatten(), nn.Linear(48, 4)).double()
    found = compare(network, *data(12, (1, 6, 6), 0, torch.float64), known=False, where=plane(network, 1, "layer"))
    assert found.plain.startswith("it has ")  # known to be unknown, not only found to differ


def test_a_module_of_the_users_own_goes_as_it_is():
    compare(users_residual(3, 0), *data(6, (2, 12, 12), 0, torch.float64, classes=3), known=False)


def test_a_chain_that_does_something_else_is_not_taken(monkeypatch):
    """A layer read wrongly, here LeakyReLU of slope -2 as if it were nondecreasing, is noticed before it is used."""
    from meanfield.landscape import layers

    torch.manual_seed(0)
    bent = [nn.Conv2d(1, 3, 3, padding=1), nn.LeakyReLU(-2.0), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)]
    network, (images, labels) = nn.Sequential(*bent), data(12, (1, 6, 6), 0, torch.float32)
    compare(network, images, labels)
    monkeypatch.setitem(layers.RISES, nn.LeakyReLU, lambda module: True)
    found = compare(network, images, labels, known=False)
    assert found.plain == "the chain of its layers does something else"


def test_shared_modules_and_tied_weights_move_together():
    torch.manual_seed(0)
    shared, relu = nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(inplace=True)
    tied = nn.Conv2d(2, 2, 3, padding=1)
    tied.weight = shared.weight
    layers = [nn.ReLU(inplace=True), shared, relu, shared, relu, tied, relu, nn.Flatten(), nn.Linear(50, 4)]
    images, labels = data(10, (2, 5, 5), 0, torch.float64)
    before = images.clone()
    compare(nn.Sequential(*layers).double(), images, labels, where=plane(nn.Sequential(*layers), seed=1))
    # functional_call works in place on what it is given
    compare(nn.Sequential(*layers[:-2], nn.Hardshrink(), *layers[-2:]), images, labels, known=False)
    assert torch.equal(images, before)


def test_blocks_batches_and_loaders_change_nothing():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)).double()
    (images, labels), where = data(700, (1, 8, 8), 0, torch.float64), plane(network, seed=1)
    subject = Subject(network)
    whole = Evaluation(where, {"train": Objective(subject, images, labels)})(POINTS)
    uneven = [(images[:1], labels[:1]), (images[1:650], labels[1:650]), (images[650:], labels[650:])]
    with limits.memory(limits.held_memory() / 2**30 + 0.02):
        tight = Evaluation(where, {"train": Objective(subject, uneven)})
        assert torch.allclose(tight(POINTS), whole, rtol=1e-12, atol=0)
    mean = Evaluation(where, {"train": Objective(subject, uneven, loss=nn.functional.cross_entropy)})
    assert torch.allclose(mean(POINTS), whole, rtol=1e-12, atol=0)
    alone = torch.cat([Evaluation(where, {"train": Objective(subject, uneven)})(point[None]) for point in POINTS])
    assert torch.allclose(alone, whole, rtol=1e-12, atol=0)


def test_data_sets_stand_side_by_side_and_points_are_counted():
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).double()
    (images, labels), where, subject = data(20, (1, 3, 3), 0, torch.float64), plane(network, seed=1), Subject(network)
    sets = {
        "train": Objective(subject, images[:12], labels[:12]),
        "held out": Objective(subject, images[12:], labels[12:]),
    }
    found = Evaluation(where, sets)
    assert list(found.figures) == ["train loss", "train accuracy", "held out loss", "held out accuracy"]
    figures = found(POINTS)
    assert figures.shape == (4, 4)
    assert figures.dtype == torch.float64
    for column, objective in zip((0, 2), sets.values()):
        wanted = torch.tensor([objective.score(where.at(a, b)).loss for a, b in POINTS.tolist()])
        assert torch.allclose(figures[:, column], wanted.double(), rtol=1e-6)
    assert found(POINTS[:0]).shape == (0, 4)
    assert found.evaluations == 4
    chosen = torch.tensor([7, 0, 7])
    single = found.losses(POINTS, "held out", chosen)
    assert found.evaluations == 4
    with torch.no_grad():
        outputs = subject(where.at(*POINTS[1].tolist()), images[12:])
    wanted = nn.functional.cross_entropy(outputs, labels[12:], reduction="none")[chosen]
    assert torch.allclose(single[1], wanted, rtol=1e-12)
    everything = found.losses(POINTS, "train", torch.arange(12))
    assert torch.allclose(everything.mean(1), figures[:, 0], rtol=1e-12)


def test_terms_of_j_are_those_of_the_problem_and_a_broken_bound_is_told():
    layers = (mf.Conv(3, activation="tanh", bias=True), mf.Conv(2))
    architecture = mf.Architecture((1, 6, 6), layers, "flatten", outputs=2)
    network = random_network(architecture, (4, 3), seed=1)
    images, targets = (
        torch.randn(7, 1, 6, 6, generator=seeded(), dtype=torch.float64),
        torch.randn(7, 2, generator=seeded(1)).double(),
    )
    penalty = mf.Penalty(source=0.1, readout=0.2, input=0.3, amplitude_bound=0.5, input_bound=1e-3)
    problem = mf.Problem(architecture, images, targets, "squared", penalty)
    subject, where = Subject(network), plane(network, seed=1)
    objective = Objective(subject, images, targets, loss=problem.loss.value)
    found = Evaluation(where, {"train": objective}, penalty=penalty)
    assert found.plain is None
    assert list(found.figures)[2:] == ["train J", "source", "readout", "input", "excess"]
    for figures, (a, b) in zip(found(POINTS), POINTS.tolist()):
        moved = subject.at(where.at(a, b))
        terms = problem.terms(moved)
        wanted = [terms.loss, terms.total(), *terms[1:], problem.excess(moved)]
        assert figures[[0, 2, 3, 4, 5, 6]].tolist() == pytest.approx([float(each) for each in wanted], rel=1e-12)
        assert figures[6] > 0
        assert math.isnan(figures[1])
    assert "excess" not in Evaluation(where, {"train": objective}, penalty=mf.Penalty()).figures


def test_infinite_losses_stay_and_a_loss_of_zero_is_a_value():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False)).double()
    with torch.no_grad():
        network[1].weight.zero_()
    images, targets = torch.ones(3, 1, 2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    where = plane(network, seed=1)
    where = replace(where, first={"1.weight": torch.full((1, 4), 1e308, dtype=torch.float64)})
    squared = Objective(Subject(network), images, targets, loss=lambda outputs, y: (outputs[:, 0] - y).square())
    found = Evaluation(where, {"train": squared})
    losses = found(torch.tensor([[0.0, 0.0], [1.0, 0.0], [math.nan, 0.0]]))[:, 0]
    assert losses[:2].tolist() == [0.0, math.inf]
    assert math.isnan(losses[2])
    again = found(torch.zeros(1, 2))
    assert again[0, 0] == 0
    assert found.evaluations == 4


def test_wrong_arguments_are_told_by_name():
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).double()
    (images, labels), subject = data(5, (1, 3, 3), 0, torch.float64), Subject(network)
    where, objective = plane(network, seed=1), Objective(subject, images, labels)
    with pytest.raises(Misuse, match="batch_norm='train'"):
        Evaluation(where, {"train": objective}, batch_norm="train")
    with pytest.raises(Misuse, match="objectives"):
        Evaluation(where, {})
    with pytest.raises(Misuse, match="penalty"):
        Evaluation(where, {"train": objective}, penalty=mf.Penalty())
    found = Evaluation(where, {"train": objective})
    for points in (torch.zeros(2), torch.zeros(2, 3), [[0.0, 0.0]]):
        with pytest.raises(Misuse, match="points="):
            found(points)
    with pytest.raises(Misuse, match="name='test'"):
        found.losses(POINTS, "test", torch.tensor([0]))
    for chosen in (torch.tensor([5]), torch.tensor([-1]), torch.tensor([0.5]), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(Misuse, match="chosen="):
            found.losses(POINTS, "train", chosen)
    mean = Evaluation(where, {"train": Objective(subject, images, labels, loss=nn.functional.cross_entropy)})
    with pytest.raises(Misuse, match="loss="):
        mean.losses(POINTS, "train", torch.tensor([0]))


def test_nothing_of_the_callers_changes_also_after_an_error():
    network = residual((1, 8, 8), 4, width=3, generator=seeded(1)).train()
    images, labels = data(8, (1, 8, 8), 0, torch.float32)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    chance = torch.get_rng_state()
    where, subject = plane(network, seed=1), Subject(network)
    found = Evaluation(where, {"train": Objective(subject, images, labels)}, batch_norm="recomputed")
    found(POINTS)
    with pytest.raises(RuntimeError, match="channels"):
        Evaluation(where, {"train": Objective(subject, images[:, :, :, 0], labels)}, batch_norm="recomputed")(POINTS)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(chance, torch.get_rng_state())
