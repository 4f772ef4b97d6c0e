"""How a graft differs from the upper network, layer by layer from the connection up."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from meanfield.grafting.cut import Below, find, recorded
from meanfield.grafting.graft import Graft, Inputs, batches_of, frozen
from meanfield.grafting.least_squares import CONSTANT

KINDS = (nn.Conv2d, nn.Linear)


class Discrepancy:
    """Running sums of |g' - g|^2 and |g - mean g|^2, means by channel (axis 1 of maps, the last one otherwise), in
    float64.
    """

    def __init__(self) -> None:
        self._count, self._missed, self._size = 0, 0.0, 0.0
        self._mean: Tensor | None = None
        self._spread: Tensor | None = None

    def add(self, found: Tensor, wanted: Tensor) -> None:
        channels = 1 if wanted.ndim == 4 else -1
        wanted_, found_ = (each.double().movedim(channels, 0).flatten(1) for each in (wanted, found))
        self._missed += float((found_ - wanted_).square().sum())
        self._size += float(wanted_.square().sum())
        count, mean = wanted_.shape[1], wanted_.mean(1)
        spread = (wanted_ - mean[:, None]).square().sum(1)
        if self._mean is None or self._spread is None:
            self._count, self._mean, self._spread = count, mean, spread
            return
        total, shift = self._count + count, mean - self._mean  # Chan, Golub & LeVeque 1983: pieces without cancellation
        self._spread = self._spread + spread + shift.square() * self._count * count / total
        self._mean = self._mean + shift * count / total
        self._count = total

    @property
    def relative(self) -> float:
        """Their ratio; nan where g is constant."""
        total = 0.0 if self._spread is None else float(self._spread.sum())
        return self._missed / total if total > CONSTANT**2 * self._size else math.nan


@torch.no_grad()
def layer_errors(graft: Graft, upper: nn.Module, inputs: Inputs) -> dict[str, float]:
    """|g' - g|^2 / |g - mean g|^2 over inputs for the connection (under the name `graft.layer`) and every Conv2d and
    Linear after it.

    g are pre-activations of `upper`, the network that was grafted on, g' those of the graft; inputs as for `graft`,
    held out or not.  The order is that of the computation; means are taken by channel, sums over all of them.  A module
    that is called more than once counts with its last call, and not at all if one of its calls is below the connection.
    """
    upper, grafted = frozen(upper, "upper"), copy.deepcopy(graft.network)  # hooks go to copies, which nobody else calls
    find(upper, graft.layer, "graft.layer")
    target = Below(upper, graft.layer)
    sums: dict[str, Discrepancy] = {}
    for batch in batches_of(inputs):
        with recorded(target.network, KINDS) as below:
            entered = target(batch)
        known = set(below)
        with recorded(upper, KINDS) as wanted:
            upper(batch.clone())
        with recorded(grafted.above.network, KINDS) as found:
            joined = grafted.connection(grafted.below(batch)).clone()
            grafted.above(joined.clone(), batch)
        goal = entered if grafted.above.entering else wanted[graft.layer]
        later = [name for name in wanted if name not in known and name != graft.layer]
        pairs = {graft.layer: (joined, goal)} | {name: (found[name], wanted[name]) for name in later}
        for name, (ours, theirs) in pairs.items():
            sums.setdefault(name, Discrepancy()).add(ours, theirs)
    if not sums:
        raise ValueError("inputs are empty; errors need at least one input")
    return {name: each.relative for name, each in sums.items()}
