"""`meanfield audit`."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from meanfield import auditing, limits, losses, storage
from meanfield.auditing import Audit
from meanfield.bench import reading, signals
from meanfield.bench.command import say_data
from meanfield.bench.options import (
    DATA,
    MODEL,
    OBJECTIVE,
    OUTPUT,
    WORK,
    Classes,
    MaxMemory,
    MaxSeconds,
    Out,
    Overwrite,
    Quiet,
    Seed,
    Settings,
    Split,
    at_least,
    choice,
    flag,
    option,
    source,
)
from meanfield.bench.provenance import Provenance
from meanfield.bench.task import AmplitudeBound, InputBound
from meanfield.losses import LOSSES
from meanfield.network import ParticleNetwork
from meanfield.penalties import KERNEL_NORMS
from meanfield.problem import Problem
from meanfield.storage import results
from meanfield.studies.audit import page
from meanfield.studies.audit.subject import FURTHER, PRICES, READ, Subject, saved
from meanfield.validation import Misuse, nonnegative, positive


def strength(what: str) -> Any:
    text = f"Strength of the penalty on {what}. Without any of the three: as the solve had it, or derived, see above."
    return Annotated[float | None, option(text, OBJECTIVE), nonnegative]


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """None: left open, see `Subject.settings`."""

    network: Annotated[
        str | None,
        option("NETWORK.safetensors, MODULE.pt2 as torch.export.save writes it, or the directory of a solve.", MODEL),
        saved,
    ] = field(default=None, kw_only=False)
    data: Annotated[
        str | None,
        option("Images, as of `meanfield solve --data`. Without it: those of the solve, or digits.", DATA),
        source,
    ] = None
    classes: Classes = None
    samples: Annotated[
        int | None,
        option("How many images, the first ones; the rest is held out. Without it: as the solve, or all.", DATA),
        at_least(2),
    ] = None
    pool: Annotated[
        int | None,
        option("Average images over windows of N x N pixels first. Without it: as the solve, or 1.", DATA),
        at_least(1),
    ] = None
    split: Split = None
    loss: Annotated[
        str | None,
        option(f"{', '.join(LOSSES)}. Without it: that of the solve, softmax, or logistic for one output.", OBJECTIVE),
        choice(LOSSES),
    ] = None
    source_penalty: strength("the flow out of every feature, between layers") = None  # type: ignore[valid-type]
    readout_penalty: strength("the readout") = None  # type: ignore[valid-type]
    input_penalty: strength("first-layer kernels") = None  # type: ignore[valid-type]
    kernel_norm: Annotated[
        str | None,
        option(f"{', '.join(KERNEL_NORMS)}. Without it: as the solve, or l2.", OBJECTIVE),
        choice(KERNEL_NORMS),
    ] = None
    amplitude_bound: AmplitudeBound = None
    input_bound: InputBound = None
    search: Annotated[
        bool, flag("Search for features that the network lacks, and add the best of them to the program.", WORK)
    ] = False
    seed: Seed = 0
    tolerance: Annotated[float, option("Relative duality gap at which a program is solved.", WORK), positive] = 1e-6
    max_seconds: MaxSeconds = None
    max_memory: MaxMemory = None
    out: Out = None
    overwrite: Overwrite = False
    json: Annotated[
        bool, flag("Print the results as one JSON object on standard output, and nothing else there.", OUTPUT)
    ] = False
    quiet: Quiet = False

    @property
    def subject(self) -> Subject:
        names = (*READ, *PRICES.values(), *FURTHER)
        return Subject(str(self.network), {name: getattr(self, name) for name in names})


def command(options: Options) -> None:
    """Say how far a trained network is from what its own features allow, with proof.

    The features that the network computes on the images are frozen; over their masses, the kernels between them and the
    readout training is a convex program, which is solved. Printed are J of the network, the lowest J that its features
    allow, which penalty pays how much, dead features and masses; with --search also what features it lacks would bring.
    --out receives a page, its picture, the figures and the repopulated network.

    A network of `meanfield solve` brings its images and penalties with it. A MODULE.pt2 is a PyTorch module as
    torch.export.save writes it: a chain of convolutions, batch norm, activations, pools and Linear layers. It is read
    as data, and nothing in it is run: neither pickles nor code. Images have pixels in [0, 1], as the module should
    expect them.

    Without any strength of a penalty those are taken for which the network is stationary to the scale of its layers:
    the most favourable reading of a network that was trained with another penalty, or none.
    """
    if options.network is None:
        raise Misuse("network", None, "is missing: meanfield audit NETWORK.safetensors, MODULE.pt2 or DIRECTORY")
    subject = options.subject
    with contextlib.ExitStack() as stack:
        result = None
        if options.out is not None:
            reading.refuse_inside(options.out, subject.settings["data"])
            result = stack.enter_context(
                results.opened(options.out, page.NAME, page.FILES, overwrite=options.overwrite)
            )
        stack.enter_context(limits.memory(options.max_memory or math.inf))
        images = subject.images
        problem = subject.problem(images)
        say_data(images.summary, options.quiet)
        made = asdict(Provenance(options.command_line("meanfield", "audit"), options.to_dict(), data=images.summary))
        stack.enter_context(signals.surely())
        found = auditing.audit(
            subject.network,
            problem.inputs,
            problem.targets,
            loss=subject.loss,
            penalty=subject.penalty(images),
            search=options.search,
            seed=options.seed,
            tolerance=options.tolerance,
            max_seconds=options.max_seconds or math.inf,
        )
        figures = _figures(found, subject)
        if result is not None:
            written = page.files(found, figures, made)
            with signals.held():
                result.publish(written)
    if options.json:
        sys.stdout.write(storage.to_json({"made": made, **figures}))
    elif not options.quiet:
        print(found)
        for name, values in figures["accuracy"].items():
            print(f"{name}: {', '.join(f'{each} {value}' for each, value in values.items())}")
        if options.out is not None:
            print(f"page: {options.out / page.FILES[0]}")


def _figures(found: Audit, subject: Subject) -> dict[str, Any]:
    """Plain values: those of the audit, and what share of images is right, of those held out as well."""
    networks = {"network": found.network, "repopulated": found.repopulated.network}
    if found.grown is not None:
        networks["grown"] = found.grown.network
    judged = {"training": found.problem}
    if subject.images.rest is not None:
        judged["held-out"] = subject.problem(subject.images.rest)
    return {
        "path": subject.path,
        "prices": "derived from the network" if subject.implied else "as they were given",
        "penalty": asdict(found.problem.penalty),
        "value": found.value,
        "dual_value": found.dual_value,
        "gap": found.gap,
        "relative_gap": found.relative_gap,
        "table": found.table,
        "accuracy": {
            f"right of {problem.count:,} {name} images": {
                each: f"{_accuracy(problem, network):.2%}" for each, network in networks.items()
            }
            for name, problem in judged.items()
        },
        "message": found.repopulated.message,
        "search": None if found.unseen is None else found.unseen.summary(),
    }


def _accuracy(problem: Problem, network: ParticleNetwork) -> float:
    return losses.accuracy(problem.loss, problem.output(network), problem.targets)
