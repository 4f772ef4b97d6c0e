"""Douglas-Rachford splitting of the convex program: a projection on its linear constraints, a proximal step on the
rest.

A state s holds every block of variables once (and once more for each cone of the bounds).  With z its projection on

    V^T W_j = p_j c_j for every feature j (V: orthonormal basis of the row space of the shifted features, the same for
    every j),   sum p = 1,   F = sum_j <U_j, f_j>,

and x the proximal step from 2 z - s, the state moves by a multiple of x - z (ADMM in another guise; Boyd et al. 2011,
Eckstein & Bertsekas 1992).  Both halves are closed form up to one scalar root per row: per iteration two matrix
products a layer and a few passes over the kernels, and on a device nothing in an iteration waits for the host.

Every block has a weight of its own in the metric: it starts at the curvature of its term (1 for the loss, lambda_s,
lambda_u) per particle, and is set a few times to |multiplier| / |variable|, the curvature that a quadratic with these
two would have.  Without this the splitting needs ten times the iterations on the reference cases.  Anderson
acceleration lowers the gap of programs frozen after a flow by a factor of 2 to 100 at equal iterations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meanfield import certificates, limits
from meanfield.certificates import Certificate, Multipliers
from meanfield.convex.program import ConvexProgram
from meanfield.convex.repopulation import ProgramPoint, joined, parted
from meanfield.penalties import Penalty, cone_projection, row_prox
from meanfield.precision import full_float32
from meanfield.problem import FEASIBLE
from meanfield.signatures import Count, Positive, Seconds, checked
from meanfield.solvers.acceleration import Anderson
from meanfield.solvers.solution import Solution, message, proven

Key = tuple[str, int]
Blocks = dict[Key, Tensor]

RELAXATION = 1.7
BALANCE_EVERY, BALANCE_RATIO, BALANCE_FACTOR, BALANCE_RANGE = 10, 5.0, 2.0, 1e4
RESCALE_AT = (20, 40, 80, 160, 320)  # finitely often: convergence is that of fixed weights
RESCALE_RANGE = 100.0  # a block without multipliers (masses that no term prices) must not lose its weight
CHECK_SHARE, CHECK_COST = 0.1, 10  # of the run; iterations that a check costs beside the products it makes


@checked
@torch.inference_mode(False)
@full_float32()
def solve(
    program: ConvexProgram,
    tolerance: Positive = 1e-6,
    *,
    max_iterations: Count = 20_000,
    max_seconds: Seconds = math.inf,
    check_every: Count | None = None,
    rho: Positive = 1.0,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Solution:
    """Solve the convex program to a true relative duality gap of `tolerance`.

    The gap is computed by `certificates` in float64 from restored points and the splitting's own multipliers every
    `check_every` iterations (default: so that checks take about a tenth of the run), rarer as the run grows longer.  A
    run that ends early, by a limit or by Ctrl-C, returns its best point with its gap.  callback receives each row of
    the
    history: iteration, seconds, cpu_seconds, value, dual_value, gap, primal_residual, dual_residual, rho.
    """
    began = limits.now()
    program.problem.penalty.require_certifiable("splitting.solve")
    run = _Run(program, rho, tolerance, callback)  # whatever the time: its start is the least that can be returned
    with limits.within(max_seconds - (limits.now() - began)):
        try:
            status = run.iterate(max_iterations, check_every or run.check_interval())
        except limits.STOPS as stop:
            status = limits.status(stop)
        return run.solution(status)


@dataclass
class _Run:
    """Keeps the best point and the best multipliers, and the history.

    All ranks iterate on the same program.  What rank 0 came to is what they judge together.

    While it runs, points are judged by their coordinates, which touches no image.  What it returns, and what it calls
    optimal, is judged afresh over all images.  Once the two have disagreed, every point is.
    """

    program: ConvexProgram
    rho: float
    tolerance: float
    callback: Callable[[dict[str, Any]], None] | None

    def __post_init__(self) -> None:
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.exact, self.ranks = self.program.to(dtype=torch.float64), self.program.problem.ranks
        self.history: list[dict[str, Any]] = []
        self.start = self.point = self.program.point(self.program.frozen)
        self.multipliers = certificates.stationary_multipliers(self.exact, self.point.map(Tensor.double))
        self.value, self.dual = self.exact_value(self.point), self.exact_dual(self.multipliers)
        self.doubted = False
        self.violation: float | None = None  # of the best point over all images, once somebody has looked
        self.splitting = _Splitting(
            self.program, self.rho, self.point, self.multipliers.map(lambda t: t.to(self.point.readout))
        )

    def exact_value(self, point: ProgramPoint) -> float:
        return self.ranks.decided(float(self.exact.value(point.map(Tensor.double))))

    def exact_dual(self, multipliers: Multipliers) -> float:
        return self.ranks.decided(certificates.dual_value(self.exact, multipliers))

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def check_interval(self) -> int:
        """Iterations of which a check costs CHECK_SHARE: its Gram matrix of the basis beside their two products a
        layer.
        """
        spaces, widths = self.program.spaces, self.program.widths[1:]
        gram = sum(space.rank * space.right.numel() for space in spaces)
        products = sum(2 * width * space.right.numel() for width, space in zip(widths, spaces))
        return math.ceil((CHECK_COST + gram / max(products, 1)) / CHECK_SHARE)

    def iterate(self, max_iterations: int, check_every: int) -> str:
        splitting, accelerated, next_check = self.splitting, Anderson(), check_every
        for iteration in range(1, max_iterations + 1):
            splitting.state = accelerated.advance(splitting.state, splitting.change(), splitting.metric)
            late = limits.passed()
            if iteration >= next_check or iteration == max_iterations or late:
                next_check = iteration + max(check_every, iteration // 4)
                with limits.grace():
                    if self.check(iteration):
                        return "optimal"
                if late:
                    return "max_seconds"
            if self._adapted(iteration, max_iterations):
                accelerated.forget()
        return "max_iterations"

    def _adapted(self, iteration: int, max_iterations: int) -> bool:
        """Change the metric where it is due; True if it changed."""
        if iteration in RESCALE_AT:
            self.splitting.rescale()
            return True
        return iteration % BALANCE_EVERY == 0 and iteration <= max_iterations // 2 and self.splitting.balance()

    def check(self, iteration: int) -> bool:
        """Judge the current iterate; True once the best point's relative gap is proven to be below the tolerance."""
        point = self.offered(self.splitting.point().map(self.ranks.agreed))
        multipliers = self.splitting.multipliers().map(self.ranks.agreed)
        dual = self.exact_dual(multipliers)
        if dual > self.dual:
            self.dual, self.multipliers = dual, multipliers
        if point is not None and (value := self.exact_value(point)) < self.value:
            self.point, self.value, self.violation = point, value, None
        ended = abs(self.value - self.dual) <= self.tolerance * abs(self.value) and self.confirm()
        primal, drift = self.splitting.residuals()
        row = {
            "iteration": iteration,
            "seconds": self.seconds(),
            "cpu_seconds": time.process_time() - self.cpu_began,
            "value": self.value,
            "dual_value": self.dual,
            "gap": self.value - self.dual,
            "primal_residual": primal,
            "dual_residual": drift,
            "rho": self.splitting.rho,
        }
        self.history.append(row)
        if self.callback is not None:
            self.callback(row)
        return ended

    def offered(self, point: ProgramPoint) -> ProgramPoint | None:
        """The point restored, where its coordinates, or else a look at all images, say that it may be returned."""
        if not self.doubted:
            restored = self.program.restore(point)
            if self.ranks.decided(self.program.discord(restored) <= FEASIBLE[point.readout.dtype]):
                return restored
        return self.program.admitted(point)

    def confirm(self) -> bool:
        """Judge the best point over all images, and whether the gap is proven to be below the tolerance."""
        if self.violation is None:
            if self.point is not self.start and not self.program.admits(self.point):
                self.doubted = True
                others = [self.start, self.program.admitted(self.point)]
                self.point = min((each for each in others if each is not None), key=self.exact_value)
                self.value = self.exact_value(self.point)
            self.violation = self.exact.violation(self.point.map(Tensor.double))
        return proven(self.certificate(), self.tolerance)

    def certificate(self) -> Certificate:
        """Of the best point; its violation is infinite where nobody has looked."""
        violation = math.inf if self.violation is None else self.violation
        return Certificate(self.value, self.dual, self.value - self.dual, violation)

    def solution(self, status: str) -> Solution:
        """The best point, confirmed whatever the time; the start, uncertified, where even that is stopped."""
        try:
            with limits.grace(math.inf):
                self.confirm()
        except limits.STOPS as stop:
            status = limits.status(stop)
            self.point, self.value = self.start, self.exact_value(self.start)
        certified = self.violation is not None
        detail = f"relative gap {self.certificate().relative_gap:.2g}"
        if self.program.spaces:
            ranks = ", ".join(str(space.rank) for space in self.program.spaces)
            detail += f", constraints of rank {ranks} at tolerance {self.program.spaces[0].tolerance:.0e}"
        return Solution(
            value=self.value,
            gap=self.value - self.dual if certified else math.inf,
            status=status,
            message=message(status, detail, certified=certified),
            network=self.program.network(self.point),
            point=self.point,
            history=self.history,
            certificate=self.certificate() if certified else None,
            multipliers=self.multipliers,
            seconds=self.seconds(),
        )


class _Splitting:
    """The iteration on one program.  state (n,) is s; z its projection and x the proximal step of the last `change`.

    Blocks of layer l: ("p", l) masses, ("W", l) and ("b", l) kernels and biases of layers >= 1 counted from 0; ("U", 0)
    readout as (1, M_L, K, positions); ("F", 0) output (N, K); ("Wc", l), ("pc", l) copies for the amplitude bound,
    ("bd", l), ("pd", l) copies for the bound on biases.  All lie in one vector, in this order.
    """

    def __init__(self, program: ConvexProgram, rho: float, point: ProgramPoint, guess: Multipliers):
        self.program, self.rho = program, rho
        self.frobenius = replace(program.problem.penalty, kernel_norm="l2")
        self.layers = range(1, program.depth)
        self.rows = program.readout_features.flatten(1)  # (N, M_L positions)
        self.wide = self.rows.shape[0] <= self.rows.shape[1]
        self.gram_values, self.gram_vectors = torch.linalg.eigh(
            self.rows @ self.rows.T if self.wide else self.rows.T @ self.rows
        )
        start = self._start(point)
        self.shapes = {key: block.shape for key, block in start.items()}
        self.natural = self._natural_weights()
        self.weights = dict(self.natural)
        self._measure()
        self.z = torch.cat([block.flatten() for block in start.values()])
        self.state = self.at = self.z + torch.cat([u.flatten() for u in self._start_multipliers(point, guess).values()])
        self.moved, self.x = self.z, start
        self.roots: Blocks = {}  # of the proximal step, each the start of the next one

    def _measure(self) -> None:
        """metric (n,): the square root of every entry's weight."""
        self.metric = torch.cat(
            [self.bare.new_full((shape.numel(),), math.sqrt(self.weights[key])) for key, shape in self.shapes.items()]
        )

    @property
    def bare(self) -> Tensor:
        return self.program.readout_features

    def blocks(self, vector: Tensor) -> Blocks:
        """Views of the blocks of a vector (n,)."""
        pieces = vector.split([shape.numel() for shape in self.shapes.values()])
        return {key: piece.view(shape) for (key, shape), piece in zip(self.shapes.items(), pieces)}

    def _natural_weights(self) -> dict[Key, float]:
        """Curvature of every block's own term per particle or image, the metric for rho = 1 at the start."""
        penalty, widths = self.program.problem.penalty, self.program.widths
        # a strength of zero has no curvature to offer: any positive number will do until the first rescaling
        source, readout = (strength or 1e-3 for strength in (penalty.source, penalty.readout))
        weights: dict[Key, float] = {("F", 0): 1 / self.program.problem.count, ("U", 0): readout * widths[-1]}
        for layer, width in enumerate(widths):
            weights.update({(name, layer): max(source, readout) * width for name in ("p", "pc", "pd")})
            if layer:
                weights.update({(name, layer): source * width * widths[layer - 1] for name in ("W", "Wc", "b", "bd")})
        return weights

    def rescale(self) -> None:
        """Set the weight of every block to |its multiplier| / |it| / rho, within RESCALE_RANGE of the natural weight.

        Copies of one block share one weight, and so do a kernel and its bias: their projection is orthogonal.  A mass
        multiplier counts with the constant part that belongs to sum p = 1: the price lambda s^2 / p^2 of a mass, twice
        which over p is the curvature of its term (q = 2).  No rule depends on whether a multiplier is zero or rounding
        noise.
        """
        z, u = self._parts()
        for names in (("F",), ("U",), ("W", "Wc", "b", "bd"), ("p", "pc", "pd")):
            for layer in range(self.program.depth):
                keys = [(name, layer) for name in names if (name, layer) in self.shapes]
                if keys:
                    self._rescale_block(keys, z, u)
        self._measure()
        self.state = torch.cat([(z[key] + u[key]).flatten() for key in self.shapes])

    def _rescale_block(self, keys: list[Key], z: Blocks, u: Blocks) -> None:
        pulls: dict[str, Tensor] = {}  # multipliers, those of copies added up
        for name, layer in keys:
            pulls[name[0]] = pulls.get(name[0], 0) + self.weight((name, layer)) * u[name, layer]
        sizes = [z[name, keys[0][1]] for name in pulls]
        amount, size = (math.sqrt(sum(float(t.square().sum()) for t in group)) for group in (pulls.values(), sizes))
        if size == 0:
            return
        natural = self.natural[keys[0]]
        weight = min(max(amount / size / self.rho, natural / RESCALE_RANGE), natural * RESCALE_RANGE)
        for key in keys:
            u[key] = u[key] * (self.weights[key] / weight)
            self.weights[key] = weight

    def _parts(self) -> tuple[Blocks, Blocks]:
        """z and the scaled multipliers u = s - z of the present state."""
        z = self._project(self.blocks(self.state))
        return self.blocks(z), self.blocks(self.state - z)

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
        prices = {key: self.bare.new_zeros(shape) for key, shape in self.shapes.items()}
        prices["F", 0] = guess.output
        response = torch.einsum("nk,nj...->j...k", guess.output, program.readout_features)
        prices["U", 0] = response.reshape(len(response), -1, guess.output.shape[1]).movedim(2, 1)[None]
        for layer, pulls in zip(self.layers, guess.realisation):
            prices["W", layer], _ = parted(pulls, self.shapes["W", layer])
            pairing = (pulls * joined(program.flows[layer], program.frozen.biases[layer])).sum(1)
            prices["p", layer] = point.masses[layer] @ pairing - pairing
        return {key: -price / self.weight(key) for key, price in prices.items()}

    def weight(self, key: Key) -> float:
        return self.rho * self.weights[key]

    def change(self) -> Tensor:
        """The step of the state: RELAXATION (x - z), z = projection(s), x = prox(2 z - s)."""
        self.at, self.moved = self.state, self.z
        self.z = self._project(self.blocks(self.state))
        self.x = self._prox(self.blocks(torch.sub(self.z, self.state).add_(self.z)))
        step = torch.empty_like(self.z)
        for key, block in self.blocks(step).items():
            torch.sub(self.x[key], self.blocks(self.z)[key], out=block)
        return step.mul_(RELAXATION)

    def _prox(self, center: Blocks) -> Blocks:
        problem, penalty = self.program.problem, self.program.problem.penalty
        count, depth = problem.count, self.program.depth
        new = dict(center)
        new["F", 0] = problem.loss.prox(center["F", 0], problem.targets, self.weight(("F", 0)) * count)
        new["p", 0] = center["p", 0] - self.program.feature_costs / self.weight(("p", 0))
        for layer in self.layers:
            kernel, source = ("W", layer), ("p", layer - 1)
            new[kernel], new[source], self.roots[kernel] = row_prox(
                center[kernel],
                new[source],
                penalty,
                penalty.source,
                self.weight(kernel),
                self.weight(source),
                self.roots.get(kernel),
            )
        last = ("p", depth - 1)
        new["U", 0], new[last], self.roots["U", 0] = row_prox(
            center["U", 0],
            new[last],
            self.frobenius,
            penalty.readout,
            self.weight(("U", 0)),
            self.weight(last),
            self.roots.get(("U", 0)),
        )
        if penalty.amplitude_bound is not None:
            self._project_cones(new, center, penalty)
        return new

    def _project_cones(self, new: Blocks, center: Blocks, penalty: Penalty) -> None:
        bound = penalty.amplitude_bound or math.inf
        for layer in self.layers:
            kernel, mass = ("Wc", layer), ("pc", layer)
            new[kernel], new[mass] = cone_projection(
                center[kernel], center[mass], penalty, bound, self.weight(kernel), self.weight(mass)
            )
            kernel, mass = ("bd", layer), ("pd", layer)
            if kernel in center:
                biases, new[mass] = cone_projection(
                    center[kernel][:, None, None, None],
                    center[mass],
                    self.frobenius,
                    bound,
                    self.weight(kernel),
                    self.weight(mass),
                )
                new[kernel] = biases[:, 0, 0, 0]

    def _project(self, center: Blocks) -> Tensor:
        """The nearest point that meets the linear constraints, (n,)."""
        vector = self.bare.new_empty(sum(shape.numel() for shape in self.shapes.values()))
        new = self.blocks(vector)
        self._project_readout(center, new)
        p = center["p", 0]
        new["p", 0][:] = p + (1 - p.sum()) / len(p)
        for layer in self.layers:
            self._project_layer(center, new, layer)
        return vector

    def _project_layer(self, center: Blocks, new: Blocks, layer: int) -> None:
        """The nearest (W, b, p) with V^T (W_j, b_j) = p_j c_j and sum p = 1; copies of one block move as their mean."""
        W, kernel_weight = self._mean(center, ["W", "Wc"], layer)
        p, mass_weight = self._mean(center, ["p", "pc", "pd"], layer)
        rows, right, image = W.flatten(1), self.program.bases[layer - 1], self.program.coordinates[layer - 1]
        if ("b", layer) in center:
            rows = torch.cat([rows, self._mean(center, ["b", "bd"], layer)[0][:, None]], 1)
        coordinates = rows @ right  # (M_l, rank)
        curvature = mass_weight + kernel_weight * image.square().sum(1)
        free = (mass_weight * p + kernel_weight * (image * coordinates).sum(1)) / curvature
        p = free + (1 - free.sum()) / curvature / (1 / curvature).sum()
        excess = coordinates.sub_(p[:, None] * image)
        if ("b", layer) in center:
            rows = torch.addmm(rows, excess, right.T, alpha=-1)
            self._spread(new, ["b", "bd"], layer, rows[:, -1])
            new["W", layer].flatten(1)[:] = rows[:, :-1]
        else:
            torch.addmm(rows, excess, right.T, alpha=-1, out=new["W", layer].view(rows.shape))
        self._spread(new, ["Wc"], layer, new["W", layer])
        self._spread(new, ["p", "pc", "pd"], layer, p)

    def _mean(self, center: Blocks, names: list[str], layer: int) -> tuple[Tensor, float]:
        """Mean of the copies of one block and their total weight."""
        copies = [center[name, layer] for name in names if (name, layer) in center]
        mean = copies[0] if len(copies) == 1 else torch.stack(copies).mean(0)
        return mean, len(copies) * self.weight((names[0], layer))

    def _spread(self, new: Blocks, names: list[str], layer: int, block: Tensor) -> None:
        for name in names:
            if (name, layer) in new:
                new[name, layer].copy_(block)

    def _project_readout(self, center: Blocks, new: Blocks) -> None:
        """The nearest (U, F) with F = features U: one solve in the eigenbasis of the smaller Gram matrix."""
        rows, vectors = self.rows, self.gram_vectors
        U = center["U", 0][0]  # (M_L, K, positions)
        flat = U.movedim(1, 2).flatten(0, 1)  # (M_L positions, K)
        ratio = self.weight(("U", 0)) / self.weight(("F", 0))
        error = center["F", 0] - rows @ flat
        solve = lambda e: vectors @ ((vectors.T @ e) / (ratio + self.gram_values)[:, None])  # noqa: E731
        flat = flat + (rows.T @ solve(error) if self.wide else solve(rows.T @ error))
        new["U", 0][0] = flat.reshape(U.shape[0], U.shape[2], U.shape[1]).movedim(2, 1)
        torch.mm(rows, flat, out=new["F", 0])

    def residuals(self) -> tuple[float, float]:
        """|x - z| and |z - previous z| in the metric for rho = 1: primal and dual residual over sqrt(rho)."""
        x = torch.cat([self.x[key].flatten() for key in self.shapes])
        return self._size(x - self.z), self._size(self.z - self.moved)

    def _size(self, vector: Tensor) -> float:
        return float(torch.linalg.vector_norm(self.metric * vector))

    def balance(self) -> bool:
        """Move rho towards equal primal and dual residuals, each relative to its variable; True if it moved."""
        primal, drift = self.residuals()
        size, multipliers = self._size(self.z), self._size(self.at - self.z)
        if min(primal, drift) <= 8 * torch.finfo(self.z.dtype).eps * size or multipliers == 0:
            return False  # where the constraints leave nothing to move, or all is settled, the ratio says nothing
        ratio = (primal / size) / (drift / multipliers)
        factor = BALANCE_FACTOR if ratio > 1 else 1 / BALANCE_FACTOR
        if 1 / BALANCE_RATIO <= ratio <= BALANCE_RATIO or not 1 / BALANCE_RANGE <= self.rho * factor <= BALANCE_RANGE:
            return False
        self.rho *= factor
        z = self._project(self.blocks(self.state))
        self.state = z + (self.state - z) / factor
        return True

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
        """The splitting's own, from u = s - z: r = -rho u_F; b_j = -rho u_W lies in the row space of A."""
        u = self.blocks(self.at - self.z)
        realisation = []
        for layer in self.layers:
            bias = self._pull(u, "b", "bd", layer) if ("b", layer) in u else None
            realisation.append(joined(self._pull(u, "W", "Wc", layer), bias))
        return Multipliers(-self.weight(("F", 0)) * u["F", 0], tuple(realisation), self._bound_multipliers(u))

    def _bound_multipliers(self, u: Blocks) -> tuple[Tensor, ...] | None:
        """kappa_j: the cone of the amplitude bound pulls on the mass p_j with -B kappa_j."""
        bound = self.program.problem.penalty.amplitude_bound
        if bound is None:
            return None
        return tuple((self.weight(("pc", layer)) * u["pc", layer] / bound).clamp_min(0) for layer in self.layers)

    def _pull(self, u: Blocks, name: str, copy: str, layer: int) -> Tensor:
        """-rho u of a block and of its copy for the amplitude bound, added up."""
        keys = [key for key in ((name, layer), (copy, layer)) if key in u]
        return torch.stack([-self.weight(key) * u[key] for key in keys]).sum(0)
