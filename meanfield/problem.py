"""A training problem: architecture, data, loss, penalty; its objective J and the terms of J."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meanfield import folds, limits, losses
from meanfield.architecture import Architecture
from meanfield.network import ParticleNetwork, ordinary
from meanfield.penalties import Penalty, input_norms, input_projection, kernel_projection
from meanfield.ranks import ALONE, Ranks
from meanfield.validation import Misuse, finite, instance, working

GRAPH = 3  # times the features: what a backward pass holds of them, and its own
# The relative violation, of a bound or of any constraint of the convex program, up to which a network or a point counts
# as feasible; solvers end at rounding.  float32: sums of 2^10 terms with one rounding each (2^-24) may be off by 6e-5.
# float64: kernels that were kept in float32 once are off by 2^-24 = 6e-8.  J is then too low by at most this times the
# multipliers of the bounds (times B).
FEASIBLE = {torch.float32: 1e-4, torch.float64: 1e-7}


PRICES = ("source", "readout", "input", "uncertified")  # what `prices` returns, in its order


class Terms(NamedTuple):
    """The terms of J, each a 0-dimensional tensor; their sum is J wherever the bounds hold."""

    loss: Tensor
    source: Tensor
    readout: Tensor
    input: Tensor

    def total(self) -> Tensor:
        return self.loss + self.source + self.readout + self.input

    def figures(self) -> dict[str, float]:
        """By name."""
        return {name: float(term) for name, term in self._asdict().items()}


class UncertifiedTerms(NamedTuple):
    """`Terms` with the user's own."""

    loss: Tensor
    source: Tensor
    readout: Tensor
    input: Tensor
    uncertified: Tensor

    def total(self) -> Tensor:
        return Terms(*self[:-1]).total() + self.uncertified

    def figures(self) -> dict[str, float]:
        """By name."""
        return {name: float(term) for name, term in self._asdict().items()}


def summed(loss: Tensor, prices: Sequence[Tensor]) -> Terms | UncertifiedTerms:
    """The terms of a mean loss and what `prices` returns."""
    return Terms(loss, *prices) if len(prices) == len(Terms._fields) - 1 else UncertifiedTerms(loss, *prices)


class Problem:
    """J = mean loss + source, readout and input penalties (+ bounds) over networks of one architecture.

    loss: a name of `losses.LOSSES`, or an object of `losses.Loss` (see `losses.check`).
    inputs (N, C_0, H, W), float32 or float64 (integers become float64); targets as the loss takes them: (N,) or (N, K)
    for the squared and the logistic loss (labels -1, 1), integer classes (N,) for softmax.  Arrays are accepted and
    converted. Fang et al. 2019 and Gu et al. 2020 with r(t) = t^q.

    Images come in `runs`, so many in each (see `folds`), of which every rank has its share.  A problem that was
    `sharded` holds as inputs those of its own rank, and all targets.
    """

    def __init__(
        self,
        architecture: Architecture,
        inputs: Any,
        targets: Any,
        loss: str | losses.Loss = "squared",
        penalty: Penalty | None = None,
    ):
        instance(architecture, "architecture", Architecture)
        if penalty is not None:
            instance(penalty, "penalty", Penalty)
        self.architecture = architecture
        self.loss = losses.make(loss)
        self.penalty = penalty if penalty is not None else Penalty()
        self.inputs = ordinary(_image_tensor(inputs, architecture))
        self.targets = ordinary(self.check_targets(_tensor(targets, "targets")))
        self.ranks, self.runs = ALONE, folds.runs(len(self.inputs), self._pixels)

    @property
    def count(self) -> int:
        """N, the number of images on all ranks."""
        return len(self.targets)

    @property
    def _pixels(self) -> int:
        return self.inputs.shape[2:].numel()

    @property
    def _edges(self) -> list[int]:
        """Where the runs of images begin and end."""
        return [0, *accumulate(self.runs)]

    def _images_of(self, rank: int) -> slice:
        first, last = self.ranks.span(len(self.runs), rank)
        return slice(self._edges[first], self._edges[last])

    @property
    def own_runs(self) -> tuple[Tensor, ...]:
        """`inputs`, run by run."""
        return self.inputs.split(self.runs[slice(*self.ranks.span(len(self.runs)))])

    @property
    def runs_of_ranks(self) -> tuple[int, ...]:
        """How many runs each rank has."""
        spans = (self.ranks.span(len(self.runs), rank) for rank in range(self.ranks.count))
        return tuple(last - first for first, last in spans)

    @property
    def own_targets(self) -> Tensor:
        """Those of `inputs`."""
        return self.targets[self._images_of(self.ranks.own)]

    def __repr__(self) -> str:
        return f"Problem({self.count} images, {self.loss.name} loss, {self.architecture}, {self.penalty})"

    def check_targets(self, targets: Tensor) -> Tensor:
        """`targets` as the loss takes them, one for every image; Misuse otherwise."""
        return self.loss.check_targets(targets, len(self.inputs), self.architecture.outputs, like=self.inputs)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Problem:
        """The same problem with its tensors converted."""
        return self._with_data(self.inputs.to(dtype=working(dtype), device=device), self.targets)

    def batch(self, indices: Tensor) -> Problem:
        """The problem on some of its images: its gradient is an unbiased estimate of the whole one's.

        Every rank gives the indices of all, and holds those among them that are its own; they may be none.
        """
        wanted = len(folds.runs(len(indices), self._pixels, len(self.runs)))
        if wanted == self.ranks.count == 1:
            return self._with_data(self.inputs[indices], self.targets[indices], (len(indices),))
        indices = indices.sort().values  # in the order of the runs
        edges = torch.searchsorted(indices.cpu(), torch.tensor(self._coarse_edges(wanted)))
        first, last = self.ranks.span(len(edges) - 1)
        own = indices[edges[first] : edges[last]] - self._images_of(self.ranks.own).start
        return self._with_data(self.inputs[own], self.targets[indices], tuple(edges.diff().tolist()))

    def _coarse_edges(self, wanted: int) -> list[int]:
        """Those of about so many branches of runs, if each is of one rank; else of all runs."""
        edges, runs = self._edges, len(self.runs)
        parts = 1 << (wanted.bit_length() - 1)
        chosen = [edges[run] for run in folds.edges(runs, parts)] if parts <= runs else edges
        begins = (chosen[self.ranks.span(len(chosen) - 1, rank)[0]] for rank in range(self.ranks.count))
        return chosen if all(begin == self._images_of(rank).start for rank, begin in enumerate(begins)) else edges

    def sharded(self, ranks: Ranks) -> Problem:
        """The same problem with the images of one rank; each calls this with the whole problem, and from there on does
        what the others do.  Up to `folds.MOST_RUNS` ranks get the same bits as one.
        """
        if ranks.count == 1:
            return self
        self.require_whole("sharding")
        runs = folds.runs(self.count, self._pixels, max(folds.MOST_RUNS, ranks.count))
        other = self._with_data(self.inputs, self.targets, runs)
        other.ranks = ranks
        other.inputs = self.inputs[other._images_of(ranks.own)].clone()  # no view, which would hold all images
        return other

    def require_whole(self, what: str) -> None:
        """Refuse a problem whose images are on several ranks."""
        if self.ranks.count > 1:
            raise ValueError(f"{what} takes all images on one rank; this problem is sharded over {self.ranks.count}")

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all images, in order, from those of one's own."""
        parts = (self._images_of(rank) for rank in range(self.ranks.count))
        return self.ranks.gathered(rows, tuple(part.stop - part.start for part in parts))

    def by_runs(self, bytes_each: int) -> Iterator[tuple[int, Iterator[slice]]]:
        """The own runs, each with blocks of its images as slices of `inputs`; an image takes so many bytes.  Every rank
        looks at the time as often as the one with the most blocks.
        """
        looks = [self._looks(rank, bytes_each) for rank in range(self.ranks.count)]
        begin = self._images_of(self.ranks.own).start
        for index, run in enumerate(range(*self.ranks.span(len(self.runs)))):
            if index:
                limits.look(in_step=True)
            yield run, _shifted(limits.blocks(self.runs[run], bytes_each), self._edges[run] - begin)
        for _ in range(max(looks) - looks[self.ranks.own]):
            limits.look(in_step=True)

    def _looks(self, rank: int, bytes_each: int) -> int:
        blocks = [
            max(1, limits.blocks_in(self.runs[run], bytes_each))
            for run in range(*self.ranks.span(len(self.runs), rank))
        ]
        return max(0, sum(blocks) - 1)

    def blocks(self, bytes_each: int) -> Iterator[slice]:
        """Slices of `inputs`, none across runs."""
        return (block for _, blocks in self.by_runs(bytes_each) for block in blocks)

    def total(self, bytes_each: int, zero: Tensor, piece: Callable[[slice], Tensor]) -> Tensor:
        """zero (n,) and the vectors that `piece` gives for blocks of images, added up over all images of all ranks."""
        fold: folds.Fold[Tensor] = folds.Fold(len(self.runs), torch.add)
        for run, blocks in self.by_runs(bytes_each):
            fold.add((run, run + 1), sum(map(piece, blocks), zero))
        return self.ranks.total(fold, zero)

    def scaled_targets(self, unit: float) -> Problem:
        """The problem with its targets divided by `unit`, as `Loss.unit` gives it; labels, of unit 1, stay."""
        return self if unit == 1 else self._with_data(self.inputs, self.targets / unit)

    def _with_data(self, inputs: Tensor, targets: Tensor, runs: tuple[int, ...] | None = None) -> Problem:
        """Without the checks: a batch may hold one class only."""
        other = object.__new__(Problem)
        other.architecture, other.loss, other.penalty = self.architecture, self.loss, self.penalty
        dtype = inputs.dtype if targets.is_floating_point() else targets.dtype
        other.inputs, other.targets = ordinary(inputs), ordinary(targets.to(dtype=dtype, device=inputs.device))
        other.ranks, other.runs = self.ranks, self.runs if runs is None else runs
        return other

    def output(self, network: ParticleNetwork) -> Tensor:
        """F on all images, (N, K); in blocks of images where no gradient is wanted, which would keep them all."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in network.tensors()):
            self.require_whole("a differentiable output")
            return network.responses(self.inputs).output
        each = self.inputs.element_size() * self.architecture.entries(network.widths)
        output = self.inputs.new_empty(len(self.inputs), self.architecture.outputs)
        for block in self.blocks(each):
            output[block] = network.responses(self.inputs[block]).output
        return self.gathered(output)

    def pulled_back(self, network: ParticleNetwork) -> tuple[Tensor, list[Tensor]]:
        """The mean loss, 0-dimensional, and its gradients in the network's tensors; neither carries a graph.

        In blocks of images, each pulled back by its own multipliers: no more than one block's graph is held.  Over
        ranks both come in one sum.
        """
        leaf, targets = network.map(lambda tensor: tensor.detach().requires_grad_()), self.own_targets
        leaves = leaf.tensors()

        def piece(block: slice) -> Tensor:
            with torch.enable_grad():
                output = leaf.responses(self.inputs[block]).output
            pulls = self.loss.gradient(output.detach(), targets[block]) / self.count
            loss = self.loss.value(output.detach(), targets[block]).sum() / self.count
            return torch.cat([loss[None], *(part.flatten() for part in torch.autograd.grad(output, leaves, pulls))])

        sizes = [1, *(tensor.numel() for tensor in leaves)]
        each = self.inputs.element_size() * self.architecture.entries(leaf.widths, GRAPH)
        loss, *gradients = self.total(each, self.inputs.new_zeros(sum(sizes)), piece).split(sizes)
        return loss[0], [part.view(tensor.shape) for part, tensor in zip(gradients, leaves)]

    def terms(self, network: ParticleNetwork, output: Tensor | None = None) -> Terms | UncertifiedTerms:
        """The terms of J; differentiable in the network's tensors.  `output` saves a second forward pass."""
        output = self.output(network) if output is None else output
        return summed(self.loss.value(output, self.targets).mean(), self.prices(network))

    def prices(self, network: ParticleNetwork) -> tuple[Tensor, ...]:
        """See the function of this name."""
        return prices(network, self.penalty)

    def value(self, network: ParticleNetwork) -> Tensor:
        """J, a 0-dimensional tensor; +inf where a bound is broken by more than rounding."""
        self._check_network(network)
        total = self.terms(network).total()
        return total if self.excess(network) <= FEASIBLE[network.dtype] else total + torch.inf

    def require_finite(self, total: Tensor) -> None:
        """Refuse a network whose J, as `terms` has it, overflows: no solver can tell what lowers it."""
        if not bool(total.isfinite()):
            raise ValueError(
                f"network has J = {total.item():g} in {total.dtype}, where no solver can begin; scale its kernels and "
                "readout down"
            )

    def excess(self, network: ParticleNetwork) -> float:
        """See the function of this name."""
        return excess(network, self.penalty)

    def bounds(self, network: ParticleNetwork) -> list[tuple[str, float, float]]:
        """See the function of this name."""
        return bounds(network, self.penalty)

    def require_feasible(self, network: ParticleNetwork) -> None:
        """Refuse a network that is not finite, or breaks a bound, naming the bound and the value reached."""
        self._check_network(network)
        network.require_finite()
        for name, reached, bound in self.bounds(network):
            if reached > bound * (1 + FEASIBLE[network.dtype]):
                raise Misuse(
                    name,
                    bound,
                    f"makes the network infeasible: it reaches {reached:.6g}; raise the bound or scale the network "
                    "down",
                )

    def _check_network(self, network: ParticleNetwork) -> None:
        instance(network, "network", ParticleNetwork)
        if network.architecture != self.architecture:
            raise ValueError(
                f"the network has the architecture {network.architecture}, the problem {self.architecture}"
            )
        if network.dtype != self.inputs.dtype or network.device != self.inputs.device:
            raise ValueError(
                f"the network is {network.dtype} on {network.device}, the problem {self.inputs.dtype} on "
                f"{self.inputs.device}; convert one with .to(...)"
            )

    def missing_bounds(self) -> list[str]:
        """Why the infimum over measures may not be attained: one phrase per missing bound; empty where it is attained.

        An unbounded activation with two or more layers needs both bounds, with one layer and a power below 2 the input
        bound, as does one that may grow faster than linearly at any depth; a free bias of a later layer needs the
        amplitude bound, and a strength of zero leaves its variable free.
        """
        penalty, layers = self.penalty, self.architecture.layers
        deep, unbounded = len(layers) > 1, any(not layer.h.bounded for layer in layers)
        missing: list[str] = []
        # light features of h(g) = g^a do the work of heavy ones where a > 2 (q - 1) / q: p |w|^2 and p |u|^q both
        # vanish at a fixed p |u| |w|^a
        steep = not layers[0].h.linear_growth
        if penalty.input_bound is None and (penalty.input == 0 or steep or (unbounded and (deep or penalty.power < 2))):
            missing.append("input_bound")
        free_bias = any(layer.bias for layer in layers[1:])
        if penalty.amplitude_bound is None and deep and (penalty.source == 0 or unbounded or free_bias):
            missing.append("amplitude_bound")
        if penalty.readout == 0:
            missing.append("a positive readout penalty")
        return missing


def project_bounds(problem: Problem, network: ParticleNetwork, *, input_bias_steps: float = 1.0) -> ParticleNetwork:
    """The nearest network, feature by feature in the flow's metric, that keeps the input and the amplitude bound.

    input_bias_steps: step length of the first layer's biases in units of that of its kernels, 1 in the flow's metric.
    """
    penalty, kernels, biases = problem.penalty, list(network.kernels), list(network.biases)
    if penalty.input_bound is not None:
        kernels[0], biases[0] = input_projection(kernels[0], biases[0], penalty.input_bound, input_bias_steps)
    if penalty.amplitude_bound is not None:
        for layer in range(1, len(kernels)):
            source = network.masses[layer - 1]
            kernels[layer] = kernel_projection(kernels[layer], source, penalty, penalty.amplitude_bound)
            bias = biases[layer]
            biases[layer] = None if bias is None else bias.clamp(-penalty.amplitude_bound, penalty.amplitude_bound)
    return ParticleNetwork.unchecked(network.architecture, network.masses, kernels, network.readout, biases)


def prices(network: ParticleNetwork, penalty: Penalty) -> tuple[Tensor, ...]:
    """The terms of J that do not depend on images: source, readout and input penalty, and the user's own if there is
    one.
    """
    p, outer = network.masses, penalty.outer
    source = network.readout.new_zeros(())
    for layer in range(1, network.architecture.depth):
        outflow = p[layer] @ penalty.norms(network.kernels[layer])  # (M_{l-1},): sum_j |w_ij| p_j
        source = source + p[layer - 1] @ outer(outflow)
    readout = p[-1] @ outer.of_squares(network.readout.movedim(1, 0).flatten(1).square().sum(1))
    first = network.kernels[0].flatten(1).square().sum(1)
    if network.biases[0] is not None:
        first = first + network.biases[0].square()
    certified = penalty.source * source, penalty.readout * readout, penalty.input * (p[0] @ first)
    return certified if penalty.uncertified is None else (*certified, uncertified(network, penalty))


def uncertified(network: ParticleNetwork, penalty: Penalty) -> Tensor:
    """The term of the user's own at a network, 0-dimensional."""
    assert penalty.uncertified is not None
    found = penalty.uncertified(network)
    if not isinstance(found, Tensor) or found.ndim or not found.is_floating_point():
        tensor = isinstance(found, Tensor)
        came = f"a tensor of shape {tuple(found.shape)}, {found.dtype}," if tensor else type(found).__name__
        remedy = f"returned {came} and must return a 0-dimensional tensor of real numbers"
        raise Misuse("uncertified", penalty.uncertified, remedy)
    if torch.is_grad_enabled() and any(each.requires_grad for each in network.tensors()) and not found.requires_grad:
        remedy = "must follow from the network's tensors by operations that torch differentiates: no flow would see it"
        raise Misuse("uncertified", penalty.uncertified, remedy)
    return found


def excess(network: ParticleNetwork, penalty: Penalty) -> float:
    """Largest relative excess over the bounds, 0 where they hold: max of (reached / bound - 1)."""
    return max((reached / bound - 1 for _, reached, bound in bounds(network, penalty)), default=0.0)


def bounds(network: ParticleNetwork, penalty: Penalty) -> list[tuple[str, float, float]]:
    """(name, largest value reached, bound) for every bound that is on; massless features are not counted."""
    found: list[tuple[str, float, float]] = []
    alive = [p > 0 for p in network.masses]
    if penalty.input_bound is not None:
        norms = input_norms(network.kernels[0], network.biases[0])
        found.append(("input_bound", float(norms[alive[0]].max()), penalty.input_bound))
    if penalty.amplitude_bound is not None and network.architecture.depth > 1:
        reached = 0.0
        for layer in range(1, network.architecture.depth):
            amplitudes = network.amplitudes(layer, penalty.norms(network.kernels[layer]))
            bias = network.biases[layer]
            amplitudes = amplitudes if bias is None else torch.maximum(amplitudes, bias.abs())
            reached = max(reached, float(amplitudes[alive[layer]].max()))
        found.append(("amplitude_bound", reached, penalty.amplitude_bound))
    return found


def _shifted(blocks: Iterator[slice], by: int) -> Iterator[slice]:
    return (slice(block.start + by, block.stop + by) for block in blocks)


def _tensor(values: Any, argument: str) -> Tensor:
    """Of lists, of lists of tensors, and of arrays in any byte order and with any strides."""
    try:
        if isinstance(values, (list, tuple)) and values and all(isinstance(each, Tensor) for each in values):
            return torch.stack(list(values))
        if isinstance(values, np.ndarray):
            values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument} of type {type(values).__name__} is not a tensor or an array of numbers") from error


def _image_tensor(inputs: Any, architecture: Architecture) -> Tensor:
    tensor = architecture.check_inputs(_tensor(inputs, "inputs"))
    if tensor.shape[0] == 0:
        raise ValueError("inputs is empty: at least one image is needed")
    if tensor.dtype not in (torch.float32, torch.float64):
        if tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"inputs has dtype {tensor.dtype}; float32 and float64 are supported")
        tensor = tensor.double()
    return finite(tensor, "inputs")
