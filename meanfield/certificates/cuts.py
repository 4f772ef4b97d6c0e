"""The small convex program over known features of one ReLU layer, by cuts, and the multipliers that are best for it.

The cut <r, phi_z u> <= price, u = q / |q|, of a kernel z is one column of

    max D(r) over <r, G_c> <= price  =  min over a >= 0 of (1/N) sum_n loss(-sum_c a_c G_c(n)) + price sum_c a_c,

whose residuals are r (Kelley's cutting planes, J. SIAM 8, 1960).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import minimize, nnls
from torch import Tensor

from meanfield import limits
from meanfield.certificates import concave, vectors
from meanfield.certificates.duality import largest_scale, mean_conjugate, price_of, scale_limit
from meanfield.problem import Problem

VIOLATED = 1e-6  # relative to the price: what a cut is added for
NEAR = 0.9  # of the price: what is cut beforehand
PASSES = 24  # of cuts for one solution
ITERATIONS = 100  # of L-BFGS-B
NEWTON_STEPS, NEWTON_HALVINGS, NEWTON_TOLERANCE, RIDGE = 20, 20, 1e-10, 1e-13


@dataclass(frozen=True, eq=False)
class Features:
    """phi_z(n) of all kernels: patches (N P, d) with 1 for a bias, weights (P,) of the positions in the readout."""

    patches: Tensor
    weights: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Features:
        patches = vectors.patches(problem).flatten(0, 1)
        return cls(patches, vectors.position_weights(problem.architecture).to(patches))

    def __call__(self, kernels: Tensor) -> Tensor:
        """phi (m, N) of kernels (m, d)."""
        size = max(1, limits.block_bytes() // (8 * len(self.patches)))
        rows = [(self.patches @ part.T).clamp_min_(0) for part in kernels.split(size)]
        split = [row.unflatten(0, (-1, len(self.weights))) for row in rows]
        return torch.cat([torch.einsum("npm,p->mn", row, self.weights) for row in split])

    def weighted(self, output: Tensor) -> Tensor:
        """Weights (N P, K) of all patches in q at r = output (N, K)."""
        return (output[:, None] * self.weights[None, :, None]).flatten(0, 1)


def dual(problem: Problem, output: Tensor) -> float:
    return 0.0 - float(mean_conjugate(problem, output))  # 0 has no sign


def best_scale(problem: Problem, output: Tensor, upper: float) -> tuple[float, float]:
    """The factor on r = `output` (N, K) that proves most where no unit kernel has |q| above `upper`, and the bound."""
    limit = min(scale_limit(problem, upper), largest_scale(problem.loss))
    return concave.maximum(lambda s: dual(problem, s * output), limit)


@dataclass
class Program:
    """The convex program over known kernels, by cuts <r, phi u> <= price: kernels (m, d), cuts (C, N, K).

    amounts (C,): a, of the last solution.  value: its value, which no bound over all measures exceeds.
    """

    problem: Problem
    features: Features
    kernels: Tensor
    phi: Tensor = field(init=False)
    cuts: Tensor = field(init=False)
    amounts: np.ndarray = field(init=False)
    value: float = math.inf

    def __post_init__(self) -> None:
        self.phi = self.features(self.kernels)
        self.cuts = self.phi.new_zeros(0, len(self.problem.inputs), self.problem.architecture.outputs)
        self.amounts = np.zeros(0)

    def add(self, kernels: Tensor) -> None:
        self.kernels = torch.cat([self.kernels, kernels])
        self.phi = torch.cat([self.phi, self.features(kernels)])

    def cut(self, output: Tensor, level: float) -> bool:
        """Add the cuts of all known kernels with |q| above a level; whether there are any."""
        q = self.phi @ output
        lengths = q.norm(dim=1)
        over = (lengths > level).nonzero()[:, 0]
        directions = q[over] / lengths[over, None]
        self.extend(self.phi[over, :, None] * directions[:, None, :])
        return len(over) > 0

    def _forget(self, output: Tensor, level: float) -> None:
        """Drop the cuts that count for nothing and are not near."""
        kept = (self.amounts > 0) | (torch.tensordot(self.cuts, output, 2).numpy(force=True) > level)
        self.cuts, self.amounts = self.cuts[torch.from_numpy(kept).to(self.cuts.device)], self.amounts[kept]

    def extend(self, cuts: Tensor) -> None:
        """Add cuts (c, N, K)."""
        self.cuts = torch.cat([self.cuts, cuts])
        self.amounts = np.concatenate([self.amounts, np.zeros(len(cuts))])

    def solve(self, output: Tensor) -> Tensor:
        """The multipliers (N, K) that are best for the known kernels, from `output` on."""
        price = price_of(self.problem)
        self._forget(output, NEAR * price)
        self.cut(output, NEAR * price)
        for _ in range(PASSES):
            output = self._of_cuts()
            if not self.cut(output, price * (1 + VIOLATED)):
                break
        return output

    def _of_cuts(self) -> Tensor:
        """Those of the cuts at hand: the residuals of the program over a >= 0."""
        if len(self.amounts):
            self._descend()
            self._polish()
        self.value = self._value(self.amounts)[0]
        slopes = self.problem.loss.gradient(self._outputs(self.amounts), self.problem.targets)
        return self.problem.loss.feasible(slopes, self.problem.targets) / self.problem.count

    def _descend(self) -> None:
        size = max(self._value(np.zeros(len(self.amounts)))[0], np.finfo(float).tiny)

        def scaled(amounts: np.ndarray) -> tuple[float, np.ndarray]:
            value, slopes = self._value(amounts)
            return value / size, slopes / size

        options = {"maxiter": ITERATIONS, "ftol": 1e-15, "gtol": 0.0, "maxcor": 30}
        bounds = [(0.0, None)] * len(self.amounts)
        self.amounts = minimize(scaled, self.amounts, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x

    def _outputs(self, amounts: np.ndarray) -> Tensor:
        return -torch.tensordot(torch.from_numpy(amounts).to(self.cuts), self.cuts, 1)

    def _value(self, amounts: np.ndarray) -> tuple[float, np.ndarray]:
        """The program's value and its slopes (C,)."""
        limits.look()
        problem, price, F = self.problem, price_of(self.problem), self._outputs(amounts)
        loss = float(problem.loss.value(F, problem.targets).mean())
        slopes = torch.tensordot(self.cuts, problem.loss.gradient(F, problem.targets), 2) / problem.count
        return loss + price * float(amounts.sum()), price - slopes.numpy(force=True)

    def _polish(self) -> None:
        """Newton steps, each a least-squares problem over a >= 0 (Lawson and Hanson, 1974): cuts are nearly parallel,
        and the first order leaves r short of what proves the last thousandth.  Without curvature, as of a hinge, there
        are none.
        """
        value, slopes = self._value(self.amounts)
        for _ in range(NEWTON_STEPS):
            curved = self._curvature()
            ridge = RIDGE * np.trace(curved)
            if ridge == 0:
                return
            root = np.linalg.cholesky(curved + ridge * np.eye(len(curved)))
            linear = slopes - curved @ self.amounts - ridge * self.amounts
            step = nnls(root.T, -solve_triangular(root, linear, lower=True))[0] - self.amounts
            if -float(slopes @ step) <= NEWTON_TOLERANCE * value:
                return
            for halving in range(NEWTON_HALVINGS):
                amounts = self.amounts + 0.5**halving * step
                reached, there = self._value(amounts)
                if reached < value:
                    break
            else:
                return
            self.amounts, value, slopes = amounts, reached, there

    def _curvature(self) -> np.ndarray:
        """The second derivative of the mean loss in the amounts, (C, C)."""
        cuts = self.cuts
        F = self._outputs(self.amounts).requires_grad_()
        (slopes,) = torch.autograd.grad(self.problem.loss.value(F, self.problem.targets).sum(), F, create_graph=True)
        if not slopes.requires_grad:
            return np.zeros((len(cuts), len(cuts)))
        rows = [torch.autograd.grad(each, F, retain_graph=True, materialize_grads=True)[0] for each in slopes.sum(0)]
        weighted = torch.einsum("cnk,nkl->cnl", cuts, torch.stack(rows, 1))
        return (weighted.flatten(1) @ cuts.flatten(1).T).numpy(force=True) / self.problem.count
