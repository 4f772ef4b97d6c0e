"""The grafting study: which pairs of networks it joins, how that is run, and what the tables say; `meanfield graft`
writes its page.

Parts: "starts" (one penalty, different starts), "classes" (what the label alone says of the hosts), "strengths" of the
penalty, "l2" in its place, "across" layers, "epochs" (one network at an epoch, the other one trained), "trajectory"
(both at any epoch), "widths", and "procedures" (least squares against the authors' Adam).  "train" trains what the
others need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from meanfield.bench import sweep
from meanfield.bench.classifiers import Classifier, layers_of
from meanfield.bench.sweep import Cell, Tables
from meanfield.studies.grafting import measure as grafting

PARTS = ("starts", "classes", "strengths", "l2", "across", "epochs", "trajectory", "widths", "procedures")
ARMS = ("trained", "untrained", "permuted_labels", "rotated", "self")
L2_STRENGTH = 5e-4 * 16  # the middle one of the authors'


@dataclass(frozen=True)
class Sizes:
    """How much of everything: "default" takes under three minutes on two cores for digits, "full" half an hour and has
    every part.
    """

    epochs: int
    checkpoints: tuple[int, ...]
    pairs: int  # of "starts" and "trajectory"
    inside: int  # pairs of "across" and "epochs", which need no further networks
    others: int  # pairs of "strengths", "l2" and "widths"
    strengths: tuple[float, ...]  # in units of the classifier's
    factors: tuple[float, ...]  # of the width
    layers: tuple[str, ...]  # of the matrices epoch x epoch; those that the network has, or one in its middle
    procedures: int  # pairs; a layer takes the authors' procedure some twenty seconds


SIZES = {
    "quick": Sizes(2, (0, 1, 2), 2, 1, 1, (1.0, 4.0), (0.5, 1.0), ("conv4",), 0),
    "default": Sizes(20, (0, 1, 3, 8, 20), 5, 1, 0, (), (), ("conv6",), 0),
    "full": Sizes(
        30, (0, 1, 2, 4, 8, 15, 30), 6, 3, 3, (0.5, 1.0, 2.0, 4.0, 8.0), (0.5, 1.0, 2.0), ("conv4", "conv6", "conv8"), 1
    ),
    "authors": Sizes(
        200,
        (0, 1, 2, 5, 8, 10, 20, 50, 100, 200),
        5,
        2,
        2,
        (0.5, 1.0, 2.0, 4.0, 8.0, 10.0),
        (0.5, 1.0),
        ("conv4", "conv7", "conv10", "conv13"),
        1,
    ),
}
MEASURES: dict[str, sweep.Measure] = {
    **dict.fromkeys(PARTS, grafting.pair),
    "train": grafting.train,
    "classes": grafting.classes,
    "procedures": grafting.procedures,
}


def prepared(base: Classifier, sizes: Sizes) -> Classifier:
    """The classifier with the epochs and checkpoints of these sizes."""
    return base.variant(epochs=sizes.epochs, checkpoints=sizes.checkpoints)


def plan(base: Classifier, sizes: Sizes, seed: int = 0, parts: Sequence[str] = PARTS) -> dict[str, list[Cell]]:
    """The cells of the wanted parts; networks that they need are those of "train", which is always there and first."""
    base = prepared(base, sizes)
    makers: dict[str, Callable[[], list[Cell]]] = {
        "starts": lambda: _starts(base, sizes.pairs, seed, ARMS, ("least_squares", "transport")),
        "classes": lambda: [
            _cell(base, *2 * _pair(base, seed, number)[1:], names={"pair": number}) for number in range(sizes.pairs)
        ],
        "strengths": lambda: _strengths(base, sizes, seed) if base.penalty != "none" else [],
        "l2": lambda: _starts(
            base.variant(penalty="l2", strength=L2_STRENGTH),
            sizes.others,
            seed,
            ("trained", "untrained", "permuted_labels"),
        ),
        "across": lambda: _starts(base, sizes.inside, seed, ("trained", "untrained"), connections="across"),
        "epochs": lambda: _epochs(base, sizes, seed),
        "trajectory": lambda: _trajectory(base, sizes, seed),
        "widths": lambda: _widths(base, sizes, seed),
        "procedures": lambda: [
            _cell(base, *_pair(base, seed, number), names={"pair": number}) for number in range(sizes.procedures)
        ],
    }
    found = {part: makers[part]() for part in makers if part in parts}
    ends = [
        (cell[end], cell[f"{end}_epoch"]) for cells in found.values() for cell in cells for end in ("lower", "upper")
    ]
    wanted = {Classifier.from_dict(settings): None for settings, epoch in ends if epoch}
    return {"train": [each.to_dict() for each in wanted], **{part: cells for part, cells in found.items() if cells}}


def _pair(base: Classifier, seed: int, number: int) -> tuple[Classifier, Classifier]:
    """Donor and host of pair 0, 1, ...: no two pairs share a network."""
    return base.variant(seed=2 * (seed + number)), base.variant(seed=2 * (seed + number) + 1)


def _cell(base: Classifier, lower: Classifier, upper: Classifier, **changes: Any) -> Cell:
    settings = {
        "lower_epoch": base.epochs,
        "upper_epoch": base.epochs,
        "connections": "same",
        "methods": ["least_squares"],
        "rotated": False,
    }
    return {"lower": lower.to_dict(), "upper": upper.to_dict(), **settings, **changes}


def _arm(base: Classifier, seed: int, number: int, arm: str, methods: Sequence[str], **changes: Any) -> Cell:
    """A pair in which the donor is as the arm says."""
    lower, upper = _pair(base, seed, number)
    donor = {"permuted_labels": lower.variant(labels="permuted"), "self": upper}.get(arm, lower)
    epoch = 0 if arm == "untrained" else base.epochs
    names = {"pair": number, "arm": arm, **changes.pop("names", {})}
    return _cell(
        base, donor, upper, lower_epoch=epoch, rotated=arm == "rotated", methods=list(methods), names=names, **changes
    )


def _starts(
    base: Classifier,
    pairs: int,
    seed: int,
    arms: Sequence[str],
    methods: Sequence[str] = ("least_squares",),
    connections: str = "same",
) -> list[Cell]:
    return [_arm(base, seed, number, arm, methods, connections=connections) for number in range(pairs) for arm in arms]


def _strengths(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    cells, strengths = [], [base.strength * factor for factor in sizes.strengths]
    for number, below, above in product(range(sizes.others), strengths, strengths):
        lower, upper = _pair(base, seed, number)
        names = {"pair": number, "arm": "trained", "lower_strength": below, "upper_strength": above}
        cells.append(_cell(base, lower.variant(strength=below), upper.variant(strength=above), names=names))
    for number, above in product(range(sizes.others), strengths):  # a start does not know its penalty
        lower, upper = _pair(base, seed, number)
        names = {"pair": number, "arm": "untrained", "lower_strength": strengths[0], "upper_strength": above}
        cells.append(
            _cell(base, lower.variant(strength=strengths[0]), upper.variant(strength=above), lower_epoch=0, names=names)
        )
    return cells


def _epochs(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    """One end at an epoch, the other one trained; the donor at epoch 0 is the untrained control."""
    cells = []
    for number, arm, end, epoch in product(
        range(sizes.inside), ("trained", "permuted_labels"), ("lower", "upper"), base.checkpoints
    ):
        lower, upper = _pair(base, seed, number)
        donor = lower.variant(labels="permuted") if arm == "permuted_labels" else lower
        names = {"pair": number, "arm": arm, "moving": end, "epoch": epoch}
        cells.append(_cell(base, donor, upper, **{f"{end}_epoch": epoch}, names=names))
    return cells


def _trajectory(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    cells, names = [], layers_of(base.start())
    layers = [name for name in sizes.layers if name in names] or [names[len(names) // 2]]
    for number, arm, below, above in product(
        range(sizes.pairs), ("trained", "permuted_labels", "self"), base.checkpoints, base.checkpoints
    ):
        if arm == "self" and number >= sizes.inside:
            continue
        made = _arm(base, seed, number, arm, ("least_squares", "transport"), connections=layers)
        cells.append({**made, "lower_epoch": below, "upper_epoch": above})
    return cells


def _widths(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    cells = []
    widths = [max(1, round(base.width * factor)) for factor in sizes.factors]
    for number, arm, below, above in product(range(sizes.others), ("trained", "untrained"), widths, widths):
        lower, upper = _pair(base, seed, number)
        names = {"pair": number, "arm": arm, "lower_width": below, "upper_width": above}
        epoch = 0 if arm == "untrained" else base.epochs
        methods = ["least_squares", "transport"]
        cells.append(
            _cell(
                base,
                lower.variant(width=below),
                upper.variant(width=above),
                lower_epoch=epoch,
                methods=methods,
                names=names,
            )
        )
    return cells


def run(
    base: Classifier,
    sizes: Sizes,
    directory: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    seed: int = 0,
    jobs: int = 1,
    backend: str = "loky",
    announce: Callable[[str, Cell, bool], None] = lambda part, cell, kept: None,
) -> Tables:
    """Rows of every part; networks in `directory`/networks, finished cells in `directory`/cells, a CSV table of each
    part.

    Cells name a digest of the images: a file of the same name with other images is another study.
    """
    digest, store = base.images().digest, Path(directory) / "networks"
    chosen = {
        part: [{**cell, "images": digest} for cell in cells] for part, cells in plan(base, sizes, seed, parts).items()
    }
    return sweep.study(
        chosen, MEASURES, directory, jobs=jobs, backend=backend, announce=announce, places={"store": str(store)}
    )
