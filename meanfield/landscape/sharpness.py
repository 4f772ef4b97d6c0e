"""How sharp a network's mean loss is where it stands: curvatures, rises, norms, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from meanfield import rates
from meanfield.landscape import curvature, directions, hessian, metric
from meanfield.landscape.caution import cautions
from meanfield.landscape.objective import Loss, Objective
from meanfield.network import ParticleNetwork
from meanfield.rates import Interval
from meanfield.signatures import Count, Positive, Seed, checked
from meanfield.starts import normal
from meanfield.subject import Network, Parameters, Subject, moved
from meanfield.validation import Misuse, at_least, choice, one_of

METRICS = ("weights", "flow")
MEASURES = ("top", "smallest", "trace", "gauss_newton", "element_trace", "rise", "adaptive", "fisher_rao")
STARTS = 3  # of the ascent: the gradient at the network, and random ones
ASCENT = 10  # its steps


@dataclass(frozen=True)
class Sharpness:
    """What was measured, None where it was not asked for.  H is the Hessian of the mean loss over the images.

    loss, size: the mean loss, and the number D of parameters.
    metric: of top, smallest, trace and gauss_newton: "weights", H itself, or "flow", G^{-1/2} H G^{-1/2} of the metric
        G of the flow (section 12 of the theory; masses are kept).  The others are the same in both.
    top, smallest: signed eigenvalues, Rayleigh quotients of unit vectors v; an eigenvalue lies within |H v - value v|,
        which is the interval.  That none lies beyond is very likely, not proven (`curvature.extremes`).
    trace, gauss_newton, element_trace: of H, of its Gauss-Newton part, and of diag(w) H diag(w), which is
        sum_i w_i^2 H_ii; Student's interval over random vectors (`curvature.Estimate`, with the standard error).
    rise: the mean of L(w + epsilon d) - L(w) over filter-normalised Gaussian directions d; Student's interval over
        directions.  largest_rise: the largest seen, a lower bound: the interval has no upper end.
    adaptive: the largest L(w + d) - L(w) with |d / |w|| <= rho, an Euclidean norm over the entries that are not zero
        (Kwon et al. 2021), reached by ascent from a few starts: a lower bound, the interval has no upper end.
    fisher_rao: w^T F w of the empirical Fisher matrix F = mean of the outer products of the images' own gradients at
        their own targets (Liang et al. 2019, whose norm is its root): the mean of (d loss_n(t w) / dt)^2 at t = 1;
        exact for these images, Student's interval over images for what they were drawn from.
    products: with H or its part, spent on each measure.
    warnings: eigenvalues that Lanczos did not reach; where networks are not made comparable by normalised directions.
    """

    loss: float
    size: int
    metric: str
    top: Interval | None
    smallest: Interval | None
    trace: Interval | None
    gauss_newton: Interval | None
    element_trace: Interval | None
    rise: Interval | None
    largest_rise: Interval | None
    adaptive: Interval | None
    fisher_rao: Interval | None
    products: Mapping[str, int]
    warnings: tuple[str, ...]

    @property
    def mean_curvature(self) -> Interval | None:
        """trace / D: the mean of d^T H d over directions d of length one, uniformly drawn."""
        if self.trace is None:
            return None
        return Interval(*(each / self.size for each in (self.trace.value, self.trace.low, self.trace.high)))


@checked
def sharpness(
    network: Network,
    images: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    seed: Seed = 0,
    metric: Annotated[str, choice(METRICS)] = "weights",
    measures: Sequence[str] = MEASURES,
    tolerance: Positive = 1e-4,
    steps: Count = curvature.STEPS,
    products: Count = curvature.PRODUCTS,
    epsilon: Positive = 0.1,
    directions: Annotated[int, at_least(2)] = 20,
    rho: Positive = 0.5,
) -> Sharpness:
    """The sharpness of a network's mean loss over images, in evaluation mode (batch norm with its running statistics).

    images, targets, loss: as of `objective.Objective`; cross-entropy where no loss is given.
    metric: "flow" is for a ParticleNetwork, of positive masses.
    measures: what to measure, of MEASURES; a figure does not depend on which others are measured.
    tolerance, steps: largest residual as a share of the top eigenvalue, and Lanczos steps at most.
    products: for each trace.  epsilon, directions: of the rise.  rho: of the adaptive one.

    Where the loss is not twice differentiable (ReLU, max pooling), H is that of the smooth piece at hand: the kinks
    between pieces show in the rises, not in H.
    """
    asked = [measures] if isinstance(measures, str) else list(measures)
    for each in asked:
        one_of(each, "measures", MEASURES)
    objective = Objective(Subject(network), images, targets, loss)
    scale = _scale(network, metric)
    here = _Here(objective, scale, seed)
    found: dict[str, Interval] = {}
    if ends := [each for each in ("top", "smallest") if each in asked]:
        found |= here.ends(ends, tolerance, steps)
    if "trace" in asked:
        found["trace"] = here.trace("trace", here.hessian, products)
    if "element_trace" in asked:
        found["element_trace"] = here.trace("element_trace", here.hessian.scaled(here.parameters), products)
    here.forget()
    if "gauss_newton" in asked:
        bare = hessian.GaussNewton(objective, here.parameters, scale)
        found["gauss_newton"] = here.trace("gauss_newton", bare, products)
    if "rise" in asked:
        here.warnings += cautions(objective.subject.network)
        found["rise"], found["largest_rise"] = here.rises(epsilon, directions)
    if "adaptive" in asked:
        found["adaptive"] = here.adaptive(rho)
    if "fisher_rao" in asked:
        along = hessian.slopes_along(objective, here.parameters, here.parameters)
        found["fisher_rao"] = rates.mean(along.square().tolist())
    figures = {name: found.get(name) for name in (*MEASURES, "largest_rise")}
    size = sum(each.numel() for each in here.parameters.values())
    return Sharpness(here.loss, size, metric, **figures, products=here.products, warnings=tuple(here.warnings))


def _scale(network: Network, name: str) -> Parameters | None:
    if name == "weights":
        return None
    if not isinstance(network, ParticleNetwork):
        raise Misuse("metric", name, f"needs the masses of a ParticleNetwork, not a {type(network).__name__}")
    return metric.inverse_root(network)


class _Here:
    """A mean loss at a network, and what was spent on it; every measure draws from the seed anew."""

    def __init__(self, objective: Objective, scale: Parameters | None, seed: int) -> None:
        self.objective, self.scale, self.seed = objective, scale, seed
        self.parameters = objective.subject.parameters
        self.loss = hessian.require_smooth(objective, self.parameters)
        self.products: dict[str, int] = {}
        self.warnings: list[str] = []

    @property
    def generator(self) -> torch.Generator:
        return directions.generator_of(self.seed)

    @cached_property
    def hessian(self) -> hessian.Hessian:
        return hessian.Hessian(self.objective, self.parameters, self.scale)

    def forget(self) -> None:
        """Give back the memory of the Hessian's graphs."""
        self.__dict__.pop("hessian", None)

    def ends(self, asked: Sequence[str], tolerance: float, steps: int) -> dict[str, Interval]:
        """The eigenvalues asked for, from one Krylov space; top is always sought, as what residuals are measured by."""
        count = int("smallest" in asked and self.hessian.size > 1)
        found = curvature.extremes(self.hessian, self.generator, 1, count, tolerance=tolerance, products=steps)
        self.products |= dict.fromkeys(asked, found.products)
        if found.status != "converged":
            residuals = " and ".join(f"{pair.residual:.1e}" for pair in (*found.largest, *found.smallest))
            self.warnings.append(
                f"{' and '.join(asked)}: after {steps} Lanczos steps residuals are {residuals}, "
                f"more than {tolerance:g} of the top eigenvalue"
            )
        values = {"top": found.largest[0].value, "smallest": (found.smallest or found.largest)[0].value}
        return {name: values[name] for name in asked}

    def trace(self, name: str, operator: hessian.Products, products: int) -> Interval:
        before = operator.count
        found = curvature.trace(operator, self.generator, products=products)
        self.products[name] = operator.count - before
        return found

    def rises(self, epsilon: float, count: int) -> tuple[Interval, Interval]:
        """Mean and largest."""
        generator, found = self.generator, []
        for _ in range(count):
            direction = directions.gaussian(self.objective.subject, generator, "filter")
            found.append(self._rise(moved(self.parameters, direction, epsilon)))
        values = torch.stack(found).tolist()
        return rates.mean(values), _at_least(max(values))

    @torch.no_grad()
    def _rise(self, parameters: Parameters) -> Tensor:
        return self.objective(parameters).double() - self.loss

    def adaptive(self, rho: float) -> Interval:
        """The largest f(t) = L(w + |w| t) on |t| = rho: steps along the normalised gradient and back to the sphere."""
        generator, origin = self.generator, hessian.flat(self.parameters.values())
        sizes, best = origin.abs(), origin.new_zeros(())
        for start in range(STARTS):
            point = _unit(normal(sizes.shape, generator, sizes) * (sizes > 0)) if start else torch.zeros_like(sizes)
            for step in range(ASCENT + 1):
                moved = hessian.named(origin + rho * sizes * point, self.parameters)
                value, gradient = hessian.slope(self.objective, moved)
                best = torch.maximum(best, value.double() - self.loss)
                point = _unit(point + 2 / (1 + step / 2) * _unit(sizes * hessian.flat(gradient.values())))
        return _at_least(float(best))


def _at_least(value: float) -> Interval:
    """A lower bound."""
    return Interval(value, value, math.inf)


def _unit(vector: Tensor) -> Tensor:
    """Of length one; zero stays."""
    return vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
