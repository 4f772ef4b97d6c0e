"""The exact optimum of one ReLU layer over ALL measures, as a cone program over activation patterns; small kernels
only.

For L = 1, ReLU, one averaged output and both penalties, minimising over masses and scales leaves

    min over signed measures nu on the unit sphere   mean loss(F_nu, y) + 2 sqrt(lambda_1 lambda_u) TV(nu),

since p (lambda_1 |z|^2 + lambda_u u^2) >= 2 sqrt(lambda_1 lambda_u) p |z| |u|.  On a cell D of the arrangement of the
patches, F is linear, so nu may be one vector v_D (and one v'_D of negative sign) per cell, confined to the cell's cone:
a finite program (Pilanci & Ergen, ICML 2020; Mishkin, Sahiner & Pilanci, ICML 2022).  Beyond ALL_CELLS cells it is
solved by generation: cells enter where the dual constraint |q(z)| <= 2 sqrt(lambda_1 lambda_u), |z| = 1, is broken; the
largest |q| over every cell is known exactly, so nothing is lost.  The same maximum gives the lower bound.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from meanfield import certificates
from meanfield.certificates import Multipliers, concave, vectors
from meanfield.convex import patterns
from meanfield.convex.patterns import Arrangement
from meanfield.convex.program import ConvexProgram
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.signatures import checked
from meanfield.solvers.solution import Solution, message

# a tenth of TARGET_GAP, which the bound has to meet; an absolute gap would end a run of small J sooner
SETTINGS: dict[str, Any] = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}
# its steps can fail
SECOND_ATTEMPT: dict[str, Any] = {"static_regularization_constant": 1e-7, "max_step_fraction": 0.9, "warm_start": False}
ALL_CELLS = 400  # up to here all cells enter at once
MAX_PROGRAMS = 60  # generation took at most 6 where the solver met its tolerances
TARGET_GAP = 1e-9  # generation ends at this gap to the bound, relative to the value
OPTIMAL_GAP = 1e-6  # beyond this relative gap to the bound the answer is called inaccurate
# of the total variation; what the interior-point method leaves on idle cells
DROPPED_SHARES = (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
MERGED_ANGLE = 1e-4  # between atoms of one sign that may be one


@checked
@torch.inference_mode(False)
def solve(problem: Problem) -> Solution:
    """The optimum over all measures: its network, and `lower_bound`, valid over all measures, which `value` should
    meet.

    The problem has one ReLU layer without or with average pooling, an averaged readout of one output, positive input
    and readout penalties of power 2, no input bound, any loss of one output, and kernels of at most three entries (all
    channels and the bias, if any, counted).  ValueError names what is not so.  `gap` is that of the convex program on
    the support of the answer.
    """
    began = time.perf_counter()
    _require_exact_case(problem)
    exact = problem.to(dtype=torch.float64, device="cpu")
    layer = _Layer.of(exact)
    found = layer.optimum()
    network = _best_network(exact, found.atoms, problem.inputs)
    program = ConvexProgram.freeze(problem, network)
    point = program.point(network)
    multipliers = Multipliers(torch.as_tensor(found.multipliers, device=problem.inputs.device)[:, None], ())
    certificate = certificates.certify(program, point, multipliers, certificates.stationary_multipliers(program, point))
    value = float(exact.value(network.to(dtype=torch.float64, device="cpu")))
    status = (
        "optimal"
        if value - found.bound <= OPTIMAL_GAP * abs(value)
        else "inaccurate"
        if len(found.atoms.signs)
        else "failed"
    )
    return Solution(
        value=value,
        gap=certificate.gap,
        status=status,
        message=message(status, found.said),
        network=network,
        point=point,
        lower_bound=found.bound,
        history=found.history,
        certificate=certificate,
        multipliers=multipliers,
        seconds=time.perf_counter() - began,
    )


def _require_exact_case(problem: Problem) -> None:
    problem.require_whole("arrangements")
    problem.penalty.require_certifiable("arrangements")
    arch, penalty = problem.architecture, problem.penalty
    conv = arch.layers[0]
    entries = arch.input_shape[0] * conv.offsets + conv.bias
    largest = max(patterns.MAX_HYPERPLANES)
    refusals = (
        (arch.depth > 1, f"layers has {arch.depth} entries; the exact optimum is known for one layer"),
        (conv.h.name != "relu", f"activation={conv.h!r}; the exact optimum is known for 'relu'"),
        (conv.pooling == "max", "pooling='max' makes the features nonlinear in the patterns; use 'none' or 'average'"),
        (
            arch.readout != "average",
            f"readout={arch.readout!r} has one number per position, its penalty is no total variation; use 'average'",
        ),
        (
            arch.outputs > 1,
            f"outputs={arch.outputs}: the penalty is then a nuclear norm per cell, which is not solved here; use one "
            "output",
        ),
        (
            penalty.input == 0,
            "input=0: a free kernel scale makes the readout penalty void; use a positive input penalty",
        ),
        (
            penalty.readout == 0,
            "readout=0: a free readout makes the input penalty void; use a positive readout penalty",
        ),
        (
            penalty.power != 2,
            f"power={penalty.power}: the penalties are then no total variation; use power 2",
        ),
        (
            penalty.input_bound is not None,
            f"input_bound={penalty.input_bound}: the penalty is then no multiple of a total variation; use None",
        ),
        (
            entries > largest,
            f"kernel_size={conv.kernel_size} has {entries} entries with channels and bias; patterns are listed for at "
            f"most {largest}: for larger kernels `certificates.search_features` bounds the optimum by a search",
        ),
    )
    for refused, text in refusals:
        if refused:
            raise ValueError(text)


@dataclass(frozen=True, eq=False)
class _Layer:
    """F(z) = weights relu(normals z) + against relu(-normals z), images by hyperplanes (sparse): the patches, merged
    by direction.
    """

    problem: Problem
    arrangement: Arrangement
    along: Any
    against: Any
    price: float

    @classmethod
    def of(cls, problem: Problem) -> _Layer:
        patches = _patches(problem)
        count, positions, _ = patches.shape
        found = patterns.arrangement(patches.flatten(0, 1))
        sizes = patches.flatten(0, 1).norm(dim=1).numpy() / positions
        image = np.repeat(np.arange(count), positions)
        sides = [np.flatnonzero(found.row_side == side) for side in (1, -1)]
        shape = (count, len(found.normals))
        along, against = (
            sparse.csr_array((sizes[rows], (image[rows], found.row_normal[rows])), shape=shape) for rows in sides
        )
        price = 2 * problem.penalty.input**0.5 * problem.penalty.readout**0.5  # their product may underflow
        return cls(problem, found, along, against, price)

    def optimum(self) -> _Optimum:
        """Found in units in which images and targets have the size 1, so that the cone solver sees no other.

        With images in units of a and targets of b (1 where they are labels), nu = (b / a) nu' has the output F = b F'
        and J = b^2 J' at the price 2 sqrt(lambda_1 lambda_u) / (a b), so r = b r'.
        """
        a = float((self.along + self.against).sum(1).max()) or 1.0
        b = self.problem.loss.unit(self.problem.targets)
        units = _Layer(
            self.problem.scaled_targets(b), self.arrangement, self.along / a, self.against / a, self.price / a / b
        )
        found = _generate(units)
        history = [{key: row[key] if key == "cells" else b * b * row[key] for key in row} for row in found.history]
        atoms = _Atoms(found.atoms.vectors * (b / a), found.atoms.signs)
        return replace(
            found, atoms=atoms, bound=b * b * found.bound, multipliers=b * found.multipliers, history=history
        )

    def features(self, cells: np.ndarray) -> np.ndarray:
        """The vectors c with F_n(z) = <c_nk, z> on cell k: (N, cells, d)."""
        active, normals = self.arrangement.cells[cells].astype(float), self.arrangement.normals
        weights = self.along + self.against
        linear = np.stack([weights @ (normals[:, j : j + 1] * active.T) for j in range(normals.shape[1])], 2)
        return linear - (self.against @ normals)[:, None]

    def responses(self, r: np.ndarray) -> np.ndarray:
        """The vectors c with q(z) = sum_n r_n F_n(z) = <c_k, z> on cell k: (cells, d)."""
        rows = (r @ (self.along + self.against))[:, None] * self.arrangement.normals
        return self.arrangement.active_sums(rows) - (r @ self.against) @ self.arrangement.normals

    def peaks(self, r: np.ndarray) -> np.ndarray:
        """max of q and of -q over the unit vectors of every cell, (2, cells)."""
        return self.arrangement.maxima(self.responses(r))

    def gradient(self, output: np.ndarray) -> np.ndarray:
        """r = d (mean loss) / d F, (N,)."""
        tensor = torch.as_tensor(output)[:, None]
        return self.problem.loss.gradient(tensor, self.problem.targets)[:, 0].numpy() / len(output)

    def feasible(self, r: np.ndarray) -> np.ndarray:
        """The nearest r in the domain of the conjugate, which a solver leaves by its tolerance."""
        dual = len(r) * torch.as_tensor(r)[:, None]
        return self.problem.loss.feasible(dual, self.problem.targets)[:, 0].numpy() / len(r)

    def bound(self, r: np.ndarray, peaks: np.ndarray) -> tuple[float, np.ndarray]:
        """max over s >= 0 of -(1/N) sum loss*(N s r), subject to s |q| <= price on the sphere; and s r.

        Merging hyperplanes moved a patch by at most TOLERANCE of its size, and a cell that narrow may be missing: that
        much is added to the largest |q|.
        """
        slack = 2 * patterns.TOLERANCE * float((np.abs(r) @ (self.along + self.against)).sum())
        largest = float(peaks.max(initial=0.0)) + slack
        limit = min(self.price / largest, 2.0) if largest > 0 else 2.0
        loss, count = self.problem.loss, len(r)
        dual = count * torch.as_tensor(r)[:, None]
        scale, value = concave.maximum(lambda s: -float(loss.conjugate(s * dual, self.problem.targets).mean()), limit)
        return value, scale * r


def _patches(problem: Problem) -> Tensor:
    """Rows a with F_n = sum over particles of p u mean_q relu(<a_nq, z>), (N, P, d): 1 / C_0 on the kernel's part, 1
    for a bias.

    Positions in windows that pooling drops are left out; the mean over the kept windows is that over their positions.
    """
    arch = problem.architecture
    conv = arch.layers[0]
    rows = vectors.patches(problem)
    if conv.pooling == "none":
        return rows
    geometry = arch.geometry[0]
    height, width = (kept * size for kept, size in zip(geometry.pooled, conv.pool_size))  # type: ignore[arg-type]
    return rows.unflatten(1, geometry.output)[:, :height, :width].flatten(1, 2)


@dataclass(frozen=True, eq=False)
class _Atoms:
    """nu: vectors v (m, d), each an amount |v| at v / |v| with the sign (m,)."""

    vectors: np.ndarray
    signs: np.ndarray

    def heavier(self, share: float) -> _Atoms:
        sizes = np.linalg.norm(self.vectors, axis=1)
        kept = sizes > share * sizes.sum()
        return _Atoms(self.vectors[kept], self.signs[kept])

    def merged(self) -> _Atoms:
        """Atoms of one sign within MERGED_ANGLE of a heavier one added to it: neighbouring cells share their facets."""
        sizes = np.linalg.norm(self.vectors, axis=1)
        units = self.vectors / np.maximum(sizes, np.finfo(float).tiny)[:, None]
        rest, vectors, signs = np.argsort(-sizes), [], []
        while len(rest):
            first = rest[0]
            near = (self.signs[rest] == self.signs[first]) & (
                np.linalg.norm(units[rest] - units[first], axis=1) <= MERGED_ANGLE
            )
            vectors.append(self.vectors[rest[near]].sum(0))
            signs.append(self.signs[first])
            rest = rest[~near]
        return _Atoms(np.array(vectors).reshape(-1, self.vectors.shape[1]), np.array(signs))


@dataclass(frozen=True, eq=False)
class _Optimum:
    """Atoms of the optimum, the best bound with its multipliers r (N,), one dict per program solved, what the solver
    said.
    """

    atoms: _Atoms
    bound: float
    multipliers: np.ndarray
    history: list[dict[str, Any]]
    said: str


def _generate(layer: _Layer) -> _Optimum:
    """Solve over a growing set of cells until no other cell breaks the dual constraint."""
    cells = len(layer.arrangement.cells)
    atoms = _Atoms(np.zeros((0, layer.arrangement.normals.shape[1])), np.zeros(0))
    active, history, said = np.zeros((2, cells), dtype=bool), [], "no program was needed"
    candidates, bound, best = [layer.gradient(np.zeros(layer.along.shape[0]))], -np.inf, np.zeros(layer.along.shape[0])
    while True:
        judged = [(*layer.bound(r, peaks := layer.peaks(r)), peaks) for r in candidates]
        found, scaled, peaks = max(judged, key=lambda entry: entry[0])
        if found > bound:
            bound, best = found, scaled
        if history:
            history[-1]["lower_bound"] = bound
        met = bool(history) and history[-1]["solver_value"] - bound <= TARGET_GAP * abs(bound)
        entering = _entering(layer, np.where(active, 0.0, peaks))
        if met or not entering.any() or len(history) == MAX_PROGRAMS:
            break
        active |= entering
        model = _ConeProgram(layer, *np.nonzero(active))
        said = model.solve()
        if model.vectors.value is None:
            break
        atoms, candidates = model.atoms(), [layer.feasible(r) for r in model.multipliers()]
        history.append({"cells": int(active.sum()), "solver_value": model.value()})
    return _Optimum(atoms, bound, best, history, f"{cells} patterns; {said}")


def _entering(layer: _Layer, peaks: np.ndarray) -> np.ndarray:
    """Which cells to add, bool (2, cells), for the peaks of the cells outside: all if they are few, else the highest.

    A cell enters where it breaks the dual constraint and no neighbour outside breaks it more.
    """
    broken = peaks > layer.price * (1 + TARGET_GAP)
    if not broken.any():
        return broken
    if peaks.shape[1] <= ALL_CELLS:
        return np.ones_like(broken)
    facet_cell, neighbour = layer.arrangement.facet_cell, layer.arrangement.facet_neighbour
    beaten = np.zeros_like(broken)
    for sign in range(2):
        np.logical_or.at(beaten[sign], facet_cell, peaks[sign, facet_cell] < peaks[sign, neighbour] * (1 - 1e-12))
    return broken & ~beaten


class _ConeProgram:
    """The program over some cells, each with a sign: one vector per pair, confined to its cell by its facets."""

    def __init__(self, layer: _Layer, signs: np.ndarray, cells: np.ndarray) -> None:
        self.layer, self.signs = layer, np.where(signs == 0, -1.0, 1.0)  # where q is large, -F lowers the loss
        features = layer.features(cells) * self.signs[:, None]
        self.vectors = cp.Variable(features.shape[1:])
        self.output = cp.Variable(len(features))
        flat = cp.vec(self.vectors, order="C")
        self.link: Any = self.output == features.reshape(len(features), -1) @ flat
        variation = cp.sum(cp.norm(self.vectors, 2, axis=1))
        inside: Any = _facet_matrix(layer.arrangement, cells) @ flat >= 0
        # in units of the price, the solver's tolerances are relative to what bounds the dual
        self.problem = cp.Problem(cp.Minimize(self._loss() / layer.price + variation), [self.link, inside])

    def _loss(self) -> Any:
        problem = self.layer.problem
        output = cp.reshape(self.output, (-1, 1), order="C")
        return problem.loss.cvxpy_sum(cp, output, problem.targets.numpy()) / len(problem.targets)

    def solve(self) -> str:
        """Run CLARABEL, twice if it returns no point, and say how it ended; accuracy is judged by the bound."""
        said = self._attempt(SETTINGS)
        return said if self.vectors.value is not None else self._attempt({**SETTINGS, **SECOND_ATTEMPT})

    def _attempt(self, settings: dict[str, Any]) -> str:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Solution may be inaccurate")
                self.problem.solve(solver=cp.CLARABEL, **settings)
        except cp.SolverError as error:
            return f"CLARABEL ended as an error ({error})"
        return f"CLARABEL ended as {self.problem.status}"

    def value(self) -> float:
        """The value that the solver claims."""
        return self.layer.price * float(self.problem.solution.opt_val)  # type: ignore[union-attr]

    def atoms(self) -> _Atoms:
        return _Atoms(np.array(self.vectors.value), self.signs)

    def multipliers(self) -> list[np.ndarray]:
        """The gradient at the program's output, and cvxpy's own multiplier in both signs."""
        dual = self.layer.price * np.array(self.link.dual_value)
        return [self.layer.gradient(np.array(self.output.value)), dual, -dual]


def _facet_matrix(arrangement: Arrangement, cells: np.ndarray) -> sparse.csr_array:
    """One row (2 D_i - 1) normal_i per facet of each of `cells`, acting on their stacked vectors."""
    order = np.argsort(arrangement.facet_cell, kind="stable")
    first = np.searchsorted(arrangement.facet_cell[order], [cells, cells + 1])
    counts = first[1] - first[0]
    block = np.repeat(np.arange(len(cells)), counts)
    facets = order[np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts) + first[0][block]]
    entries = arrangement.normals[arrangement.facet_normal[facets]] * arrangement.facet_side[facets][:, None]
    d = entries.shape[1]
    rows = np.repeat(np.arange(len(facets)), d)
    columns = (d * block[:, None] + np.arange(d)).reshape(-1)
    return sparse.csr_array((entries.reshape(-1), (rows, columns)), shape=(len(facets), d * len(cells)))


def _best_network(problem: Problem, atoms: _Atoms, like: Tensor) -> ParticleNetwork:
    """The network, in dtype and on the device of `like`, of least value among those of the atoms, merged or not, with
    the lightest or all left out; of equals the smallest.  What counts is the value after rounding to that dtype.
    """
    choices = [some.heavier(share) for some in (atoms, atoms.merged()) for share in (*DROPPED_SHARES, 1.0)]
    exact = [_network(problem, some) for some in sorted(choices, key=lambda some: -len(some.signs))]
    networks = [network.to(dtype=like.dtype, device=like.device) for network in exact]
    values = [float(problem.value(network.to(dtype=torch.float64, device="cpu"))) for network in networks]
    least = min(values)
    return [network for network, value in zip(networks, values) if value <= least * (1 + 1e-12)][-1]


def _network(problem: Problem, atoms: _Atoms) -> ParticleNetwork:
    """Masses |v_j| / T, kernels of size zeta along v_j, readouts sign_j T / zeta, for T = sum |v| and zeta^4 = T^2
    lambda_u / lambda_1.

    Its output is that of the atoms, and its penalty lambda_1 zeta^2 + lambda_u (T / zeta)^2 = 2 sqrt(lambda_1
    lambda_u) T.
    """
    arch = problem.architecture
    sizes = np.linalg.norm(atoms.vectors, axis=1)
    total = float(sizes.sum())
    if total == 0:
        return _zero_network(problem)
    zeta = total**0.5 * (problem.penalty.readout / problem.penalty.input) ** 0.25
    kernels = torch.as_tensor(zeta * atoms.vectors / sizes[:, None])
    bias = kernels[:, -1].contiguous() if arch.layers[0].bias else None
    shaped = kernels[:, : kernels.shape[1] - (bias is not None)].reshape(arch.kernel_shapes((len(sizes),))[0])
    readout = torch.as_tensor(atoms.signs * total / zeta)[None]
    return ParticleNetwork(arch, [torch.as_tensor(sizes / total)], [shaped.contiguous()], readout, [bias])


def _zero_network(problem: Problem) -> ParticleNetwork:
    arch, like = problem.architecture, problem.inputs
    bias = like.new_zeros(1) if arch.layers[0].bias else None
    kernel = like.new_zeros(arch.kernel_shapes((1,))[0])
    return ParticleNetwork(arch, [like.new_ones(1)], [kernel], like.new_zeros(arch.readout_shape(1)), [bias])
