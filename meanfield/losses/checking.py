"""Whether a loss is what its methods say: convex, with this gradient, this prox, this domain and this conjugate."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meanfield.losses.base import Loss
from meanfield.signatures import Seed, checked
from meanfield.validation import Misuse

COUNT = 24  # images of each set of targets
SPREADS = (0.1, 1.0, 5.0, 25.0)  # of outputs
WEIGHTS = (0.01, 0.1, 1.0, 30.0)
STEP = 1e-6  # of a difference quotient, relative to the outputs
FARTHEST = (1.0, 1e2, 1e4, 1e6)  # where a supremum that is not finite shows
TOLERANCES = {"value": 0.0, "convexity": 1e-9, "gradient": 1e-5, "prox": 1e-5, "domain": 1e-9, "conjugate": 1e-9}


class LossCheck(NamedTuple):
    """What a loss was found to be off by at most, each relative to 1 plus the terms compared; all below tolerance.

    convexity: of the value above a chord.  gradient: of its slopes outside of the difference quotients to both sides.
    prox: fall of its objective, per unit of way, on leaving the point.  domain: of `feasible` moving what lies in the
    domain, and of a conjugate that is finite where <s, F> - loss rises beyond it.  conjugate: of the equality of
    Fenchel and Young at the gradient and at the dual of the prox, and of their inequality elsewhere.
    """

    convexity: float
    gradient: float
    prox: float
    domain: float
    conjugate: float


@checked
def check(loss: Loss, targets: Any = None, *, outputs: int | None = None, seed: Seed = 0) -> LossCheck:
    """Try value, convexity, gradient, prox, domain and conjugate of a loss on random points, in float64.

    targets: as a problem takes them, with `outputs` K; by default those of two and of three classes and, of a loss that
    takes them, real ones.
    Raises Misuse that names the line which is wrong, by how much, and where.  The lines are tried in this order, each
    by those before it, so that the first one named is the one to mend.  What holds at random points is not proven.
    """
    generator = torch.Generator().manual_seed(seed)
    found = dict.fromkeys(LossCheck._fields, 0.0)
    sets = _targets(loss, targets, outputs, generator)
    trials = [_Trial(loss, y, size, spread, generator, found) for y, size in sets for spread in SPREADS]
    for line in (_Trial.value, _Trial.convexity, _Trial.gradient, _Trial.prox, _Trial.domain, _Trial.conjugate):
        for trial in trials:
            line(trial)
    return LossCheck(**found)


def _targets(loss: Loss, given: Any, outputs: int | None, generator: torch.Generator) -> list[tuple[Tensor, int]]:
    """Sets of checked targets with their K."""
    like = torch.zeros(1, dtype=torch.float64)
    if given is not None:
        rows = torch.as_tensor(given)
        size = outputs or (rows.shape[1] if rows.ndim == 2 else 1)
        return [(loss.check_targets(rows, len(rows), size, like), size)]
    found = []
    for classes in (2, 3):
        own, size = torch.arange(COUNT) % classes, loss.outputs_for(classes)
        y = loss.check_targets(loss.encode(own, classes), COUNT, size, like)
        if not torch.equal(loss.decode(y), own):
            raise Misuse(
                "loss", loss.name, f"has a wrong decode: it does not give back the {classes} classes of encode"
            )
        found.append((y, size))
    for size in (1, 3):
        try:
            real = 3 * torch.randn(COUNT, size, generator=generator, dtype=torch.float64)
            found.append((loss.check_targets(real, COUNT, size, like), size))
        except ValueError:  # of labels or classes
            break
    return found


class _Trial:
    """One set of targets y and random outputs F (N, K) of one size; `found` keeps the worst of every line."""

    def __init__(
        self, loss: Loss, targets: Tensor, size: int, spread: float, generator: torch.Generator, found: dict[str, float]
    ) -> None:
        self.loss, self.y, self.spread, self.generator, self.found = loss, targets, spread, generator, found
        self.F = self._normal((len(targets), size))
        self.duals: list[tuple[str, Tensor, Tensor]] = []  # where F maximises <s, F> - loss: what s is, s, F

    def value(self) -> None:
        value = self.loss.value(self.F, self.y)
        self._require_shape("value", value, self.F.shape[:1])
        self._line("value", torch.where(value.isfinite(), 0.0, torch.inf), "is not finite", self.F)

    def convexity(self) -> None:
        for share in (0.01, 1.0):
            other = self.F + share * self._normal(self.F.shape)
            t = torch.rand(len(self.F), generator=self.generator, dtype=self.F.dtype)
            middle = self.loss.value(self.F + t[:, None] * (other - self.F), self.y)
            here, there = (self.loss.value(each, self.y) for each in (self.F, other))
            over = (middle - (1 - t) * here - t * there) / (1 + here.abs() + there.abs())
            self._line("convexity", over, "lies above a chord from here", self.F)

    def gradient(self) -> None:
        """Of a convex function every subgradient's slope lies between the difference quotients to both sides."""
        g = self.loss.gradient(self.F, self.y)
        self._require_shape("gradient", g, self.F.shape)
        for direction in self._directions():
            up, down = self._slope(self.value_at, self.F, direction), -self._slope(self.value_at, self.F, -direction)
            along = (g * direction).sum(1)
            off = torch.maximum(along - up, down - along) / (1 + up.abs() + down.abs() + self.value_at(self.F).abs())
            self._line("gradient", off, "has a slope that the values do not have", self.F)
        self.duals.append(("the gradient", g, self.F))

    def prox(self) -> None:
        for weight in WEIGHTS:
            center = self.F
            point = self.loss.prox(center, self.y, weight)
            self._require_shape("prox", point, center.shape)

            def merit(outputs: Tensor, center: Tensor = center, weight: float = weight) -> Tensor:
                return self.value_at(outputs) + 0.5 * weight * (outputs - center).square().sum(1)

            pull = weight * (center - point)
            size = 1 + merit(point).abs() + pull.abs().sum(1) + self.loss.gradient(point, self.y).abs().sum(1)
            for direction in (sign * each for each in self._directions() for sign in (1, -1)):
                fall = -self._slope(merit, point, direction) / size
                self._line("prox", fall, f"is no minimum at weight {weight:g}: beside it there is less", center)
            self.duals.append((f"the dual of the prox of weight {weight:g}", pull, point))

    def domain(self) -> None:
        for name, dual, _ in self.duals:
            for share in (0.0, 0.3, 1.0):
                s = share * dual
                self._line("domain", self._moved(s), f"loses {share:g} times {name}: feasible moves it", s)
        for size in (0.1, 1.0, 1e3):
            wild = size * self._normal(self.F.shape)
            near = self.loss.feasible(wild, self.y)
            self._require_shape("feasible", near, self.F.shape)
            lost = torch.where(self.loss.conjugate(near, self.y).isfinite(), self._moved(near), torch.inf)
            self._line("domain", lost, "does not hold what feasible gives", wild)
            self._unbounded(wild, near)
            if self.loss.supercoercive:
                lost = torch.where(self.loss.conjugate(wild, self.y).isfinite(), 0.0, torch.inf)
                self._line("domain", lost, "is not everything, and the loss is said to be supercoercive", wild)

    def conjugate(self) -> None:
        for name, dual, F in self.duals:
            s = self.loss.feasible(dual, self.y)  # that of a prox is in the domain up to rounding
            conjugate, value, product = self.loss.conjugate(s, self.y), self.value_at(F), (s * F).sum(1)
            self._require_shape("conjugate", conjugate, self.F.shape[:1])
            off = (value + conjugate - product).abs() / (1 + value.abs() + product.abs())
            self._line("conjugate", off, f"breaks Fenchel-Young, loss + conjugate = <s, F>, at {name}", F)
        for size in (0.1, 1.0, 10.0):
            s = self.loss.feasible(size * self._normal(self.F.shape), self.y)
            value, product = self.value_at(self.F), (s * self.F).sum(1)
            below = (product - value - self.loss.conjugate(s, self.y)) / (1 + value.abs() + product.abs())
            self._line("conjugate", below, "breaks Fenchel-Young, loss + conjugate >= <s, F>", self.F)

    def value_at(self, outputs: Tensor) -> Tensor:
        return self.loss.value(outputs, self.y)

    def _unbounded(self, wild: Tensor, near: Tensor) -> None:
        """Outside of the domain <s, F> - loss has no end, along F as far as one looks towards s."""
        conjugate = self.loss.conjugate(wild, self.y)
        away = wild - near
        for distance in FARTHEST:
            F = distance * torch.nn.functional.normalize(away, dim=1)
            value, product = self.value_at(F), (wild * F).sum(1)
            below = (product - value - conjugate) / (1 + value.abs() + product.abs())
            below = torch.where(away.norm(dim=1) > 1e-6 * wild.norm(dim=1), below, 0.0)
            self._line("domain", below, "holds a dual s whose conjugate is finite, and <s, F> - loss is above it", wild)

    def _moved(self, dual: Tensor) -> Tensor:
        """How far `feasible` moves each dual, relative."""
        return (self.loss.feasible(dual, self.y) - dual).abs().amax(1) / (1 + dual.abs().amax(1))

    def _slope(self, function: Any, at: Tensor, direction: Tensor) -> Tensor:
        """The difference quotient of one side, per image; the step is what remains of it after rounding."""
        step = STEP * (1 + at.abs().amax(1))
        return (function(at + step[:, None] * direction) - function(at)) / step

    def _directions(self) -> list[Tensor]:
        random = torch.nn.functional.normalize(self._normal(self.F.shape), dim=1)
        axes = torch.eye(self.F.shape[1], dtype=self.F.dtype)
        return [random, *(axis.expand_as(self.F) for axis in axes)]

    def _normal(self, shape: Any) -> Tensor:
        return self.spread * torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)

    def _require_shape(self, line: str, found: Any, shape: Any) -> None:
        if not isinstance(found, Tensor) or found.shape != shape or found.dtype != torch.float64:
            came = f"{tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            remedy = f"has a wrong {line}: of outputs {tuple(self.F.shape)} in float64 it must have the shape"
            raise Misuse("loss", self.loss.name, f"{remedy} {tuple(shape)} and their dtype, and is {came}")

    def _line(self, line: str, errors: Tensor, why: str, place: Tensor) -> None:
        """Keep the largest error (N,); Misuse where it is above the tolerance of the line."""
        errors = errors.nan_to_num(nan=math.inf, posinf=math.inf)
        worst = int(errors.argmax())
        error = float(errors[worst])
        if error > TOLERANCES[line]:
            here = ", ".join(f"{each:.4g}" for each in place[worst].tolist())
            target = self.y[worst].tolist()
            remedy = f"has a wrong {line}: it {why}, off by {error:.3g} at ({here}) with the target {target}"
            raise Misuse("loss", self.loss.name, remedy)
        if line in self.found:
            self.found[line] = max(self.found[line], error)
