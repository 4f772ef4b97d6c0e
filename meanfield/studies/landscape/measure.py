"""What is measured of trained classifiers: their losses, surfaces around them, sharpness, slices, trajectories.

Each measurement is a function of a cell (see `meanfield.bench.sweep`) and of the store of trained networks.  A cell has
`networks` (fields of a Classifier each), `epochs` (of each, in its order) and `names`, which its rows repeat.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meanfield import landscape
from meanfield.bench import provenance
from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import evaluate, recipes
from meanfield.landscape import curvature
from meanfield.landscape.directions import Plane, generator_of
from meanfield.landscape.hessian import Hessian, named
from meanfield.landscape.objective import Loss, Objective
from meanfield.penalties import Penalty
from meanfield.rates import Interval
from meanfield.storage import files
from meanfield.storage.tensors import TENSORS
from meanfield.studies.landscape.equal_loss import at_loss
from meanfield.subject import Subject, moved
from meanfield.validation import Misuse

PLANES = {"random": 1, "eigen": 1, "line": 2, "triangle": 3, "pca": 3}  # -> networks that it needs at least
SHARPNESS = (
    "top",
    "smallest",
    "trace",
    "gauss_newton",
    "element_trace",
    "rise",
    "largest_rise",
    "adaptive",
    "fisher_rao",
)


def train(cell: Cell, store: str) -> list[Row]:
    """Train one classifier into the store: a row per checkpoint, losses and accuracies in evaluation mode."""
    classifier = Classifier.from_dict(cell)
    if any(classifier.checkpoints):
        classifier.at(classifier.checkpoints[-1], store)
    kept = ("network", "activation", "loss", "penalty", "strength", "labels", "width", "seed")
    named_so = {name: getattr(classifier, name) for name in kept}
    return [
        {**named_so, "epoch": epoch, **_scores(classifier, classifier.at(epoch, store))}
        for epoch in classifier.checkpoints
    ]


def surface(cell: Cell, store: str) -> list[Row]:
    """One surface: a row with its figures, and its values on the grid under "values", name of a figure -> lists.

    cell: plane, grid, tolerance (None: exact), evaluations (at most; None: as many as it takes), normalise, batch_norm,
    seed, extent.
    """
    first = Classifier.from_dict(cell["networks"][0])
    networks = [Classifier.from_dict(each).at(epoch, store) for each, epoch in zip(cell["networks"], cell["epochs"])]
    images, labels = first.images(), first.training_labels()
    loss, held_out = loss_of(first), (images.held_out, images.held_out_labels)
    plane = planes(networks, cell, images.inputs, labels, loss)
    return [{**cell["names"], **around(networks[-1], plane, images.inputs, labels, held_out, loss, cell, store)}]


def around(
    network: Any,
    plane: Plane,
    inputs: Tensor,
    targets: Tensor,
    held_out: tuple[Tensor, Tensor] | None,
    loss: Loss | None,
    cell: Cell,
    store: str,
    penalty: Penalty | None = None,
) -> Row:
    """The row of one surface.  What is evaluated is kept in the store until it is finished."""
    made_by = json.dumps({"cell": cell, "library": provenance.library()}, sort_keys=True)
    state = Path(store) / f"{files.checksum(made_by)[:24]}.surface{TENSORS}"
    state.parent.mkdir(parents=True, exist_ok=True)
    work = partial(
        landscape.surface,
        network,
        plane,
        inputs,
        targets,
        cell["tolerance"],
        extent=cell["extent"],
        loss=loss,
        penalty=penalty,
        held_out=held_out,
        batch_norm=cell["batch_norm"],
        max_evaluations=cell["evaluations"],
        seed=cell["seed"],
        state=state,
    )
    try:
        found = work()
    except Misuse as error:
        if error.argument != "state":
            raise
        warnings.warn(f"{state} {error.remedy}: the surface is evaluated anew", stacklevel=2)
        state.unlink()
        found = work()
    row = drawn(found, plane, cell["grid"])
    if found.status == "interrupted":
        raise KeyboardInterrupt
    state.unlink(missing_ok=True)
    return row


def planes(networks: list[Any], cell: Cell, inputs: Tensor, labels: Tensor, loss: Loss | None) -> Plane:
    """The plane of a cell through so many networks; of checkpoints the last one is the origin."""
    kind, seed = cell["plane"], cell["seed"]
    if kind == "random":
        return landscape.plane(networks[0], seed, cell["normalise"])
    if kind == "eigen":
        return landscape.eigenplane(networks[0], inputs, labels, loss=loss, seed=seed)
    if kind == "line":
        return landscape.line(networks[0], networks[1], seed)
    return landscape.triangle(*networks[:3]) if kind == "triangle" else landscape.principal(networks)


def drawn(found: Any, plane: Plane, grid: int) -> Row:
    """The row of a surface: plain values."""
    values = {figure: found.grid(grid, figure).tolist() for figure in found.figures}  # evaluated now where exact
    points, _, exact = found.checks
    return {
        "plane": plane.kind,
        "normalise": plane.normalise,
        "error": found.error,
        "errors": found.errors,
        "status": found.status,
        "evaluations": found.evaluations,
        "checks": len(points),
        "least": found.least,
        "largest": found.largest,
        "warnings": list(plane.warnings),
        "marks": {name: list(place) for name, place in plane.marks.items()},
        "axis": found.axis(grid).tolist(),
        "values": values,
        "check_points": [[*point, value] for point, value in zip(points.tolist(), exact.tolist())],
    }


def sharpness(cell: Cell, store: str) -> list[Row]:
    """Every measure of `SHARPNESS` with its interval, and losses.

    cell: count (of training images, the first so many), products, rises (directions), steps, tolerance, seed, and at
    equal training loss target.  One that never has that loss gives a row that says so.
    """
    classifier = Classifier.from_dict(cell["networks"][0])
    if "target" in cell:
        passed = at_loss(classifier, store, cell["target"])
        if passed is None:
            return [{**cell["names"], "target": cell["target"], "reached": False}]
        network, epoch = passed.network, passed.epoch
        reached: Row = {"target": cell["target"], "reached": True}
    else:
        network, epoch, reached = classifier.at(cell["epochs"][0], store), cell["epochs"][0], {}
    count, images = cell["count"], classifier.images()
    found = landscape.sharpness(
        network,
        images.inputs[:count],
        classifier.training_labels()[:count],
        loss=loss_of(classifier),
        seed=cell["seed"],
        products=cell["products"],
        directions=cell["rises"],
        steps=cell["steps"],
        tolerance=cell["tolerance"],
    )
    figures = {name: getattr(found, name) for name in SHARPNESS}
    rows = {**cell["names"], **reached, "epoch": epoch, **_scores(classifier, network), "parameters": found.size}
    return [{**rows, **_ends(figures), "warnings": list(found.warnings)}]


def slices(cell: Cell, store: str) -> list[Row]:
    """The loss along lines of length one: a row per direction with its curvature d^T H d and "values" at "axis".

    Random ones, uniform on the sphere (cell: directions), and the eigenvectors of the largest and smallest eigenvalue.
    """
    classifier = Classifier.from_dict(cell["networks"][0])
    network, images = classifier.at(cell["epochs"][0], store), classifier.images()
    objective = Objective(Subject(network), images.inputs, classifier.training_labels(), loss_of(classifier))
    origin, generator = objective.subject.parameters, generator_of(cell["seed"])
    hessian = Hessian(objective, origin)
    extremes = curvature.extremes(hessian, generator, 1, 1, tolerance=cell["tolerance"], products=cell["steps"])
    trace = curvature.trace(hessian, generator, products=cell["products"])
    rows, axis = [], torch.linspace(-cell["reach"], cell["reach"], cell["grid"], dtype=torch.float64)
    lines = [("random", _unit(generator, hessian.size)) for _ in range(cell["directions"])]
    lines += [("largest eigenvalue", extremes.largest[0].vector), ("smallest eigenvalue", extremes.smallest[0].vector)]
    for kind, vector in lines:
        direction = named(vector.to(hessian.like), origin)
        values = [float(objective(moved(origin, direction, t))) for t in axis.tolist()]
        bend = float(vector.double() @ hessian(vector.to(hessian.like)).double())
        rows.append({**cell["names"], "kind": kind, "curvature": bend, "axis": axis.tolist(), "values": values})
    ends = {"top": extremes.largest[0].value, "smallest": extremes.smallest[0].value, "trace": trace}
    return [{**row, "parameters": hessian.size, **_ends(ends), "status": extremes.status} for row in rows]


def trajectory(cell: Cell, store: str) -> list[Row]:
    """A training on the plane of its principal components: a row per checkpoint, the shares in every row."""
    classifier = Classifier.from_dict(cell["networks"][0])
    images = classifier.images()
    checkpoints = [classifier.at(epoch, store) for epoch in cell["epochs"]]
    found = landscape.trajectory(
        checkpoints, images.inputs, classifier.training_labels(), loss=loss_of(classifier), seed=cell["seed"]
    )
    shares = {"explained": found.explained, **_ends({} if found.null is None else {"null": found.null})}
    columns = {
        "a": found.coordinates[:, 0],
        "b": found.coordinates[:, 1],
        "distance": found.residuals,
        "loss": found.figures["train loss"],
        "loss_on_plane": found.plane_figures["train loss"],
    }
    places = [dict(zip(columns, values)) for values in zip(*(each.tolist() for each in columns.values()))]
    return [{**cell["names"], "epoch": epoch, **place, **shares} for epoch, place in zip(cell["epochs"], places)]


def loss_of(classifier: Classifier) -> Loss | None:
    """As the landscape takes it: None is the cross-entropy."""
    return None if classifier.loss == "cross_entropy" else squared_loss


def squared_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Image by image, (N,)."""
    return recipes.squared(outputs, labels, reduction="none")


def _scores(classifier: Classifier, network: nn.Module) -> Row:
    images = classifier.images()
    here = evaluate(network, images.inputs, classifier.training_labels(), loss=classifier.loss)
    there = evaluate(network, images.held_out, images.held_out_labels, loss=classifier.loss)
    return {
        "train_loss": here.loss,
        "train_accuracy": here.accuracy,
        "held_out_loss": there.loss,
        "held_out_accuracy": there.accuracy,
    }


def _ends(figures: dict[str, Interval]) -> Row:
    return {key: value for name, interval in figures.items() for key, value in interval.columns(name).items()}


def _unit(generator: torch.Generator, size: int) -> Tensor:
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    return vector / vector.norm()
