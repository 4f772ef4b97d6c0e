"""What a network does at points of a plane, exactly: loss, accuracy, and of a ParticleNetwork J and its terms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, zip_longest

import torch
from torch import Tensor

from meanfield import limits
from meanfield.landscape.batch_norm import Statistics
from meanfield.landscape.directions import Plane
from meanfield.landscape.objective import Batch, Objective, hits, said
from meanfield.landscape.passes import ChainPasses, Place, PlainPasses, Point, Prepared, passes
from meanfield.network import ParticleNetwork
from meanfield.penalties import Penalty
from meanfield.precision import full_float32
from meanfield.problem import PRICES, excess, prices
from meanfield.validation import Misuse, instance, one_of

BATCH_NORMS = ("kept", "recomputed")


class Evaluation:
    """Figures at points of a plane.

    objectives: name of a data set -> network, images and loss; all of one network.
    penalty: of a ParticleNetwork.  Adds to the figures J of the first data set, its mean loss plus source, readout and
        input (`problem.prices`), those three (and one's own), and where the penalty has bounds "excess", the
        largest relative excess over them, 0 where they hold: J counts terms only.
    batch_norm: "kept", running statistics as they are at the origin, or "recomputed", at every point those of all
        images of the first data set, which the others take as well (`batch_norm.Statistics`).  Without batch norm the
        two are the same.
    figures: names of the columns: "train loss", "train accuracy", "held out loss", ..., "train J", "source", ...
    evaluations: points at which all figures were computed so far.
    plain: why the network itself makes the passes and not a chain of its layers (`layers`); None where a chain does.

    Losses that are infinite or nan stay so.
    """

    def __init__(
        self,
        plane: Plane,
        objectives: Mapping[str, Objective],
        *,
        penalty: Penalty | None = None,
        batch_norm: str = "kept",
    ) -> None:
        self.plane, self.objectives, self.penalty = plane, dict(objectives), penalty
        one_of(batch_norm, "batch_norm", BATCH_NORMS)
        if not self.objectives:
            raise Misuse("objectives", "nothing", "must name at least one data set")
        first = next(iter(self.objectives.values()))
        if penalty is not None:
            instance(penalty, "penalty", Penalty)
            if not isinstance(first.subject.network, ParticleNetwork):
                raise Misuse("penalty", type(first.subject.network).__name__, "is of a ParticleNetwork, no other has J")
        with torch.no_grad(), full_float32():
            ways = {id(each.subject): passes(each.subject, plane, each.batches[0][0]) for each in objectives.values()}
            self.plain = next((reason for _, reason in ways.values() if reason is not None), None)
            self._sets = {name: _DataSet(each, ways[id(each.subject)][0]) for name, each in self.objectives.items()}
            way, images = ways[id(first.subject)][0], [inputs for inputs, _ in first.batches]
            self._statistics = Statistics(way, images) if batch_norm == "recomputed" else None
        self.figures: Sequence[str] = self._figures()
        self.evaluations = 0

    def _figures(self) -> list[str]:
        found = [f"{name} {figure}" for name in self.objectives for figure in ("loss", "accuracy")]
        if self.penalty is not None:
            bounded = self.penalty.amplitude_bound is not None or self.penalty.input_bound is not None
            named = PRICES if self.penalty.uncertified is not None else PRICES[:-1]
            found += [f"{next(iter(self.objectives))} J", *named, *["excess"] * bounded]
        return found

    @torch.no_grad()
    @full_float32()
    def __call__(self, points: Tensor) -> Tensor:
        """Figures (P, len(figures)), float64 on the CPU, at points (P, 2)."""
        places = self._places(points)
        scores = [each.scores(places) for each in self._sets.values()]
        if self.penalty is not None:
            scores.append(self._terms(self.penalty, places, scores[0][:, 0]))
        self.evaluations += len(places)
        return torch.cat(scores, 1).cpu()

    @torch.no_grad()
    @full_float32()
    def losses(self, points: Tensor, name: str, chosen: Tensor) -> Tensor:
        """Losses (P, n), float64 on the CPU, of single images of a data set: its images `chosen` (n,), by number.

        Misuse where the loss gives only the mean over images.
        """
        one_of(name, "name", self._sets)
        return self._sets[name].losses(self._places(points), chosen).cpu()

    def _places(self, points: Tensor) -> list[Place]:
        """With the statistics there."""
        if not isinstance(points, Tensor) or points.ndim != 2 or points.shape[1] != 2:
            came = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
            raise Misuse("points", came, "must be a tensor (P, 2) of coefficients of the two directions")
        pairs: list[Point] = [(a, b) for a, b in points.tolist()]
        return [(point, {} if self._statistics is None else self._statistics(point)) for point in pairs]

    def _terms(self, penalty: Penalty, places: Sequence[Place], losses: Tensor) -> Tensor:
        rows = []
        for (a, b), _ in places:
            network = next(iter(self.objectives.values())).subject.at(self.plane.at(a, b))
            terms = torch.stack(prices(network, penalty)).double()
            rows.append(torch.cat([terms.sum()[None], terms]))
            if "excess" in self.figures:
                rows[-1] = torch.cat([rows[-1], rows[-1].new_tensor([excess(network, penalty)])])
        found = torch.stack(rows) if rows else losses.new_zeros(0, len(self.figures) - 2 * len(self._sets))
        found[:, 0] += losses
        return found


@dataclass(frozen=True, eq=False)
class _Group:
    """Batches that pass through a network together: images, and targets as the loss is asked for them."""

    images: Sequence[Tensor]
    targets: Sequence[Tensor]
    at_once: int  # images in a piece

    @cached_property
    def labels(self) -> Tensor:
        return torch.cat(list(self.targets))

    def pieces(self) -> Sequence[Tensor]:
        whole = self.images[0] if len(self.images) == 1 else torch.cat(list(self.images))
        return whole.split(self.at_once)


class _DataSet:
    """The images of an objective on their way through a network."""

    def __init__(self, objective: Objective, way: ChainPasses | PlainPasses) -> None:
        self.objective, self.way = objective, way
        self.by_image = self._tells_images_apart()
        self.groups = list(self._groups(objective.batches))
        self.kept = self._kept()

    def _tells_images_apart(self) -> bool:
        """Whether the loss gives a value per image."""
        images, targets = self.objective.batches[0]
        (outputs,) = self.way.outputs(self.way.prepared(images[:2]), [((0.0, 0.0), {})])
        return said(self.objective.loss_of, outputs, targets[:2]).ndim == 1

    def _groups(self, batches: Iterable[Batch]) -> Iterator[_Group]:
        """Batches alike that follow one another, as many as may pass at once."""
        for _, alike in groupby(batches, _kind):
            waiting: list[Batch] = []
            for batch in alike:
                at_once = self.way.at_once(batch[0])
                if waiting and sum(len(images) for images, _ in [*waiting, batch]) > at_once:
                    yield self._group(waiting, at_once)
                    waiting = []
                waiting.append(batch)
            yield self._group(waiting, self.way.at_once(waiting[0][0]))

    def _group(self, batches: Sequence[Batch], at_once: int) -> _Group:
        images, targets = zip(*batches)
        return _Group(images, [torch.cat(targets)] if self.by_image else targets, at_once)

    def _kept(self) -> list[list[Prepared]]:
        """What points share of the first groups, for all calls, of as many as take no more than a block."""
        room, kept = limits.block_bytes(), []
        for group in self.groups:
            prepared = self._prepared(group)
            room -= sum(part.numel() * part.element_size() for piece in prepared for part in piece)
            if room < 0:
                break
            kept.append(prepared)
        return kept

    def _prepared(self, group: _Group) -> list[Prepared]:
        return [self.way.prepared(piece) for piece in group.pieces()]

    def scores(self, places: Sequence[Place]) -> Tensor:
        """Mean loss and accuracy (P, 2), float64."""
        parts = []
        for group, prepared in zip_longest(self.groups, self.kept):
            prepared = self._prepared(group) if prepared is None else prepared
            found = [self._score(outputs, group) for outputs in self._outputs(prepared, places)]
            parts.append(torch.stack(found) if found else torch.zeros(0, 2, dtype=torch.float64))
        return torch.stack(parts).sum(0) / self.objective.count

    def _score(self, outputs: Tensor, group: _Group) -> Tensor:
        """Sum of losses and number of hits, (2,)."""
        parts = outputs.split([len(targets) for targets in group.targets])
        found = [said(self.objective.loss_of, part, each).double() for part, each in zip(parts, group.targets)]
        losses = [each.sum() if each.ndim else each * len(part) for part, each in zip(parts, found)]
        return torch.stack([torch.stack(losses).sum(), hits(outputs, group.labels).sum()])

    def losses(self, places: Sequence[Place], chosen: Tensor) -> Tensor:
        """Of single images, (P, n), float64."""
        if not self.by_image:
            raise Misuse(
                "loss", "a mean", "came back for several images: single ones take one that gives one per image"
            )
        rows = self._rows(chosen)
        starts = torch.tensor([0, *(len(images) for images, _ in self.objective.batches)]).cumsum(0)
        batch_of, parts = torch.searchsorted(starts, rows, right=True) - 1, []
        picked = [(place, (batch_of == place).nonzero().flatten()) for place in batch_of.unique().tolist()]
        for place, columns in picked:
            inside = (rows[columns] - starts[place]).to(self.objective.batches[place][0].device)
            parts.append((self.objective.batches[place][0][inside], self.objective.batches[place][1][inside]))
        found = [self._losses(group, places) for group in self._groups(parts)]
        order = torch.cat([columns for _, columns in picked]).argsort()
        return torch.cat(found, 1)[:, order.to(found[0].device)]

    def _losses(self, group: _Group, places: Sequence[Place]) -> Tensor:
        rows = self._outputs(self._prepared(group), places)
        found = [said(self.objective.loss_of, outputs, group.labels).double() for outputs in rows]
        return torch.stack(found) if found else group.labels.new_zeros(0, len(group.labels), dtype=torch.float64)

    def _rows(self, chosen: Tensor) -> Tensor:
        rows = torch.as_tensor(chosen).cpu()
        if rows.ndim != 1 or rows.is_floating_point() or not len(rows):
            raise Misuse("chosen", f"{rows.dtype} of shape {tuple(rows.shape)}", "must be numbers of images, (n,)")
        if not bool(((rows >= 0) & (rows < self.objective.count)).all()):
            raise Misuse("chosen", rows.tolist(), f"must be at least 0 and less than {self.objective.count}")
        return rows.long()

    def _outputs(self, prepared: Sequence[Prepared], places: Sequence[Place]) -> Iterator[Tensor]:
        """(N, ...) at one place after another."""
        for outputs in zip(*(self.way.outputs(each, places) for each in prepared)):
            limits.look()
            yield outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _kind(batch: Batch) -> tuple[object, ...]:
    images, targets = batch
    return images.shape[1:], images.dtype, targets.shape[1:], targets.dtype
