"""The outer function t^q and what follows from it, against numbers found without the formulas."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize

import meanfield as mf
from meanfield.outer import Outer
from meanfield.validation import Misuse

POWERS = (1.2, 1.5, 2.0, 3.0, 6.0)
STRENGTHS = (1e-3, 0.7, 20.0)
cases = pytest.mark.parametrize(("power", "strength"), [(q, strength) for q in POWERS for strength in STRENGTHS])


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_perspective_and_its_conventions_at_zero_mass():
    amounts, masses = numbers(3.0, 0.0, 0.0, 1e-30), numbers(2.0, 2.0, 0.0, 0.0)
    assert Outer().perspective(amounts, masses).tolist() == [4.5, 0.0, 0.0, math.inf]
    assert Outer(3.0).perspective(amounts, masses).tolist() == [6.75, 0.0, 0.0, math.inf]


@pytest.mark.parametrize("power", POWERS)
def test_perspective_has_finite_gradients_at_zero_mass(power):
    amounts, masses = numbers(3.0, 0.0).requires_grad_(), numbers(2.0, 0.0).requires_grad_()
    Outer(power).perspective(amounts, masses).sum().backward()
    np.testing.assert_allclose(amounts.grad, [power * 1.5 ** (power - 1), 0.0], rtol=1e-14)
    np.testing.assert_allclose(masses.grad, [(1 - power) * 1.5**power, 0.0], rtol=1e-14)


@pytest.mark.parametrize("power", POWERS)
def test_light_masses_keep_their_perspective(power):
    """In float32 the mass to a power vanishes where amount over mass is ordinary."""
    light = torch.tensor([1e-18])
    assert Outer(power).perspective(3 * light, light).item() == pytest.approx(1e-18 * 3**power, rel=1e-5)


@cases
def test_conjugate_is_the_largest_gain_and_price_its_inverse(power, strength):
    pulls, outer = numbers(0.0, 0.3, 2.0), Outer(power)
    found = outer.conjugate(pulls, strength)
    for pull, gain in zip(pulls.tolist(), found.tolist()):
        loss = lambda x, pull=pull: strength * math.exp(power * x) - pull * math.exp(x)  # noqa: E731 - at t = e^x
        best = max(0.0, -optimize.minimize_scalar(loss, bounds=(-60, 60), options={"xatol": 1e-9}).fun)
        assert gain == pytest.approx(best, rel=1e-6, abs=1e-12)
    torch.testing.assert_close(outer.conjugate_of_squares(pulls.square(), strength), found)
    torch.testing.assert_close(outer.price(found, strength), pulls)
    assert outer.conjugate(pulls, 0.0).tolist() == [0.0, math.inf, math.inf]


def test_the_square_keeps_its_bits():
    """What stood here before there were powers."""
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, outer = x.flip(0), Outer(2.0)
    for strength in (3e-4, 0.07, 1 / 3):
        assert torch.equal(outer.conjugate(x, strength), (x / (2 * math.sqrt(strength))).square())
        assert torch.equal(outer.conjugate_of_squares(x, strength), x / (4 * strength))
        assert torch.equal(outer.price(x, strength), 2 * (strength * x).sqrt())
    assert torch.equal(outer.perspective(x, p), x.square() / p)
    assert torch.equal(outer(x), x.square())
    assert outer.of_squares(x) is x


@pytest.mark.parametrize("power", POWERS)
def test_slopes_in_squares_end_at_zero(power):
    squares = numbers(0.0, 4.0).requires_grad_()
    value = Outer(power).of_squares(squares)
    np.testing.assert_allclose(value.detach(), [0.0, 2.0**power])
    value.sum().backward()
    assert squares.grad[0].item() == (1.0 if power == 2 else 0.0)
    assert squares.grad[1].item() == pytest.approx(power / 4 * 2.0**power / 2)


@pytest.mark.parametrize("power", [1, 1.0, 0.5, -2, math.nan, "3"])
def test_powers_that_are_no_powers_are_refused(power):
    with pytest.raises(Misuse, match=r"power=.* must be") as caught:
        mf.Penalty(power=power)
    assert "\n" not in str(caught.value)
