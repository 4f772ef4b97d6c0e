"""The convex program over populations of frozen features: value, violation, coordinates, restoration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from meanfield import limits, measures
from meanfield.convex import repopulation
from meanfield.convex.basis import RANK_TOLERANCE, RowSpace, StackedRows, row_space, rows_of, stacked
from meanfield.convex.repopulation import ProgramPoint, joined, parted
from meanfield.convex.restoration import BoundedRows, into_bounds, least_weighted, towards
from meanfield.folds import Fold
from meanfield.network import ParticleNetwork, along_axis, propagate
from meanfield.problem import FEASIBLE, GRAPH, Problem, Terms, UncertifiedTerms, summed, uncertified
from meanfield.signatures import checked
from meanfield.validation import instance

RESTORE_SWEEPS = 4
REVIVED_SHARES = (1.0, 1e-2, 1e-4)  # of the violation that the lack of sources leaves


@dataclass(frozen=True, eq=False)
class ConvexProgram:
    """minimise over (p, W, U, B) at frozen features  mean loss + perspectives of the penalties,

        subject to  sum_i sum_s W_ijs T_s f_i + B_j = p_j g_j  on every image and position, for layers >= 2,
        p >= 0, sum p = 1, and the amplitude bound  sum_i |W_ij| <= B p_j, |B_j| <= B p_j  where it is on.

    Fang et al. 2019, section 4.  Features of zero mass in the frozen network are candidates.

    The constraint is A (W_j, B_j) = p_j g_j with the shifted features A of the layer, and g_j = A w^_j for the flows
    w^_j that made the features.  With an orthonormal basis V of A's row space it is V^T (W_j, B_j) = p_j V^T w^_j:
    that is how it is held.  No feature map is; `maps` computes those of some inputs.

    flows[l] (M_l, M_{l-1}, kh, kw), kernels times source masses, of layer 1 kernels over C_0, with the frozen biases;
    spaces[l-1] the row space of layer l, counted from 0; readout_features (N, M_L) or (N, M_L, positions), what the
    readout multiplies.
    """

    problem: Problem
    frozen: ParticleNetwork
    flows: tuple[Tensor, ...]
    spaces: tuple[RowSpace, ...]
    readout_features: Tensor

    @classmethod
    @checked
    @torch.inference_mode(False)
    def freeze(cls, problem: Problem, network: ParticleNetwork) -> ConvexProgram:
        """Freeze the features that `network` computes on the problem's inputs: one pass over them, in float64."""
        problem.require_feasible(network)
        network = network.detach()
        program = cls._gathered(problem, network, network.flows)
        point = repopulation.to_program(network)
        problem.require_finite(problem.terms(network, program.output(point)).total())
        return program

    @classmethod
    @checked
    @torch.inference_mode(False)
    def with_candidates(cls, problem: Problem, network: ParticleNetwork, candidates: ParticleNetwork) -> ConvexProgram:
        """Freeze the features of `network`, and those of `candidates` beside them at zero mass.

        A candidate of a later layer stands on lower candidates without mass: its features are those it has in the
        network `candidates`, where they do have mass.  Its readout is not used.
        """
        problem.require_feasible(network)
        problem.require_feasible(candidates)
        network, candidates = network.detach(), candidates.detach()
        own, others = network.flows, candidates.flows
        flows = [torch.cat([own[0], others[0]]), *map(_side_by_side, own[1:], others[1:])]
        return cls._gathered(problem, measures.adjoin(network, candidates), flows)

    @classmethod
    def _gathered(cls, problem: Problem, frozen: ParticleNetwork, flows: Sequence[Tensor]) -> ConvexProgram:
        arch, inputs, widths = problem.architecture, problem.inputs, frozen.widths
        exact = [flow.double() for flow in flows]
        biases = [None if bias is None else bias.double() for bias in frozen.biases]
        shapes = arch.row_shapes(widths)
        folds = [Fold(len(problem.runs), stacked) for _ in shapes]
        read = inputs.new_empty(len(inputs), *arch.readout_shape(widths[-1])[1:])
        with torch.no_grad():
            for run, blocks in problem.by_runs(8 * (arch.entries(widths) + 2 * max(map(prod, shapes), default=0))):
                stacks = [StackedRows(problem.runs[run] * rows, columns, inputs.device) for rows, columns in shapes]
                for block in blocks:
                    _, features = propagate(arch, exact, biases, inputs[block].double())
                    for stack, conv, below in zip(stacks, arch.layers[1:], features):
                        stack.add(rows_of(conv, below))
                    read[block] = arch.readout_features(features[-1]).to(inputs.dtype)
                for fold, stack in zip(folds, stacks):
                    fold.add((run, run + 1), stack.rows())
            spaces = tuple(
                row_space(fold, RANK_TOLERANCE[inputs.dtype], inputs.new_empty(0, columns).double(), problem.ranks)
                for fold, (_, columns) in zip(folds, shapes)
            )
        return cls(problem, frozen, tuple(flows), spaces, problem.gathered(read))

    @torch.inference_mode(False)
    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ConvexProgram:
        """The program in another dtype, on another device."""
        convert = lambda tensor: tensor.to(dtype=dtype, device=device)  # noqa: E731
        if convert(self.readout_features) is self.readout_features:
            return self  # with what it has computed
        return ConvexProgram(
            self.problem.to(dtype=dtype, device=device),
            self.frozen.map(convert),
            tuple(map(convert, self.flows)),
            tuple(space._replace(right=space.right.to(device=device)) for space in self.spaces),
            convert(self.readout_features),
        )

    @property
    def depth(self) -> int:
        """L, the number of layers."""
        return self.problem.architecture.depth

    @property
    def widths(self) -> tuple[int, ...]:
        """(M_1, ..., M_L), features per layer, those without mass included."""
        return self.frozen.widths

    @cached_property
    def feature_costs(self) -> Tensor:
        """lambda_1 |(z_i, b_i)|^2, (M_1,)."""
        cost = self.frozen.kernels[0].flatten(1).square().sum(1)
        if self.frozen.biases[0] is not None:
            cost = cost + self.frozen.biases[0].square()
        return self.problem.penalty.input * cost

    @cached_property
    def bases(self) -> tuple[Tensor, ...]:
        """V of every layer >= 2 in the program's dtype, (columns, rank): kernels source by source, then the bias."""
        return tuple(space.right.to(self.frozen.dtype) for space in self.spaces)

    @cached_property
    def coordinates(self) -> tuple[Tensor, ...]:
        """c_j = V^T w^_j of every layer >= 2, (M_l, rank)."""
        frozen = zip(self.flows[1:], self.frozen.biases[1:], self.spaces)
        return tuple(
            (joined(flows, bias).double() @ space.right).to(self.frozen.dtype) for flows, bias, space in frozen
        )

    def maps(self, inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """g^l (N, M_l, H', W') and f^l (N, M_l, H'', W'') of every frozen feature on inputs (N, C_0, H, W)."""
        return propagate(self.problem.architecture, self.flows, self.frozen.biases, inputs)

    @property
    def bytes_each(self) -> int:
        """Of the maps of an image and their graph."""
        return self.problem.inputs.element_size() * self.problem.architecture.entries(self.widths, GRAPH)

    def point(self, network: ParticleNetwork) -> ProgramPoint:
        """The program variables of the frozen network, or of any network with the same features."""
        instance(network, "network", ParticleNetwork)
        if network.widths != self.widths or network.architecture != self.problem.architecture:
            raise ValueError(
                f"the network has widths {network.widths}; the program froze the features of widths {self.widths}"
            )
        network = network.detach()
        point = repopulation.to_program(network)
        # of the coarsest dtype: features may have been computed in another one than they are in now
        if max(self._first_layer_change(network), self.discord(point)) > max(FEASIBLE.values()):
            raise ValueError("the network's features differ from the frozen ones; freeze a program at this network")
        return point

    def _first_layer_change(self, network: ParticleNetwork) -> float:
        """Largest relative change of a first-layer kernel entry or bias against the frozen ones."""
        pairs = [(self.frozen.kernels[0], network.kernels[0]), (self.frozen.biases[0], network.biases[0])]
        changes = [
            (float((new - old).abs().max()), float(old.abs().max()))
            for old, new in pairs
            if old is not None and new is not None
        ]
        return max(change / max(size, torch.finfo(network.dtype).tiny) for change, size in changes)

    def network(self, point: ProgramPoint) -> ParticleNetwork:
        """The network of a point; particles of zero mass are dropped."""
        return repopulation.to_network(point, self.frozen)

    def output(self, point: ProgramPoint) -> Tensor:
        """F = sum_j <U_j, f_j>, (N, K)."""
        return self.readout_features.flatten(1) @ point.readout.flatten(1).T

    def terms(self, point: ProgramPoint) -> Terms | UncertifiedTerms:
        """The terms of the program; the same as the problem's at the network of the point."""
        penalty, loss = self.problem.penalty, self.problem.loss
        fit = loss.value(self.output(point), self.problem.targets).mean()
        source = fit.new_zeros(())
        for W, p in zip(point.kernels, point.masses):
            source = source + penalty.outer.perspective(penalty.norms(W).sum(0), p).sum()
        amounts = torch.linalg.vector_norm(point.readout.movedim(1, 0).flatten(1), dim=1)
        readout = penalty.outer.perspective(amounts, point.masses[-1]).sum()
        weigh = lambda strength, term: strength * term if strength else torch.zeros_like(term)  # noqa: E731
        prices = [weigh(penalty.source, source), weigh(penalty.readout, readout), point.masses[0] @ self.feature_costs]
        own = [] if penalty.uncertified is None else [uncertified(self.network(point), penalty)]
        return summed(fit, prices + own)

    def value(self, point: ProgramPoint) -> Tensor:
        """The objective, a 0-dimensional tensor; constraints are judged by `violation`."""
        return self.terms(point).total()

    def residual(self, point: ProgramPoint, layer: int) -> Tensor:
        """V^T (W_j, B_j) - p_j c_j of `layer` (>= 1), (M_l, rank): zero where the features are realised."""
        rows = joined(point.kernels[layer - 1], point.biases[layer - 1])
        return rows @ self.bases[layer - 1] - point.masses[layer][:, None] * self.coordinates[layer - 1]

    def image_residuals(self, point: ProgramPoint, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """sum_i sum_s W_ijs T_s f_i + B_j - p_j g_j on some inputs, and p_j g_j; (N, M_l, H', W') for layers >= 2."""
        preactivations, features = self.maps(inputs)
        found = []
        for conv, below, W, B, p, g in zip(
            self.problem.architecture.layers[1:],
            features,
            point.kernels,
            point.biases,
            point.masses[1:],
            preactivations[1:],
        ):
            wanted = p[None, :, None, None] * g
            found.append((conv.convolve(below, W, B) - wanted, wanted))
        return found

    def violation(self, point: ProgramPoint) -> float:
        """Largest violation of any constraint, relative to its own scale, evaluated afresh over all images.

        Masses: |sum p - 1| and -p M.  Realisation: the largest |residual| over the largest |p_j g_j|, per layer.
        Bounds: the largest excess over B p_j, over B p_j (over B max p where p_j = 0), as `Problem.excess` has it.
        """
        largest = point.readout.new_zeros(self.depth - 1, 2)
        if self.depth > 1:
            for block in self.problem.blocks(self.bytes_each):
                pairs = self.image_residuals(point, self.problem.inputs[block])
                here = torch.stack([tensor.abs().amax() for pair in pairs for tensor in pair])
                largest = torch.maximum(largest, here.reshape(largest.shape))
        largest = self.problem.ranks.largest(largest)
        ratios = largest[:, 0] / largest[:, 1].clamp_min(torch.finfo(largest.dtype).tiny)
        return self.problem.ranks.decided(_worst([*self._excesses(point), *ratios.tolist()]))

    def discord(self, point: ProgramPoint) -> float:
        """As `violation`, but by coordinates: the largest |V^T (W_j, B_j) - p_j c_j| over p_j |c_j| of any feature.

        It touches no image, and leaves aside what rounding explains.  Where it is small every feature of the point's
        network is the frozen one; where it is not, the directions that A hardly sees may be all that is amiss.
        """
        ratios = []
        for layer in range(1, self.depth):
            rows = joined(point.kernels[layer - 1], point.biases[layer - 1])
            rounding = rows.shape[1] * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows, dim=1)
            off = (torch.linalg.vector_norm(self.residual(point, layer), dim=1) - rounding).clamp_min(0)
            size = point.masses[layer] * torch.linalg.vector_norm(self.coordinates[layer - 1], dim=1)
            ratios.append(float((off / size.clamp_min(torch.finfo(off.dtype).tiny)).max()))
        return _worst([*self._excesses(point), *ratios])

    def _excesses(self, point: ProgramPoint) -> list[float]:
        """By how much masses and bounds are broken."""
        found = [abs(float(p.sum()) - 1) for p in point.masses] + [-float(p.min()) * len(p) for p in point.masses]
        for layer in range(1, self.depth):
            found.extend(self._bound_excess(point, layer))
        return found

    def _bound_excess(self, point: ProgramPoint, layer: int) -> list[float]:
        bound, p, bias = self.problem.penalty.amplitude_bound, point.masses[layer], point.biases[layer - 1]
        if bound is None:
            return []
        reached = [self.problem.penalty.norms(point.kernels[layer - 1]).sum(1)] + ([] if bias is None else [bias.abs()])
        return [float(((amount - bound * p) / (bound * torch.where(p > 0, p, p.max()))).max()) for amount in reached]

    def admits(self, point: ProgramPoint) -> bool:
        """Whether a solver may return the point: within `problem.FEASIBLE`, and its network's J is its value.

        J takes every feature as the network computes it, so that a light feature which is off by much of itself, but by
        little of its layer, is found out.
        """
        tolerance = FEASIBLE[point.readout.dtype]
        if not self.violation(point) <= tolerance:
            return False
        value, judged = float(self.value(point)), float(self.problem.value(self.network(point)))
        return self.problem.ranks.decided(abs(judged - value) <= tolerance * abs(value))

    def admitted(self, point: ProgramPoint) -> ProgramPoint | None:
        """The best restored point that a solver may return, or None.

        A solver can take all mass off sources that the features need a little: no restoration on this support meets
        the constraints.  Then all features share a mass s, which costs price s + lambda_s (lack)^2 / s: convex in s, so
        that a few shares, some powers of ten apart, find what it is worth.
        """
        restored = self.restore(point)
        if self.admits(restored):
            return restored
        lack = self.violation(restored)
        if not lack <= 1:
            return None
        revived = (self.restore(_spread(point, share * lack)) for share in REVIVED_SHARES)
        cost = lambda each: self.problem.ranks.decided(float(self.value(each)))  # noqa: E731
        return min(filter(self.admits, revived), key=cost, default=None)

    def restore(self, point: ProgramPoint) -> ProgramPoint:
        """A nearby point, on the same support, that meets every constraint to rounding where the support can.

        Masses are clipped and normalised (uniform where none is left); every feature's kernels move by the least sum of
        |dW_ij|^2 / min(p_i M, 1), so that massless features keep zero kernels and light ones move little.  With an
        amplitude bound each feature then moves inside it along its linear constraints, where its sources realise it
        with less than B p_j; one that stays outside is mixed with its frozen kernels, where their sources have mass.
        To the value this costs what the multipliers make of the distance, to second order at an optimum.
        """
        masses = tuple(_normalised(p.clamp_min(0)) for p in point.masses)
        alive = [(p > 0).to(p.dtype) for p in masses]
        kernels, biases = list(point.kernels), list(point.biases)
        for layer in range(1, self.depth):
            carry = alive[layer][:, None, None, None] * alive[layer - 1][None, :, None, None]
            kernels[layer - 1] = kernels[layer - 1] * carry
            bias = biases[layer - 1]
            biases[layer - 1] = None if bias is None else bias * alive[layer]
        readout = point.readout * along_axis(alive[-1], point.readout, 1)
        restored = ProgramPoint(masses, tuple(kernels), readout, tuple(biases))
        for layer in range(1, self.depth):
            restored = self._restore_layer(restored, layer)
        return restored

    def _restore_layer(self, point: ProgramPoint, layer: int) -> ProgramPoint:
        source, target = point.masses[layer - 1], point.masses[layer]
        conv, right = self.problem.architecture.layers[layer], self.bases[layer - 1]
        scale = (source * len(source)).clamp_max(1).sqrt().repeat_interleave(conv.offsets)
        if conv.bias:
            scale = torch.cat([scale, scale.new_ones(1)])
        solve = least_weighted(right, scale)
        kernels, biases = list(point.kernels), list(point.biases)
        rows, wanted = joined(kernels[layer - 1], biases[layer - 1]), target[:, None] * self.coordinates[layer - 1]
        for _ in range(RESTORE_SWEEPS):
            limits.look()
            rows = rows - solve(rows @ right - wanted) * (target > 0)[:, None]
        bound = self.problem.penalty.amplitude_bound
        if bound is not None:
            alive = torch.nonzero(target > 0).flatten()
            unit = bound * target[alive, None]
            rows[alive] = unit * self._bounded(layer, alive, rows[alive] / unit, solve, scale)
        kernels[layer - 1], biases[layer - 1] = parted(rows, kernels[layer - 1].shape)
        return ProgramPoint(point.masses, tuple(kernels), point.readout, tuple(biases))

    def _bounded(
        self, layer: int, alive: Tensor, rows: Tensor, solve: Callable[[Tensor], Tensor], scale: Tensor
    ) -> Tensor:
        """Rows (W_j, B_j) / (B p_j) of the features `alive`, moved inside the bounds; their coordinates are right."""
        kernel, bias = self.flows[layer], self.frozen.biases[layer]
        bounds = BoundedRows(self.problem.penalty, tuple(kernel.shape[1:]), scale, bias is not None)
        rows = into_bounds(rows, self.bases[layer - 1], solve, bounds)
        # the flows that made a feature realise it inside the bounds, where their sources have mass
        anchors = joined(kernel, bias)[alive] / (self.problem.penalty.amplitude_bound or math.inf)
        usable = ~(anchors[:, scale == 0] != 0).any(1) & (bounds.excess(rows) > FEASIBLE[rows.dtype])
        return torch.where(usable[:, None], towards(rows, anchors, bounds), rows)


def _side_by_side(own: Tensor, others: Tensor) -> Tensor:
    """Flows (M, M', kh, kw) of two networks as those of one, block-diagonal."""
    both = own.new_zeros(own.shape[0] + others.shape[0], own.shape[1] + others.shape[1], *own.shape[2:])
    both[: own.shape[0], : own.shape[1]] = own
    both[own.shape[0] :, own.shape[1] :] = others
    return both


def _worst(found: list[float]) -> float:
    """The largest, at least 0; NaN stays NaN."""
    return float(torch.tensor([0.0, *found], dtype=torch.float64).max())


def _spread(point: ProgramPoint, share: float) -> ProgramPoint:
    """The point with a share of the mass of every layer spread evenly."""
    masses = (_normalised(p.clamp_min(0)) for p in point.masses)
    return replace(point, masses=tuple((1 - share) * p + share / len(p) for p in masses))


def _normalised(masses: Tensor) -> Tensor:
    total = masses.sum()
    return torch.where(total > 0, masses / total, 1 / len(masses))
