"""The grafting study in one record: a part is entered here and nowhere else."""

from __future__ import annotations

from functools import partial

from meanfield.bench.study import Part, Study
from meanfield.studies.grafting import measure, page, pictures, plan, summary

STUDY = Study(
    name="graft",
    title="Do networks from different starts learn the same features?",
    claim=page.claim,
    sizes=plan.SIZES,
    groundwork={"train": Part(plan.train, measure.train, sections=[page.train])},
    # a file of the same name with other images is another study
    common=lambda base: {"images": base.images().digest},
    data=lambda base: base.images().summary,
    check=plan.check,
    places=lambda directory: {"store": str(directory / "networks")},
    closing=[page.LIMITS],
    parts={
        "starts": Part(
            plan.starts,
            measure.pair,
            {
                "starts": lambda tables: summary.starts(tables["starts"]),
                "correlations": lambda tables: summary.correlations(tables["starts"]),
            },
            {"profiles": pictures.starts, "methods": pictures.methods, "later": pictures.later},
            [page.starts, page.methods, page.later, page.correlations],
        ),
        "classes": Part(
            plan.classes,
            measure.classes,
            {"classes": lambda tables: summary.class_errors(tables["classes"])},
            {"classes": pictures.classes},
            [page.classes],
        ),
        "l2": Part(
            plan.l2,
            measure.pair,
            {"l2": lambda tables: summary.starts(tables["l2"])},
            {"l2": pictures.l2},
            [page.l2],
        ),
        "trajectory": Part(
            plan.trajectory,
            measure.pair,
            {"trajectory": lambda tables: summary.contrasts(tables["trajectory"])},
            {
                **{f"trajectory_{of}": partial(pictures.trajectory, of=of) for of in pictures.TRAJECTORY},
                "ridge": pictures.ridge,
            },
            [page.trajectory],
        ),
        "epochs": Part(plan.epochs, measure.pair, {}, {"epochs": pictures.epochs}, [page.epochs]),
        "across": Part(plan.across, measure.pair, {}, {"across": pictures.across}, [page.across]),
        "strengths": Part(
            plan.strengths,
            measure.pair,
            {"strengths": lambda tables: summary.matrix(tables["strengths"], "lower_strength", "upper_strength")},
            {"strengths": pictures.strengths},
            [page.strengths],
        ),
        "widths": Part(
            plan.widths,
            measure.pair,
            {"widths": lambda tables: summary.matrix(tables["widths"], "lower_width", "upper_width")},
            {"widths": pictures.widths},
            [page.widths],
        ),
        "procedures": Part(
            plan.procedures,
            measure.procedures,
            {"procedures": lambda tables: summary.procedures(tables["procedures"])},
            {},
            [page.procedures],
        ),
    },
)
