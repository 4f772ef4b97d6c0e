"""Many images by few of them: control variates.

    mean over all = mean over a subsample + difference

The mean over a random subsample stands for all at every node of its polynomial, at the cost of its share of the images.
The difference is smaller by about the root of their number and has a polynomial of its own, of a low degree, through
full evaluations at few nodes.  Each part has its checks, and the estimate is the sum of theirs: nothing is assumed of
how well the subsample was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from meanfield import validation
from meanfield.landscape.objective import Objective

LEAST = 1000  # images of a subsample: the difference is then a thirtieth of the loss where losses scatter as their mean
SHARE = 10  # of more images, one in so many
PAYS = 4  # times the subsample: of fewer images, full evaluations alone are about as cheap


def size(objectives: Mapping[str, Objective], subsample: int | bool | None) -> int:
    """How many images of each data set are to stand for all; 0 where no set has more.

    subsample: that number; False for none; True for a tenth of the largest set, LEAST at least; None for the same where
    that set has PAYS times as many.
    """
    largest = max(each.count for each in objectives.values())
    if isinstance(subsample, bool) or subsample is None:
        few = max(LEAST, largest // SHARE)
        wanted = few if subsample or (subsample is None and PAYS * few <= largest) else 0
    else:
        wanted = validation.integer(subsample, "subsample")
    return wanted if wanted < largest else 0


def drawn(objectives: Mapping[str, Objective], count: int, generator: torch.Generator) -> dict[str, Objective]:
    """The objectives of `count` random images of each data set, of all where it has no more."""
    return {name: _drawn(each, count, generator) for name, each in objectives.items()}


def images(objectives: Mapping[str, Objective]) -> int:
    """Of all data sets."""
    return sum(each.count for each in objectives.values())


def _drawn(objective: Objective, count: int, generator: torch.Generator) -> Objective:
    if count >= objective.count:
        return objective
    picked = torch.randperm(objective.count, generator=generator)[:count].sort().values
    batches, first = [], 0
    for inputs, targets in objective.batches:
        here = picked[(picked >= first) & (picked < first + len(inputs))] - first
        batches.append((inputs[here.to(inputs.device)], targets[here.to(targets.device)]))
        first += len(inputs)
    if len({(inputs.shape[1:], targets.shape[1:]) for inputs, targets in batches}) > 1:
        return Objective(objective.subject, batches, loss=objective.loss_of)
    return Objective(objective.subject, *(torch.cat(each) for each in zip(*batches)), loss=objective.loss_of)
