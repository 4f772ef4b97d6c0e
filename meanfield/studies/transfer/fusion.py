"""Trained networks made one in every way: how good the outcome is, and how near to their ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.fusion import Channels, fuse, matched, reduce
from meanfield.studies.transfer.judged import divided, scores

IMAGES = 256  # that pass through a network at a time


class Made(NamedTuple):
    """A network, by which way, and whether its variances were repaired.

    kept: of a matching at equal widths, the largest difference that it makes to a parent, in units of the largest
        output.
    """

    way: str
    network: nn.Module
    repaired: bool = False
    kept: float | None = None


def fusion(cell: Cell, store: str) -> list[Row]:
    """A row per way: scores, error and largest difference to the ensemble on held-out images.

    cell: networks (the parents; what is made of them has the first one's widths, where it is not larger), seed (of
        random channels).
    """
    classifiers = [Classifier.from_dict(each) for each in cell["networks"]]
    parents = [each.at(each.epochs, store) for each in classifiers]
    division = divided(classifiers[0])
    images, held_out = division.training[0], division.held_out[0]
    wanted = outputs(fuse(parents[0], parents[1], images, "ensemble", others=parents[2:]), held_out)
    rows = []
    for made in every(parents, images, cell["seed"]):
        row = {**cell["names"], "way": made.way, "repaired": made.repaired, **scores(made.network, division)}
        found = outputs(made.network, held_out)
        row |= {"error": error(found, wanted), "difference": float((found - wanted).abs().max())}
        rows.append(row if made.kept is None else {**row, "kept": made.kept})
    return rows


def every(parents: Sequence[nn.Module], images: Tensor, seed: int) -> Iterator[Made]:
    """The parents, and what is made of them by every way that their widths allow."""
    first, second, *others = parents
    yield from (Made(f"parent {number}", parent) for number, parent in enumerate(parents, start=1))
    if len({Channels.of(each).widths for each in parents}) == 1:
        yield from _averages("average", parents, images, None)
        for way in ("weights", "activations"):
            yield from _matched(way, parents, images)
    yield from _matched("transport", parents, images)
    yield Made("ensemble", fuse(first, second, images, "ensemble", others=others))
    union = fuse(first, second, images, "union", others=others)
    yield Made("union", union)
    yield Made("reduced union", reduce(union, first, images))
    yield Made("random channels", reduce(union, first, images, "random", seed=seed))


def _matched(way: str, parents: Sequence[nn.Module], images: Tensor) -> Iterator[Made]:
    """Plain and repaired averages after one matching."""
    first, *rest = parents
    moved = [cast(nn.Module, matched(first, each, images, way)) for each in rest]  # modules come back as modules
    alike = all(Channels.of(each).widths == Channels.of(first).widths for each in rest)
    kept = max(_difference(new, old, images) for new, old in zip(moved, rest)) if alike else None
    yield from _averages(way, [first, *moved], images, kept)


def _averages(way: str, networks: Sequence[nn.Module], images: Tensor, kept: float | None) -> Iterator[Made]:
    first, second, *others = networks
    for repair in (False, True):
        yield Made(way, fuse(first, second, images, "average", others=others, repair=repair), repair, kept)


def _difference(network: nn.Module, other: nn.Module, images: Tensor) -> float:
    wanted = outputs(other, images)
    return float((outputs(network, images) - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor) -> Tensor:
    """(N, K), images in blocks."""
    return torch.cat([network(block) for block in images.split(IMAGES)])


def error(found: Tensor, wanted: Tensor) -> float:
    """Squared difference of outputs (N, K), in units of the squares of those wanted around their means over images."""
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
