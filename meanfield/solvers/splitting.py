"""ADMM for the convex program: alternate a projection on its linear constraints with a proximal step on the rest.

Douglas-Rachford splitting in its ADMM form, with over-relaxation and residual balancing (Boyd et al. 2011, sections 3.4
and 4.2).  A variable x carries one copy of every block, z is projected on

    V^T W_j = p_j c_j for every feature j (V: orthonormal basis of the row space of the shifted features, the same for
    every j),   sum p = 1,   F = sum_j <U_j, f_j>,

and both halves are closed form up to one scalar root per row.  Every block has a weight of its own in the metric: it
starts at the curvature of its term (1 for the loss, lambda_s, lambda_u) per particle, and is set a few times to
|multiplier| / |variable|, the curvature that a quadratic with these two would have.  Without this the splitting needs
ten times the iterations on the reference cases.  Anderson acceleration of the fixed-point map (Walker & Ni 2011, type
II; Zhang, O'Donoghue & Boyd 2020 for the safeguard) lowers the gap of programs frozen after a flow by a factor of 2 to
100 at equal iterations, for a third more time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meanfield import certificates, validation
from meanfield.certificates import Certificate, Multipliers
from meanfield.penalties import Penalty, cone_projection, row_prox
from meanfield.program import ConvexProgram
from meanfield.repopulation import ProgramPoint
from meanfield.solution import Solution, message

Key = tuple[str, int]
Blocks = dict[Key, Tensor]

RELAXATION = 1.7
BALANCE_RATIO, BALANCE_FACTOR = 5.0, 2.0
RESCALE_AT = (20, 40, 80, 160)  # finitely often: convergence is that of fixed weights
RESCALE_RANGE = 100.0  # a block without multipliers (masses that no term prices) must not lose its weight
ANDERSON_MEMORY, ANDERSON_PERIOD, ANDERSON_GROWTH = 10, 5, 2.0
FROBENIUS = Penalty(kernel_norm="l2")


def solve(
    program: ConvexProgram,
    tolerance: float = 1e-6,
    *,
    max_iterations: int = 20_000,
    max_seconds: float = math.inf,
    check_every: int = 100,
    rho: float = 1.0,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Solution:
    """Solve the convex program to a true relative duality gap of `tolerance`.

    The gap is computed by `certificates` in float64 from restored points and the splitting's own multipliers every
    `check_every` iterations (rarer as the run grows longer).  A run that ends early returns its best point with its
    gap.  callback receives each row of the history.
    """
    validation.positive(tolerance, "tolerance")
    validation.integer(max_iterations, "max_iterations")
    run = _Run(program, rho, tolerance, callback)
    accelerated = _Anderson(run.splitting)
    status = "max_iterations"
    try:
        next_check = check_every
        for iteration in range(1, max_iterations + 1):
            accelerated.step(iteration)
            if iteration in RESCALE_AT:
                run.splitting.rescale()
                accelerated.forget()
            if iteration % 10 == 0 and iteration <= max_iterations // 2 and run.splitting.balance():
                accelerated.forget()
            if iteration >= next_check or iteration == max_iterations:
                next_check = iteration + max(check_every, iteration // 4)
                if run.check(iteration):
                    status = "optimal"
                    break
                if run.seconds() > max_seconds:
                    status = "max_seconds"
                    break
    except KeyboardInterrupt:
        status = "interrupted"
    return run.solution(status)


@dataclass
class _Run:
    """Keeps the best point and the best multipliers, each certified, and the history."""

    program: ConvexProgram
    rho: float
    tolerance: float
    callback: Callable[[dict[str, Any]], None] | None

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.exact = self.program.to(dtype=torch.float64)
        self.feasible = 1e-3 if self.program.features[0].dtype == torch.float32 else 1e-8
        self.history: list[dict[str, Any]] = []
        self.point = self.program.point(self.program.frozen)
        self.multipliers = certificates.stationary_multipliers(self.exact, self.point.map(Tensor.double))
        self.certificate = certificates.certify(self.exact, self.point, self.multipliers)
        self.splitting = _Splitting(self.program, self.rho, self.point, self.multipliers.map(lambda t: t.to(self.point.readout)))

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def check(self, iteration: int) -> bool:
        """Certify the current iterate; True once the relative gap is below the tolerance."""
        point, multipliers = self.program.restore(self.splitting.point()), self.splitting.multipliers()
        found = certificates.certify(self.exact, point, multipliers)
        if found.dual_value > self.certificate.dual_value:
            self.multipliers = multipliers
        dual = max(found.dual_value, self.certificate.dual_value)
        value, violation = self.certificate.value, self.certificate.violation
        if found.violation <= self.feasible and found.value < value:
            self.point, value, violation = point, found.value, found.violation
        self.certificate = Certificate(value, dual, value - dual, violation)
        primal, drift = self.splitting.residuals()
        row = {
            "iteration": iteration, "seconds": self.seconds(), "value": value, "dual_value": dual, "gap": value - dual,
            "primal_residual": primal, "dual_residual": drift, "rho": self.splitting.rho,
        }  # fmt: skip
        self.history.append(row)
        if self.callback is not None:
            self.callback(row)
        return self.certificate.relative_gap <= self.tolerance

    def solution(self, status: str) -> Solution:
        detail = f"relative gap {self.certificate.relative_gap:.2g}"
        return Solution(
            value=self.certificate.value, gap=self.certificate.gap, status=status, message=message(status, detail),
            network=self.program.network(self.point), point=self.point, history=self.history, certificate=self.certificate,
            multipliers=self.multipliers, seconds=self.seconds(),
        )  # fmt: skip


class _Splitting:
    """The iteration on one program: x (proximal copy), z (projected copy), u (scaled multipliers), block by block.

    Blocks of layer l: ("p", l) masses, ("W", l) and ("b", l) kernels and biases of layers >= 1 counted from 0; ("U", 0)
    readout as (1, M_L, K, positions); ("F", 0) output (N, K); ("Wc", l), ("pc", l) copies for the amplitude bound,
    ("bd", l), ("pd", l) copies for the bound on biases.
    """

    def __init__(self, program: ConvexProgram, rho: float, point: ProgramPoint, guess: Multipliers):
        self.program, self.rho = program, rho
        self.layers = range(1, program.depth)
        self.bases = {layer: program.basis(layer) for layer in self.layers}
        self.images = self._images(point)
        rows = program.readout_features.flatten(1)
        self.gram_values, self.gram_vectors = torch.linalg.eigh(rows @ rows.T)
        self.natural = self._natural_weights()
        self.weights = dict(self.natural)
        self.z = self._start(point)
        self.x = dict(self.z)
        self.u = self._start_multipliers(point, guess)
        self.moved = self.z
        self.roots: Blocks = {}  # of the proximal step, each the start of the next one

    def _images(self, point: ProgramPoint) -> dict[int, Tensor]:
        """c_j of the frozen features, (M_l, rank): A^T-coordinates of g_j, so that V^T W_j = p_j c_j keeps them as they are."""
        images = {}
        for layer, basis in self.bases.items():
            g = self.program.preactivations[layer].movedim(1, 0).flatten(1)  # (M_l, N P)
            images[layer] = g @ basis.preimage
        return images

    def _natural_weights(self) -> dict[Key, float]:
        """Curvature of every block's own term per particle or image, the metric for rho = 1 at the start."""
        penalty, widths = self.program.problem.penalty, self.program.widths
        # a strength of zero has no curvature to offer: any positive number will do until the first rescaling
        source, readout = (strength or 1e-3 for strength in (penalty.source, penalty.readout))
        weights: dict[Key, float] = {("F", 0): 1 / len(self.program.problem.inputs), ("U", 0): readout * widths[-1]}
        for layer, width in enumerate(widths):
            weights.update({(name, layer): max(source, readout) * width for name in ("p", "pc", "pd")})
            if layer:
                weights.update({(name, layer): source * width * widths[layer - 1] for name in ("W", "Wc", "b", "bd")})
        return weights

    def rescale(self) -> None:
        """Set the weight of every block to |its multiplier| / |it| / rho, within RESCALE_RANGE of the natural weight.

        Copies of one block share one weight; the constant part of a mass multiplier belongs to sum p = 1 and is left out.
        """
        for names in (("F",), ("U",), ("W", "Wc"), ("b", "bd"), ("p", "pc", "pd")):
            for layer in range(self.program.depth):
                copies = [(name, layer) for name in names if (name, layer) in self.u]
                if copies:
                    self._rescale_block(copies)

    def _rescale_block(self, copies: list[Key]) -> None:
        multiplier = self.weight(copies[0]) * torch.stack([self.u[key] for key in copies]).sum(0)
        if copies[0][0] == "p":
            multiplier = multiplier - multiplier.mean()
        amount, size = float(torch.linalg.vector_norm(multiplier)), float(torch.linalg.vector_norm(self.z[copies[0]]))
        if amount == 0 or size == 0:
            return
        natural = self.natural[copies[0]]
        weight = min(max(amount / size / self.rho, natural / RESCALE_RANGE), natural * RESCALE_RANGE)
        for key in copies:
            self.u[key] = self.u[key] * (self.weights[key] / weight)
            self.weights[key] = weight

    def _start(self, point: ProgramPoint) -> Blocks:
        """The blocks of a point, copies included."""
        bounded = self.program.problem.penalty.amplitude_bound is not None
        blocks: Blocks = {("p", layer): p for layer, p in enumerate(point.masses)}
        for layer, W, b in zip(self.layers, point.kernels, point.biases):
            blocks["W", layer] = W
            if bounded:
                blocks["Wc", layer], blocks["pc", layer] = W, point.masses[layer]
            if b is not None:
                blocks["b", layer] = b
                if bounded:
                    blocks["bd", layer], blocks["pd", layer] = b, point.masses[layer]
        blocks["U", 0] = point.readout.reshape(*point.readout.shape[:2], -1).movedim(0, 1)[None]
        blocks["F", 0] = self.program.output(point)
        return blocks

    def _start_multipliers(self, point: ProgramPoint, guess: Multipliers) -> Blocks:
        """u of guessed multipliers; those of a stationary network are near the answer after a flow.

        -weight u is a subgradient of the proximal half: r on F, q_j on U, b_ij on W, lambda_u |u_j|^2-like prices on p.
        """
        program = self.program
        prices = {key: torch.zeros_like(block) for key, block in self.z.items()}
        prices["F", 0] = guess.output
        response = torch.einsum("nk,nj...->j...k", guess.output, program.readout_features)
        prices["U", 0] = response.reshape(len(response), -1, guess.output.shape[1]).movedim(2, 1)[None]
        for layer, beta in zip(self.layers, guess.realisation):
            g = program.preactivations[layer]
            shaped = beta.movedim(0, 1).reshape(g.shape)
            prices["W", layer] = program.problem.architecture.layers[layer].correlate(program.features[layer - 1], shaped)
            pairing = (shaped * g).sum((0, 2, 3))
            prices["p", layer] = point.masses[layer] @ pairing - pairing
        return {key: -price / self.weight(key) for key, price in prices.items()}

    def weight(self, key: Key) -> float:
        return self.rho * self.weights[key]

    def step(self) -> None:
        """x = prox(z - u);  z = projection(relaxed x + u);  u += relaxed x - z."""
        self.x = self._prox({key: block - self.u[key] for key, block in self.z.items()})
        shifted = {key: RELAXATION * self.x[key] + (1 - RELAXATION) * block + self.u[key] for key, block in self.z.items()}
        self.moved, self.z = self.z, self._project(shifted)
        self.u = {key: block - self.z[key] for key, block in shifted.items()}

    def _prox(self, center: Blocks) -> Blocks:
        problem, penalty = self.program.problem, self.program.problem.penalty
        count, depth = len(problem.inputs), self.program.depth
        new = dict(center)
        new["F", 0] = problem.loss.prox(center["F", 0], problem.targets, self.weight(("F", 0)) * count)
        new["p", 0] = center["p", 0] - self.program.feature_costs / self.weight(("p", 0))
        for layer in self.layers:
            kernel, source = ("W", layer), ("p", layer - 1)
            new[kernel], new[source], self.roots[kernel] = row_prox(
                center[kernel], new[source], penalty, penalty.source, self.weight(kernel), self.weight(source), self.roots.get(kernel)
            )
        last = ("p", depth - 1)
        new["U", 0], new[last], self.roots["U", 0] = row_prox(
            center["U", 0], new[last], FROBENIUS, penalty.readout, self.weight(("U", 0)), self.weight(last), self.roots.get(("U", 0))
        )
        if penalty.amplitude_bound is not None:
            self._project_cones(new, center, penalty)
        return new

    def _project_cones(self, new: Blocks, center: Blocks, penalty: Penalty) -> None:
        bound = penalty.amplitude_bound or math.inf
        for layer in self.layers:
            kernel, mass = ("Wc", layer), ("pc", layer)
            new[kernel], new[mass] = cone_projection(center[kernel], center[mass], penalty, bound, self.weight(kernel), self.weight(mass))
            kernel, mass = ("bd", layer), ("pd", layer)
            if kernel in center:
                biases, new[mass] = cone_projection(
                    center[kernel][:, None, None, None], center[mass], FROBENIUS, bound, self.weight(kernel), self.weight(mass)
                )
                new[kernel] = biases[:, 0, 0, 0]

    def _project(self, center: Blocks) -> Blocks:
        new = self._project_readout(center)
        p = center["p", 0]
        new["p", 0] = p + (1 - p.sum()) / len(p)
        for layer in self.layers:
            self._project_layer(new, center, layer)
        return new

    def _project_layer(self, new: Blocks, center: Blocks, layer: int) -> None:
        """The nearest (W, b, p) with V^T (W_j, b_j) = p_j c_j and sum p = 1; copies of one block move as their mean."""
        W, kernel_weight = self._mean(center, ["W", "Wc"], layer)
        p, mass_weight = self._mean(center, ["p", "pc", "pd"], layer)
        rows, right, image = W.flatten(1), self.bases[layer].right, self.images[layer]
        has_bias = ("b", layer) in center
        if has_bias:
            b, _ = self._mean(center, ["b", "bd"], layer)
            rows = torch.cat([rows, b[:, None]], 1)
        coordinates = rows @ right  # (M_l, rank)
        curvature = mass_weight + kernel_weight * image.square().sum(1)
        free = (mass_weight * p + kernel_weight * (image * coordinates).sum(1)) / curvature
        p = free + (1 - free.sum()) / curvature / (1 / curvature).sum()
        rows = rows - (coordinates - p[:, None] * image) @ right.T
        if has_bias:
            self._spread(new, center, ["b", "bd"], layer, rows[:, -1])
            rows = rows[:, :-1]
        self._spread(new, center, ["W", "Wc"], layer, rows.reshape(W.shape))
        self._spread(new, center, ["p", "pc", "pd"], layer, p)

    def _mean(self, center: Blocks, names: list[str], layer: int) -> tuple[Tensor, float]:
        """Mean of the copies of one block and their total weight."""
        copies = [center[name, layer] for name in names if (name, layer) in center]
        mean = copies[0] if len(copies) == 1 else torch.stack(copies).mean(0)
        return mean, len(copies) * self.weight((names[0], layer))

    def _spread(self, new: Blocks, center: Blocks, names: list[str], layer: int, block: Tensor) -> None:
        new.update({(name, layer): block for name in names if (name, layer) in center})

    def _project_readout(self, center: Blocks) -> Blocks:
        """The nearest (U, F) with F = features U: one solve in the eigenbasis of the Gram matrix over images."""
        rows = self.program.readout_features.flatten(1)  # (N, M_L positions)
        U = center["U", 0][0]  # (M_L, K, positions)
        flat = U.movedim(1, 2).flatten(0, 1)  # (M_L positions, K)
        ratio = self.weight(("U", 0)) / self.weight(("F", 0))
        error = self.gram_vectors.T @ (center["F", 0] - rows @ flat)
        flat = flat + rows.T @ (self.gram_vectors @ (error / (ratio + self.gram_values)[:, None]))
        readout = flat.reshape(U.shape[0], U.shape[2], U.shape[1]).movedim(2, 1)
        return {("U", 0): readout[None], ("F", 0): rows @ flat}

    def residuals(self) -> tuple[float, float]:
        """|x - z| and |z - previous z| in the metric for rho = 1: primal and dual residual over sqrt(rho)."""
        size = lambda a, b: math.sqrt(sum(self.weights[k] * float((a[k] - b[k]).square().sum()) for k in a))  # noqa: E731
        return size(self.x, self.z), size(self.z, self.moved)

    def balance(self) -> bool:
        """Move rho towards equal primal and dual residuals, each relative to its variable; True if it moved."""
        size = lambda a: math.sqrt(sum(self.weights[k] * float(a[k].square().sum()) for k in a))  # noqa: E731
        primal, drift = self.residuals()
        ratio = (primal / max(size(self.z), 1e-300)) / max(drift / max(size(self.u), 1e-300), 1e-300)
        if 1 / BALANCE_RATIO <= ratio <= BALANCE_RATIO:
            return False
        factor = BALANCE_FACTOR if ratio > 1 else 1 / BALANCE_FACTOR
        self.rho *= factor
        self.u = {key: block / factor for key, block in self.u.items()}
        return True

    def state(self) -> Tensor:
        """z + u in the metric's coordinates: the point whose map the splitting iterates."""
        return torch.cat([math.sqrt(self.weights[key]) * (block + self.u[key]).flatten() for key, block in self.z.items()])

    def restart(self, state: Tensor) -> None:
        """Continue from another state: z is its projection, u the rest."""
        pieces = state.split([block.numel() for block in self.z.values()])
        whole = {key: (piece / math.sqrt(self.weights[key])).reshape(self.z[key].shape) for key, piece in zip(self.z, pieces)}
        self.z = self._project(whole)
        self.u = {key: block - self.z[key] for key, block in whole.items()}

    def point(self) -> ProgramPoint:
        """The proximal copy: exact zeros, constraints met up to the primal residual."""
        readout = self.x["U", 0][0].movedim(1, 0).reshape(self.program.frozen.readout.shape)
        return ProgramPoint(
            tuple(self.x["p", layer] for layer in range(self.program.depth)),
            tuple(self.x["W", layer] for layer in self.layers),
            readout,
            tuple(self.x.get(("b", layer)) for layer in self.layers),
        )

    def multipliers(self) -> Multipliers:
        """The splitting's own: r = -rho u_F; b_j = -rho u_W lies in the row space of A, beta_j = A^{T+} b_j."""
        realisation = []
        count = len(self.program.problem.inputs)
        for layer in self.layers:
            rows = self._pull("W", "Wc", layer).flatten(1)
            if ("b", layer) in self.u:
                rows = torch.cat([rows, self._pull("b", "bd", layer)[:, None]], 1)
            basis = self.bases[layer]
            beta = (rows @ basis.right) @ basis.preimage.T
            realisation.append(beta.reshape(len(rows), count, -1))
        return Multipliers(-self.weight(("F", 0)) * self.u["F", 0], tuple(realisation))

    def _pull(self, name: str, copy: str, layer: int) -> Tensor:
        """-rho u of a block and of its copy for the amplitude bound, added up."""
        keys = [key for key in ((name, layer), (copy, layer)) if key in self.u]
        return torch.stack([-self.weight(key) * self.u[key] for key in keys]).sum(0)


class _Anderson:
    """Safeguarded Anderson acceleration of the splitting: every few steps, the best affine combination of the last ones."""

    def __init__(self, splitting: _Splitting):
        self.splitting = splitting
        self.forget()

    def forget(self) -> None:
        """The map has changed (new weights): earlier steps say nothing about it."""
        self.images: list[Tensor] = []
        self.changes: list[Tensor] = []

    def step(self, iteration: int) -> None:
        self._remember()
        if iteration % ANDERSON_PERIOD == 0 and len(self.images) >= 3:
            self._extrapolate()

    def _remember(self) -> float:
        """One step of the splitting, kept in memory; returns |change|."""
        before = self.splitting.state()
        self.splitting.step()
        after = self.splitting.state()
        self.images = [*self.images, after][-ANDERSON_MEMORY:]
        self.changes = [*self.changes, after - before][-ANDERSON_MEMORY:]
        return float(torch.linalg.vector_norm(self.changes[-1]))

    def _extrapolate(self) -> None:
        """Jump, and go back if the next step from there is longer than ANDERSON_GROWTH times the last one."""
        splitting, last = self.splitting, self.changes[-1]
        saved, memory = dict(vars(splitting)), (self.images, self.changes)
        splitting.roots = dict(splitting.roots)
        splitting.restart(self._combination())
        if not self._remember() <= ANDERSON_GROWTH * float(torch.linalg.vector_norm(last)):
            vars(splitting).update(saved)
            self.images, self.changes = memory

    def _combination(self) -> Tensor:
        """argmin over affine combinations of the changes, applied to the images; slightly regularised."""
        changes, images = torch.stack(self.changes, 1).diff(dim=1), torch.stack(self.images, 1).diff(dim=1)
        gram = changes.T @ changes
        ridge = 1e-10 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
        shares = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), changes.T @ self.changes[-1])
        return self.images[-1] - images @ shares
