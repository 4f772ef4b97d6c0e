"""The cells of the transfer study, part by part: plan(subject, sizes, seed).

`subject` says which images and which networks; a size says how many seeds, epochs, scales and widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell
from meanfield.studies.transfer.arms import PREDICTED
from meanfield.studies.transfer.tasks import METHODS
from meanfield.validation import Misuse

WIDTHS = {"mlp": 64, "cnn": 16, "residual": 8, "residual_bn": 8, "resnet18": 64}  # others: 8
RATE = 0.05  # of "regimes", where small starts leave their plateau within the shorter training, and of "reduction"
PERMUTED_RATES = {"mlp": 0.05, "cnn": 0.05}  # at which permuted labels are fitted; of deeper networks the preset's
# of "tasks": at which joint training has its highest validation accuracy, of 0.01, 0.02, 0.05, 0.1, 0.2 and 15 or 30
# epochs, mean of both kinds of heads over seeds that no size has; of other networks the preset's
TASK_RATES = {"cnn": 0.05}
DIVISIONS = {"two tasks": 2, "five tasks": 5}  # of the classes, in their order


@dataclass(frozen=True)
class Subject:
    """A classifier that all arms are variants of.

    network: the only one that is studied; None: of every part those that its size names.
    width: of all networks; None: WIDTHS.
    """

    base: Classifier
    network: str | None = None
    width: int | None = None

    def named(self, networks: Sequence[str]) -> list[Classifier]:
        """The base as each of these networks, or as the only one."""
        wanted = networks if self.network is None else (self.network,) if networks else ()
        return [self.base.variant(network=name, width=self.width or WIDTHS.get(name, 8)) for name in wanted]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything: "quick" shows that it runs, "default" takes under six minutes on two cores for digits,
    "full" has every network and ten seeds, "cifar" is meant for a local copy of CIFAR and a GPU.

    epochs: of a training, those on permuted labels apart, which go on until they fit.
    networks, seeds, draws, alphas: of "alphas": trainings of every network, and fresh starts of every training.
    regimes: network -> widths.  scales (of the start), lengths (epochs), factors (alpha), trainings, starts: of its
        cells.
    sampled: depth -> widths of particle networks.  runs: trainings at each of them.
    steps: networks of step-by-step transfer.  pairs, fused: of "fusion", how many pairs and of which networks.
    reduced, shares, penalties: pairs of particle networks, to which shares of one parent's widths their mixture is
        reduced, and factors of the default penalty of the convex program by which it may be.
    tasks: name in DIVISIONS -> seeds.  heads, methods, task_epochs: of it.
    """

    epochs: int
    permuted_epochs: int
    networks: tuple[str, ...]
    seeds: int
    draws: int
    alphas: tuple[float, ...]
    regimes: Mapping[str, tuple[int, ...]]
    scales: tuple[float, ...]
    lengths: tuple[int, ...]
    factors: tuple[float, ...]
    trainings: int
    starts: int
    sampled: Mapping[int, tuple[int, ...]]
    runs: int
    steps: tuple[str, ...]
    fused: tuple[str, ...]
    pairs: int
    reduced: int
    tasks: Mapping[str, int]
    task_epochs: int
    heads: tuple[str, ...] = ("task", "one")
    methods: tuple[str, ...] = METHODS
    shares: tuple[float, ...] = (1.0, 0.5, 0.25)
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0)


SIZES = {
    "quick": Sizes(
        epochs=6,
        permuted_epochs=12,
        networks=("mlp", "residual_bn"),
        seeds=2,
        draws=1,
        alphas=(0.0, 1.0, 3.0),
        regimes={"mlp": (16,)},
        scales=(0.3, 1.0),
        lengths=(6,),
        factors=(1.0, 3.0),
        trainings=1,
        starts=3,
        sampled={1: (8, 32)},
        runs=2,
        steps=("mlp",),
        fused=("cnn",),
        pairs=1,
        reduced=1,
        tasks={"two tasks": 1},
        task_epochs=3,
        heads=("task",),
        shares=(1.0, 0.5),
        penalties=(1.0,),
    ),
    "default": Sizes(
        epochs=30,
        permuted_epochs=150,
        networks=("mlp", "cnn", "vgg11", "residual", "residual_bn"),
        seeds=3,
        draws=2,
        alphas=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
        regimes={"mlp": (16, 64, 128), "cnn": (16,), "residual_bn": (8, 32)},
        scales=(0.3, 0.6, 1.0),
        lengths=(10, 60),
        factors=(1.0, 3.0, 10.0),
        trainings=2,
        starts=20,
        sampled={1: (16, 64, 256), 2: (16, 48, 144)},
        runs=8,
        steps=("mlp", "cnn"),
        fused=("cnn", "vgg11", "residual", "residual_bn"),
        pairs=2,
        reduced=2,
        tasks={"two tasks": 3},
        task_epochs=30,
    ),
    "full": Sizes(
        epochs=30,
        permuted_epochs=150,
        networks=("mlp", "cnn", "vgg11", "residual", "residual_bn"),
        seeds=5,
        draws=4,
        alphas=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0),
        regimes={"mlp": (16, 64, 128, 256), "cnn": (8, 16, 32), "residual_bn": (8, 32, 64)},
        scales=(0.1, 0.3, 0.6, 1.0),
        lengths=(10, 60),
        factors=(1.0, 3.0, 10.0),
        trainings=3,
        starts=20,
        sampled={1: (16, 64, 256), 2: (16, 48, 144)},
        runs=32,
        steps=("mlp", "cnn", "vgg11", "residual", "residual_bn"),
        fused=("mlp", "cnn", "vgg11", "residual", "residual_bn"),
        pairs=10,
        reduced=5,
        tasks={"two tasks": 10, "five tasks": 10},
        task_epochs=30,
    ),
    "cifar": Sizes(
        epochs=200,
        permuted_epochs=400,
        networks=("vgg11", "resnet18"),
        seeds=3,
        draws=2,
        alphas=(0.0, 0.5, 1.0, 2.0, 5.0, 10.0),
        regimes={},
        scales=(),
        lengths=(),
        factors=(),
        trainings=0,
        starts=0,
        sampled={},
        runs=0,
        steps=(),
        fused=("vgg11", "resnet18"),
        pairs=3,
        reduced=0,
        tasks={"two tasks": 3},
        task_epochs=100,
    ),
}


def check(subject: Subject, plan: Mapping[str, Sequence[Cell]]) -> None:
    """Refuse images that leave too few to choose by and to be judged on."""
    left = len(subject.base.images().held_out)
    if left < 2:
        remedy = f"leaves {left} of {subject.base.samples + left} images: at least one to choose by, and one held out"
        raise Misuse("samples", subject.base.samples, remedy)


def ended(base: Classifier, epochs: int) -> Classifier:
    """Trained for so long, only its end kept."""
    return base.variant(epochs=epochs, checkpoints=(epochs,))


def alphas(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """A cell per training: its network, another one (to combine it with), and one of permuted labels."""
    cells = []
    for base, number in product(subject.named(sizes.networks), range(sizes.seeds)):
        mine = ended(base.variant(seed=2 * (seed + number)), sizes.epochs)
        other = mine.variant(seed=mine.seed + 1)
        rate = PERMUTED_RATES.get(base.network)
        permuted = ended(mine.variant(labels="permuted", learning_rate=rate), sizes.permuted_epochs)
        names = {"network": base.network, "seed": mine.seed}
        settings = {"alphas": list(sizes.alphas), "draws": sizes.draws}
        cells.append(_cell([mine, other, permuted], names, **settings))
    return cells


def regimes(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """A cell per training, over start scales, epochs and widths; where nothing is predicted, over widths alone."""
    cells = []
    for base in subject.named(tuple(sizes.regimes)):
        widths = sizes.regimes.get(base.network, (base.width,)) if subject.width is None else (subject.width,)
        known = base.network in PREDICTED
        scales, lengths = (sizes.scales, sizes.lengths) if known else ((1.0,), sizes.lengths[-1:])
        numbers = range(sizes.trainings if known else 1)
        for width, scale, epochs, number in product(widths, scales, lengths, numbers):
            trained = ended(base.variant(width=width, scale=scale, learning_rate=RATE, seed=seed + number), epochs)
            names = {"network": base.network, "width": width, "scale": scale, "epochs": epochs, "seed": trained.seed}
            cells.append(_cell([trained], names, alphas=list(sizes.factors), draws=sizes.starts))
    return cells


def widths(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """A cell per trained particle network, in two scalings."""
    return [
        {"depth": depth, "width": width, "scaling": scaling, "seed": seed, "run": run}
        for depth, every in sizes.sampled.items()
        for scaling, width, run in product(("mean_field", "standard"), every, range(sizes.runs))
    ]


def steps(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    cells = []
    for base, number in product(subject.named(sizes.steps), range(sizes.seeds)):
        trained = ended(base.variant(seed=2 * (seed + number)), sizes.epochs)
        names = {"network": base.network, "seed": trained.seed}
        cells.append({"network": trained.to_dict(), "names": names})
    return cells


def fusion(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """Pairs of one width; and, of the first pair, three parents, the third one half as wide again."""
    cells = []
    for base, number in product(subject.named(sizes.fused), range(sizes.pairs)):
        first = ended(base.variant(seed=2 * (seed + number)), sizes.epochs)
        second = first.variant(seed=first.seed + 1)
        names = {"network": base.network, "pair": number, "parents": 2}
        cells.append(_cell([first, second], names, seed=first.seed))
        if number == 0:
            wider = first.variant(seed=2 * (seed + sizes.pairs), width=base.width * 3 // 2)
            cells.append(_cell([first, second, wider], {**names, "parents": 3}, seed=first.seed))
    return cells


def reduction(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """Pairs of particle networks of two layers, which the cell trains itself."""
    width = subject.width or WIDTHS["cnn"]
    base = ended(subject.base.variant(network="cnn", width=width, learning_rate=RATE), sizes.epochs)
    settings = {"shares": list(sizes.shares), "factors": list(sizes.penalties)}
    return [
        {"network": base.variant(seed=2 * (seed + number)).to_dict(), "names": {"pair": number}, **settings}
        for number in range(sizes.reduced)
    ]


def tasks(subject: Subject, sizes: Sizes, seed: int) -> list[Cell]:
    """A cell per division into tasks, kind of heads, seed and method; without tasks that would have one class."""
    cells, classes = [], subject.base.images().classes
    for base, (division, seeds) in product(subject.named(("cnn",)), sizes.tasks.items()):
        groups = _divided(classes, DIVISIONS[division])
        if min(map(len, groups)) < 2:
            continue
        for heads, number, method in product(sizes.heads, range(seeds), sizes.methods):
            rate = TASK_RATES.get(base.network)
            network = ended(base.variant(learning_rate=rate, seed=2 * (seed + number)), sizes.task_epochs)
            names = {"network": base.network, "tasks": division, "heads": heads, "seed": network.seed, "method": method}
            cells.append({"network": network.to_dict(), "groups": groups, "names": names})
    return cells


def _divided(classes: int, parts: int) -> list[list[int]]:
    """Runs of classes, the first ones longer where they cannot be equally long."""
    ends = [-(-classes * part // parts) for part in range(parts + 1)]
    return [list(range(first, last)) for first, last in pairwise(ends)]


def _cell(networks: Sequence[Classifier], names: dict[str, Any], **settings: Any) -> Cell:
    return {"networks": [each.to_dict() for each in networks], "names": names, **settings}
