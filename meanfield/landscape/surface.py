"""The loss on a plane: exactly where it is asked, or everywhere within a tolerance from few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from meanfield import limits, validation
from meanfield.landscape import subsample as few
from meanfield.landscape.directions import Plane
from meanfield.landscape.evaluation import BATCH_NORMS, Evaluation
from meanfield.landscape.kept import Keeper, Kept
from meanfield.landscape.nested import Checks, Nested
from meanfield.landscape.objective import Loss, Objective, data_sets
from meanfield.penalties import Penalty
from meanfield.signatures import Positive, Seed, checked
from meanfield.storage.states import DIGITS, StateFile
from meanfield.storage.tensors import digest
from meanfield.subject import Network, Subject, described
from meanfield.validation import Misuse

DEGREES = (8, 8)  # of the first polynomial
LOW = (4, 4)  # of that of a difference
ROUNDING = 64  # units in the last place of the largest value, which a polynomial may add to it: none is asked for less
BLOCK_IMAGES = 2**16  # images times points between two looks at the limits
STATUS_TEXTS = {
    "met": "the estimated largest error is within the tolerance",
    "not met": "the estimated largest error is above the tolerance, and no further polynomial was allowed",
    "exact": "values are evaluated where they are asked",
    "not finite": "a loss is infinite or nan somewhere, so that no polynomial goes through it; only points that were "
    "evaluated have values",
    "interrupted": "stopped by the user; the last whole polynomial is kept",
    "max_seconds": "stopped at the limit of time; the last whole polynomial is kept",
    "out_of_memory": "stopped for want of memory; the last whole polynomial is kept",
}


class Surface:
    """Figures on [-extent, extent]^2 of a plane, as `surface` returns them.

    figures: their names, the loss of `images` first.  status: a key of STATUS_TEXTS, "exact" without a tolerance.
    With a tolerance nothing more is evaluated, whatever is asked; without one what is asked and not known yet is.
    """

    def __init__(self, extent: float, tolerance: float | None, full: Kept, part: Kept | None, share: float) -> None:
        self.extent, self.tolerance, self.figures = extent, tolerance, full.columns
        self.status = "exact" if tolerance is None else "not met"
        self._full, self._part, self._share = full, part, share
        self._polynomials: list[Nested] = []

    @property
    def message(self) -> str:
        """What the status means, in a sentence."""
        return STATUS_TEXTS[self.status]

    def axis(self, n: int) -> Tensor:
        """(n,): the coordinates of a grid, equally far apart, both ends included; 0 is among them where n is odd."""
        count = validation.integer(n, "n")
        steps = torch.arange(count, dtype=torch.float64)
        return (2 * steps - (count - 1)) / max(count - 1, 1) * self.extent

    def grid(self, n: int | tuple[int, int], figure: str | None = None) -> Tensor:
        """(n, n), or (n, m) of a pair: a figure, the loss by default, at axis(n) along plane.first (the tensor's first
        axis) and axis(m) along plane.second; float64.  An even n leaves the origin out.
        """
        first, second = (self.axis(count) for count in validation.pair(n, "n", 1))
        column = self._column(figure)
        if self._polynomials and self.status != "not finite":
            places = (first / self.extent, second / self.extent)
            return torch.stack([each.grid(*places) for each in self._polynomials]).sum(0)[..., column]
        return self._evaluated(torch.cartesian_prod(first, second))[:, column].unflatten(0, (len(first), len(second)))

    def at(self, points: Tensor, figure: str | None = None) -> Tensor:
        """(P,): a figure, the loss by default, at points (P, 2) of the square; float64."""
        places, column = self._places(points), self._column(figure)
        if self._polynomials and self.status != "not finite":
            return self._predicted(places / self.extent)[:, column]
        return self._evaluated(places)[:, column]

    @property
    def error(self) -> float:
        """The estimated largest error of the loss over the square, in units of the loss; 0 where exact."""
        return self.errors[self.figures[0]]

    @property
    def errors(self) -> dict[str, float]:
        """That of every figure; inf where a loss is not finite.  The tolerance is for losses and J alone: accuracy
        jumps where a polynomial does not.
        """
        if self._polynomials and self.status != "not finite":
            return dict(zip(self.figures, self._estimates.sum(0).tolist()))
        return dict.fromkeys(self.figures, 0.0 if self.status == "exact" else math.inf)

    @property
    def range(self) -> float:
        """largest - least: what the tolerance is a share of; nan where nothing is evaluated yet."""
        return self.largest - self.least

    @property
    def least(self) -> float:
        """The least loss of the points that were evaluated on all images."""
        return float(self._losses.min()) if len(self._losses) else math.nan

    @property
    def largest(self) -> float:
        """The largest loss of these points."""
        return float(self._losses.max()) if len(self._losses) else math.nan

    @property
    def _losses(self) -> Tensor:
        return self._full.answers[:, 0]

    @property
    def evaluations(self) -> float:
        """Points it stands on, evaluated or found in the state; one on some of the images counts as their share."""
        return len(self._full) + (0 if self._part is None else self._share * len(self._part))

    @property
    def checks(self) -> Checks:
        """Points (C, 2) that were held against evaluations on all images, what the surface says of the loss there and
        what it is, (C,); none where exact.
        """
        if not self._polynomials:
            return Checks(torch.empty(0, 2), torch.empty(0), torch.empty(0))
        places = self._polynomials[-1].checks.points
        points = places * self.extent
        return Checks(points, self._predicted(places)[:, 0], self._full(points)[:, 0])

    def __repr__(self) -> str:
        return f"Surface({self.status}, error {self.error:.2g}, {self.evaluations:g} evaluations)"

    def watch(self, file: StateFile | None, callback: Callable[[dict[str, Any]], None] | None) -> None:
        """Keep what is evaluated in a file, take what is there, and tell of it."""
        kept = {"all": self._full} | ({} if self._part is None else {"some": self._part})
        keeper = None if file is None else Keeper(file, kept)

        def after(end: bool) -> None:
            if keeper is not None:
                keeper.glance(end)
            if callback is not None:  # last: it may raise KeyboardInterrupt
                callback({"evaluations": self.evaluations, "error": self.error})

        for each in kept.values():
            each.after = after

    def refine(self, generator: torch.Generator, most: float, rounding: float) -> None:
        """Take polynomials until they keep the tolerance, or need more than so many evaluations.

        rounding: of a loss of 1, below which nothing is asked.
        """
        try:
            self._polynomials = self._first(generator)
            self.status = self._refined(most, rounding)
        except limits.STOPS as stop:
            status = limits.status(stop)  # raises what is a fault
            if not self._polynomials:
                raise
            self.status = status

    def _first(self, generator: torch.Generator) -> list[Nested]:
        """Of all images; or of some, and of what all images differ by."""
        full = partial(self._scaled, self._full)
        if self._part is None:
            return [Nested(full, DEGREES, self._judged, generator)]
        part = partial(self._scaled, self._part)
        return [
            Nested(part, DEGREES, self._judged, generator, self._share),
            Nested(lambda places: full(places) - part(places), LOW, self._judged, generator, 1 + self._share),
        ]

    def _refined(self, most: float, rounding: float) -> str:
        while all(each.finite for each in self._polynomials):
            goal, missed = self._goal(rounding), self._estimates[:, self._judged]
            if bool((missed.sum(0) <= goal).all()):
                return "met"
            worst = self._polynomials[int((missed / goal.clamp_min(math.ulp(0.0))).amax(1).argmax())]
            degrees = worst.ahead(goal)
            if degrees is None or self.evaluations + worst.cost(degrees) > most:
                return "not met"
            worst.climb(degrees)
        return "not finite"

    def _goal(self, rounding: float) -> Tensor:
        """What the estimate of each figure that is judged must not exceed."""
        values = self._full.answers[:, self._judged]
        ranges, largest = values.amax(0) - values.amin(0), values.abs().amax(0)
        return torch.maximum((self.tolerance or 0.0) * ranges, rounding * largest)

    @property
    def _judged(self) -> list[int]:
        """The columns for which the tolerance is kept: losses and J."""
        return [index for index, figure in enumerate(self.figures) if figure.endswith((" loss", " J"))]

    @property
    def _estimates(self) -> Tensor:
        """(polynomials, F)"""
        return torch.stack([each.errors for each in self._polynomials])

    def _predicted(self, places: Tensor) -> Tensor:
        return torch.stack([each.at(places) for each in self._polynomials]).sum(0)

    def _scaled(self, kept: Kept, places: Tensor) -> Tensor:
        """The values that are kept at places of [-1, 1]^2."""
        return kept(places * self.extent)

    def _evaluated(self, points: Tensor) -> Tensor:
        """Exact values; nan at points without one where nothing more is evaluated."""
        return self._full(points) if self.status == "exact" else self._full.known(points)

    def _column(self, figure: str | None) -> int:
        return 0 if figure is None else self.figures.index(validation.one_of(figure, "figure", self.figures))

    def _places(self, points: Any) -> Tensor:
        places = torch.as_tensor(points, dtype=torch.float64, device="cpu")
        if places.ndim != 2 or places.shape[1] != 2:
            raise Misuse("points", tuple(places.shape), "is the shape: must be (P, 2)")
        if not bool((places.abs() <= self.extent * (1 + 1e-6)).all()):  # float32 rounds to more
            raise Misuse("points", float(places.abs().max()), f"lies outside: at most {self.extent:g} in size")
        return places


@checked
def surface(
    network: Network,
    plane: Plane,
    images: Any,
    targets: Any = None,
    tolerance: Positive | None = 0.01,
    *,
    extent: Positive = 1.0,
    loss: Loss | None = None,
    penalty: Penalty | None = None,
    held_out: Any = None,
    batch_norm: Annotated[str, validation.choice(BATCH_NORMS)] = "kept",
    subsample: int | bool | None = None,
    max_evaluations: Positive | None = None,
    seed: Seed = 0,
    state: str | Path | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Surface:
    """Loss and accuracy of a network on [-extent, extent]^2 of a plane; of a ParticleNetwork with `penalty` J and its
    terms as well.

    images, targets, loss: as `Objective` takes them; the cross-entropy by default.
    tolerance: the share of its range (largest minus least value) that the error of every loss, and of J, may have
        anywhere on the square.  The figures are then polynomials through values at nested Chebyshev points, 9x9, 17x17
        or 33x33, checked at further points (`nested`), and a grid of any size costs the same evaluations.  The error is
        an estimate; where it is above the tolerance, the status says "not met".  Terms of J are interpolated as the
        losses are; so is accuracy, which is not smooth: it has its estimate in `errors` and no promise.
        None: values are evaluated where they are asked, once each.
    held_out: further images: (images, targets), an iterable of batches, or either by name.
    batch_norm: "kept", or "recomputed" from `images` at every point.
    subsample: how many images stand for all at most nodes (`subsample`), drawn by `seed`; True for a number that suits,
        False for none, None for either as it pays.
    max_evaluations: no polynomial but the first, which takes 107, is begun that would need more.
    seed: of the checks.
    state: file (.safetensors) that keeps the evaluated values, about once a second.  The same call goes on from it
        after a kill and ends with the same bits, on the same machine and as many threads; it stays where the surface
        is finished, and serves another tolerance, extent or grid as well.  Refused (Misuse) where it is damaged or of
        other arguments or data.
    callback: called after every block of points with a dict: evaluations, and error as it is known so far.

    The network is not touched.  An interrupt or a limit (`limits`) ends the work with the last whole polynomial, and
    a status; before the first one it passes on.
    """
    subject = Subject(network)
    _check_plane(plane, subject)
    data = data_sets(images, targets, held_out)
    objectives = {name: Objective(subject, each, loss=loss) for name, each in data.items()}
    generator = torch.Generator().manual_seed(seed)
    count = few.size(objectives, False if tolerance is None else subsample)
    smaller = few.drawn(objectives, count, generator) if count else None

    def kept(of: Mapping[str, Objective]) -> Kept:
        evaluation = Evaluation(plane, of, penalty=penalty, batch_norm=batch_norm)
        return Kept(evaluation, evaluation.figures, max(1, BLOCK_IMAGES // few.images(of)))

    share = few.images(smaller) / few.images(objectives) if smaller else 0.0
    found = Surface(extent, tolerance, kept(objectives), kept(smaller) if smaller else None, share)
    made = {"penalty": None if penalty is None or state is None else penalty.settings(), "batch_norm": batch_norm}
    found.watch(
        None if state is None else StateFile(state, _settings(plane, subject, objectives, smaller, made)), callback
    )
    if tolerance is not None:
        dtype = next(iter(subject.parameters.values())).dtype
        found.refine(generator, max_evaluations or math.inf, ROUNDING * torch.finfo(dtype).eps)
    return found


def _check_plane(plane: Plane, subject: Subject) -> None:
    for name in {**subject.parameters, **plane.origin}:
        here, there = (described(each.get(name)) for each in (subject.parameters, plane.origin))
        if here != there:
            raise Misuse("plane", name, f"is {there} there and {here} in the network: give a plane of its own")


def _settings(
    plane: Plane,
    subject: Subject,
    objectives: Mapping[str, Objective],
    smaller: Mapping[str, Objective] | None,
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """What the values at a point depend on; not on tolerance, extent or seed."""
    loss = next(iter(objectives.values())).loss_of
    return {
        "images": {name: each.count for name, each in objectives.items()},
        **made,
        "loss": f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', type(loss).__qualname__)}",
        "network": f"{subject.network!r}",
        "dtype": str(next(iter(subject.parameters.values())).dtype).removeprefix("torch."),
        "device": next(iter(subject.parameters.values())).device.type,
        "plane": _digest(each[name] for each in (plane.origin, plane.first, plane.second) for name in plane.origin),
        "buffers": _digest(subject.buffers.values()),
        "data": {name: _of_data(each) for name, each in objectives.items()},
        "subsample": None if smaller is None else {name: _of_data(each) for name, each in smaller.items()},
    }


def _of_data(objective: Objective) -> str:
    return _digest(tensor for batch in objective.batches for tensor in batch)


def _digest(tensors: Iterable[Tensor]) -> str:
    return digest(tensors)[:DIGITS]
