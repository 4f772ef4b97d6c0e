"""The convex program in cvxpy: slow, small cases only, independent of our own solver.  The only module with cvxpy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from meanfield import certificates
from meanfield.certificates import Multipliers
from meanfield.convex.program import ConvexProgram
from meanfield.convex.repopulation import ProgramPoint, joined
from meanfield.signatures import Positive, checked
from meanfield.solvers.solution import Solution, message, proven
from meanfield.validation import choice

SOLVERS: dict[str, dict[str, Any]] = {
    "CLARABEL": {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9},
    "SCS": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 200_000},
}
# CLARABEL's factorisation can fail on redundant rows (deep programs with free biases) at its default regularisation
SECOND_ATTEMPT: dict[str, dict[str, Any]] = {"CLARABEL": {"static_regularization_constant": 1e-7}, "SCS": {}}
UNITS = (0.5, 1.0, 0.0)  # shares of the penalties in the units, in the order in which they are tried
MASS_FLOOR = 1e-7  # interior-point solvers leave a little mass on every particle; below this share of 1/M it is dropped


@checked
@torch.inference_mode(False)
def solve(
    program: ConvexProgram,
    solver: Annotated[str, choice(SOLVERS)] = "CLARABEL",
    *,
    tolerance: Positive = 1e-6,
    **options: Any,
) -> Solution:
    """Solve the convex program with cvxpy; options go to the cvxpy solver (defaults in SOLVERS).

    It is solved up to three times, in other units of its variables (`_Units`), until the certificate is within
    `tolerance`; the best point and the best multipliers count, whichever solve they came from.  A point is cleaned
    (masses below MASS_FLOOR / M dropped if that does not raise the value), restored to the constraints, and returned if
    the program admits it and it is below the frozen network, which is returned otherwise.
    The gap comes from `certificates` with the solver's own multipliers; the status is "optimal" where the relative gap
    is within `tolerance`, whatever the solver says of itself.
    """
    began = time.perf_counter()
    program.problem.penalty.require_certifiable("reference.solve")
    exact, settings = program.to(dtype=torch.float64, device="cpu"), {**SOLVERS[solver], **options}
    found, status = None, ""
    for share in UNITS:
        model = _Model(exact, _Units.of(exact, share))
        status = _attempt(model, solver, settings)
        if model.masses[0].value is None:
            status = _attempt(model, solver, {**SECOND_ATTEMPT[solver], **settings})
        if model.masses[0].value is not None:
            found = _certified(program, model, f"{solver} ended as {status}", tolerance, began, found)
            if found.status == "optimal":
                return found
    return _failed(program, f"{solver} ended as {status}", began) if found is None else found


def _attempt(model: _Model, solver: str, settings: dict[str, Any]) -> str:
    """Run cvxpy and return its status; what it has to say of accuracy is said by status and certificate."""
    try:
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            model.problem.solve(solver=solver, **settings)
    except cp.SolverError as error:
        return f"an error ({error})"
    return str(model.problem.status)


def _certified(
    program: ConvexProgram, model: _Model, detail: str, tolerance: float, began: float, before: Solution | None
) -> Solution:
    """The best of what the model and the solution before it have found."""
    # the sign of cvxpy's equality duals differs between formulations: try both
    duals = [model.multipliers(sign) for sign in (1.0, -1.0)]
    if before is not None and before.multipliers is not None:
        duals.append(before.multipliers)
    found = model.point().map(lambda tensor: tensor.to(program.readout_features))
    points = [program.point(program.frozen) if before is None else before.point, *_cleaned(program, found)]
    judged = [(certificates.certify(program, point, *duals), point) for point in points]
    certificate, point = min(judged, key=lambda pair: pair[0].value)
    best = max(duals, key=lambda dual: certificates.dual_value(model.program, dual))
    status = "optimal" if proven(certificate, tolerance) else "inaccurate"
    detail += f", relative gap {certificate.relative_gap:.2g}"
    return Solution(
        value=certificate.value,
        gap=certificate.gap,
        status=status,
        message=message(status, detail),
        network=program.network(point),
        point=point,
        certificate=certificate,
        multipliers=best.map(lambda tensor: tensor.to(device=program.frozen.device)),
        history=[*([] if before is None else before.history), {"solver_value": model.solver_value()}],
        seconds=time.perf_counter() - began,
    )


def _failed(program: ConvexProgram, detail: str, began: float) -> Solution:
    point = program.point(program.frozen)
    certificate = certificates.certify(program, point)
    return Solution(
        value=certificate.value,
        gap=certificate.gap,
        status="failed",
        message=message("failed", detail),
        network=program.frozen,
        point=point,
        certificate=certificate,
        seconds=time.perf_counter() - began,
    )


def _cleaned(program: ConvexProgram, point: ProgramPoint) -> list[ProgramPoint]:
    """The restored point as it is, and without its lightest particles, where the program admits them."""
    lighter = tuple(torch.where(p > MASS_FLOOR / len(p), p, 0.0) for p in point.masses)
    found = [program.admitted(each) for each in (point, replace(point, masses=lighter))]
    return [each for each in found if each is not None]


@dataclass(frozen=True)
class _Units:
    """What the cone solver's variables are multiples of: the value, kernels and biases (of all layers), the readout.

    A solver's tolerances are numbers near 1e-9 whatever the data.  In units of (value / strength)^(1/q) every penalty
    has strength 1, and the norms dual to W and U, whose conjugates enter the dual bound, are known to that accuracy;
    in units of the frozen network's own W and U the constraints are.
    """

    value: float
    kernels: float
    readout: float

    @classmethod
    def of(cls, program: ConvexProgram, share: float) -> _Units:
        """A geometric mean with `share` of the penalties' units in it.  The value, of the frozen network or of the same
        without readout, is above the optimum.
        """
        point, penalty = program.point(program.frozen), program.problem.penalty
        values = (program.value(each) for each in (point, replace(point, readout=torch.zeros_like(point.readout))))
        value = min(map(float, values)) or 1.0

        def mean(tensors: Sequence[Tensor], strength: float) -> float:
            entries = torch.cat([tensor.flatten() for tensor in (*tensors, torch.zeros(0))])
            own = float(entries.square().mean().sqrt()) if len(entries) and bool(entries.any()) else 1.0
            return (value / strength) ** (share / penalty.power) * own ** (1 - share) if strength else own

        return cls(value, mean(point.kernels, penalty.source), mean([point.readout], penalty.readout))


class _Model:
    """The cvxpy formulation of one program, in units of its own."""

    def __init__(self, program: ConvexProgram, units: _Units) -> None:
        self.program, self.units = program, units
        arch, penalty = program.problem.architecture, program.problem.penalty
        self.masses = [cp.Variable(m, nonneg=True) for m in program.widths]
        self.kernels = [
            cp.Variable((layer.offsets * m, n))
            for layer, m, n in zip(arch.layers[1:], program.widths, program.widths[1:])
        ]
        self.readout = cp.Variable((program.readout_features.flatten(1).shape[1], arch.outputs))
        self.biases = [cp.Variable(n) if layer.bias else None for layer, n in zip(arch.layers[1:], program.widths[1:])]
        self.constraints: list[Any] = [cp.sum(p) == 1 for p in self.masses]
        self.realisation: dict[int, Any] = {}  # none where every feature below is dead
        self.amplitude: list[Any] = []
        objective = self._loss() + self._readout() + _numpy(program.feature_costs) / self.units.value @ self.masses[0]
        for layer in range(1, program.depth):
            objective = objective + self._layer(layer, penalty)
        self.problem = cp.Problem(cp.Minimize(objective), self.constraints)

    def _loss(self) -> Any:
        problem, output = self.program.problem, self._output()
        return problem.loss.cvxpy_sum(cp, output, _numpy(problem.targets)) / (len(problem.targets) * self.units.value)

    def _output(self) -> Any:
        return self.units.readout * _numpy(self.program.readout_features.flatten(1)) @ self.readout

    def _readout(self) -> Any:
        width = self.program.widths[-1]
        each = self.readout.shape[0] // width
        amounts = [cp.norm(self.readout[j * each : (j + 1) * each, :], "fro") for j in range(width)]
        penalty = self.program.problem.penalty
        strength = penalty.readout
        return self._perspectives(amounts, self.masses[-1], strength * self.units.readout**penalty.power)

    def _perspectives(self, amounts: list[Any], masses: Any, strength: float) -> Any:
        if strength == 0:
            return 0.0
        power = self.program.problem.penalty.power
        if power == 2:
            each = [cp.quad_over_lin(amount, masses[i]) for i, amount in enumerate(amounts)]
            return strength / self.units.value * cp.sum(each)
        # s^q / p^(q-1) is the least t with t^(1/q) p^(1 - 1/q) >= s
        costs, reached = cp.Variable(len(amounts)), cp.Variable(len(amounts))
        self.constraints.append(cp.hstack(amounts) <= reached)
        self.constraints.append(cp.PowCone3D(costs, masses, reached, 1 / power))
        return strength / self.units.value * cp.sum(costs)

    def _layer(self, layer: int, penalty: Any) -> Any:
        program, W, bias = self.program, self.kernels[layer - 1], self.biases[layer - 1]
        offsets = program.problem.architecture.layers[layer].offsets
        right, coordinates = _numpy(program.bases[layer - 1]), _numpy(program.coordinates[layer - 1])
        rows = W if bias is None else cp.vstack([W, cp.reshape(bias, (1, -1), order="C")])
        if right.shape[1]:
            wanted = coordinates.T / self.units.kernels
            self.realisation[layer] = right.T @ rows == wanted @ cp.diag(self.masses[layer])
            self.constraints.append(self.realisation[layer])
        norms = [self._norms(W[i * offsets : (i + 1) * offsets, :], penalty) for i in range(program.widths[layer - 1])]
        if penalty.amplitude_bound is not None:
            bound = penalty.amplitude_bound / self.units.kernels
            self.amplitude.append(cp.sum(norms) <= bound * self.masses[layer])
            self.constraints.append(self.amplitude[-1])
            if bias is not None:
                self.constraints.append(cp.abs(bias) <= bound * self.masses[layer])
        strength = penalty.source * self.units.kernels**penalty.power
        return self._perspectives([cp.sum(norm) for norm in norms], self.masses[layer - 1], strength)

    def _norms(self, kernels: Any, penalty: Any) -> Any:
        """|W_ij| of one source i over its targets, (M_l,)."""
        return cp.norm(kernels, 2, axis=0) if penalty.kernel_norm == "l2" else cp.norm(kernels, 1, axis=0)

    def point(self) -> ProgramPoint:
        frozen, units = self.program.frozen, self.units
        kernels = [units.kernels * _tensor(W).T.reshape(w.shape) for W, w in zip(self.kernels, frozen.kernels[1:])]
        readout = units.readout * _tensor(self.readout).T.reshape(frozen.readout.shape)
        biases = [None if b is None else units.kernels * _tensor(b) for b in self.biases]
        return ProgramPoint(tuple(map(_tensor, self.masses)), tuple(kernels), readout, tuple(biases))

    def solver_value(self) -> float:
        """The value that the solver claims; `problem.value` would divide by masses that are exactly zero."""
        solution = self.problem.solution
        return float("nan") if solution is None else self.units.value * float(solution.opt_val)

    def multipliers(self, sign: float) -> Multipliers:
        """r = d loss / d F at cvxpy's output, b = V y from its equality duals y times `sign`, kappa
        from the bound's duals.
        """
        problem, count = self.program.problem, self.program.problem.count
        output = torch.as_tensor(self._output().value)
        r, price = problem.loss.gradient(output, problem.targets) / count, self.units.value / self.units.kernels
        pulls = [torch.zeros_like(joined(w, b)) for w, b in zip(self.program.flows[1:], self.program.frozen.biases[1:])]
        for layer, constraint in self.realisation.items():
            duals = sign * price * torch.as_tensor(constraint.dual_value)
            pulls[layer - 1] = duals.T @ self.program.bases[layer - 1].T
        kappas = tuple(price * torch.as_tensor(np.array(c.dual_value, dtype=float)) for c in self.amplitude)
        return Multipliers(r, tuple(pulls), kappas or None)


def _tensor(variable: Any) -> Tensor:
    return torch.as_tensor(np.array(variable.value, dtype=float))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.numpy(force=True)
