"""The cells of the grafting study, part by part: plan(base, sizes, seed).

`base` says which images, network and recipe; a size says how many epochs and which of them are kept.  `train` makes the
cells of the networks that all the others need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from meanfield.bench.classifiers import Classifier, layers_of
from meanfield.bench.sweep import Cell
from meanfield.validation import Misuse

ARMS = ("trained", "untrained", "permuted_labels", "rotated", "self")
METHODS = ("least_squares", "transport")
L2_STRENGTH = 5e-4 * 16  # the middle one of the authors'
LEAST_HELD_OUT = 4  # for the unbiased similarity of features


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything: "quick" shows that it runs, "default" takes under three minutes on two cores for digits,
    "full" half an hour and has every part, "authors" is meant for CIFAR and a GPU.

    pairs: of "starts", "classes" and "trajectory".  inside: pairs of "across" and "epochs", which need no further
        networks.  others: pairs of "l2", "strengths" and "widths".
    strengths: in units of the classifier's.  factors: of the width.
    layers: of the matrices epoch x epoch; those that the network has, or one in its middle.
    procedures: pairs; a layer takes the authors' procedure some twenty seconds.
    """

    epochs: int
    checkpoints: tuple[int, ...]
    pairs: int
    inside: int
    others: int
    strengths: tuple[float, ...]
    factors: tuple[float, ...]
    layers: tuple[str, ...]
    procedures: int


SIZES = {
    "quick": Sizes(
        epochs=2,
        checkpoints=(0, 1, 2),
        pairs=2,
        inside=1,
        others=1,
        strengths=(1.0, 4.0),
        factors=(0.5, 1.0),
        layers=("conv4",),
        procedures=0,
    ),
    "default": Sizes(
        epochs=20,
        checkpoints=(0, 1, 3, 8, 20),
        pairs=5,
        inside=1,
        others=0,
        strengths=(),
        factors=(),
        layers=("conv6",),
        procedures=0,
    ),
    "full": Sizes(
        epochs=30,
        checkpoints=(0, 1, 2, 4, 8, 15, 30),
        pairs=6,
        inside=3,
        others=3,
        strengths=(0.5, 1.0, 2.0, 4.0, 8.0),
        factors=(0.5, 1.0, 2.0),
        layers=("conv4", "conv6", "conv8"),
        procedures=1,
    ),
    "authors": Sizes(
        epochs=200,
        checkpoints=(0, 1, 2, 5, 8, 10, 20, 50, 100, 200),
        pairs=5,
        inside=2,
        others=2,
        strengths=(0.5, 1.0, 2.0, 4.0, 8.0, 10.0),
        factors=(0.5, 1.0),
        layers=("conv4", "conv7", "conv10", "conv13"),
        procedures=1,
    ),
}


def check(base: Classifier, plan: Mapping[str, Sequence[Cell]]) -> None:
    """Refuse images that leave too few to compare features on."""
    left = len(base.images().held_out)
    if left < LEAST_HELD_OUT:
        raise Misuse(
            "samples",
            base.samples,
            f"leaves {left} of {base.samples + left} images held out, on which features are compared; leave "
            f"{LEAST_HELD_OUT} at least",
        )


def prepared(base: Classifier, sizes: Sizes) -> Classifier:
    """The classifier with the epochs and checkpoints of these sizes."""
    return base.variant(epochs=sizes.epochs, checkpoints=sizes.checkpoints)


def train(cells: Sequence[Cell]) -> list[Cell]:
    """The networks that the cells need after their start, each once, in the order of first need."""
    ends = [(cell[end], cell[f"{end}_epoch"]) for cell in cells for end in ("lower", "upper")]
    wanted = dict.fromkeys(Classifier.from_dict(settings) for settings, epoch in ends if epoch)
    return [each.to_dict() for each in wanted]


def starts(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    return _grafts(prepared(base, sizes), sizes.pairs, seed, ARMS, METHODS)


def classes(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    """Of the hosts; there is no donor."""
    base, cells = prepared(base, sizes), []
    for number in range(sizes.pairs):
        _, host = _pair(base, seed, number)
        cells.append(_cell(base, host, host, names={"pair": number}))
    return cells


def l2(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    base = prepared(base, sizes).variant(penalty="l2", strength=L2_STRENGTH)
    return _grafts(base, sizes.others, seed, ("trained", "untrained", "permuted_labels"))


def trajectory(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    """Both ends at any epoch."""
    base, cells = prepared(base, sizes), []
    names = layers_of(base.start())
    layers = [name for name in sizes.layers if name in names] or [names[len(names) // 2]]
    for number, arm, below, above in product(
        range(sizes.pairs), ("trained", "permuted_labels", "self"), base.checkpoints, base.checkpoints
    ):
        if arm == "self" and number >= sizes.inside:
            continue
        made = _graft(base, seed, number, arm, METHODS, layers)
        cells.append({**made, "lower_epoch": below, "upper_epoch": above})
    return cells


def epochs(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    """One end at an epoch, the other one trained; the donor at epoch 0 is the untrained control."""
    base, cells = prepared(base, sizes), []
    for number, arm, end, epoch in product(
        range(sizes.inside), ("trained", "permuted_labels"), ("lower", "upper"), base.checkpoints
    ):
        made = _graft(base, seed, number, arm)
        names = {**made["names"], "moving": end, "epoch": epoch}
        cells.append({**made, f"{end}_epoch": epoch, "names": names})
    return cells


def across(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    return _grafts(prepared(base, sizes), sizes.inside, seed, ("trained", "untrained"), connections="across")


def strengths(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    """A start does not know its penalty: untrained donors have the first strength alone."""
    if base.penalty == "none":
        return []
    base, cells = prepared(base, sizes), []
    every = [base.strength * factor for factor in sizes.strengths]
    for arm, lower in (("trained", every), ("untrained", every[:1])):
        for number, below, above in product(range(sizes.others), lower, every):
            cells.append(_crossed(_graft(base, seed, number, arm), "strength", below, above))
    return cells


def widths(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    base, cells = prepared(base, sizes), []
    every = [max(1, round(base.width * factor)) for factor in sizes.factors]
    for number, arm, below, above in product(range(sizes.others), ("trained", "untrained"), every, every):
        cells.append(_crossed(_graft(base, seed, number, arm, METHODS), "width", below, above))
    return cells


def procedures(base: Classifier, sizes: Sizes, seed: int) -> list[Cell]:
    base = prepared(base, sizes)
    return [_cell(base, *_pair(base, seed, number), names={"pair": number}) for number in range(sizes.procedures)]


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


def _graft(
    base: Classifier,
    seed: int,
    number: int,
    arm: str,
    methods: Sequence[str] = ("least_squares",),
    connections: Any = "same",
) -> Cell:
    """A pair in which the donor is as the arm says."""
    lower, upper = _pair(base, seed, number)
    donor = {"permuted_labels": lower.variant(labels="permuted"), "self": upper}.get(arm, lower)
    return _cell(
        base,
        donor,
        upper,
        lower_epoch=0 if arm == "untrained" else base.epochs,
        connections=connections,
        methods=list(methods),
        rotated=arm == "rotated",
        names={"pair": number, "arm": arm},
    )


def _grafts(
    base: Classifier,
    pairs: int,
    seed: int,
    arms: Sequence[str],
    methods: Sequence[str] = ("least_squares",),
    connections: Any = "same",
) -> list[Cell]:
    return [_graft(base, seed, number, arm, methods, connections) for number in range(pairs) for arm in arms]


def _crossed(graft: Cell, field: str, below: Any, above: Any) -> Cell:
    """The graft with donor and host that have values of their own in a field, which the rows name."""
    names = {**graft["names"], f"lower_{field}": below, f"upper_{field}": above}
    lower, upper = {**graft["lower"], field: below}, {**graft["upper"], field: above}
    return {**graft, "lower": lower, "upper": upper, "names": names}
