"""Recipes: the regulariser and its conversion, rates, the authors' preset."""

import dataclasses
import json
import math

import pytest
import torch
from strategies import normal, seeded
from torch import nn

import meanfield as mf
from meanfield.finite import (
    L2_STRENGTHS,
    L12_STRENGTHS,
    FiniteCNN,
    Recipe,
    l12,
    regulariser,
    residual,
)
from meanfield.finite.recipes import LOSSES


class TestRegulariser:
    @pytest.mark.parametrize("shape", [(3, 4, 2, 3), (3, 4)])
    def test_l12_is_the_formula_of_the_authors(self, shape):
        weight = normal(shape, 0)
        terms = []
        for source in range(4):
            entries = [math.sqrt(4) * abs(float(x)) for x in weight[:, source].flatten()]
            terms.append((sum(entries) / len(entries)) ** 2)
        assert float(l12(weight)) == pytest.approx(sum(terms) / len(terms), rel=1e-12)

    def test_l12_is_the_source_penalty_over_c_in_and_offsets_squared(self):
        widths, side = (5, 4), 3
        arch = mf.Architecture((2, 4, 4), (mf.Conv(side, padding=1), mf.Conv(side, padding=1)))
        kernels = [normal(shape, i) for i, shape in enumerate(arch.kernel_shapes(widths))]
        masses = [torch.full((m,), 1 / m, dtype=torch.float64) for m in widths]
        network = mf.ParticleNetwork(arch, masses, kernels, normal(arch.readout_shape(4), 0))
        penalty = mf.Penalty(source=1, readout=0, input=0, kernel_norm="l1")
        problem = mf.Problem(arch, normal((2, 2, 4, 4), 0), torch.tensor([1.0, -1.0]), penalty=penalty)
        source = float(problem.terms(network).source)
        assert float(l12(kernels[1] / 5)) == pytest.approx(source / (5 * side**4), rel=1e-12)
        # and the library's own passage to a network without masses makes the same division
        plain = FiniteCNN.from_particles(network, "standard")
        assert float(l12(plain.kernels[1].detach())) == pytest.approx(source / (5 * side**4), rel=1e-12)

    def test_the_sum_runs_over_weights_only(self):
        network = residual((1, 4, 4), 3, width=2, generator=seeded(), dtype=torch.float64)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
        weights = [module.weight for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        assert len(weights) == 10
        sums = {kind: float(regulariser(network, kind).detach()) for kind in ("l12", "l2")}
        assert sums["l12"] == pytest.approx(sum(float(l12(weight.detach())) for weight in weights), rel=1e-12)
        assert sums["l2"] == pytest.approx(
            sum(float(weight.detach().square().sum()) for weight in weights) / 2, rel=1e-12
        )
        assert float(regulariser(network, "none")) == 0
        assert regulariser(network, "none").dtype == torch.float64
        assert float(regulariser(nn.ReLU(), "l12")) == 0

    def test_errors(self):
        with pytest.raises(ValueError, match=r"weight has shape \(3,\); expected \(c_out, c_in, ...\)"):
            l12(torch.ones(3))
        with pytest.raises(ValueError, match=r"kind='L12' is unknown.*did you mean 'l12'"):
            regulariser(nn.Linear(2, 2), "L12")


@pytest.mark.parametrize(("reduction", "expected"), [("none", [0.5, 2.5]), ("sum", 3.0), ("mean", 1.5)])
def test_the_squared_loss_is_half_the_square_from_one_hot(reduction, expected):
    outputs, classes = torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1])
    torch.testing.assert_close(LOSSES["squared"](outputs, classes, reduction=reduction), torch.tensor(expected))


class TestRecipe:
    def test_rates(self):
        found = Recipe(epochs=8, learning_rate=0.5, warm_up=2, milestones=(3, 6), decay=0.1)
        rates = [found.rate_at(step, 4) for step in range(32)]
        expected = [0.5 * k / 8 for k in range(1, 9)] + [0.5] * 4 + [0.05] * 12 + [0.005] * 8
        assert rates == pytest.approx(expected, rel=1e-12)
        assert Recipe(learning_rate=0.5, warm_up=0).rate_at(0, 4) == 0.5

    def test_it_travels_as_json(self):
        found = Recipe(epochs=5, penalty="l12", strength=2, augment=True, milestones=[2, 4])
        assert Recipe(**json.loads(json.dumps(dataclasses.asdict(found)))) == found
        assert found.milestones == (2, 4)

    @pytest.mark.parametrize(
        ("penalty", "strengths", "rates"),
        [
            ("l12", L12_STRENGTHS, [0.01] * 4 + [0.002, 0.001]),
            ("l2", L2_STRENGTHS, [0.01] * 3 + [0.002, 0.001]),
            ("none", (0,), [0.01]),
        ],
    )
    def test_the_preset_of_the_authors(self, penalty, strengths, rates):
        found = [Recipe.authors(penalty, strength) for strength in strengths]
        assert [entry.learning_rate for entry in found] == rates
        assert [entry.strength for entry in found] == list(strengths)
        fixed = {
            "epochs": 200,
            "batch_size": 64,
            "momentum": 0.9,
            "milestones": (60, 120, 180),
            "decay": 0.2,
            "warm_up": 1,
            "augment": True,
        }
        assert fixed.items() <= dataclasses.asdict(found[-1]).items()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"epochs": 0}, "epochs=0 must be an integer of at least 1"),
            ({"batch_size": 2.5}, "batch_size=2.5 must be an integer"),
            ({"warm_up": -1}, "warm_up=-1 must be an integer of at least 0"),
            ({"learning_rate": 0}, "learning_rate=0 must be greater than 0"),
            ({"momentum": 1.0}, "momentum=1.0 must be at least 0 and less than 1"),
            ({"decay": -1}, "decay=-1 must be a finite number"),
            ({"milestones": 3}, "milestones=3 must be a sequence of epochs"),
            ({"milestones": (4, 4)}, r"milestones=\(4, 4\) must be increasing epochs"),
            ({"penalty": "l1"}, "penalty='l1' is unknown"),
            ({"strength": 1}, "strength=1.0 needs a penalty: 'l12' or 'l2'"),
            ({"loss": "hinge"}, "loss='hinge' is unknown"),
            ({"augment": "yes"}, "augment='yes' must be True or False"),
        ],
    )
    def test_errors(self, changed, message):
        with pytest.raises(ValueError, match=message):
            Recipe(**changed)
