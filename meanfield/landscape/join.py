"""Two networks joined by a path: how far loss, accuracy and J along it lie from the chord between its ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meanfield.finite.statistics import norms
from meanfield.landscape.displacement import RIDGE
from meanfield.landscape.objective import Batch, Loss, Objective, data_sets, scores
from meanfield.landscape.paths import WAYS, Path, path
from meanfield.losses import Loss as ConvexLoss
from meanfield.network import ParticleNetwork
from meanfield.penalties import Penalty
from meanfield.problem import FEASIBLE, PRICES, excess, prices
from meanfield.signatures import Nonnegative, checked
from meanfield.subject import Network, Subject
from meanfield.validation import Misuse, choice, integer, number

CONVEX = (functional.cross_entropy, functional.mse_loss, functional.l1_loss, functional.huber_loss)


@dataclass(frozen=True, eq=False)
class Joined:
    """A path between two networks and what it passes through.

    times: (T,), from 0 to 1.  figures: name -> values (T,), float64 on the CPU: "train loss", "train accuracy", the
        same of every other data set, and with a penalty "train J", ..., "source", "readout" and "input".
    warnings: what to know before a barrier is believed.
    """

    how: str
    times: Tensor
    figures: Mapping[str, Tensor]
    path: Path = field(repr=False)
    warnings: tuple[str, ...] = ()

    def at(self, t: float) -> Network:
        """The network at a time in [0, 1], in evaluation mode: a ParticleNetwork or a module."""
        return self.path(_time(t, "t"))

    def networks(self) -> Iterator[Network]:
        """Those at `times`, one after the other."""
        return map(self.path, self.times.tolist())

    def chord(self, figure: str) -> Tensor:
        """(1 - t) f(0) + t f(1), (T,)."""
        values = self.figures[figure]
        return (1 - self.times) * values[0] + self.times * values[-1]

    def rise(self, figure: str) -> Tensor:
        """Above the chord, (T,); of accuracies below it: what is positive is bad."""
        values, chord = self.figures[figure], self.chord(figure)
        return chord - values if figure.endswith("accuracy") else values - chord

    @property
    def barrier(self) -> dict[str, float]:
        """The largest rise of every figure over `times`, 0 where it never leaves the chord upward."""
        return {figure: float(self.rise(figure).max()) for figure in self.figures}

    @property
    def relative(self) -> dict[str, float]:
        """The largest rise of every figure in units of the chord below it."""
        return {figure: float((self.rise(figure) / self.chord(figure)).max()) for figure in self.figures}


@checked
def join(
    a: Network,
    b: Network,
    images: Any,
    targets: Any = None,
    how: Annotated[str, choice(WAYS)] = "weights",
    *,
    loss: Callable[..., Tensor] | None = None,
    penalty: Penalty | None = None,
    held_out: Any = None,
    times: Any = 11,
    ridge: Nonnegative = RIDGE,
) -> Joined:
    """The path from network a (t = 0) to network b (t = 1), and loss and accuracy along it.

    a, b: modules, or ParticleNetworks.  images, targets, loss: as for `Objective`; a loss of a meanfield Problem is
        `problem.loss`.
    how: "weights": the straight line of parameters.
        "matched": the same after the channels of b were put in the order whose features, on the images, are closest to
        a's, layer by layer; b's function stays.
        "displacement": features move to their partners in an optimal transport plan, and later kernels are fitted; see
        `landscape.displacement`.  Widths may differ.
        "mixture": both networks side by side.  Its output is the straight line of outputs: a loss that is convex in
        these has no barrier, nor has J (docs/theory.md, section 6).  It has the parameters of both.
        Weights and mixture join all modules that are alike, and any with outputs of one shape.  Matched takes those
        whose channels `fusion.Channels` describes, with batch norm and the blocks of `finite.residual`; displacement
        of these the chains without batch norm.  Both take a FiniteCNN as `finite.sequential` has it.
    penalty: of ParticleNetworks; then also J (+inf where a bound is broken) and its terms.
    held_out: (images, targets) or an iterable of batches: a second data set, which no path sees.
    times: how many, evenly spaced with both ends, or the times themselves; ends are added where they are missing.
    ridge: of displacement: what keeps fitted kernels near the line of the matched ones.

    Batch norm: running statistics belong to neither network in between.  Along a line of parameters those of all images
    are taken at every time, at the ends too (`finite.statistics`); a mixture keeps each network's own.
    """
    first, second = Subject(a, "a").network, Subject(b, "b").network
    _require_one_kind(first, second, penalty)
    data = data_sets(images, targets, held_out)
    route = path(first, second, how, [inputs for inputs, _ in data["train"]], ridge)
    moments = _times(times)
    rows = [_figures(route(t), data, loss, penalty) for t in moments]
    figures = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    moments = torch.tensor(moments, dtype=torch.float64)
    return Joined(how, moments, figures, route, _warnings(first, how, loss))


def _figures(
    network: Network, data: Mapping[str, list[Batch]], loss: Loss | None, penalty: Penalty | None
) -> dict[str, float]:
    subject = Subject(network)
    found = scores({name: Objective(subject, each, loss=loss) for name, each in data.items()}, subject.parameters)
    if penalty is None or not isinstance(network, ParticleNetwork):
        return found
    terms = dict(zip(PRICES, map(float, prices(network, penalty))))
    broken = 0.0 if excess(network, penalty) <= FEASIBLE[network.dtype] else math.inf
    values = {f"{name} J": found[f"{name} loss"] + sum(terms.values()) + broken for name in data}
    return found | values | terms


def _warnings(network: Network, how: str, loss: Loss | None) -> tuple[str, ...]:
    found = []
    if how == "mixture" and not _is_convex(loss):
        found.append("the loss is the caller's: a mixture has no barrier if it is convex in the outputs, not otherwise")
    if how in ("weights", "matched") and isinstance(network, nn.Module) and norms(network):
        names = ", ".join(norms(network))
        found.append(
            f"batch norm: {names}.  Running statistics are those of the images at every time, ends included, where "
            "they replace the networks' own"
        )
    return tuple(found)


def _is_convex(loss: Loss | None) -> bool:
    return loss is None or loss in CONVEX or isinstance(getattr(loss, "__self__", loss), ConvexLoss)


def _require_one_kind(first: Network, second: Network, penalty: Penalty | None) -> None:
    particles = [isinstance(each, ParticleNetwork) for each in (first, second)]
    if particles[0] != particles[1]:
        raise Misuse("b", type(second).__name__, f"joins none of another kind: a is a {type(first).__name__}")
    if penalty is not None and not particles[0]:
        raise Misuse("penalty", penalty, "is of ParticleNetworks, and a and b are modules")
    ours, theirs = (getattr(each, "architecture", None) if particles[0] else None for each in (first, second))
    if ours != theirs:
        raise Misuse("b", theirs, "is its architecture, and must be that of a")


def _times(times: Any) -> list[float]:
    if not isinstance(times, (Sequence, Tensor)):
        return torch.linspace(0, 1, integer(times, "times", minimum=2), dtype=torch.float64).tolist()
    given = [_time(t, "times") for t in times]
    return sorted({0.0, *given, 1.0})


def _time(t: Any, argument: str) -> float:
    if not 0 <= number(t, argument) <= 1:
        raise Misuse(argument, t, "must lie between 0 and 1")
    return float(t)
