"""The convex program in cvxpy: slow, small cases only, independent of our own solver.  The only module with cvxpy."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
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
MASS_FLOOR = 1e-7  # interior-point solvers leave a little mass on every particle; below this share of 1/M it is dropped


@checked
def solve(
    program: ConvexProgram,
    solver: Annotated[str, choice(SOLVERS)] = "CLARABEL",
    *,
    tolerance: Positive = 1e-6,
    **options: Any,
) -> Solution:
    """Solve the convex program with cvxpy; options go to the cvxpy solver (defaults in SOLVERS).

    The point is cleaned (masses below MASS_FLOOR / M dropped if that does not raise the value), restored to the
    constraints, and returned if the program admits it and it is below the frozen network, which is returned otherwise.
    The gap comes from `certificates` with the solver's own multipliers; the status is "optimal" where the relative gap
    is within `tolerance`, whatever the solver says of itself.
    """
    began = time.perf_counter()
    model = _Model(program.to(dtype=torch.float64, device="cpu"))
    settings = {**SOLVERS[solver], **options}
    status = _attempt(model, solver, settings)
    if model.masses[0].value is None:
        status = _attempt(model, solver, {**SECOND_ATTEMPT[solver], **settings})
    if model.masses[0].value is None:
        return _failed(program, f"{solver} ended as {status}", began)
    return _certified(program, model, f"{solver} ended as {status}", tolerance, began)


def _attempt(model: _Model, solver: str, settings: dict[str, Any]) -> str:
    """Run cvxpy and return its status; what it has to say of accuracy is said by status and certificate."""
    try:
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            model.problem.solve(solver=solver, **settings)
    except cp.SolverError as error:
        return f"an error ({error})"
    return str(model.problem.status)


def _certified(program: ConvexProgram, model: _Model, detail: str, tolerance: float, began: float) -> Solution:
    # the sign of cvxpy's equality duals differs between formulations: try both
    duals = [model.multipliers(sign) for sign in (1.0, -1.0)]
    found = model.point().map(lambda tensor: tensor.to(program.readout_features))
    points = [program.point(program.frozen), *_cleaned(program, found)]
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
        multipliers=best,
        history=[{"solver_value": model.solver_value()}],
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


class _Model:
    """The cvxpy formulation of one program."""

    def __init__(self, program: ConvexProgram):
        self.program = program
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
        objective = self._loss() + self._readout() + _numpy(program.feature_costs) @ self.masses[0]
        for layer in range(1, program.depth):
            objective = objective + self._layer(layer, penalty)
        self.problem = cp.Problem(cp.Minimize(objective), self.constraints)

    def _loss(self) -> Any:
        problem, output = self.program.problem, self._output()
        return problem.loss.cvxpy_sum(cp, output, _numpy(problem.targets)) / len(problem.targets)

    def _output(self) -> Any:
        return _numpy(self.program.readout_features.flatten(1)) @ self.readout

    def _readout(self) -> Any:
        width = self.program.widths[-1]
        each = self.readout.shape[0] // width
        amounts = [cp.norm(self.readout[j * each : (j + 1) * each, :], "fro") for j in range(width)]
        return self._perspectives(amounts, self.masses[-1], self.program.problem.penalty.readout)

    def _perspectives(self, amounts: list[Any], masses: Any, strength: float) -> Any:
        if strength == 0:
            return 0.0
        return strength * cp.sum([cp.quad_over_lin(amount, masses[i]) for i, amount in enumerate(amounts)])

    def _layer(self, layer: int, penalty: Any) -> Any:
        program, W, bias = self.program, self.kernels[layer - 1], self.biases[layer - 1]
        offsets = program.problem.architecture.layers[layer].offsets
        right, coordinates = _numpy(program.bases[layer - 1]), _numpy(program.coordinates[layer - 1])
        rows = W if bias is None else cp.vstack([W, cp.reshape(bias, (1, -1), order="C")])
        if right.shape[1]:
            self.realisation[layer] = right.T @ rows == coordinates.T @ cp.diag(self.masses[layer])
            self.constraints.append(self.realisation[layer])
        norms = [self._norms(W[i * offsets : (i + 1) * offsets, :], penalty) for i in range(program.widths[layer - 1])]
        if penalty.amplitude_bound is not None:
            self.amplitude.append(cp.sum(norms) <= penalty.amplitude_bound * self.masses[layer])
            self.constraints.append(self.amplitude[-1])
            if bias is not None:
                self.constraints.append(cp.abs(bias) <= penalty.amplitude_bound * self.masses[layer])
        return self._perspectives([cp.sum(norm) for norm in norms], self.masses[layer - 1], penalty.source)

    def _norms(self, kernels: Any, penalty: Any) -> Any:
        """|W_ij| of one source i over its targets, (M_l,)."""
        return cp.norm(kernels, 2, axis=0) if penalty.kernel_norm == "l2" else cp.norm(kernels, 1, axis=0)

    def point(self) -> ProgramPoint:
        frozen = self.program.frozen
        kernels = [_tensor(W).T.reshape(w.shape) for W, w in zip(self.kernels, frozen.kernels[1:])]
        readout = _tensor(self.readout).T.reshape(frozen.readout.shape)
        biases = [None if b is None else _tensor(b) for b in self.biases]
        return ProgramPoint(tuple(map(_tensor, self.masses)), tuple(kernels), readout, tuple(biases))

    def solver_value(self) -> float:
        """The value that the solver claims; `problem.value` would divide by masses that are exactly zero."""
        solution = self.problem.solution
        return float("nan") if solution is None else float(solution.opt_val)

    def multipliers(self, sign: float) -> Multipliers:
        """r = d loss / d F at cvxpy's output, b = V y from its equality duals y times `sign`, kappa
        from the bound's duals.
        """
        problem, count = self.program.problem, len(self.program.problem.inputs)
        output = torch.as_tensor(self._output().value)
        r = problem.loss.gradient(output, problem.targets) / count
        pulls = [torch.zeros_like(joined(w, b)) for w, b in zip(self.program.flows[1:], self.program.frozen.biases[1:])]
        for layer, constraint in self.realisation.items():
            pulls[layer - 1] = sign * torch.as_tensor(constraint.dual_value).T @ self.program.bases[layer - 1].T
        kappas = tuple(torch.as_tensor(np.array(c.dual_value, dtype=float)) for c in self.amplitude)
        return Multipliers(r, tuple(pulls), kappas or None)


def _tensor(variable: Any) -> Tensor:
    return torch.as_tensor(np.array(variable.value, dtype=float))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.numpy(force=True)
