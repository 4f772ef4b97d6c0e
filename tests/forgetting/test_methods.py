"""Each way to learn a task after others, against what it should find in closed form."""

import pytest
import torch
from strategies import normal, seeded
from torch import nn
from torch.nn import functional

from meanfield.finite import Recipe, fit, residual
from meanfield.finite.terms import Batch
from meanfield.forgetting import (
    EWC,
    L2SP,
    Anchor,
    Distillation,
    FineTuning,
    FrozenTrunk,
    Joint,
    LwF,
    Replay,
    Task,
    divided,
    learn,
    score,
)
from meanfield.forgetting.methods import Past
from meanfield.forgetting.tasks import united
from meanfield.validation import Misuse

RECIPE = Recipe(epochs=2, batch_size=8, learning_rate=0.05, milestones=(), warm_up=0)
CONVERGED = Recipe(
    epochs=100, batch_size=100, learning_rate=0.4, momentum=0.5, milestones=(), warm_up=0, loss="squared"
)


def flat(outputs, inputs=4):
    """A linear model, whose minima can be written down."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs, bias=False, dtype=torch.float64))
    with torch.no_grad():
        network[1].weight.copy_(normal((outputs, inputs), 5))
    return network


def two_tasks(classes=((0, 1), (2, 3)), counts=(12, 9), inputs=4):
    """Of the first no image has two entries, so that its squared loss has a diagonal Hessian, here the identity."""
    first = 2 * functional.one_hot(torch.arange(counts[0]) % inputs, inputs).double()
    orthogonal = torch.linalg.qr(normal((counts[1], inputs), 1)).Q * counts[1] ** 0.5
    mixed = orthogonal @ (torch.eye(inputs) + normal((inputs, inputs), 2) / 8)  # well conditioned, and not diagonal
    images = [each[:, None, None] for each in (first, mixed)]
    labels = [torch.tensor(group)[torch.arange(count) * 5 // 3 % len(group)] for group, count in zip(classes, counts)]
    return tuple(Task(*each) for each in zip(images, labels, classes))


def normal_equations(task, outputs, strength=0.0, point=0.0):
    """argmin_W of mean 1/2 |W x - e_c|^2 + strength / 2 (W - point)^2, W and what is no number (outputs, inputs)."""
    x, y = task.images.flatten(1), functional.one_hot(task.labels, outputs).double()
    strength, point = (torch.as_tensor(each).expand(outputs, x.shape[1]).double() for each in (strength, point))
    gram, cross = x.T @ x / len(x), y.T @ x / len(x)
    return torch.stack([torch.linalg.solve(gram + s.diag(), b + s * p) for s, b, p in zip(strength, cross, point)])


def weight(network):
    return network[1].weight.detach()


def batch_normed():
    return residual((1, 4, 4), 4, width=2, generator=seeded(), dtype=torch.float64)


def images_of_four():
    images = torch.rand((24, 1, 4, 4), generator=seeded(3), dtype=torch.float64)
    return divided(images, torch.arange(24) % 4, ((0, 1), (2, 3)))


def same_bits(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_ewc_finds_the_joint_minimum_where_the_fisher_information_is_the_whole_hessian():
    """With squared loss it is, exactly, where the images of the first task have one entry each: N_A / N_B times the
    quadratic about the minimum of A is then the loss of A up to a constant, in units of the mean loss of B.
    """
    a, b = two_tasks()
    found = learn(flat(4), (a, b), EWC(12 / 9), CONVERGED, heads="one")
    torch.testing.assert_close(weight(found.networks[0]), normal_equations(a, 4), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weight(found.network), normal_equations(united((a, b)), 4), rtol=1e-9, atol=1e-9)


def test_ewc_adds_a_quadratic_for_every_old_task():
    a, b = two_tasks()
    points = (flat(4), learn(flat(4), (a,), FineTuning(), RECIPE).network)
    last = Task(normal((5, 1, 1, 4), 8), torch.tensor([4, 5, 4, 5, 4]), (4, 5))
    terms = EWC(3.0).stage(Past(points[0], points, (a, b), "one", "squared", 0), last).terms
    moved = flat(4)
    with torch.no_grad():
        moved[1].weight += 0.3
    information = [task.images.flatten(1).square().mean(0) for task in (a, b)]
    expected = sum(
        1.5 * float((each * (weight(moved) - weight(point)).square()).sum()) for each, point in zip(information, points)
    )
    assert sum(float(term(moved).detach()) for term in terms) == pytest.approx(expected, rel=1e-12)
    assert expected > 0


def test_the_penalty_of_ewc_is_not_zero_and_has_a_gradient():
    """A pitfall of public tools: with nothing moved it is 0, and twice as far it is four times as large."""
    (a, b), network = images_of_four(), batch_normed()
    found = learn(network, (a,), FineTuning(), RECIPE)
    (term,) = EWC(2.0).stage(Past(network, found.networks, (a,), "task", "cross_entropy", 0), b).terms
    values = []
    for step in (0.0, 1.0, 2.0):
        moved = batch_normed()
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.copy_(found.network.get_parameter(name) + step * 0.1)
        value = term(moved)
        values.append(value.detach())
    value.backward()
    assert float(values[0]) == 0 < float(values[1])
    assert float(values[2]) == pytest.approx(4 * float(values[1]), rel=1e-9)
    assert bool(moved.conv1.weight.grad.any())
    assert bool(moved.linear1.weight.grad[:2].any())
    assert not bool(moved.linear1.weight.grad[2:].any())  # the head of the other task


def test_l2_sp_is_a_ridge_towards_the_old_point_and_towards_zero_in_the_new_rows():
    a, b = two_tasks()
    found = learn(flat(5), (a, b), L2SP(0.3, "1", 0.7), CONVERGED, heads="one")
    old = weight(found.networks[0])
    strength = torch.tensor([0.3, 0.3, 0.7, 0.7, 0.0], dtype=torch.float64)[:, None].expand(5, 4)
    expected = normal_equations(b, 5, strength, torch.cat([old[:2], torch.zeros(3, 4, dtype=torch.float64)]))
    torch.testing.assert_close(weight(found.network), expected, rtol=1e-9, atol=1e-9)


def test_l2_sp_pulls_rows_of_the_new_classes_to_zero_and_leaves_those_of_later_tasks():
    """From rows that are not zero, as where every task trains its own head."""
    a, b = two_tasks()
    network = flat(5)
    network[1].weight.data = normal((5, 4), 21)
    (term,) = L2SP(0.3, "1", 0.7).stage(Past(network, (network,), (a,), "task", "squared", 0), b).terms
    moved = flat(5)
    moved[1].weight.data = normal((5, 4), 22)
    term(moved).backward()
    now, old = weight(moved), weight(network)
    expected = torch.cat([0.3 * (now - old)[:2], 0.7 * now[2:4], torch.zeros(1, 4)])
    torch.testing.assert_close(moved[1].weight.grad, expected, rtol=1e-12, atol=0)


def test_an_anchor_keeps_its_point_and_says_which_it_is():
    point, precision = {"1.weight": normal((4, 4), 3)}, {"1.weight": torch.ones(4, 4).double()}
    term = Anchor(point, precision)
    before = float(term(flat(4)).detach())
    assert Anchor({"1.weight": 2 * point["1.weight"]}, precision).settings != term.settings
    assert Anchor(point, {"1.weight": 2 * precision["1.weight"]}).settings != term.settings
    point["1.weight"] += 1
    precision["1.weight"] += 1
    assert float(term(flat(4)).detach()) == before


def test_lwf_pulls_the_outputs_of_every_old_head_to_their_old_shares():
    """d/dz of the cross-entropy of softmax(z / T) to q is (softmax(z / T) - q) / T, image by image."""
    older, network, images = flat(5), flat(5), normal((6, 1, 1, 4), 2)
    with torch.no_grad():
        network[1].weight.copy_(normal((5, 4), 11))
    term = Distillation(older, ((0, 1), (3, 2)), strength=0.4, temperature=2.5)
    term(network, Batch(images, torch.zeros(6, dtype=torch.int64), network(images))).backward()
    x, expected = images.flatten(1), torch.zeros(5, 4, dtype=torch.float64)
    for head in ([0, 1], [3, 2]):
        now, then = ((x @ weight(each).T / 2.5)[:, head].softmax(1) for each in (network, older))
        expected[head] = 0.4 / 2.5 * (now - then).T @ x / 6
    torch.testing.assert_close(network[1].weight.grad, expected, rtol=1e-12, atol=1e-15)
    assert older[1].weight.grad is None


def test_lwf_holds_a_head_per_task_or_one_of_all_old_classes():
    a, b = two_tasks()
    last = Task(normal((2, 1, 1, 4), 8), torch.tensor([4, 5]), (4, 5))
    for heads, expected in (("task", [[0, 1], [2, 3]]), ("one", [[0, 1, 2, 3]])):
        latest = flat(6)
        latest[1].weight.data += 1
        (term,) = LwF(1.0).stage(Past(flat(6), (flat(6), latest), (a, b), heads, "cross_entropy", 0), last).terms
        assert term.heads == expected
        assert torch.equal(weight(term.older), weight(latest))


def test_replay_of_everything_is_joint_training_from_the_old_network():
    a, b = images_of_four()
    found = learn(batch_normed(), (a, b), Replay(None), RECIPE, 3)
    both = fit(found.networks[0], torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels]), RECIPE, 3,
               heads=((0, 1), (2, 3)))  # fmt: skip
    assert same_bits(found.network, both.network)
    assert same_bits(learn(batch_normed(), (a, b), Replay(100), RECIPE, 3).network, both.network)  # 12 there are
    assert not same_bits(learn(batch_normed(), (a, b), Replay(4), RECIPE, 3).network, both.network)


def test_joint_training_begins_anew():
    a, b = images_of_four()
    found = learn(batch_normed(), (a, b), Joint(), RECIPE, 3)
    both = united((a, b))
    whole = fit(batch_normed(), both.images, both.labels, RECIPE, 3, heads=((0, 1), (2, 3)))
    assert same_bits(found.network, whole.network)


def test_a_frozen_trunk_keeps_statistics_and_with_heads_every_old_answer():
    a, b = images_of_four()
    found = learn(batch_normed(), (a, b), FrozenTrunk("linear1"), RECIPE)
    before, after = (each.state_dict() for each in found.networks)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"linear1.weight", "linear1.bias"}
    assert torch.equal(before["linear1.weight"][:2], after["linear1.weight"][:2])
    first, last = (score(each, (a, b)) for each in found.networks)
    assert first[0] == last[0]
    assert last[1].loss < first[1].loss
    assert all(parameter.requires_grad for parameter in found.network.parameters())
    tuned = learn(batch_normed(), (a, b), FineTuning(), RECIPE).network.state_dict()
    assert not torch.equal(before["norm1.running_mean"], tuned["norm1.running_mean"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EWC(0.0), "strength=0.0 must be greater than 0"),
        (lambda: LwF(1.0, temperature=0), "temperature=0 must be greater than 0"),
        (lambda: Replay(0), "images=0 must be an integer of at least 1"),
        (lambda: Anchor({}, {"w": torch.ones(2)}), "precision='w' has shape .* no point"),
        (lambda: Anchor({}, {}), "precision={} must be of one parameter at least"),
        (
            lambda: Anchor({"w": torch.ones(2)}, {"w": torch.ones(2)})(flat(4)),
            "network='Sequential' has no parameter w",
        ),
        (lambda: Distillation(flat(4), ((0, 1),), temperature=0), "temperature=0 must be greater than 0"),
        (lambda: Distillation(flat(4), ((0, 1), (1, 2))), "heads=.* no class twice"),
        (
            lambda: learn(batch_normed(), images_of_four(), FrozenTrunk("fc"), RECIPE),
            "readout='fc' must name the last linear layer; the network has linear1",
        ),
        (
            lambda: learn(batch_normed(), images_of_four(), L2SP(1.0, "conv1"), RECIPE),
            "readout='conv1' must name the last linear layer",
        ),
    ],
)
def test_misuse(call, message):
    with pytest.raises(Misuse, match=message):
        call()
