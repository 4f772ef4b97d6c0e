"""The cells of the landscape study, part by part: plan(subject, sizes, seed).

`subject` says which images, network and view; a size says how many seeds, epochs, strengths and widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any

from meanfield.bench.classifiers import Classifier
from meanfield.bench.options import Settings, at_least, choice
from meanfield.bench.sweep import Cell
from meanfield.landscape.directions import NORMALISATIONS
from meanfield.studies.landscape.measure import PLANES
from meanfield.validation import positive

LADDER = "relu"  # the arm without a penalty, the lowest rung of either ladder of strengths
LEAST_CHECKPOINTS = 3  # of a path in a plane
DRAWS = 6  # of sampled networks, at every width
ROOM = 1.2  # a path of checkpoints reaches to 1 in its plane


@dataclass(frozen=True, kw_only=True)
class View(Settings):
    """Which surface: see `landscape.plane` and `landscape.surface`; tolerance None is exact."""

    plane: Annotated[str, choice(PLANES)] = "random"
    grid: Annotated[int, at_least(2)] = 51
    tolerance: Annotated[float | None, positive] = 0.01
    extent: Annotated[float | None, positive] = None
    normalise: Annotated[str, choice(NORMALISATIONS)] = "filter"
    batch_norm: Annotated[str, choice(("kept", "recomputed"))] = "kept"

    def cell(self, seed: int, evaluations: int | None = None) -> Cell:
        extent = self.extent or (ROOM if self.plane == "pca" else 1.0)
        return {**self.to_dict(), "extent": extent, "seed": seed, "evaluations": evaluations}


@dataclass(frozen=True)
class Subject:
    """A classifier that all arms are variants of, and the view of its surfaces."""

    base: Classifier
    view: View = field(default_factory=View)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything: "quick" shows that it runs, "default" takes under five minutes on two cores for digits,
    "full" has every arm, strength and width.

    arms: names in `ARMS`, beside the ladders of strengths l2 and l12.  seeds: of every arm.
    evaluations: of a surface, at most.
    target: training loss, by the name of the loss, at which networks are compared.
    images, products, rises, steps, tolerance: of `landscape.sharpness`, on the first so many training images.  With 20
        directions to its mean the rank correlation of the rise with held-out loss moves by 0.06 from draw to draw.
    directions: random slices.  widths, pairs, flow_steps, flow_images: of particle networks that are joined.
    """

    epochs: int
    seeds: int
    arms: tuple[str, ...]
    l2: tuple[float, ...]
    l12: tuple[float, ...]
    evaluations: int
    images: int
    products: int
    rises: int
    steps: int
    directions: int
    widths: tuple[int, ...]
    pairs: int
    flow_steps: int
    flow_images: int
    source: int
    sampled: tuple[int, ...]
    tolerance: float = 1e-3
    target: Mapping[str, float] = field(default_factory=lambda: {"cross_entropy": 0.15, "squared": 0.1})


# what differs from the base; widths are for about as many parameters as it has
ARMS: dict[str, dict[str, Any]] = {
    "relu": {},
    "tanh": {"activation": "tanh"},
    "gelu": {"activation": "gelu"},
    "vgg11": {"network": "vgg11", "width": 4},
    "residual": {"network": "residual", "width": 8},
    "residual, batch norm": {"network": "residual_bn", "width": 8},
    "squared loss": {"loss": "squared"},
    "permuted labels": {"labels": "permuted"},
    "untrained": {},
}

SIZES = {
    "quick": Sizes(
        epochs=6,
        seeds=1,
        arms=("relu", "tanh", "residual, batch norm", "squared loss", "untrained"),
        l2=(0.003, 0.01),
        l12=(),
        evaluations=110,
        images=96,
        products=9,
        rises=4,
        steps=15,
        directions=4,
        widths=(8, 16),
        pairs=1,
        flow_steps=40,
        flow_images=16,
        source=24,
        sampled=(8, 16),
        target={"cross_entropy": 0.5, "squared": 0.2},
    ),
    "default": Sizes(
        epochs=30,
        seeds=4,
        arms=tuple(ARMS),
        l2=(0.001, 0.003, 0.006, 0.01),
        l12=(0.25, 0.5, 1.0),
        evaluations=330,
        images=360,
        products=30,
        rises=100,
        steps=60,
        directions=20,
        widths=(16, 32, 64),
        pairs=3,
        flow_steps=150,
        flow_images=64,
        source=200,
        sampled=(32, 64, 128),
    ),
    "full": Sizes(
        epochs=60,
        seeds=8,
        arms=tuple(ARMS),
        l2=(0.0003, 0.001, 0.003, 0.006, 0.01, 0.03),
        l12=(0.1, 0.25, 0.5, 1.0, 2.0),
        evaluations=1200,
        images=1437,
        products=30,
        rises=100,
        steps=100,
        directions=50,
        widths=(16, 32, 64, 128, 256),
        pairs=5,
        flow_steps=600,
        flow_images=100,
        source=400,
        sampled=(16, 32, 64, 128, 256),
        tolerance=1e-4,
    ),
}


@dataclass(frozen=True)
class Arm:
    """A trained network, or with epoch 0 a start, and what rows say of it."""

    classifier: Classifier
    epoch: int
    names: dict[str, Any]


def arms(subject: Subject, sizes: Sizes, seed: int) -> list[Arm]:
    """Of one seed: those of the size, then the ladders."""
    base = prepared(subject, sizes).variant(seed=seed)
    changes = {name: ARMS[name] for name in sizes.arms}
    for penalty, strengths in (("l2", sizes.l2), ("l12", sizes.l12)):
        changes |= {f"{penalty} {each:g}": {"penalty": penalty, "strength": each} for each in strengths}
    found = []
    for name, change in changes.items():
        classifier = base.variant(**change)
        l2 = classifier.strength if classifier.penalty == "l2" else 0.0 if name == LADDER else None
        names = {"arm": name, "seed": seed, "trained_with": classifier.loss, "l2": l2}
        found.append(Arm(classifier, 0 if name == "untrained" else sizes.epochs, names))
    return found


def prepared(subject: Subject, sizes: Sizes) -> Classifier:
    """The base with the epochs of these sizes, every one of them kept."""
    return subject.base.variant(epochs=sizes.epochs, checkpoints=tuple(range(sizes.epochs + 1)))


def surfaces(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """One per arm, of the first seed; lines and triangles lead to the next ones."""
    others = [arms(subject, sizes, seed + number) for number in range(PLANES[subject.view.plane])]
    found = []
    for same in zip(*others):
        first = same[0]
        if subject.view.plane == "pca":
            if first.epoch < LEAST_CHECKPOINTS:
                continue
            chosen = [(first.classifier, epoch) for epoch in first.classifier.checkpoints]
        else:
            chosen = [(each.classifier, each.epoch) for each in same]
        if subject.view.plane == "random":
            chosen = chosen[:1]
        found.append(_cell(chosen, first.names, **subject.view.cell(seed, sizes.evaluations)))
    return found


def sharpness(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """At the end of training."""
    return _sharpness(subject, sizes, seed)


def matched(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """At equal training loss, among networks that were trained."""
    return [
        {**cell, "target": sizes.target[cell["names"]["trained_with"]]}
        for cell in _sharpness(subject, sizes, seed)
        if cell["epochs"][0]
    ]


def toy(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """Of the first seeds: a ReLU network and a tanh one, of two convolutions each."""
    base, cells = prepared(subject, sizes).variant(network="cnn"), []
    for number in range(min(sizes.seeds, 3)):
        both = [base.variant(seed=seed + number, activation=name) for name in ("relu", "tanh")]
        chosen = [(each, sizes.epochs) for each in both]
        settings = {"spread": 10.0, "grid": subject.view.grid, "tolerance": 0.01, "seed": seed + number}
        settings["evaluations"] = sizes.evaluations
        cells.append(_cell(chosen, {"seed": seed + number}, **settings))
    return cells


def slices(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    base = prepared(subject, sizes).variant(seed=seed)
    settings = {
        "directions": sizes.directions,
        "reach": 1.0,
        "grid": 41,
        "products": sizes.products,
        "steps": 2 * sizes.steps,
        "tolerance": sizes.tolerance,
        "seed": seed,
    }
    return [_cell([(base, sizes.epochs)], {"seed": seed}, **settings)]


def joins(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    settings = {"task": _task(subject, sizes), "steps": sizes.flow_steps, "times": 11}
    return [
        {**settings, "width": width, "seeds": [2 * (seed + pair), 2 * (seed + pair) + 1], "names": {"pair": pair}}
        for width, pair in product(sizes.widths, range(sizes.pairs))
    ]


def metric(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """Samples of one network, which is wider than they are."""
    task = {**_task(subject, sizes), "dtype": "float32"}
    settings = {"task": task, "steps": 2 * sizes.flow_steps, "source": sizes.source, "seed": seed}
    settings |= {"draws": DRAWS, "products": 8, "tolerance": 1e-2}  # far less than draws differ by
    return [{**settings, "width": width} for width in sizes.sampled]


def _task(subject: Subject, sizes: Sizes) -> dict[str, Any]:
    """Of particle networks: two classes of the images, averaged over 2x2 windows."""
    return {"data": subject.base.data, "classes": (3, 5), "samples": sizes.flow_images, "pool": 2, "depth": 2}


def trajectory(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """Of the arms that a plane may show in another light: plain and residual ones, and permuted labels."""
    shown = ("relu", "tanh", "residual, batch norm", "permuted labels")
    return [
        _cell([(arm.classifier, epoch) for epoch in arm.classifier.checkpoints], arm.names, seed=seed)
        for arm in arms(subject, sizes, seed)
        if arm.names["arm"] in shown and sizes.epochs >= LEAST_CHECKPOINTS
    ]


def _sharpness(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    settings = {
        "count": min(sizes.images, subject.base.samples),
        "products": sizes.products,
        "rises": sizes.rises,
        "steps": sizes.steps,
        "tolerance": sizes.tolerance,
    }
    every = [arm for number in range(sizes.seeds) for arm in arms(subject, sizes, seed + number)]
    # directions of its own for every network: shared ones would move all of them alike, which no interval sees
    return [
        _cell([(arm.classifier, arm.epoch)], arm.names, **settings, seed=seed + place)
        for place, arm in enumerate(every)
    ]


def _cell(chosen: Sequence[tuple[Classifier, int]], names: Mapping[str, Any], **settings: Any) -> Cell:
    return {
        "networks": [classifier.to_dict() for classifier, _ in chosen],
        "epochs": [epoch for _, epoch in chosen],
        "names": dict(names),
        **settings,
    }
