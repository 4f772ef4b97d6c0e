"""Losses and activations known by their formula alone: solved to a gap of 1e-6, and as cvxpy solves them."""

import pytest
import reference as slow
import torch
from strategies import normal, random_inputs, seeded

import meanfield as mf
from meanfield import finite, losses, starts
from meanfield.activations import Activation
from meanfield.landscape.join import _is_convex
from meanfield.solvers import arrangements, flow, splitting


def quantile(F, y):
    return torch.maximum(0.3 * (y - F), -0.7 * (y - F))


def quantile_slope(F, y):
    return 0.7 - (y > F).to(F)


def expectile(F, y):
    return (0.7 - 0.4 * (y > F).to(F)) * (F - y) ** 2


def soft_margin(F, y):
    """The hinge with its corner rounded off: squared between margins of 0 and 1, linear below."""
    gap = (1 - y * F).clamp_min(0)
    return torch.where(gap <= 1, 0.5 * gap**2, gap - 0.5)


LOSSES = {
    "quantile": losses.ScalarLoss(
        quantile,
        quantile_slope,
        name="quantile",
        cvxpy=lambda cp, F, y: cp.sum(cp.maximum(0.3 * (y - F), -0.7 * (y - F))),
    ),
    "expectile": losses.ScalarLoss(
        expectile,
        name="expectile",
        supercoercive=True,
        cvxpy=lambda cp, F, y: 0.3 * cp.sum_squares(cp.pos(y - F)) + 0.7 * cp.sum_squares(cp.pos(F - y)),
    ),
    "soft_margin": losses.ScalarLoss(
        soft_margin,
        name="soft_margin",
        labels=True,
        cvxpy=lambda cp, F, y: 0.5 * cp.sum(cp.huber(cp.pos(1 - cp.multiply(y, F)), 1)),
    ),
}
ACTIVATIONS = {
    "soft_sign": Activation(lambda g: g / (1 + g.abs()), bounded=True, derivative_bound=1.0, name="soft_sign"),
    "two_slopes": Activation(
        lambda g: torch.where(g > 0, g, 0.2 * g), homogeneous=True, derivative_bound=1.0, name="two_slopes"
    ),
    "square_plus": Activation(
        lambda g: 0.5 * (g + (g * g + 1).sqrt()), recession="relu", derivative_bound=1.0, name="square_plus"
    ),
}


def problem(loss, activation="tanh", outputs=2):
    layers = (mf.Conv(2, activation=ACTIVATIONS.get(activation, activation)), mf.Conv(2, activation="tanh"))
    arch = mf.Architecture((1, 3, 3), layers, outputs=outputs)
    targets = normal((8, outputs), 5)
    named = LOSSES.get(loss, loss)
    labels = isinstance(losses.make(named), losses.LabelLoss)
    penalty = mf.Penalty(source=2e-3, readout=2e-2, input=2e-3)
    return mf.Problem(arch, random_inputs(arch, 8, 1), targets.sign() if labels else targets, named, penalty)


def program(given, widths=(5, 4)):
    return mf.ConvexProgram.freeze(given, starts.draw(given, widths, seeded(3), "low_rank"))


@pytest.mark.parametrize(
    ("loss", "activation"),
    [*((loss, "tanh") for loss in (*LOSSES, "huber", "hinge")), *(("squared", each) for each in ACTIVATIONS)],
)
def test_the_program_is_solved_to_a_gap_of_a_millionth_and_as_cvxpy_solves_it(loss, activation):
    given = program(problem(loss, activation))
    ours, theirs = splitting.solve(given, 1e-6), slow.solve(given)
    assert ours.status == "optimal"
    assert -1e-12 <= ours.gap <= 1e-6 * ours.value
    assert ours.value == pytest.approx(theirs.value, rel=1e-5)


@pytest.mark.parametrize("loss", ["quantile", "soft_margin", "hinge"])
def test_the_flow_descends_and_bounds_hold_along_subgradients(loss):
    given = problem(loss)
    start = starts.draw(given, (6, 4), seeded(3), "low_rank")
    ended = flow.solve(given, start, steps=60)
    assert ended.value < float(given.value(start))
    solved = splitting.solve(mf.ConvexProgram.freeze(given, ended.network), 1e-6)
    assert ended.value - ended.gap <= solved.value + 1e-9  # the bound at the subgradients
    assert -1e-12 <= solved.gap <= 1e-6 * solved.value


@pytest.mark.parametrize("loss", ["hinge", "quantile", "huber"])
def test_one_relu_layer_has_its_exact_optimum(loss):
    arch = mf.Architecture((1, 3, 3), (mf.Conv((1, 2)),))
    named, targets = LOSSES.get(loss, loss), normal((6,), 5)
    targets = targets.sign() if loss == "hinge" else targets
    given = mf.Problem(arch, random_inputs(arch, 6, 0), targets, named, mf.Penalty(input=2e-3, readout=5e-3))
    exact = arrangements.solve(given)
    assert exact.lower_bound <= exact.value * (1 + 1e-9)
    assert exact.status == "optimal"
    assert exact.value - exact.lower_bound <= 1e-6 * exact.value


def test_the_loss_of_a_state_is_named(tmp_path):
    given, other = problem("huber"), problem(losses.HuberLoss(0.5))
    start = starts.draw(given, (3, 2), seeded(3), "low_rank")
    with mf.limits.within(seconds=0):
        flow.solve(given, start, steps=50, state=tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match=r"its loss is 'huber', here 'huber\(0.5\)'"):
        flow.solve(other, start, steps=50, state=tmp_path / "run.safetensors")


def test_classifiers_train_on_an_object():
    images, labels = normal((12, 1, 4, 4), 0, torch.float32), torch.arange(12) % 3
    network = finite.mlp((1, 4, 4), 3, hidden=(8,), generator=seeded())
    before = finite.evaluate(network, images, labels, loss=losses.HuberLoss()).loss
    expected = losses.HuberLoss().value(network(images).detach(), torch.eye(3)[labels]).mean()
    assert before == pytest.approx(float(expected), rel=1e-6)
    recipe = finite.Recipe(epochs=3, milestones=(), batch_size=6, loss=losses.HuberLoss())
    fitted = finite.fit(network, images, labels, recipe, seed=0)
    assert finite.evaluate(fitted.network, images, labels, loss=losses.HuberLoss()).loss < before
    two = finite.mlp((1, 4, 4), 2, hidden=(8,), generator=seeded())
    with pytest.raises(ValueError, match="loss='hinge' reads 2 classes from 1 output"):
        finite.evaluate(two, images, labels % 2, loss=losses.HingeLoss())
    with pytest.raises(ValueError, match="loss='huber' has no value of an output that is absent"):
        finite.evaluate(network, images, labels, loss=losses.HuberLoss(), heads=((0, 1), (2,)))
    with pytest.raises(ValueError, match="loss='hubr' is unknown"):
        finite.Recipe(loss="hubr")


def test_landscapes_take_an_object():
    given = problem("expectile")
    networks = [starts.draw(given, (3, 2), seeded(seed), "low_rank") for seed in (1, 2)]
    found = mf.landscape.join(*networks, given.inputs, given.targets, loss=given.loss, times=3)
    direct = float(given.loss.value(networks[0](given.inputs), given.targets).mean())
    assert float(found.figures["train loss"][0]) == pytest.approx(direct, rel=1e-12)
    assert _is_convex(given.loss)
