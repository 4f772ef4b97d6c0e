"""`meanfield widths`."""

from __future__ import annotations

from dataclasses import dataclass

from meanfield.bench.command import StudyOptions, run_study
from meanfield.bench.task import Images, Machine, Task
from meanfield.studies.widths.study import STUDY


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions, Images, Machine):
    """What the width study can be asked for."""


def command(options: Options = Options()) -> None:
    """Measure how finite networks approach the continuous one, and write tables and a page.

    Networks sampled from a solved measure and trained from random starts, trajectories of their features, moments, a
    coordinate check of four parameterisations and a tangent kernel, each over widths and seeds. Parts that train take
    half of the images, averaged over windows of twice the size. Finished cells are kept: after a stop of any kind the
    same command goes on and ends with the same tables.

    The quick size takes a minute, the default one under 10 minutes on 2 cores, the full one hours.
    """
    run_study(STUDY, options, Task.from_dict(options.to_dict()), "meanfield", "widths")
