"""What makes the bound of one ReLU layer rigorous: upper bounds of a response over cones of directions."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from meanfield.certificates import sphere
from meanfield.certificates.sphere.branching import bounded_cones
from meanfield.certificates.sphere.cones import Cones
from meanfield.certificates.sphere.response import Response, reduced
from theory_checks.claim import Axes, Claim, Evidence, Setting, ranked
from theory_checks.statistics import largest, share_text

HALVINGS = 4
DIRECTIONS = 64  # per cone
NEAR = 0.1  # distance of rows of opposite weight


def _rows(generator: torch.Generator, instance: int) -> tuple[Tensor, Tensor]:
    """Patches and weights (n, C): at random; in pairs that nearly cancel; in pairs that differ in one direction, where
    the bound of a pair is attained; and with two outputs.
    """
    dimension, kind = 3 + instance // 4 % 3, instance % 4
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    A, w = draw(12, dimension), draw(12, 2 if kind == 3 else 1)
    if kind == 1:
        return torch.cat([A, A + NEAR * draw(*A.shape)]), torch.cat([w, -w])
    if kind == 2:
        axis = torch.eye(dimension, dtype=torch.float64)[0]
        A = A + 4 * axis
        return torch.cat([A + NEAR * axis, A - NEAR * axis]), torch.cat([w.abs(), -w.abs()])
    return A, w


def _responses(response: Response, cells: Cones, points: Tensor) -> Tensor:
    """Signed for one output, lengths for more, of directions (b, k, r) -> (b, k)."""
    q = response(torch.nn.functional.normalize(points, dim=-1).flatten(0, 1)).unflatten(0, points.shape[:2])
    return q[..., 0] * cells.signs[:, None] if q.shape[2] == 1 else q.norm(dim=2)


def _above(setting: Setting, corners_alone: bool) -> Evidence:
    """Largest response in a cone over its bound; the control takes the largest at its corners for a bound."""
    ratios, listed = [], []
    for instance in range(setting.instances(12, 48)):
        generator = setting.generator(16, instance)
        A, W = _rows(generator, instance)
        response = reduced(A, W)
        cells = bounded_cones(response, HALVINGS, math.inf if instance % 2 else 0.0)  # in single or double precision
        count, dimension = cells.middles.shape
        boxes = 2 * torch.rand(count, DIRECTIONS, dimension, generator=generator, dtype=torch.float64) - 1
        corners = torch.tensor(list(product((-1.0, 1.0), repeat=dimension)), dtype=torch.float64).expand(count, -1, -1)
        inside = [cells.middles[:, None] + cells.halves[:, None] * each for each in (boxes, corners)]
        found = [_responses(response, cells, each).amax(1) for each in inside]
        bound = found[1] if corners_alone else cells.uppers
        size = float(response.weights.abs().sum()) + float(response.linear.norm())
        excess = torch.maximum(*found) - bound
        ratios.append(float((excess / (response.rounding + torch.finfo(torch.float64).eps * size)).max()))
        solved = sphere.maximise(A, W, max_seconds=0.1)
        best = max(float(_responses(response, cells, each).max()) for each in inside)
        listed.append((best - solved.upper) / (response.rounding + torch.finfo(torch.float64).eps * size))
    worst = ratios if corners_alone else [max(pair) for pair in zip(ratios, listed)]
    beyond = sum(ratio > 1 for ratio in worst)
    text = (
        f"{share_text(beyond, len(worst), 'sets of patches have a direction above a bound')}; of the final bounds the "
        f"worst is {max(listed):.2g} roundings above"
    )
    return Evidence(largest(worst), text, len(worst), beyond, (ranked("largest excess", worst),))


CLAIMS = (
    Claim(
        name="sphere",
        statement="No direction's ReLU response lies above the bound of a cone that holds it, nor above the final "
        "bound.",
        source="meanfield/certificates/sphere; McCormick 1976",
        statistic="largest (response - bound of the cone) over cones after four halvings and directions in them, in "
        "units of the rounding that the bound allows for",
        threshold=1.0,
        derivation="a bound is one; rounding as stated by `sphere.response.reduced`",
        limits="Directions are drawn and taken at corners: a bound that is too low elsewhere could escape. Pairs of "
        "rows that differ in one direction attain theirs.",
        measure=lambda setting: _above(setting, False),
        controls={"the largest response at the corners for a bound": lambda setting: _above(setting, True)},
        axes=Axes("set of patches, sorted", "excess over the bound / rounding", ""),
    ),
)
