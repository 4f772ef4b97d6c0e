"""The landscape study in one record, and the surface of given networks in another: a part is entered here and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meanfield.bench.classifiers import networks_of
from meanfield.bench.study import Part, Study
from meanfield.bench.sweep import Measure
from meanfield.studies.landscape import archives, given, measure, page, pictures, plan, summary
from meanfield.studies.landscape.joins import joins
from meanfield.studies.landscape.metric import metric
from meanfield.studies.landscape.toy import toy

NAME = "landscape"


def _surfaces(cells: Callable[..., Any], measured: Measure, *sections: Callable[..., Any]) -> Part:
    return Part(
        cells,
        measured,
        {"surfaces": lambda tables: summary.surfaces(tables["surfaces"])},
        {"surfaces": pictures.surfaces},
        sections,
        {
            "surfaces.npz": lambda tables: archives.npz(tables["surfaces"]),
            "surfaces.json": lambda tables: archives.json(tables["surfaces"]),
            "surfaces.nc": lambda tables: archives.netcdf(tables["surfaces"]),
        },
    )


STUDY = Study(
    name=NAME,
    title="The loss around trained networks, and what a picture of it can say",
    claim=page.claim,
    sizes=plan.SIZES,
    groundwork={"train": Part(networks_of, measure.train, sections=[page.train])},
    # a file of the same name with other images is another study
    common=lambda subject: {"images": subject.base.images().digest},
    data=lambda subject: subject.base.images().summary,
    places=lambda directory: {"store": str(directory / "networks")},
    closing=[page.LIMITS],
    parts={
        "surfaces": _surfaces(plan.surfaces, measure.surface, page.surfaces),
        "sharpness": Part(
            plan.sharpness,
            measure.sharpness,
            {"sharpness": lambda tables: summary.measures(tables["sharpness"])},
            {"sharpness": pictures.sharpness},
            [page.sharpness],
        ),
        "matched": Part(
            plan.matched,
            measure.sharpness,
            {
                "matched": lambda tables: summary.measures(tables["matched"]),
                "reach": lambda tables: summary.reach(tables["matched"]),
                "correlations": summary.correlations,
            },
            {"matched": pictures.matched},
            [page.matched, page.correlations],
        ),
        "toy": Part(
            plan.toy,
            toy,
            {"toy": lambda tables: summary.writings(tables["toy"])},
            {"toy": pictures.toy},
            [page.toy],
        ),
        "slices": Part(
            plan.slices,
            measure.slices,
            {"slices": lambda tables: summary.curvatures(tables["slices"])},
            {"slices": pictures.slices},
            [page.slices],
        ),
        "joins": Part(
            plan.joins,
            joins,
            {
                "barriers": lambda tables: summary.barriers(tables["joins"]),
                "slopes": lambda tables: summary.slopes(tables["joins"]),
            },
            {"joins": pictures.joins, "barriers": pictures.barriers},
            [page.joins],
        ),
        "metric": Part(
            plan.metric,
            metric,
            {"metric": lambda tables: summary.in_metrics(tables["metric"])},
            {"metric": pictures.metric},
            [page.metric],
        ),
        "trajectory": Part(
            plan.trajectory,
            measure.trajectory,
            {"trajectory": lambda tables: summary.paths(tables["trajectory"])},
            {"trajectory": pictures.trajectory},
            [page.trajectory],
        ),
    },
)

ONE = Study(
    name=NAME,
    title="The loss around a network",
    claim=page.claim_of_one,
    sizes=plan.SIZES,
    common=lambda subject: {"images": given.digest(subject.images)},
    data=lambda subject: subject.images.summary,
    check=lambda subject, _: subject.check(),
    places=lambda directory: {"store": str(directory / "networks")},
    closing=[page.LIMITS],
    parts={"surfaces": _surfaces(given.cells, given.surface, page.surfaces, page.figures)},
)
