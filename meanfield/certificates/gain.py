"""The largest response of one kernel of a saturating layer for its price, by branch and bound over boxes of kernels.

Sought is G = max_z |Xi(z)| / c(z) of Xi(z) = weights^T h(patches z) and c(z) = 2 sqrt(lambda_s (mu + lambda_1 |z|^2)).
On a box |z_k - m_k| <= e_k every row is near a line, h(x + d) = v + s d + eps, |eps| <= apart (`Saturating.chords`).
With Xi_0 = weights^T v of length l and direction u, J = d Xi / dz along those lines, J_u = J^T u, J_- what is across u,
and with the parts of the rows' lengths along and across u, rest_u = sum |<weights_i, u>| apart_i and rest_- alike,

    |Xi(z)| <= A + hypot(a, B) - a,   A = l + <J_u, z - m> + rest_u,   B = sum_k e_k |J_-k| + rest_-,

a the least on the box of l + <J_u, z - m> - rest_u: the part x of Xi along u has a <= x <= A, the one across is no
longer than B, and hypot(x, B) - x falls as x rises.  The price has c(z) >= c(m) + <c'(m), z - m>: it is convex.
A box has no ratio above a level where the first less the level times the second is nowhere positive.  At the maximum
the terms of first order cancel: boxes there need not be small.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from meanfield import limits
from meanfield.certificates.saturating import Saturating
from meanfield.certificates.sphere.response import chunk
from meanfield.penalties import Penalty

BATCH = 1024  # boxes bounded at a time
MAX_OPEN = 1_000_000
BISECTIONS = 20  # of the level: a millionth of it


@dataclass(frozen=True, eq=False)
class Gain:
    """lower <= max_z |Xi(z)| / c(z) <= upper, `lower` attained at the kernel argmax (d,); boxes that were looked at."""

    lower: float
    upper: float
    argmax: Tensor
    boxes: int


def price(penalty: Penalty, mu: float, lengths: Tensor) -> Tensor:
    """c of kernels of these lengths."""
    return penalty.outer.price(mu + penalty.input * lengths.square(), penalty.source)


@dataclass(frozen=True, eq=False)
class Response:
    """Xi of a layer h, patches (n, d), weights (n, C); its price has the strengths of `penalty`, of power 2, and mu."""

    h: Saturating
    patches: Tensor
    weights: Tensor
    penalty: Penalty
    mu: float

    def __call__(self, kernels: Tensor) -> Tensor:
        """|Xi|, (b, d) -> (b,)."""
        parts = kernels.split(chunk(len(self.patches)))
        return torch.cat([(self.h.function(z @ self.patches.T) @ self.weights).norm(dim=1) for z in parts])

    def price(self, lengths: Tensor) -> Tensor:
        """c of kernels of these lengths."""
        return price(self.penalty, self.mu, lengths)

    def ratios(self, kernels: Tensor) -> Tensor:
        """|Xi| / c, (b, d) -> (b,)."""
        return self(kernels) / self.price(kernels.norm(dim=1))

    @cached_property
    def sizes(self) -> Tensor:
        """Lengths of the rows of weights, (n,)."""
        return self.weights.norm(dim=1)

    def across(self, parts: Tensor) -> Tensor:
        """Lengths of the rows of weights without their parts (b, n) along unit vectors, rounded up: squares of nearly
        equal size hide as much as the root of their rounding.
        """
        rounded = 8 * (self.weights.shape[1] + 8) * torch.finfo(parts.dtype).eps
        return ((1 + rounded) * self.sizes.square() - parts.square()).clamp_min(0).sqrt()

    @cached_property
    def products(self) -> Tensor:
        """patches_ik weights_ic, (n, d C): h'(patches m) times this is J."""
        return (self.patches[:, :, None] * self.weights[:, None, :]).flatten(1)

    @property
    def rounded(self) -> float:
        """Of what h is of, relative to the sum of its sizes: long kernels may cancel in it."""
        return (2 * self.patches.shape[1] + 4) * torch.finfo(self.patches.dtype).eps

    @cached_property
    def rounding(self) -> float:
        """Of |Xi| and of its bounds, what h is of apart."""
        terms = len(self.patches) + 8 * self.patches.shape[1] + 64
        return 8 * terms * torch.finfo(self.weights.dtype).eps * float(self.sizes.sum())

    def radius(self, level: float) -> float:
        """Beyond it the price alone keeps the ratio below the level: |Xi| <= sum |weights_i|."""
        most = (float(self.sizes.sum()) / (2 * level)) ** 2 / self.penalty.source - self.mu
        return math.sqrt(max(most, 0.0) / self.penalty.input)


def largest(response: Response, tried: Tensor, deadline: float, tolerance: float) -> Gain:
    """Bounds of the largest ratio, within a relative `tolerance` or what is proven at `deadline` (of perf_counter).

    tried (b, d): kernels that are tried first.  Xi is odd, so that half of all kernels are looked at.
    """
    ratios = response.ratios(tried)
    best = int(ratios.argmax())
    lower, argmax = float(ratios[best]), tried[best]
    if lower <= 0 and not bool(response.sizes.any()):
        return Gain(0.0, 0.0, argmax, 0)
    lower = max(lower, 1e-9 * float(response.sizes.sum() / response.price(response.sizes.new_zeros(()))))
    middles, halves = _whole(response, lower)
    uppers, axes = middles.new_full((1,), math.inf), torch.zeros(1, dtype=torch.long, device=middles.device)
    looked, closed, fresh = 0, 0.0, torch.arange(1)
    while True:
        limits.look()
        found, axes[fresh] = _bounds(response, middles[fresh], halves[fresh])
        uppers[fresh] = torch.minimum(uppers[fresh], found)
        looked += len(fresh)
        reached = response.ratios(middles[fresh])
        if float(reached.max()) > lower:
            lower, argmax = float(reached.max()), middles[fresh][int(reached.argmax())]
        alive = uppers > lower * (1 + tolerance)
        closed = max(closed, float(uppers.masked_fill(alive, 0.0).max()))
        middles, halves, uppers, axes = middles[alive], halves[alive], uppers[alive], axes[alive]
        if not len(uppers) or time.perf_counter() >= deadline or len(uppers) > MAX_OPEN:
            break
        chosen = uppers.topk(min(len(uppers), BATCH)).indices
        middles, halves, uppers, axes = _halved(middles, halves, uppers, axes, chosen)
        fresh = torch.arange(len(uppers) - 2 * len(chosen), len(uppers), device=uppers.device)
    return Gain(lower, max(lower, closed, float(uppers.max()) if len(uppers) else 0.0), argmax, looked)


def _whole(response: Response, lower: float) -> tuple[Tensor, Tensor]:
    """One box that holds a kernel or its negative wherever the ratio may exceed `lower`."""
    dimension, radius = response.patches.shape[1], response.radius(lower)
    middles, halves = response.patches.new_zeros(1, dimension), response.patches.new_full((1, dimension), radius)
    middles[0, 0] = halves[0, 0] = radius / 2
    return middles, halves


def _halved(middles: Tensor, halves: Tensor, uppers: Tensor, axes: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
    """The boxes that were not chosen, then both halves of those that were, cut across their axes."""
    axis = axes[chosen, None]
    half = halves[chosen].scatter(1, axis, 0.5 * halves[chosen].gather(1, axis))
    step = torch.zeros_like(half).scatter(1, axis, half.gather(1, axis))
    left = torch.ones(len(uppers), dtype=torch.bool, device=uppers.device).index_fill(0, chosen, False)
    return (
        torch.cat([middles[left], middles[chosen] - step, middles[chosen] + step]),
        torch.cat([halves[left], half, half]),
        torch.cat([uppers[left], uppers[chosen], uppers[chosen]]),
        torch.cat([axes[left], axes[chosen], axes[chosen]]),
    )


def _bounds(response: Response, middles: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds of the ratio on boxes (b, d), and the axis along which it is least known."""
    size = chunk(len(response.patches))
    parts = [_bound(response, m, e) for m, e in zip(middles.split(size), halves.split(size))]
    bounds, axes = zip(*parts)
    return torch.cat(bounds), torch.cat(axes)


def _bound(response: Response, middles: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    rounded = response.rounded * ((middles.abs() + halves) @ response.patches.abs().T)
    reach = halves @ response.patches.abs().T + rounded
    values, slopes, apart = response.h.chords(middles @ response.patches.T, reach)
    apart = apart + slopes * rounded
    xi = values @ response.weights
    jacobian = (slopes @ response.products).unflatten(1, (middles.shape[1], -1))  # (b, d, C)
    length = xi.norm(dim=1)
    towards = xi / length.clamp_min(torch.finfo(xi.dtype).tiny)[:, None]
    along = (jacobian * towards[:, None, :]).sum(2)
    across = (jacobian - along[:, :, None] * towards[:, None, :]).norm(dim=2)
    parts = (towards @ response.weights.T).abs()
    rest = (parts * apart).sum(1)
    aside = (halves * across).sum(1) + (response.across(parts) * apart).sum(1)
    moved = (halves * along.abs()).sum(1)
    least = length - moved - rest
    flat = length + rest + torch.hypot(least, aside) - least + response.rounding
    most = torch.minimum(flat + moved, response.sizes.sum() + response.rounding)
    crude = most / response.price((middles.abs() - halves).clamp_min(0).norm(dim=1))
    unknown = halves * (
        (response.sizes * apart / reach.clamp_min(torch.finfo(reach.dtype).tiny)) @ response.patches.abs()
    )
    return _least_level(response, middles, halves, along, flat, crude), unknown.argmax(1)


def _least_level(
    response: Response, middles: Tensor, halves: Tensor, along: Tensor, flat: Tensor, crude: Tensor
) -> Tensor:
    """The least level up to `crude` that is seen not to be exceeded.  Every `high` on the way is such a level."""
    prices = response.price(middles.norm(dim=1))
    slope = 4 * response.penalty.source * response.penalty.input * middles / prices[:, None]
    low, high = torch.zeros_like(crude), crude
    for _ in range(BISECTIONS):
        level = 0.5 * (low + high)
        most = flat + (halves * (along - level[:, None] * slope).abs()).sum(1)
        holds = most <= level * prices
        low, high = torch.where(holds, low, level), torch.where(holds, level, high)
    return high
