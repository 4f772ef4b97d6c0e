import math

import cvxpy as cp
import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, random_targets, seeds

from meanfield import losses
from meanfield.losses import smooth

NAMES = tuple(losses.LOSSES)
named = st.sampled_from(NAMES)
smooth_named = st.sampled_from([name for name in NAMES if name != "hinge"])
twins = st.sampled_from(("squared", "logistic", "softmax"))  # those with a slow twin in `reference`
weights = st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e3])


def batch(name, seed, count=4, outputs=3, spread=3.0):
    loss, outputs_ = losses.make(name), spread * normal((count, outputs), seed)
    return loss, outputs_, loss.check_targets(random_targets(name, outputs, count, seed), count, outputs, outputs_)


@given(twins, seeds)
def test_value_is_the_stated_formula(name, seed):
    loss, F, y = batch(name, seed)
    expected = [slow.loss_value(name, f, t) for f, t in zip(F.numpy(), y.numpy())]
    np.testing.assert_allclose(loss.value(F, y), expected, rtol=1e-13, atol=1e-15 * F.abs().max().item())


@given(smooth_named, seeds)
def test_gradient_matches_finite_differences(name, seed):
    loss, F, y = batch(name, seed)
    step = 1e-5
    for k in range(F.shape[1]):
        move = step * torch.eye(F.shape[1], dtype=F.dtype)[k]
        slope = (loss.value(F + move, y) - loss.value(F - move, y)) / (2 * step)
        torch.testing.assert_close(loss.gradient(F, y)[:, k], slope, rtol=0, atol=1e-9 if name != "huber" else 5.1e-6)


@given(named, seeds)
def test_fenchel_young_is_an_equality_at_the_gradient(name, seed):
    loss, F, y = batch(name, seed)
    s = loss.gradient(F, y)
    torch.testing.assert_close(loss.value(F, y) + loss.conjugate(s, y), (s * F).sum(1), rtol=1e-12, atol=1e-12)


@given(named, seeds)
def test_fenchel_young_is_an_inequality_elsewhere(name, seed):
    loss, F, y = batch(name, seed)
    s = loss.feasible(normal(F.shape, seed + 1), y)
    assert bool((loss.value(F, y) + loss.conjugate(s, y) >= (s * F).sum(1) - 1e-12).all())


@given(twins, seeds)
def test_conjugate_is_the_supremum(name, seed):
    loss, F, y = batch(name, seed, count=2, spread=1.0)
    s = loss.gradient(F, y)
    expected = [slow.numerical_conjugate(name, dual, target) for dual, target in zip(s.numpy(), y.numpy())]
    np.testing.assert_allclose(loss.conjugate(s, y), expected, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "dual", "target"),
    [
        ("logistic", [0.1], [1.0]),
        ("logistic", [-1.1], [1.0]),
        ("logistic", [1.1], [-1.0]),
        ("softmax", [0.1, 0.2, 0.0], 0),
        ("softmax", [-1.2, 0.6, 0.6], 0),
    ],
)
def test_conjugate_is_infinite_outside_its_domain(name, dual, target):
    assert (
        losses.make(name).conjugate(torch.tensor([dual], dtype=torch.float64), torch.tensor([target])).item()
        == torch.inf
    )


@pytest.mark.parametrize(("dual", "target"), [([0.0], [1.0]), ([-1.0], [1.0]), ([1.0], [-1.0])])
def test_logistic_conjugate_vanishes_at_the_ends_of_its_domain(dual, target):
    assert losses.LogisticLoss().conjugate(torch.tensor([dual]), torch.tensor([target])).item() == 0


def test_softmax_duals_below_rounding_of_one_keep_their_sum():
    """Of well-fitted images all entries are tiny: lost at the own class, half of |q|^2 would be missing."""
    loss, y = losses.SoftmaxLoss(), torch.tensor([1])
    outputs = torch.tensor([[0.0, 100.0, -3.0]], dtype=torch.float64)
    t = math.exp(-100) + math.exp(-103)
    for dual in (loss.gradient(outputs, y), loss.feasible(loss.gradient(outputs, y), y)):
        torch.testing.assert_close(dual, torch.tensor([[math.exp(-100), -t, math.exp(-103)]], dtype=torch.float64),
                                   rtol=1e-13, atol=0)  # fmt: skip
    expected = -100 * math.exp(-100) - 103 * math.exp(-103) - t
    assert loss.conjugate(dual, y).item() == pytest.approx(expected, rel=1e-13, abs=0)
    unbalanced = torch.tensor([[1e-20, 0.0, 0.0]], dtype=torch.float64)
    assert loss.conjugate(unbalanced, y).item() == torch.inf
    assert losses.LogisticLoss().conjugate(-dual[:, :1], torch.ones(1, 1)).item() == pytest.approx(
        -101 * math.exp(-100), rel=1e-13, abs=0
    )


@given(named, seeds, st.sampled_from([0.1, 1.0, 100.0]))
def test_feasible_lands_in_the_domain(name, seed, spread):
    loss, F, y = batch(name, seed)
    repaired = loss.feasible(spread * normal(F.shape, seed + 1), y)
    assert bool(loss.conjugate(repaired, y).isfinite().all())


@given(named, seeds, st.floats(0, 1))
def test_feasible_keeps_what_is_feasible_and_its_multiples(name, seed, scale):
    loss, F, y = batch(name, seed)
    s = scale * loss.gradient(F, y)
    torch.testing.assert_close(loss.feasible(s, y), s, rtol=0, atol=1e-14)


def test_feasible_softmax_of_a_row_without_positive_part_is_the_vertex():
    y = torch.tensor([1])
    repaired = losses.SoftmaxLoss().feasible(torch.tensor([[-2.0, -3.0, -1.0]]), y)
    assert repaired.tolist() == [[0.0, 0.0, 0.0]]


@given(named, seeds, weights)
def test_prox_meets_its_optimality_condition(name, seed, weight):
    loss, center, y = batch(name, seed)
    F = loss.prox(center, y, weight)
    scale = 1 + weight * (center.abs() + F.abs())
    assert bool((residual(loss, F, y, weight * (F - center)) <= 1e-13 * scale).all())


def residual(loss, F, y, pull):
    """How far -pull is from a subgradient: at the kink of the hinge all between its two slopes are one."""
    if loss.name != "hinge":
        return (loss.gradient(F, y) + pull).abs()
    margin, v = y * F, y * pull
    rounding = 1e-14 * (1 + margin.abs())
    low, high = (margin < 1 - rounding).double(), (margin <= 1 + rounding).double()
    return (v - v.clamp(low, high)).abs()


@pytest.mark.parametrize("name", ["logistic", "softmax"])
@pytest.mark.parametrize("weight", [1e-6, 1e-4, 1e-2, 1.0])
def test_prox_of_far_centers_takes_no_more_steps_than_a_device_has(name, weight, monkeypatch):
    monkeypatch.setattr(smooth, "NEWTON_STEPS", smooth.DEVICE_STEPS)
    loss, outputs = losses.make(name), 1 if name == "logistic" else 10
    center = torch.cat([size * normal((30, outputs), 0) for size in (1, 10, 100, 1e3, 1e4)])
    y = loss.check_targets(
        loss.encode(torch.arange(len(center)) % max(outputs, 2), outputs), len(center), outputs, center
    )
    F = loss.prox(center, y, weight)
    slope = loss.gradient(F, y) + weight * (F - center)
    rounding = 64 * torch.finfo(F.dtype).eps * (1 + weight * (F.abs() + center.abs()) + F.abs())
    assert bool((slope.abs() <= rounding).all())


@given(twins, seeds, weights)
def test_prox_attains_the_minimum(name, seed, weight):
    loss, center, y = batch(name, seed, count=1)
    F = loss.prox(center, y, weight)
    merit = loss.value(F, y) + 0.5 * weight * (F - center).square().sum(1)
    expected = slow.numerical_prox(name, center[0].numpy(), y[0].numpy(), weight)
    assert merit.item() <= expected + 1e-12
    assert merit.item() >= expected - 1e-8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [50.0, 1e3, 1e6])
def test_prox_and_value_survive_extreme_outputs(name, size):
    loss = losses.make(name)
    center = torch.tensor([[size, -size, 0.0], [-size, size, 1.0]], dtype=torch.float64)
    y = loss.check_targets(random_targets(name, 3, 2, 0), 2, 3, center)
    F = loss.prox(center, y, 0.5)
    assert bool(loss.value(center, y).isfinite().all())
    assert bool((residual(loss, F, y, 0.5 * (F - center)) <= 1e-13 * (1 + size)).all())


@pytest.mark.parametrize("name", NAMES)
def test_float32_throughout(name, device):
    loss, F, y = batch(name, 3)
    single, y_single = F.float().to(device), (y.float() if y.is_floating_point() else y).to(device)
    s = loss.gradient(F, y)
    pairs = [
        (loss.value(single, y_single), loss.value(F, y)),
        (loss.gradient(single, y_single), s),
        (loss.conjugate(loss.feasible(s.float().to(device), y_single), y_single), loss.conjugate(s, y)),
        (loss.prox(single, y_single, 0.7), loss.prox(F, y, 0.7)),
    ]
    for got, expected in pairs:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@given(named, seeds)
def test_cvxpy_states_the_same_loss(name, seed):
    loss, F, y = batch(name, seed)
    expression = loss.cvxpy_sum(cp, cp.Constant(F.numpy()), y.numpy())
    assert expression.is_convex()
    assert float(expression.value) == pytest.approx(float(loss.value(F, y).sum()), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_supercoercive_losses_are_those_with_a_conjugate_everywhere(name):
    loss, F, y = batch(name, 0)
    anywhere = 1e6 * normal(F.shape, 1)
    assert loss.supercoercive == bool(loss.conjugate(anywhere, y).isfinite().all())
    assert torch.equal(loss.feasible(anywhere, y), anywhere) == loss.supercoercive
    assert bool(loss.conjugate(torch.zeros_like(F), y).isfinite().all())  # bounded below


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_class_survives_encoding_and_learning(name, classes):
    """A step of the prox from outputs of zero is a step towards the image's own class."""
    loss, own = losses.make(name), torch.arange(7) % classes
    zero = torch.zeros(7, loss.outputs_for(classes), dtype=torch.float64)
    y = loss.check_targets(loss.encode(own, classes), 7, zero.shape[1], zero)
    assert torch.equal(loss.decode(y), own)
    assert torch.equal(loss.predict(loss.prox(zero, y, 1.0)), own)
    assert torch.equal(loss.predict(-loss.gradient(zero, y)), own)


def test_targets_of_classes():
    two, three = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    squared, logistic, softmax = map(losses.make, ("squared", "logistic", "softmax"))
    for loss in (squared, logistic):
        assert (loss.outputs_for(2), loss.outputs_for(3)) == (1, 3)
        assert loss.encode(two, 2).tolist() == [1, -1, -1]
    assert squared.encode(three, 3).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert logistic.encode(three, 3).tolist() == [[-1, -1, 1], [1, -1, -1], [-1, 1, -1]]
    assert (softmax.outputs_for(2), softmax.outputs_for(3)) == (2, 3)
    assert torch.equal(softmax.encode(two, 2), two)


def test_the_best_outputs_for_the_squared_loss_are_the_probabilities_of_the_classes():
    loss, drawn = losses.make("squared"), torch.tensor([0, 0, 0, 1, 2, 2])
    probabilities = torch.tensor([[3, 1, 2]], dtype=torch.float64) / 6
    slope = loss.gradient(probabilities.expand(6, 3), loss.encode(drawn, 3)).sum(0)
    torch.testing.assert_close(slope, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_predictions_and_their_ties(name):
    loss = losses.make(name)
    assert loss.predict(torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 0.0]])).tolist() == [1, 0, 0]
    if loss.outputs_for(2) == 1:
        assert loss.predict(torch.tensor([[0.0], [-0.1], [3.0]])).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "expected"),
    [
        ("squared", [[0.4], [-2.0], [3.0], [1.0]], [[1.0], [-1.0], [-1.0], [1.0]], 0.75),
        ("squared", [[0.4, 0.1], [-2.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]], 0.5),
        ("logistic", [[0.4], [-2.0]], [[1.0], [1.0]], 0.5),
        ("logistic", [[0.4, -1.0], [-2.0, -3.0]], [[1.0, -1.0], [-1.0, 1.0]], 0.5),
        ("softmax", [[0.4, 0.0, -1.0], [-2.0, 0.0, 1.0]], [0, 1], 0.5),
    ],
)
def test_accuracy(name, outputs, targets, expected):
    assert losses.accuracy(losses.make(name), torch.tensor(outputs), torch.tensor(targets)) == expected


def test_check_targets_gives_columns_of_the_dtype_of_the_inputs():
    like = torch.zeros(1, dtype=torch.float32)
    checked = losses.SquaredLoss().check_targets(torch.tensor([1, 2]), 2, 1, like)
    assert checked.dtype == torch.float32
    assert checked.tolist() == [[1.0], [2.0]]


def test_softmax_accepts_whole_floating_classes():
    checked = losses.SoftmaxLoss().check_targets(torch.tensor([0.0, 2.0]), 2, 3, torch.zeros(1))
    assert checked.dtype == torch.int64
    assert checked.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("name", "targets", "outputs", "message"),
    [
        ("squared", [1.0, 2.0, 3.0], 1, r"targets has shape \(3,\); expected 2 rows"),
        ("squared", 1.0, 1, r"targets has shape \(\)"),
        ("squared", [1.0, 2.0], 3, r"targets has shape \(2,\); expected \(2, 3\) for 3 outputs"),
        ("squared", [[[1.0]], [[2.0]]], 1, r"targets has shape \(2, 1, 1\)"),
        ("squared", [1.0, float("nan")], 1, r"targets\[1, 0\] is nan"),
        ("logistic", [0.0, 1.0], 1, "targets contain 0; the logistic loss expects the labels -1 and 1"),
        ("logistic", [1.0, 1.0], 1, r"targets hold one class only \(label 1\)"),
        ("softmax", [0, 1], 1, "outputs=1 .*the softmax loss needs"),
        ("softmax", [0.5, 1.0], 3, r"targets of shape \(2,\).*integer classes"),
        ("softmax", [[0], [1]], 3, r"targets of shape \(2, 1\)"),
        ("softmax", [0, 3], 3, r"targets lie in 0..3; with outputs=3 the classes are 0..2"),
        ("softmax", [-1, 0], 3, r"targets lie in -1..0"),
        ("softmax", [2, 2], 3, r"targets hold one class only \(2\)"),
        ("softmax", [0, 1, 2], 3, r"targets has shape \(3,\); expected 2 rows"),
    ],
)
def test_check_targets_says_what_is_wrong(name, targets, outputs, message):
    with pytest.raises(ValueError, match=message):
        losses.make(name).check_targets(torch.tensor(targets), 2, outputs, torch.zeros(1, dtype=torch.float64))


def test_make_names_the_argument():
    with pytest.raises(ValueError, match=r"loss='sqared' is unknown.*did you mean 'squared'"):
        losses.make("sqared")


@pytest.mark.parametrize("name", NAMES)
def test_check_accepts_what_ships(name):
    found = losses.check(losses.make(name))
    assert max(found) <= 1e-9


class Broken(losses.HuberLoss):
    """Huber's loss with one method replaced."""

    def __init__(self, **methods):
        super().__init__()
        self.name = "broken"
        vars(self).update(methods)


HUBER = losses.HuberLoss()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"conjugate": lambda s, y: HUBER.conjugate(s, -y)}, "wrong conjugate: it breaks Fenchel-Young.* off by"),
        ({"conjugate": lambda s, y: HUBER.conjugate(s, y) + 1e-3}, "wrong conjugate: .* at the gradient, off by 0.0"),
        ({"conjugate": lambda s, y: (0.5 * s**2 + s * y).sum(1)}, "wrong domain: it holds a dual s whose conjugate is"),
        ({"prox": lambda c, y, w: HUBER.prox(c, y, 1.01 * w)}, "wrong prox: it is no minimum at weight 0.01.* off by"),
        ({"prox": lambda c, y, w: c - HUBER.gradient(c, y) / w}, "wrong prox"),  # an explicit step
        ({"feasible": lambda s, y: s}, "wrong domain: it does not hold what feasible gives, off by inf"),
        ({"feasible": lambda s, y: 0.9 * s.clamp(-1, 1)}, "wrong domain: it loses 0.3 times the gradient"),
        ({"gradient": lambda F, y: 1.001 * HUBER.gradient(F, y)}, "wrong gradient: it has a slope.* off by 0.000"),
        ({"gradient": lambda F, y: -HUBER.gradient(F, y)}, "wrong gradient"),
        ({"value": lambda F, y: HUBER.value(F, y).clamp_max(2)}, "wrong convexity: it lies above a chord"),
        ({"value": lambda F, y: HUBER.value(F, y).mean()}, r"wrong value: .* the shape \(24,\) .* and is \(\)"),
        ({"value": lambda F, y: HUBER.value(F, y).log()}, "wrong value: it is not finite|wrong convexity"),
        ({"supercoercive": True}, "wrong domain: it is not everything, and the loss is said to be supercoercive"),
        ({"encode": lambda own, classes: HUBER.encode(0 * own, classes)}, "wrong decode"),
    ],
)
def test_check_names_the_line_that_is_wrong(methods, message):
    with pytest.raises(ValueError, match=f"loss='broken' has a {message}"):
        losses.check(Broken(**methods))


def test_check_tries_the_targets_that_are_given():
    loss = Broken(value=lambda F, y: HUBER.value(F, y) - 5 * (y[:, 0] > 90) * F[:, 0].abs())
    losses.check(loss, torch.zeros(5))
    with pytest.raises(ValueError, match="wrong convexity"):
        losses.check(loss, torch.full((5,), 99.0))


def quantile(t):
    return lambda F, y: torch.maximum(t * (y - F), (t - 1) * (y - F))


def log_cosh(F, y):
    t = (F - y).abs()
    return t + torch.nn.functional.softplus(-2 * t) - math.log(2)


def test_check_sees_slopes_of_single_precision():
    """0.7 in float32 is off by 1e-8, and certificates would be."""
    rounded = lambda F, y: torch.where(y > F, -0.3, 0.7).to(F)  # noqa: E731
    with pytest.raises(ValueError, match=r"wrong (domain|conjugate)"):
        losses.check(losses.ScalarLoss(quantile(0.3), rounded, name="quantile"))


def test_a_value_that_is_not_elementwise_is_refused():
    with pytest.raises(ValueError, match=r"value=\(\) is the shape of what it gives: must be .*, \(24, 1\)"):
        losses.check(losses.ScalarLoss(lambda F, y: (F - y).square().mean(), name="mean"))


def test_check_holds_of_formulas_alone():
    for loss in (
        losses.ScalarLoss(quantile(0.3), name="quantile"),
        losses.ScalarLoss(lambda F, y: (1 - y * F).clamp_min(0).square(), name="squared_hinge", labels=True),
        losses.ScalarLoss(lambda F, y: (F - y) ** 4, name="fourth", supercoercive=True),
        losses.ScalarLoss(log_cosh, lambda F, y: torch.tanh(F - y), name="log_cosh"),
    ):
        assert max(losses.check(loss, torch.tensor([1.0, -1.0, 1.0, -1.0]))) <= 1e-9


@pytest.mark.parametrize("single", [False, True])
def test_numerical_conjugate_and_prox_are_those_in_closed_form(single):
    """Huber and hinge by their values alone against their own methods; of the quantile by hand."""
    dtype = torch.float32 if single else torch.float64
    F, y = 3 * normal((50, 2), 0, dtype), normal((50, 2), 1, dtype)
    labels = y.sign()
    pairs = [
        (losses.HuberLoss(0.7), losses.ScalarLoss(lambda F, y: _huber(F - y, 0.7), name="h"), y),
        (losses.HingeLoss(), losses.ScalarLoss(lambda F, y: (1 - y * F).clamp_min(0), name="k", labels=True), labels),
    ]
    accuracy = {"rtol": 2e-6, "atol": 2e-6} if single else {"rtol": 1e-12, "atol": 1e-12}
    for closed, numerical, targets in pairs:
        for weight in (1e-3, 0.1, 1.0, 40.0):
            got, expected = (each.prox(F, targets, weight) for each in (numerical, closed))
            torch.testing.assert_close(got, expected, **accuracy)
            assert got.dtype == dtype
        dual = closed.feasible(F, targets)
        for s in (dual, 0.4 * dual, closed.gradient(F, targets)):
            torch.testing.assert_close(numerical.conjugate(s, targets), closed.conjugate(s, targets), **accuracy)
            torch.testing.assert_close(numerical.feasible(3 * s, targets), closed.feasible(3 * s, targets), **accuracy)
        assert bool((numerical.conjugate(dual + 3, targets) == torch.inf).all())
    t = 0.3
    pinball = losses.ScalarLoss(quantile(t), name="quantile")
    s = F.clamp(-t, 1 - t)
    torch.testing.assert_close(pinball.conjugate(s, y), (s * y).sum(1), **accuracy)
    moved = F - y
    expected = y + moved - moved.clamp(-t / 2, (1 - t) / 2)  # soft threshold, each side with its slope over the weight
    torch.testing.assert_close(pinball.prox(F, y, 2.0), expected, **accuracy)


def _huber(t, d):
    return torch.where(t.abs() <= d, 0.5 * t * t, d * t.abs() - 0.5 * d * d)


def test_duals_on_the_end_of_a_domain_stay_in_it_when_divided_and_multiplied():
    for loss, end in ((losses.HuberLoss(0.1), 0.1), (losses.HingeLoss(), -1.0)):
        s = torch.full((1000, 1), end, dtype=torch.float64)
        count = torch.arange(1.0, 1001, dtype=torch.float64)[:, None]
        assert bool(loss.conjugate(count * (s / count), torch.ones_like(s)).isfinite().all())


def test_objects_are_losses_wherever_names_are():
    class Named(losses.HuberLoss):
        def __init__(self, name):
            super().__init__()
            self.name = name

    huber = losses.HuberLoss(0.5)
    assert losses.make(huber) is huber
    assert (huber.name, losses.make("huber").name) == ("huber(0.5)", "huber")
    with pytest.raises(ValueError, match="loss='squared' is the name of SquaredLoss: give this loss another"):
        losses.make(Named("squared"))
    with pytest.raises(ValueError, match="loss='Named' needs a name"):
        losses.make(Named(""))
    with pytest.raises(TypeError, match=r"loss must be a name or an object of losses\.Loss, not the class HuberLoss"):
        losses.make(losses.HuberLoss)
    with pytest.raises(TypeError, match=r"loss must be a name or an object of losses\.Loss, not function"):
        losses.make(quantile(0.3))
    with pytest.raises(ValueError, match=r"'own' is unknown: .*or give the loss itself, an object of losses.Loss"):
        losses.make("own")
    with pytest.raises(ValueError, match="'quantile' has no form in cvxpy: give it a method cvxpy_sum"):
        losses.ScalarLoss(quantile(0.3), name="quantile").cvxpy_sum(cp, None, None)
