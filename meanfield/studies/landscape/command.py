"""`meanfield landscape`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from meanfield.bench import reading
from meanfield.bench.classifiers import Classifier
from meanfield.bench.command import StudyOptions, run_study
from meanfield.bench.options import (
    DATA,
    MODEL,
    OBJECTIVE,
    WORK,
    Classes,
    Device,
    Dtype,
    Split,
    at_least,
    choice,
    flag,
    option,
)
from meanfield.bench.options import source as address
from meanfield.landscape.directions import NORMALISATIONS
from meanfield.losses import LOSSES
from meanfield.storage.tensors import TENSORS
from meanfield.studies.landscape.given import Given
from meanfield.studies.landscape.measure import PLANES
from meanfield.studies.landscape.plan import Subject, View
from meanfield.studies.landscape.study import ONE, STUDY
from meanfield.validation import Misuse, positive

TOLERANCE = 0.01  # unless told otherwise


def saved(value: Any, argument: str) -> tuple[str, ...]:
    """Files of networks, or directories of solves, that are there."""
    found = tuple(value)
    for each in found:
        if not each or not (Path(each).is_dir() or (Path(each).suffix == TENSORS and Path(each).is_file())):
            raise Misuse(argument, each, "must be the file of a network, or the directory of a solve")
    return found


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """None: left open, see `settled`."""

    data: Annotated[
        str | None,
        option(
            "Images, as of `meanfield solve --data`. Without it: digits, or those that --network was made from.",
            DATA,
        ),
        address,
    ] = None
    classes: Classes = None
    samples: Annotated[
        int | None,
        option(
            "How many images the loss is over; the rest is held out. Without it: 80% of them, drawn at random, or as "
            "many as --network was made from.",
            DATA,
        ),
        at_least(2),
    ] = None
    pool: Annotated[
        int | None,
        option("Average images over windows of N x N pixels first. Without it: 1, or as for the network.", DATA),
        at_least(1),
    ] = None
    split: Split = None
    network: Annotated[
        tuple[str, ...],
        option(
            "A file of a network, or the directory of a solve: its surface alone. May be given again: two for "
            "--plane line, three for triangle, checkpoints in their order for pca.",
            MODEL,
            show_default=False,
        ),
        saved,
    ] = ()
    width: Annotated[int, option("Channels of the first convolution of the plain networks.", MODEL), at_least(1)] = 16
    loss: Annotated[
        str | None,
        option(f"{', '.join(LOSSES)}: of the network of --network. Without it: the one it was made with.", OBJECTIVE),
        choice(LOSSES),
    ] = None
    plane: Annotated[
        str,
        option(
            "random directions; eigen: of the two largest eigenvalues of the Hessian; line or triangle: through two "
            "or three networks; pca: of the checkpoints of a training.",
            WORK,
        ),
        choice(PLANES),
    ] = "random"
    grid: Annotated[int, option("Points on each side of a surface that is written.", WORK), at_least(2)] = 51
    tolerance: Annotated[
        float | None,
        option(
            "Largest error of a surface, as a share of the range of the loss, by an estimate that is shown. Without "
            f"it: {TOLERANCE:g}.",
            WORK,
        ),
        positive,
    ] = None
    extent: Annotated[
        float | None,
        option(
            "A surface reaches from -X to X along both directions. Without it: 1, or 1.2 for pca.",
            WORK,
        ),
        positive,
    ] = None
    exact: Annotated[bool, flag("Evaluate every point of the grid instead.", WORK)] = False
    normalise: Annotated[
        str, option(f"{', '.join(NORMALISATIONS)}: what random directions are scaled by.", WORK), choice(NORMALISATIONS)
    ] = "filter"
    batch_norm: Annotated[
        str,
        option("kept: running statistics as they are; recomputed: at every point, from the training images.", WORK),
        choice(("kept", "recomputed")),
    ] = "kept"
    dtype: Dtype = "float32"
    device: Device = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact and self.tolerance is not None:
            raise Misuse("exact", True, f"leaves nothing to tolerate: leave out --tolerance={self.tolerance:g}, or it")
        others, remedy = (
            (("width", "dtype", "device"), "is of networks that are trained, and --network has its own")
            if self.network
            else (("classes", "split", "loss"), "is of the network of --network, and none is given")
        )
        for name in others:
            if getattr(self, name) != getattr(type(self), name):
                raise Misuse(name, getattr(self, name), remedy)

    @property
    def view(self) -> View:
        tolerance = None if self.exact else TOLERANCE if self.tolerance is None else self.tolerance
        return View.from_dict({**self.to_dict(), "tolerance": tolerance})


def command(options: Options) -> None:
    """Draw the loss around trained networks, with its error, and measure its sharpness.

    Without --network, networks of several architectures, activations, losses and penalties are trained; measured are
    their surfaces, their sharpness at the end of training and at equal training loss, one function in several scalings,
    slices, joins of two networks and trajectories, each with what controls do. With --network, the surface of that
    network on the images it was made from or on others.

    A surface is a polynomial through a few exact values; its error is estimated and shown, or with --exact there is
    none. Written are tables, surfaces as .npz, JSON and NetCDF, pictures and one page, in which surfaces can be turned,
    offline.

    The default size takes under five minutes on two cores. Trained networks, points of a surface and finished cells are
    kept: after a stop of any kind the same command goes on and ends with the same tables.
    """
    if options.network:
        wanted = {name: getattr(options, name) for name in ("data", "classes", "samples", "pool", "split", "loss")}
        given = Given(tuple(map(str, options.network)), options.view, tuple(wanted.items()))
        run_study(ONE, options.variant(data=given.settings["data"]), given, "meanfield", "landscape")
    else:
        options = settled(options)
        run_study(STUDY, options, Subject(classifier(options), options.view), "meanfield", "landscape")


def settled(options: Options) -> Options:
    """With nothing left open: the page says what was taken."""
    data, pool = options.data or "digits", options.pool or 1
    samples = options.samples or max(2, len(reading.images(data, pool=pool)) * 4 // 5)
    return options.variant(data=data, pool=pool, samples=samples)


def classifier(options: Options) -> Classifier:
    """That all arms are variants of: the plain network, without a penalty."""
    kept = ("data", "pool", "samples", "width", "dtype", "device")
    return Classifier(
        network="cnn", penalty="none", strength=0.0, split=0, **{name: getattr(options, name) for name in kept}
    )
