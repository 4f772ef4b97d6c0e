"""Is a function convex?  Segments, curvature on a tangent space, and an adversarial search for a witness against it.

All three work on any scalar function of a vector (d,), so that a theorist can point them at an objective of their own;
`ProgramVariables` makes the convex program of frozen features such a function (Fang et al. 2019, section 4).  A
violation counts only beyond what rounding can explain.

    >>> import torch
    >>> from meanfield.studies import convexity
    >>> points = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    >>> convexity.segments(lambda x: x.square().sum(), points).convex
    True
    >>> convexity.segments(lambda x: x.square().sum().sqrt().sqrt(), points).convex
    False
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from meanfield import storage
from meanfield.convex.program import ConvexProgram
from meanfield.convex.repopulation import ProgramPoint
from meanfield.network import along_axis
from meanfield.signatures import Count, Seed, checked
from meanfield.validation import Misuse, instance

Function = Callable[[Tensor], Tensor]
Sampler = Callable[[torch.Generator], Tensor]
Constraint = Callable[[Tensor], Tensor]

# up to here all eigenvalues are computed, which is quicker too; beyond, Lanczos finds the two ends
DENSE_DIMENSION = 1000
LANCZOS_TOLERANCE = 1e-6  # of the residual, relative to the largest eigenvalue
VERTICES, ASCENT_STEPS, ASCENT_RATE = 8, 40, 0.2  # of one restart of the search
RESTORING_STEPS = 100  # of Newton's method from a drawn point to the constraints
LIGHT_MASSES = 0.25  # concentration of sampled masses: below 1, so that light particles are common


@dataclass(frozen=True, eq=False)
class Witness:
    """Two points between which a function lies above its chord, or the most suspicious ones found.

    violation = f((1-t) start + t end) - (1-t) f(start) - t f(end); scale = (1-t) |f(start)| + t |f(end)|; rounding
    bounds what float errors can contribute to the violation.
    """

    start: Tensor
    end: Tensor
    t: float
    violation: float
    scale: float
    rounding: float

    @property
    def relative(self) -> float:
        """violation / scale."""
        return self.violation / max(self.scale, torch.finfo(torch.float64).tiny)

    @property
    def proves(self) -> bool:
        """Whether the function is not convex: the violation exceeds rounding."""
        return self.violation > self.rounding

    def replay(self, function: Function) -> float:
        """The violation, evaluated afresh."""
        with torch.no_grad():
            ends = (1 - self.t) * function(self.start) + self.t * function(self.end)
            return float(function((1 - self.t) * self.start + self.t * self.end) - ends)

    def save(self, path: str | Path) -> Path:
        """Both points and t as safetensors."""
        figures = torch.tensor([self.t, self.violation, self.scale, self.rounding], dtype=torch.float64)
        return storage.save_tensors({"start": self.start, "end": self.end, "figures": figures}, path)

    @classmethod
    def load(cls, path: str | Path) -> Witness:
        """ValueError where the file is damaged or of another kind."""
        kept = storage.load_tensors(path)
        if kept.keys() != {"start", "end", "figures"} or kept["figures"].shape != (4,):
            raise ValueError(f"{path} holds no witness against convexity, but {sorted(kept)}")
        return cls(kept["start"], kept["end"], *kept["figures"].tolist())


def rounding_of_sums(function: Function, point: Tensor) -> float:
    """(d + 8) eps |f|: bounds the error of f where it is a sum of at most d non-negative terms (Higham 2002, section
    4.2).
    """
    return (len(point) + 8) * torch.finfo(point.dtype).eps * abs(float(function(point)))


@dataclass(frozen=True, eq=False)
class Segments:
    """A function along straight lines: excess over the chord and its rounding bound, (pairs, times) each."""

    points: Tensor
    pairs: list[tuple[int, int]]
    times: Tensor
    excess: Tensor
    scale: Tensor
    rounding: Tensor

    @property
    def convex(self) -> bool:
        """Whether no excess goes beyond rounding: not a proof of convexity, only the absence of a witness."""
        return bool((self.excess <= self.rounding).all())

    @property
    def violated(self) -> Tensor:
        """(pairs,), whether the chord is broken somewhere on the line."""
        return (self.excess > self.rounding).any(1)

    @cached_property
    def worst(self) -> Witness:
        """The largest excess in units of its rounding bound."""
        place = int((self.excess / self.rounding.clamp_min(torch.finfo(self.rounding.dtype).tiny)).argmax())
        pair, time = divmod(place, len(self.times))
        first, second = self.pairs[pair]
        figures = (float(each[pair, time]) for each in (self.excess, self.scale, self.rounding))
        return Witness(self.points[first], self.points[second], float(self.times[time]), *figures)


@checked
@torch.no_grad()
def segments(
    function: Function, points: Tensor, *, times: Count = 7, rounding: Callable[[Tensor], float] | None = None
) -> Segments:
    """`function` at `times` inner points of the straight lines between all pairs of `points` (count, d).

    rounding(point) bounds the float error of function(point); default `rounding_of_sums`.  ValueError as in `falsify`.
    """
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f"points has shape {tuple(points.shape)}; expected (count, d) with at least two points")
    function = _finite_only(function)
    bound = rounding if rounding is not None else lambda point: rounding_of_sums(function, point)
    inner = torch.linspace(0, 1, times + 2, dtype=points.dtype, device=points.device)[1:-1]
    ends = torch.stack([function(point) for point in points])
    errors = torch.tensor([bound(point) for point in points], dtype=points.dtype, device=points.device)
    pairs = list(combinations(range(len(points)), 2))
    mix = lambda values, a, b: (1 - inner) * values[a] + inner * values[b]  # noqa: E731
    excess, scale, allowed = [], [], []
    for a, b in pairs:
        line = [(1 - t) * points[a] + t * points[b] for t in inner]
        excess.append(torch.stack([function(point) for point in line]) - mix(ends, a, b))
        scale.append(mix(ends.abs(), a, b))
        allowed.append(
            mix(errors, a, b) + torch.tensor([bound(point) for point in line], dtype=points.dtype, device=points.device)
        )
    return Segments(points, pairs, inner, torch.stack(excess), torch.stack(scale), torch.stack(allowed))


@dataclass(frozen=True, eq=False)
class Curvature:
    """Ends of the spectrum of Z^T H Z, for the Hessian H at a point and a basis Z (d, k) of a tangent space.

    residual |Z^T H Z v - smallest v|: an eigenvalue lies within it of `smallest`, and smallest = v^T Z^T H Z v is
    never below the least one; `direction` is Z v, (d,).  rounding: the error of an eigenvalue from sums of d products,
    d^{3/2} eps max |eigenvalue|.
    """

    smallest: float
    largest: float
    residual: float
    rounding: float
    direction: Tensor
    dimension: int

    @property
    def negative(self) -> bool:
        """Whether there is a direction of negative curvature: its Rayleigh quotient is below zero by more than
        rounding.
        """
        return self.smallest < -self.rounding


@checked
@torch.inference_mode(False)
def curvature(
    function: Function,
    point: Tensor,
    tangent: Tensor | None = None,
    *,
    equalities: Constraint | None = None,
    inequalities: Constraint | None = None,
    seed: Seed = 0,
) -> Curvature:
    """Smallest and largest eigenvalue of Z^T H Z, H the Hessian at `point` (d,) and Z = `tangent` (d, k), by default
    all of R^d, or what the equalities leave of it.

    equalities, inequalities: functions (d,) -> (k,) of a convex set, what must be zero (affine) and what must not be
    positive; the point must be in it.  Z is then an orthonormal basis of the directions that keep the equalities.
    Inequalities take no direction away, active ones neither: a function that is convex on a set with inner points has
    no negative curvature on its border, by continuity.  ValueError where the point is not in the set, or an equality
    is not affine.

    Signs are those of H on the span of Z whatever the basis; with orthonormal columns eigenvalues are curvatures per
    unit length.  Lanczos on autograd's Hessian products (all of them up to k = DENSE_DIMENSION), in the dtype of
    `point`. The function must be twice differentiable along the span of Z: entries that no column moves may sit on a
    kink.
    """
    if tangent is not None and equalities is not None:
        raise Misuse("tangent", tuple(tangent.shape), "and equalities both say in which directions; give one of them")
    basis = tangent if tangent is not None else _Constraints(equalities, inequalities).tangent(point.detach())
    if basis.shape[0] != len(point):
        raise ValueError(
            f"tangent has shape {tuple(basis.shape)}; expected ({len(point)}, k), one column per direction"
        )
    moved = (basis != 0).any(1)
    leaf = point.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = _number(function(leaf))
        if not value.requires_grad:
            raise Misuse("function", float(value), "is a value without a gradient: torch must make it from the point")
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        if not slope.requires_grad:  # an affine function
            return torch.zeros_like(vector)
        (change,) = torch.autograd.grad(slope, leaf, basis @ vector, retain_graph=True, materialize_grads=True)
        return basis[moved].T @ change[moved]

    values, vectors = _spectrum_ends(product, basis, seed)
    lowest = vectors[:, 0]
    residual = float((product(lowest) - values[0] * lowest).norm())
    size = max(abs(values[0]), abs(values[1]))
    rounding = len(point) ** 1.5 * torch.finfo(point.dtype).eps * size
    return Curvature(values[0], values[1], residual, rounding, basis @ lowest, basis.shape[1])


def _spectrum_ends(product: Callable[[Tensor], Tensor], basis: Tensor, seed: int) -> tuple[list[float], Tensor]:
    """Smallest and largest eigenvalue and the eigenvector of the smallest, (k, 1)."""
    count = basis.shape[1]
    if count <= DENSE_DIMENSION:
        matrix = torch.stack([product(unit) for unit in torch.eye(count, dtype=basis.dtype, device=basis.device)])
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return [float(values[0]), float(values[-1])], vectors[:, :1]

    def apply(vector: np.ndarray) -> np.ndarray:
        return product(torch.as_tensor(vector.ravel(), dtype=basis.dtype, device=basis.device)).cpu().numpy()

    def ends(which: str, shift: float, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        operator = LinearOperator((count, count), matvec=lambda v: apply(v) + shift * v.ravel(), dtype=np.float64)  # type: ignore[call-arg]
        found: Any = eigsh(operator, k=1, which=which, v0=np.random.default_rng(seed).normal(size=count), tol=tolerance)  # type: ignore[arg-type]
        return found

    size = abs(float(ends("LM", 0.0, 1e-3)[0][0]))
    if size == 0:
        return [0.0, 0.0], basis.new_ones(count, 1) / count**0.5
    # ARPACK converges relative to the eigenvalue it looks for, and that one may be zero: the shift makes it at least
    # `size`
    low, vectors = ends("SA", 2 * size, LANCZOS_TOLERANCE)
    high, _ = ends("LA", 2 * size, 1e-3)
    return [float(low[0]) - 2 * size, float(high[0]) - 2 * size], torch.as_tensor(
        vectors, dtype=basis.dtype, device=basis.device
    )


@dataclass(frozen=True, eq=False)
class Falsification:
    """What an adversarial search found: the worst witness, the largest relative violation of every restart, what it
    cost.
    """

    witness: Witness
    reached: list[float] = field(repr=False)
    evaluations: int

    @property
    def falsified(self) -> bool:
        """Whether the function is proven not to be convex: the witness goes beyond rounding."""
        return self.witness.proves


@checked
@torch.inference_mode(False)
def falsify(
    function: Function,
    feasible_sampler: Sampler,
    budget: Count = 4000,
    *,
    equalities: Constraint | None = None,
    inequalities: Constraint | None = None,
    seed: Seed = 0,
    rounding: Callable[[Tensor], float] | None = None,
) -> Falsification:
    """Search for the pair of feasible points whose midpoint lies highest above the chord, relative to the values.

    feasible_sampler(generator) draws one point (d,) of a CONVEX feasible set.  A restart draws a few and moves two
    points through their convex hull by gradient ascent, so that nothing needs to be known of the constraints.  budget:
    evaluations of the function, three to a step.  The best witness of all restarts is returned whether it proves
    anything or not.  ValueError names a point at which the function is not finite: no comparison with it says anything.

    equalities, inequalities: functions (d,) -> (k,) of the variables, differentiable, that say what the set is: zero,
    and not positive.  Points may then be drawn anywhere: each is moved to the set by Newton's method along the least
    change (inequalities that hold are left alone).  ValueError where a point does not get there, and where a midpoint
    of two points of the set is not in it: that set is not convex.
    """
    function = _finite_only(function)
    bound = rounding if rounding is not None else lambda point: rounding_of_sums(function, point)
    feasible = _Constraints(equalities, inequalities)
    generator = torch.Generator().manual_seed(seed)
    restarts = max(1, budget // (3 * (ASCENT_STEPS + 1)))
    best, reached = None, []
    for _ in range(restarts):
        drawn = (feasible_sampler(generator) for _ in range(VERTICES))
        points = [instance(point, "feasible_sampler(generator)", Tensor) for point in drawn]
        vertices = torch.stack([feasible.restored(point.detach()) for point in points])
        feasible.require_convex(vertices)
        found = _witness(function, *_ascend(function, vertices, generator), bound)
        reached.append(found.relative)
        best = found if best is None or _score(found) > _score(best) else best
    assert best is not None
    return Falsification(best, reached, 3 * restarts * (ASCENT_STEPS + 1))


@dataclass(frozen=True)
class _Constraints:
    """The set of points where equalities are zero and inequalities not positive; without either, everywhere."""

    equalities: Constraint | None
    inequalities: Constraint | None

    def restored(self, point: Tensor) -> Tensor:
        """A point of the set near this one: Newton's method on what is violated, by the least change, to rounding."""
        best, least = point, self._violation(point)
        for _ in range(RESTORING_STEPS):
            if least == 0:
                break
            point = point - torch.linalg.pinv(self._rows(point)) @ self._violated(point)
            amount = self._violation(point)
            if least <= _nearly_zero(best) and not amount < least:
                break
            if not amount >= least:
                best, least = point, amount
        self._require(best, "no feasible point was found near one that was drawn")
        return best

    def require_convex(self, points: Tensor) -> None:
        for a, b in combinations(points, 2):
            self._require((a + b) / 2, "the constraints are those of no convex set, halfway between two of its points")

    def tangent(self, point: Tensor) -> Tensor:
        """An orthonormal basis (d, k) of the directions that keep the equalities at a point of the set."""
        self._require(point, "point is not in the set")
        if self.equalities is None:
            return torch.eye(len(point), dtype=point.dtype, device=point.device)
        basis = _null_space(_jacobian(self.equalities, point), torch.ones_like(point, dtype=torch.bool))
        if basis.shape[1] == 0:
            raise ValueError("equalities leave no direction in which a curvature could be taken")
        alone = _Constraints(self.equalities, None)
        for direction in basis.T:
            alone._require(point + (1 + point.norm()) * direction, "equalities are not affine, their set is not convex")
        return basis

    def _violated(self, point: Tensor) -> Tensor:
        """(k,): the equalities, and those inequalities that are positive."""
        found = [point.new_zeros(0)]
        if self.equalities is not None:
            found.append(_values(self.equalities, point))
        if self.inequalities is not None:
            values = _values(self.inequalities, point)
            found.append(values[~(values <= 0)])
        return torch.cat(found)

    def _rows(self, point: Tensor) -> Tensor:
        """The Jacobian of what is violated, (k, d)."""
        found = [point.new_zeros(0, len(point))]
        if self.equalities is not None:
            found.append(_jacobian(self.equalities, point))
        if self.inequalities is not None:
            found.append(_jacobian(self.inequalities, point)[~(_values(self.inequalities, point) <= 0)])
        return torch.cat(found)

    def _violation(self, point: Tensor) -> float:
        violated = self._violated(point)
        return float(violated.abs().max()) if len(violated) else 0.0

    def _require(self, point: Tensor, what: str) -> None:
        amount = self._violation(point)
        if not amount <= _nearly_zero(point):  # NaN as well
            raise ValueError(f"{what}: constraints are off by {amount:.3g} at {point.tolist()}")


def _nearly_zero(point: Tensor) -> float:
    return torch.finfo(point.dtype).eps ** 0.5 * (1 + float(point.norm()))


def _values(constraint: Constraint, point: Tensor) -> Tensor:
    with torch.no_grad():
        return instance(constraint(point), "a constraint's value", Tensor).reshape(-1)


def _jacobian(constraint: Constraint, point: Tensor) -> Tensor:
    rows: Any = torch.autograd.functional.jacobian(lambda x: constraint(x).reshape(-1), point)
    return rows


def _number(value: Any) -> Tensor:
    """What a function of the user gave, if it is a tensor of no dimensions."""
    if instance(value, "function(point)", Tensor).ndim:
        raise Misuse("function", tuple(value.shape), "is the shape of its value: must be (), such as that of a sum")
    return value


def _finite_only(function: Function) -> Function:
    """The function, refusing values that are not finite numbers."""

    def finite(point: Tensor) -> Tensor:
        value = _number(function(point))
        if not bool(torch.isfinite(value)):
            raise ValueError(
                f"function is {float(value.detach()):g} at the feasible point {point.detach().tolist()}; whether it is "
                "convex can only be judged where it is finite"
            )
        return value

    return finite


def _score(witness: Witness) -> tuple[bool, float]:
    return witness.proves, witness.relative


def _ascend(function: Function, vertices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Adam on the softmax weights of two points of the hull; the best pair seen."""
    draw = torch.randn(2, len(vertices), generator=generator, dtype=torch.float64)
    weights = (3 * draw).to(vertices).requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=ASCENT_RATE)
    best, pair = -torch.inf, vertices[:2]
    for _ in range(ASCENT_STEPS + 1):
        ends = torch.softmax(weights, 1) @ vertices
        at_ends = torch.stack([function(ends[0]), function(ends[1])])
        rise = (function(ends.mean(0)) - at_ends.mean()) / at_ends.detach().abs().mean()
        if float(rise.detach()) > best:
            best, pair = float(rise.detach()), ends.detach().clone()
        optimiser.zero_grad()
        (-rise).backward()
        optimiser.step()
    return pair[0], pair[1]


@torch.no_grad()
def _witness(function: Function, start: Tensor, end: Tensor, bound: Callable[[Tensor], float]) -> Witness:
    middle = (start + end) / 2
    at_start, at_end = float(function(start)), float(function(end))
    violation = float(function(middle)) - (at_start + at_end) / 2
    return Witness(
        start, end, 0.5, violation, (abs(at_start) + abs(at_end)) / 2, bound(middle) + (bound(start) + bound(end)) / 2
    )


def _null_space(rows: Tensor, active: Tensor) -> Tensor:
    """Orthonormal basis (d, k) of the vectors x with rows x = 0 that vanish off the `active` entries, exactly."""
    _, sizes, right = torch.linalg.svd(rows[:, active], full_matrices=True)
    rank = int((sizes > sizes[0] * max(rows.shape) * torch.finfo(rows.dtype).eps).sum())
    basis = rows.new_zeros(rows.shape[1], len(right) - rank)
    basis[active] = right[rank:].T
    return basis


@dataclass(frozen=True, eq=False)
class ProgramVariables:
    """The convex program of frozen features as a function of one vector (p, W, U, B), for the three functions above.

    The frozen network must have positive masses and is best small: the constraints are dense here.
    """

    program: ConvexProgram

    @cached_property
    def template(self) -> ProgramPoint:
        """The frozen network in the variables of the program: the shapes of a vector."""
        return self.program.point(self.program.frozen)

    def point(self, vector: Tensor) -> ProgramPoint:
        """The masses, kernels, readout and biases that a vector (d,) stands for."""
        return self.template.at(vector)

    def objective(self, vector: Tensor) -> Tensor:
        """The program's value at a vector (d,)."""
        return self.program.value(self.point(vector))

    def rounding(self, vector: Tensor) -> float:
        """Bound of the float error of `objective`: sums of non-negative terms, and the loss through the error of F."""
        problem, point = self.program.problem, self.point(vector)
        eps = torch.finfo(vector.dtype).eps
        features = self.program.readout_features.flatten(1)
        output = self.program.output(point)
        error = (features.shape[1] + 2) * eps * (features.abs() @ point.readout.flatten(1).abs().T)  # (N, K), of F
        # kinks within the error of F included; the error itself for curvatures, which are at most 1
        around = [problem.loss.gradient(output + sign * error, problem.targets).abs() for sign in (-1, 0, 1)]
        loss = float((error * (torch.stack(around).amax(0) + error)).sum(1).mean())
        return loss + (len(vector) + problem.inputs.shape[0] + 8) * eps * float(self.program.value(point))

    def sample(self, generator: torch.Generator) -> Tensor:
        """A feasible vector: random masses and readout, kernels near those of the frozen network at the new masses.

        W_ij = (w_ij + noise) p_i p_j with noise of random size, moved to the realisation constraints by `restore`,
        which moves what flows from light sources least.
        """
        frozen, template = self.program.frozen, self.template
        draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(frozen.readout)  # noqa: E731
        masses = tuple(self._masses(len(p), generator) for p in template.masses)
        amount = float(draw(())) ** 2
        kernels = tuple(
            (w + amount * draw(w.shape) * w.square().mean().sqrt()) * (q[:, None] * p)[:, :, None, None]
            for w, p, q in zip(frozen.kernels[1:], masses, masses[1:])
        )
        biases = tuple(None if b is None else b * q for b, q in zip(frozen.biases[1:], masses[1:]))
        last = along_axis(masses[-1], template.readout, 1)
        readout = draw(template.readout.shape) * last * frozen.readout.abs().mean()
        return self.program.restore(ProgramPoint(masses, kernels, readout, biases)).vector()

    def _masses(self, count: int, generator: torch.Generator) -> Tensor:
        """Dirichlet masses, many of them light, none below 1e-6."""
        seed = int(torch.randint(2**31, (), generator=generator))
        raw = np.random.default_rng(seed).dirichlet(np.full(count, LIGHT_MASSES)) + 1e-6
        return torch.as_tensor(raw / raw.sum()).to(self.program.frozen.readout)

    def tangent(self, vector: Tensor) -> Tensor:
        """A basis (d, k) of the directions that keep the mass and the realisation constraints; no bound may be on.

        Columns change every variable by a share of its own size at `vector`: light particles make the plain Hessian
        ill-conditioned (1 / p^3), and this keeps eigenvalues of the order of the value.  Kernels that vanish are kinks
        of the penalty and stay zero.
        """
        point, norms = self.point(vector), self.program.problem.penalty.norms
        sizes = [*point.masses, *(norms(W)[:, :, None, None].expand_as(W) for W in point.kernels)]
        sizes += [point.readout.abs(), *(b.abs() for b in point.biases if b is not None)]
        scale = torch.cat([size.flatten() for size in sizes])
        return scale[:, None] * _null_space(self._constraint_rows * scale, scale > 0)

    @cached_property
    def _constraint_rows(self) -> Tensor:
        """The linear constraints as a matrix, dense."""
        frozen = self.program.frozen
        origin = torch.zeros(len(self.template.vector()), dtype=frozen.dtype, device=frozen.device)
        return torch.func.jacrev(self._constraints)(origin)

    def _constraints(self, vector: Tensor) -> Tensor:
        point = self.point(vector)
        sums = torch.stack([p.sum() for p in point.masses])
        return torch.cat(
            [sums, *(self.program.residual(point, layer).flatten() for layer in range(1, self.program.depth))]
        )
