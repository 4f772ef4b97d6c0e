import copy
import itertools
import shutil
import sys

import places
import pytest
import torch
from places import IMAGE, TARGET, Place
from stops import interrupt_at
from strategies import normal, random_network, seeded
from torch import nn

import meanfield as mf
from meanfield import landscape, limits
from meanfield.landscape import kept as keeping
from meanfield.landscape import subsample
from meanfield.landscape.objective import Objective
from meanfield.subject import Subject
from meanfield.validation import Misuse


def of(function, tolerance: float | None = 0.01, seen=None, plane=None, **options):
    """The surface of a function of both coordinates."""
    loss = places.loss(function, seen)
    return landscape.surface(Place(), plane or places.plane(), IMAGE, TARGET, tolerance, loss=loss, **options)


def steep(a, b):
    return (a + 0.3 * b).exp() + (3 * a * b).sin() + 0.1 * (a - b).abs() ** 3


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3))


IMAGES, LABELS = normal((60, 1, 4, 4), 0, torch.float32), torch.arange(60) % 3


def test_a_surface_within_the_tolerance_and_the_exact_one():
    network = classifier()
    plane = landscape.plane(network, seed=1)
    held_out = (IMAGES[:9] + 0.1, LABELS[:9])
    exact = landscape.surface(network, plane, IMAGES, LABELS, None, held_out=held_out)
    found = landscape.surface(network, plane, IMAGES, LABELS, held_out=held_out)
    assert (exact.status, exact.error, exact.evaluations) == ("exact", 0, 0)
    assert exact.figures == ("train loss", "train accuracy", "held out loss", "held out accuracy")
    assert found.status == "met"
    for figure in exact.figures:
        missed = (found.grid(13, figure) - exact.grid(13, figure)).abs().max()
        assert 0 < missed <= found.errors[figure]
    assert found.error == found.errors["train loss"] <= 0.01 * found.range
    assert exact.evaluations == 169
    moved = torch.func.functional_call(network.eval(), plane.at(0.5, -1.0), (IMAGES,))
    assert float(exact.at([[0.5, -1.0]])) == pytest.approx(float(nn.functional.cross_entropy(moved, LABELS)), rel=1e-5)
    before = found.evaluations
    assert found.grid(201).shape == (201, 201)
    assert found.evaluations == before


def test_the_network_and_the_global_numbers_are_as_they_were_also_after_an_error():
    network = classifier().train()
    network[1].requires_grad_(False)
    state, numbers = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    plane = landscape.plane(network, seed=1)

    def broken(outputs, targets):
        raise ArithmeticError

    landscape.surface(network, plane, IMAGES, LABELS, batch_norm="recomputed", max_evaluations=110)
    with pytest.raises(ArithmeticError):
        landscape.surface(network, plane, IMAGES, LABELS, loss=broken)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in state.items())
    assert torch.equal(numbers, torch.get_rng_state())
    assert network.training
    assert [each.requires_grad for each in network.parameters()] == [False, False, True, True, True, True]


@pytest.mark.parametrize("tolerance", [None, 0.01])
def test_rows_are_the_first_direction_and_columns_the_second(tolerance):
    found = of(lambda a, b: 10 * a + b, tolerance, extent=2.0)
    first, second = found.axis(4), found.axis(7)
    expected = 10 * first[:, None] + second
    torch.testing.assert_close(found.grid((4, 7)), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(found.at(torch.cartesian_prod(first, second)), expected.flatten(), rtol=0, atol=1e-13)
    assert float(found.grid(5)[4, 0]) == pytest.approx(18)


def test_an_odd_grid_meets_the_origin_and_an_even_one_does_not():
    for n, extent in itertools.product((1, 3, 51, 201), (1.0, 0.3)):
        axis = of(steep, None, extent=extent).axis(n)
        assert axis[n // 2] == 0
        assert torch.equal(axis, -axis.flip(0))
        assert n == 1 or axis[-1] == extent
    found = of(steep)
    assert 0 not in found.axis(50)
    assert float(found.grid(51)[25, 25]) == float(steep(*torch.zeros(2, dtype=torch.float64)))


def test_the_transposed_plane_has_the_transposed_grid():
    across = places.plane((0.0, 1.0), (1.0, 0.0))
    torch.testing.assert_close(of(steep, None, plane=across).grid((5, 8)), of(steep, None).grid((8, 5)).T)
    torch.testing.assert_close(of(steep, plane=across).grid((5, 8)), of(steep).grid((8, 5)).T, rtol=0, atol=0.03)


def test_a_loss_of_0_is_evaluated_once():
    seen = []
    found = of(lambda a, b: (a * b).clamp_min(0), None, seen)
    found.grid(5), found.grid(3), found.at([[0.0, 0.5], [0.0, 0.5]])
    asked = [point for point in seen if point != (0, 0)]  # the origin is asked when a network is looked at
    assert len(asked) == len(set(asked)) == found.evaluations - 1 == 24


def test_what_is_constant_is_met():
    for value in (0.0, 1.7):
        found = of(lambda a, b, value=value: 0 * a + value)
        assert (found.status, found.evaluations) == ("met", 107)
        torch.testing.assert_close(found.grid(4), torch.full((4, 4), value, dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_largest_miss_is_an_absolute_one_within_the_share_of_the_range():
    """The least loss is a ten thousandth of the range: nothing is promised of it relative to itself."""
    found = of(lambda a, b: 1e-4 + (a.square() + b.square()) ** 3 + 0.05 * (a + b).abs())
    exact = of(lambda a, b: 1e-4 + (a.square() + b.square()) ** 3 + 0.05 * (a + b).abs(), None)
    missed = (found.grid(21) - exact.grid(21)).abs()
    assert missed.max() <= found.error <= 0.01 * found.range
    assert (missed / exact.grid(21)).max() > 0.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_ends_the_surface_and_is_not_filled(value):
    def cut(a, b):
        return torch.where(a + b < -1.9, value, a)

    found = of(cut)
    assert (found.status, found.error, found.evaluations) == ("not finite", torch.inf, 107)
    grid = found.grid(3)
    assert grid.isfinite().sum() == 8  # nodes, all of them
    assert not grid[0, 0].isfinite()
    assert found.grid((4, 4)).isfinite().sum() == 3  # the corners are nodes, one of them is not finite
    exact = of(cut, None)
    assert exact.status == "exact"
    torch.testing.assert_close(exact.grid(3), cut(*torch.meshgrid([exact.axis(3)] * 2, indexing="ij")), equal_nan=True)


def test_a_tolerance_that_is_not_kept_is_a_status():
    def jump(a, b):
        return (a > b).to(a)

    found = of(jump, max_evaluations=400)
    assert (found.status, found.evaluations) == ("not met", 330)
    assert found.error > 0.1
    assert of(jump).evaluations == 1089 + 65
    assert of(lambda a, b: (9 * a).sin(), max_evaluations=107).status == "not met"


def test_checks_are_what_they_say():
    found = of(steep)
    assert torch.equal(found.checks.predicted, found.at(found.checks.points))
    assert torch.equal(found.checks.exact, steep(*found.checks.points.T))
    assert float(3 * (found.checks.predicted - found.checks.exact).abs().max()) == found.error
    assert not len(of(steep, None).checks.points)


def test_another_seed_has_other_checks_and_the_same_one_the_same():
    first, again, other = (of(steep, seed=seed, max_evaluations=107) for seed in (0, 0, 1))
    assert torch.equal(first.checks.points, again.checks.points)
    assert not torch.equal(first.checks.points, other.checks.points)


def test_interrupted_it_keeps_the_last_whole_polynomial():
    def wild(a, b):
        return (20 * a).sin() * (20 * b).cos()

    stopped = interrupt_at(250)  # in the second polynomial: each value is a look as well
    with limits.watched(stopped):
        found = of(wild)
    assert found.status == "interrupted"
    assert found.error == of(wild, max_evaluations=107).error
    with pytest.raises(KeyboardInterrupt), limits.watched(interrupt_at(20)):
        of(wild)


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(sys.modules["meanfield.landscape.surface"], "BLOCK_IMAGES", 40)
    network = classifier()
    plane, states = landscape.plane(network, seed=1), []

    def run(state, **options):
        return landscape.surface(
            network, plane, IMAGES[:1], LABELS[:1], 1e-9, state=state, **{"max_evaluations": 400, **options}
        )

    def copied(row):
        states.append(shutil.copy(tmp_path / "whole.safetensors", tmp_path / f"{len(states)}.safetensors"))

    whole = run(tmp_path / "whole.safetensors", callback=copied)
    assert len(states) > 9
    for state in (states[1], states[6], states[-1]):
        rows = []
        found = run(state, callback=rows.append)
        assert torch.equal(found.grid(9), whole.grid(9))
        assert (found.evaluations, found.error) == (whole.evaluations, whole.error)
        assert [row["evaluations"] for row in rows] == sorted(row["evaluations"] for row in rows)
    assert not rows  # after its end nothing was left to do
    with pytest.raises(Misuse, match=r"its data\.train is"):
        landscape.surface(network, plane, IMAGES[1:2], LABELS[:1], state=states[0])
    other = landscape.plane(network, seed=2)
    with pytest.raises(Misuse, match="its plane is"):
        landscape.surface(network, other, IMAGES[:1], LABELS[:1], state=states[0])
    with pytest.raises(Misuse, match="its batch_norm is 'kept'"):
        run(states[0], batch_norm="recomputed")


def test_what_a_state_keeps_of_a_wider_square_changes_nothing(tmp_path):
    """The wider range would make a looser promise of the same tolerance."""

    def bowl(a, b):
        return 100 * (a.square() + b.square()) ** 4 + (a + b).abs()

    state = tmp_path / "state.safetensors"
    of(bowl, state=state, max_evaluations=107)
    found, alone = (of(bowl, extent=0.2, max_evaluations=330, **options) for options in ({"state": state}, {}))
    assert (found.range, found.error, found.evaluations) == (alone.range, alone.error, 330)


def test_j_and_its_terms_of_particles():
    architecture = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="tanh"), mf.Conv(2)), "flatten", outputs=3)
    network, penalty = random_network(architecture, (4, 3), seed=1), mf.Penalty(source=0.1, readout=0.2, input=0.3)
    images = IMAGES[:12].double()
    plane = landscape.plane(network, seed=0)
    found = landscape.surface(network, plane, images, LABELS[:12], penalty=penalty)
    problem = mf.Problem(architecture, images, LABELS[:12], "softmax", penalty)
    for a, b in ((0.0, 0.0), (0.7, -0.4)):
        exact = float(problem.value(Subject(network).at(plane.at(a, b))))
        assert float(found.at([[a, b]], "train J")) == pytest.approx(exact, abs=found.errors["train J"])
    terms = sum(found.grid(5, name) for name in ("train loss", "source", "readout", "input"))
    torch.testing.assert_close(found.grid(5, "train J"), terms)


def regression(count, seed=0):
    """A linear network, images and targets, and the square of what is missed: the loss is a quadratic function."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    inputs = normal((count, 3), seed)
    return network, inputs, inputs[:, 0] + 0.1 * normal((count,), seed + 1)


def square(outputs, targets):
    return (outputs.flatten() - targets).square()


@pytest.mark.slow
def test_few_images_stand_for_many_and_both_parts_are_in_the_estimate(tmp_path):
    network, inputs, targets = regression(6000)
    plane = landscape.plane(network, seed=0)
    exact = landscape.surface(network, plane, inputs, targets, None, loss=square)
    state, rows = tmp_path / "state.safetensors", []
    found = landscape.surface(network, plane, inputs, targets, loss=square, state=state)
    again = landscape.surface(network, plane, inputs, targets, loss=square, state=state, callback=rows.append)
    assert torch.equal(again.grid(9), found.grid(9))
    assert not rows
    alone = landscape.surface(network, plane, inputs, targets, loss=square, subsample=False)
    assert found.status == alone.status == "met"
    assert found.evaluations < 0.7 * alone.evaluations
    missed = (found.grid(15) - exact.grid(15)).abs().max()
    assert 1e-6 < missed <= found.error
    assert torch.equal(found.checks.exact, exact.at(found.checks.points))
    assert float((found.checks.predicted - found.checks.exact).abs().max()) <= found.error
    # the control: of 1,000 images alone the surface is another one, far outside of the estimate
    few = subsample.drawn({"train": Objective(Subject(network), inputs, targets, square)}, 1000, seeded(0))["train"]
    assert few.count == 1000
    assert abs(float(few(plane.at(1.0, -1.0))) - float(exact.at([[1.0, -1.0]]))) > found.error


@pytest.mark.parametrize(
    ("count", "asked", "expected"),
    [
        (3999, None, 0),
        (4000, None, 1000),
        (19000, None, 1900),
        (19000, False, 0),
        (1200, True, 1000),
        (900, True, 0),
        (600, 50, 50),
        (40, 50, 0),
    ],
)
def test_how_many_images_stand_for_all(count, asked, expected):
    network, inputs, targets = regression(count)
    objective = Objective(Subject(network), inputs, targets, square)
    assert subsample.size({"train": objective}, asked) == expected


def test_a_subsample_is_of_single_images_of_all_batches_and_each_at_most_once():
    network, inputs, targets = regression(300)
    objective = Objective(Subject(network), inputs, targets, square)
    few = subsample.drawn({"train": objective}, 120, seeded(3))["train"]
    ((found, marks),) = few.batches
    rows = [int((inputs == row).all(1).nonzero()) for row in found]
    assert rows == sorted(set(rows))
    assert len(rows) == 120
    assert rows[0] < 20
    assert rows[-1] > 280
    assert torch.equal(marks, targets[rows])


def test_misuse_is_named():
    network = classifier()
    plane = landscape.plane(network)
    with pytest.raises(Misuse, match=r"plane='0.weight' is missing there"):
        landscape.surface(nn.Sequential(nn.Linear(2, 2)), plane, IMAGES, LABELS)
    with pytest.raises(Misuse, match=r"plane='1.weight' is torch.float32 .* there and torch.float64"):
        landscape.surface(copy.deepcopy(network).double(), landscape.plane(network), IMAGES.double(), LABELS)
    with pytest.raises(Misuse, match=r"tolerance=0 must be greater"):
        landscape.surface(network, plane, IMAGES, LABELS, 0)
    with pytest.raises(Misuse, match="held_out='train'"):
        landscape.surface(network, plane, IMAGES, LABELS, held_out={"train": (IMAGES, LABELS)})
    with pytest.raises(Misuse, match=r"subsample=0"):
        landscape.surface(network, plane, IMAGES, LABELS, subsample=0)
    found = of(steep)
    with pytest.raises(Misuse, match="figure='loss' is unknown"):
        found.grid(3, "loss")
    with pytest.raises(Misuse, match=r"points=1.5 lies outside"):
        found.at([[1.5, 0.0]])
    with pytest.raises(Misuse, match=r"points=\(3,\) is the shape"):
        found.at([1.0, 0.0, 0.0])
