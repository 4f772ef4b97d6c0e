"""The connecting layer of a graft is the least-squares one, from samples in pieces, with or without a ridge."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meanfield.grafting import least_squares
from theory_checks.claim import Axes, Claim, Evidence, Setting, ranked
from theory_checks.statistics import largest, share_text

Change = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
UNKNOWNS, TARGETS, SAMPLES, PIECE = 6, 3, 400, 37
PRECISION = torch.finfo(torch.float64).eps


def _kept(weights: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weights, offset


def _without_offset(weights: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weights, None if offset is None else torch.zeros_like(offset)


def _shorter(weights: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return 0.999 * weights, offset


def _gradients(setting: Setting, change: Change) -> Evidence:
    """Size of the gradient of |W' a + o - b|^2 / n + ridge |W|^2 at the fit, and of the residual it states, in
    roundings.
    """
    ratios = []
    for instance in range(setting.instances(16, 200)):
        generator, wide = setting.generator(17, instance), bool(instance % 2)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: B023, E731
        a, b = draw(UNKNOWNS, SAMPLES) + 2, draw(TARGETS, SAMPLES) - 1
        ridge, free = (0.0, 0.3)[instance // 2 % 2], bool(instance // 4 % 2)
        a, b = (a, b) if wide else (a.float(), b.float())  # kept as inner products
        found = least_squares.moments(UNKNOWNS, TARGETS, a)
        for first in range(0, SAMPLES, PIECE):
            found.add(a[:, first : first + PIECE], b[:, first : first + PIECE])
        fit = found.solve(ridge, PRECISION, offset=free)
        weights, offset = change(fit.weights.double(), None if fit.offset is None else fit.offset.double())
        a, b = a.double(), b.double()
        rest = weights.T @ a + (0.0 if offset is None else offset[:, None]) - b
        slopes = a @ rest.T / SAMPLES + ridge * weights
        if free:
            slopes = torch.cat([slopes, rest.mean(1)[None]])
        unit = SAMPLES * PRECISION * float(a.square().sum() + b.square().sum()) / SAMPLES
        stated = abs(found.residual(weights, offset) - float(rest.square().sum())) / SAMPLES
        ratios.append(max(float(slopes.abs().max()), stated) / unit)
    beyond = sum(ratio > 1 for ratio in ratios)
    text = f"{share_text(beyond, len(ratios), 'fits can be improved')}; largest gradient {max(ratios):.2g} roundings"
    return Evidence(largest(ratios), text, len(ratios), beyond, (ranked("gradient", ratios),))


CLAIMS = (
    Claim(
        name="grafts",
        statement="The connecting layer of a graft minimises the mean squared error plus its ridge, and its residual "
        "is what it states.",
        source="docs/grafting.md; Gu et al. 2020",
        statistic="largest entry of the gradient at the fit, or difference of the stated residual, over the rounding "
        "of the sums it is made of",
        threshold=1.0,
        derivation="n eps |a|^2: the running error bound of inner products over n samples, for a design whose "
        "condition number is of order ten",
        limits="A least-squares problem with well conditioned samples; rank and cutoffs are tested elsewhere.",
        measure=lambda setting: _gradients(setting, _kept),
        controls={
            "offset left out": lambda setting: _gradients(setting, _without_offset),
            "weights a thousandth too small": lambda setting: _gradients(setting, _shorter),
        },
        axes=Axes("fit, sorted", "gradient / rounding", "y", 1.0),
    ),
)
