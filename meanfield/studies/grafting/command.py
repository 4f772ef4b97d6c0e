"""`meanfield graft`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from meanfield.bench import reading
from meanfield.bench.classifiers import VGGS, Classifier, WeightPenalty
from meanfield.bench.command import StudyOptions, run_study
from meanfield.bench.options import DATA, MODEL, OBJECTIVE, Data, Device, Dtype, Pool, at_least, choice, flag, option
from meanfield.studies.grafting.plan import L2_STRENGTH
from meanfield.studies.grafting.study import STUDY
from meanfield.validation import nonnegative

CIFAR_TRAINING = 50_000  # the first images of either data set; the test images follow


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """None: left open, see `settled`."""

    data: Data = "digits"
    pool: Pool = 1
    samples: Annotated[
        int | None,
        option(
            "How many images to train on; the rest is held out. Without it: 80% of them (1437 digits), 50000 of CIFAR.",
            DATA,
        ),
        at_least(2),
    ] = None
    split: Annotated[
        bool | None,
        flag(
            "Draw the images to train on at random, or take the first ones in file order. Without either: --split; "
            "for CIFAR, whose test images come last, --file-order.",
            DATA,
            "--file-order",
        ),
    ] = None
    network: Annotated[
        str | None,
        option(
            "vgg8, vgg11, vgg13 or vgg16, with 5, 8, 10 or 13 convolutions. Without it: vgg11; vgg16 for --size "
            "authors.",
            MODEL,
        ),
        choice(VGGS),
    ] = None
    width: Annotated[
        int | None,
        option(
            "Channels of the first convolution; later ones have up to 8 times as many. Without it: 8; 64 for --size "
            "authors.",
            MODEL,
        ),
        at_least(1),
    ] = None
    penalty: WeightPenalty = "l12"
    strength: Annotated[
        float | None,
        option("Strength of the penalty. Without it: 1 for l12, 0.008 for l2.", OBJECTIVE),
        nonnegative,
    ] = None
    dtype: Dtype = "float32"
    device: Device = "cpu"


def command(options: Options) -> None:
    """Measure whether networks from different starts learn the same features, and write tables and a page.

    Networks are trained from different starts on all classes of the images and grafted: the lower layers of one, the
    upper layers of another, and between them one layer that least squares fits. How well that works, layer by layer and
    epoch by epoch, stands beside controls: donors untrained, trained on permuted labels, or rotated, and connections by
    optimal transport instead of least squares. The seed is the number of the first pair of networks; pair k has seeds
    2k and 2k + 1.

    The default size takes under three minutes on two cores, the full one half an hour and has every part, the authors'
    one has 200 epochs of their recipe and is meant for CIFAR and a GPU. The networks that a part needs are trained.
    Trained networks and finished cells are kept: after a stop of any kind the same command goes on and ends with the
    same tables.
    """
    options = settled(options)
    run_study(STUDY, options, classifier(options), "meanfield", "graft")


def settled(options: Options) -> Options:
    """With nothing left open: the page says what was taken."""
    authors = options.size == "authors"
    usual: dict[str, Any] = {
        "network": "vgg16" if authors else "vgg11",
        "width": 64 if authors else 8,
        "strength": {"l2": L2_STRENGTH, "none": 0.0}.get(options.penalty, 1.0),
    }
    if options.samples is None or options.split is None:
        usual |= _division(options)
    return options.variant(**{name: value for name, value in usual.items() if getattr(options, name) is None})


def _division(options: Options) -> dict[str, Any]:
    """How many images to train on and which: CIFAR's own division, of others 80%, drawn at random."""
    found = reading.images(options.data, pool=options.pool)
    official = found.name.startswith("CIFAR")
    return {"samples": CIFAR_TRAINING if official else max(2, len(found) * 4 // 5), "split": not official}


def classifier(options: Options) -> Classifier:
    preset = "authors" if options.size == "authors" else "default"
    return Classifier.from_dict({**options.to_dict(), "split": 0 if options.split else None, "preset": preset})
