"""How far a trained network is from what its own features allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meanfield import certificates, limits
from meanfield.certificates import UnseenFeatures
from meanfield.convex.program import ConvexProgram
from meanfield.finite.network import FiniteCNN
from meanfield.network import ParticleNetwork
from meanfield.penalties import Penalty, input_norms
from meanfield.problem import Problem, prices
from meanfield.signatures import Count, Positive, Seconds, Seed, checked
from meanfield.solvers import memory, splitting
from meanfield.solvers.solution import Solution
from meanfield.validation import Misuse

LEAST_SHARE = 1e-3  # of the mean loss: what a penalty that was derived from the network costs at least
TERMS = {"loss": "mean loss", "source": "source penalty", "readout": "readout penalty", "input": "input penalty"}
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Audit:
    """What `audit` found.

    value: J of the network.  dual_value: no other population of its features has a J below it; gap: value minus that.
    network: the particles, in float64; program: their convex program; problem: J.  repopulated: the solution of the
    program, with the network that it ends at; what repopulation alone gains is between value - repopulated.value and
    gap.  unseen: what a search for features that the network lacks found, grown: the solution of the program that has
    them as well; None without a search, and grown None where nothing was found.  table: rows {"quantity", "network",
    "repopulated"} and with a search "grown", of plain values, None where there is no figure.
    """

    value: float
    dual_value: float
    network: ParticleNetwork
    problem: Problem
    program: ConvexProgram
    repopulated: Solution
    unseen: UnseenFeatures | None = None
    grown: Solution | None = None
    table: list[Row] = field(default_factory=list, repr=False)

    @property
    def gap(self) -> float:
        """value - dual_value: by how much J could fall at most with these features."""
        return self.value - self.dual_value

    @property
    def relative_gap(self) -> float:
        """gap / |value|."""
        return self.gap / max(abs(self.value), torch.finfo(torch.float64).tiny)

    def __str__(self) -> str:
        heads = list(self.table[0])
        lines = [heads, *([_shown(row[head]) for head in heads] for row in self.table)]
        sizes = [max(map(len, column)) for column in zip(*lines)]
        rows = ("  ".join([first.ljust(sizes[0]), *map(str.rjust, rest, sizes[1:])]).rstrip() for first, *rest in lines)
        penalty = self.problem.penalty
        said = [
            f"J = {self.value:.8g} and no population of these features below {self.dual_value:.8g}: a gap of "
            f"{self.gap:.3g}, {self.relative_gap:.2%} of J, for penalties source {penalty.source:.3g}, readout "
            f"{penalty.readout:.3g}, input {penalty.input:.3g}",
            f"repopulation alone: {self.repopulated.message}",
            *([] if self.unseen is None else [f"the search: {self.unseen.summary()}"]),
        ]
        return "\n".join([*rows, *said])


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


@checked
@torch.inference_mode(False)
def audit(
    module: nn.Module | ParticleNetwork | torch.export.ExportedProgram,
    images: Tensor,
    targets: Any,
    *,
    loss: Any = "softmax",
    penalty: Penalty | None = None,
    search: bool = False,
    starts: Count = 16,
    count: Count = 8,
    seed: Seed = 0,
    tolerance: Positive = 1e-6,
    max_iterations: Count = 20_000,
    max_seconds: Seconds = math.inf,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Audit:
    """How far a trained network is from what its own features allow, proven by a duality gap.

    The features that the network computes on the images are frozen and their convex program is solved: over all masses
    of these features, all kernels between them that realise them, and all readouts.

    module: as `ParticleNetwork.from_module` takes it, a FiniteCNN or particles.  images (N, C, H, W), as the module
    takes them; targets as `Problem` does.  Everything is computed in float64 on the device of the network.
    penalty: that of J.  None: the strengths that make the network stationary to the scale of its readout, its kernels
    between layers and its first kernels (`implied_penalty`), the most favourable reading of a network that was trained
    with another penalty, or none.  Without any penalty J is the loss, and the program a regression on its features.
    search: look for features that the network lacks, from `starts` starts, add the best `count` of them to the program,
    and bound J over all measures, where the theory has such a bound; unbounded activations of several layers have one
    among networks whose first kernels and amplitudes are no larger than the largest here.
    tolerance, max_iterations, max_seconds, callback: of `solvers.splitting.solve`, for each program; max_seconds
    of the search as well.
    """
    network = _particles(module, images)
    inputs = network.architecture.check_inputs(images, "images").to(network.readout)
    posed = partial(Problem, network.architecture, inputs, targets, loss)
    problem = posed(implied_penalty(posed(), network) if penalty is None else penalty)
    options = {"max_iterations": max_iterations, "max_seconds": max_seconds, "callback": callback}
    _require_memory(problem, network, count if search else 0, starts)
    program = ConvexProgram.freeze(problem, network)
    solved = splitting.solve(program, tolerance, **options)
    unseen, bounded = None, problem
    if search and solved.multipliers is not None:
        bounded, output = posed(_bounded(problem, network, solved.network)), solved.multipliers.output
        try:
            with limits.within(max_seconds):
                unseen = certificates.search_features(
                    bounded, output, solved.network, starts=starts, count=count, seed=seed
                )
        except limits.STOPS as stop:  # what was proven is kept
            unseen = UnseenFeatures(-math.inf, 0, f"the search has ended early ({limits.status(stop)})")
    grown = None
    if unseen is not None and unseen.features is not None:
        wider = ConvexProgram.with_candidates(problem, network, unseen.features)
        grown = splitting.solve(wider, tolerance, **options)
        if bounded.penalty == problem.penalty:  # one problem: what it reaches is no lower than a bound that holds
            unseen = unseen.below(grown.value, problem, grown.network.widths)
    value = float(problem.value(network))
    dual = solved.value - solved.gap
    found = Audit(value, dual, network, problem, program, solved, unseen, grown)
    return replace(found, table=list(_table(found)))


def _particles(module: Any, images: Tensor) -> ParticleNetwork:
    if isinstance(module, FiniteCNN):
        module = module.particles()
    if not isinstance(module, ParticleNetwork):
        held = next((each for each in getattr(module, "parameters", tuple)()), None)
        example = images[:2] if held is None or not isinstance(images, Tensor) else images[:2].to(held)
        exported = isinstance(module, torch.export.ExportedProgram)
        module = ParticleNetwork.from_module(module, None if exported else example)
    return in_float64(module.detach())


def in_float64(network: ParticleNetwork) -> ParticleNetwork:
    """The same function in float64, with masses that sum to one there: in float32 they do not quite."""
    if network.dtype == torch.float64:
        return network
    wide = network.to(dtype=torch.float64)
    sums = [masses.sum() for masses in wide.masses]
    masses = [p / total for p, total in zip(wide.masses, sums)]
    kernels = [wide.kernels[0], *(kernel * total for kernel, total in zip(wide.kernels[1:], sums))]
    return ParticleNetwork(network.architecture, masses, kernels, wide.readout * sums[-1], wide.biases)


def _require_memory(problem: Problem, network: ParticleNetwork, grow: int, starts: int) -> None:
    try:
        memory.require(problem, network.widths, grow=grow, starts=starts)
    except Misuse as error:
        raise Misuse("module", network.widths, f"as widths {error.remedy}") from None


def implied_penalty(problem: Problem, network: ParticleNetwork) -> Penalty:
    """The strengths for which the network gains nothing from scaling its readout, its kernels or its first features.

    Along a scaling of the parameters w of a penalty lambda T(w), T of degree two, J is stationary where
    <d loss / d w, w> + 2 lambda T = 0; of the kernels between layers all are scaled together.  At a stationary point of
    the flow these are the strengths it was trained with.  At least LEAST_SHARE of the mean loss, and so positive also
    where the loss would rise with the scale.  Norm and bounds are those of the problem's own penalty.
    """
    loss, gradients = problem.pulled_back(network)
    slopes = [float((each * slope).sum()) for each, slope in zip(network.tensors(), gradients)]
    depth = network.architecture.depth
    kernels, readout = slopes[depth : 2 * depth], slopes[2 * depth]
    first = kernels[0] + (slopes[2 * depth + 1] if network.biases[0] is not None else 0.0)
    unit = replace(problem.penalty, source=1.0, readout=1.0, input=1.0)
    source, read, input_price = map(float, prices(network, unit))
    pulls = {"source": (sum(kernels[1:]), source), "readout": (readout, read), "input": (first, input_price)}
    least = 2 * LEAST_SHARE * float(loss)
    strengths = {name: max(-pull, least) / (2 * price) for name, (pull, price) in pulls.items() if price > 0}
    return replace(problem.penalty, **strengths)


def _bounded(problem: Problem, *networks: ParticleNetwork) -> Penalty:
    """With those bounds, without which no infimum over measures would be attained, at what networks reach."""
    missing, penalty = problem.missing_bounds(), problem.penalty
    if "input_bound" in missing:
        reached = max(float(input_norms(each.kernels[0], each.biases[0]).max()) for each in networks)
        penalty = replace(penalty, input_bound=reached)
    if "amplitude_bound" in missing:
        penalty = replace(penalty, amplitude_bound=max(_amplitude(each, penalty) for each in networks))
    return penalty


def _amplitude(network: ParticleNetwork, penalty: Penalty) -> float:
    """The largest of any feature behind the first layer, its bias among them."""
    found = 0.0
    for layer in range(1, network.architecture.depth):
        found = max(found, float(network.amplitudes(layer, penalty.norms(network.kernels[layer])).max()))
        bias = network.biases[layer]
        found = found if bias is None else max(found, float(bias.abs().max()))
    return found


def _table(found: Audit) -> Iterator[Row]:
    networks: dict[str, ParticleNetwork] = {"network": found.network, "repopulated": found.repopulated.network}
    if found.unseen is not None and found.grown is not None:
        networks["grown"] = found.grown.network
    elif found.unseen is not None:
        networks["grown"] = found.repopulated.network
    terms = {name: found.problem.terms(each) for name, each in networks.items()}
    yield {"quantity": "J", **{name: float(each.total()) for name, each in terms.items()}}
    for term, text in TERMS.items():
        yield {"quantity": text, **{name: float(getattr(each, term)) for name, each in terms.items()}}
    nothing = dict.fromkeys(networks)
    yield {"quantity": "dual value", **nothing, "network": found.dual_value}
    yield {"quantity": "gap", **nothing, "network": found.gap}
    gains = {name: terms["network"].total() - each.total() for name, each in terms.items() if name != "network"}
    yield {"quantity": "J falls by", **nothing, **{name: float(gain) for name, gain in gains.items()}}
    dead = {name: dead_features(found.problem, each) for name, each in networks.items()}
    for layer in range(found.network.architecture.depth):
        at = f"layer {layer + 1}: "
        yield {
            "quantity": f"{at}features with mass",
            **{n: int((e.masses[layer] > 0).sum()) for n, e in networks.items()},
        }
        yield {"quantity": f"{at}features they are worth", **{n: _worth(e.masses[layer]) for n, e in networks.items()}}
        yield {"quantity": f"{at}largest mass", **{n: float(e.masses[layer].max()) for n, e in networks.items()}}
        yield {"quantity": f"{at}dead features", **{name: int(each[layer].sum()) for name, each in dead.items()}}
        yield {
            "quantity": f"{at}mass on dead features",
            **{name: float(e.masses[layer] @ dead[name][layer].to(e.masses[layer])) for name, e in networks.items()},
        }


def _worth(masses: Tensor) -> float:
    """1 / sum p^2: of so many equal masses."""
    return float(1 / masses.square().sum())


@torch.no_grad()
def dead_features(problem: Problem, network: ParticleNetwork) -> list[Tensor]:
    """(M_l,) bool per layer: which features are zero at every position of every image."""
    largest = [masses.new_zeros(len(masses)) for masses in network.masses]
    for block in problem.blocks(problem.inputs.element_size() * problem.architecture.entries(network.widths)):
        limits.look()
        features = network.responses(problem.inputs[block]).features
        largest = [torch.maximum(a, f.abs().amax((0, 2, 3))) for a, f in zip(largest, features)]
    return [each == 0 for each in largest]
