"""`meanfield transfer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from meanfield.bench import reading
from meanfield.bench.classifiers import NETWORKS, Classifier
from meanfield.bench.command import StudyOptions, run_study
from meanfield.bench.options import DATA, MODEL, Data, Device, Dtype, Pool, at_least, choice, option
from meanfield.studies.transfer.plan import Subject
from meanfield.studies.transfer.study import STUDY

SHARE = 3 / 5  # of the images, to train on; half of the others to choose by, half held out


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """None: left open, see `settled`."""

    data: Data = "digits"
    pool: Pool = 1
    samples: Annotated[
        int | None,
        option(
            "How many images to train on, drawn at random; of the rest one half is to choose strengths and factors by, "
            "the other one held out. Without it: 60% of them (1078 digits).",
            DATA,
        ),
        at_least(2),
    ] = None
    network: Annotated[
        str | None,
        option(
            f"{', '.join(NETWORKS)}: this one alone. Without it: of every part those that it is about. A prediction "
            "is made for mlp and cnn.",
            MODEL,
        ),
        choice(NETWORKS),
    ] = None
    width: Annotated[
        int | None,
        option(
            "Channels of the first convolution, or units of hidden layers. Without it: 64 for mlp and resnet18, 16 for "
            "cnn, otherwise 8.",
            MODEL,
        ),
        at_least(1),
    ] = None
    dtype: Dtype = "float32"
    device: Device = "cpu"


def command(options: Options) -> None:
    """Measure what of a training survives another start, a fusion, and another task, and write tables and a page.

    What a training moved is added to other starts, times a factor alpha, beside controls: its own start, none, noise of
    the same norms, the movement dealt anew, that of permuted labels. A prediction that draws no start stands beside
    what is observed; particle networks are followed over their width, trainings repeated step by step. Trained networks
    are fused, and reduced to one network's width without labels. Tasks are learnt in sequence by every customary
    method, strengths chosen on images of their own.

    The default size takes under six minutes on two cores, the full one has every network and ten seeds, cifar is meant
    for a local copy of it and a GPU (--network resnet18). Trained networks and finished cells are kept: after a stop of
    any kind the same command goes on and ends with the same tables.
    """
    options = settled(options)
    kept = ("data", "pool", "samples", "dtype", "device")
    settings = {name: getattr(options, name) for name in kept}
    preset = "authors" if options.size == "cifar" else "default"
    base = Classifier(network="cnn", penalty="none", strength=0.0, split=0, preset=preset, **settings)
    run_study(STUDY, options, Subject(base, options.network, options.width), "meanfield", "transfer")


def settled(options: Options) -> Options:
    """With nothing left open that the data decide: the page says what was taken."""
    samples = options.samples or max(2, int(SHARE * len(reading.images(options.data, pool=options.pool))))
    return options.variant(samples=samples)
