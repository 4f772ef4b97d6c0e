"""The transfer study in one record: a part is entered here and nowhere else."""

from __future__ import annotations

from functools import partial
from itertools import product

from meanfield.bench.classifiers import networks_of
from meanfield.bench.study import Part, Study
from meanfield.studies.transfer import judged, page, pictures, plan, summary
from meanfield.studies.transfer.alphas import alphas
from meanfield.studies.transfer.fusion import fusion
from meanfield.studies.transfer.reduction import reduction
from meanfield.studies.transfer.regimes import regimes
from meanfield.studies.transfer.steps import steps
from meanfield.studies.transfer.tasks import tasks
from meanfield.studies.transfer.widths import widths

STUDY = Study(
    name="transfer",
    title="What of a training survives another beginning?",
    claim=page.claim,
    sizes=plan.SIZES,
    groundwork={"train": Part(networks_of, judged.train, sections=[page.train])},
    # a file of the same name with other images is another study
    common=lambda subject: {"images": subject.base.images().digest},
    data=lambda subject: subject.base.images().summary,
    check=plan.check,
    places=lambda directory: {"store": str(directory / "networks")},
    closing=[page.LIMITS],
    parts={
        "alphas": Part(
            plan.alphas,
            alphas,
            {
                "alphas": lambda tables: summary.alphas(tables["alphas"]),
                "chosen": lambda tables: summary.chosen(tables["alphas"]),
            },
            {
                f"alphas_{arms}_{figure}": partial(pictures.alphas, arms=arms, figure=figure)
                for arms, figure in product(pictures.ARMS, pictures.FIGURES)
                if arms != "sums" or figure == "held_out_accuracy"
            },
            [page.alphas, page.chosen],
        ),
        "regimes": Part(
            plan.regimes,
            regimes,
            {"regimes": lambda tables: summary.regimes(tables["regimes"])},
            {"gaps": pictures.gaps, "predicted": pictures.predicted},
            [page.regimes],
        ),
        "widths": Part(
            plan.widths,
            widths,
            {"widths": lambda tables: summary.distances(tables["widths"])},
            {"widths": pictures.widths},
            [page.widths],
        ),
        "fusion": Part(
            plan.fusion,
            fusion,
            {
                "fusion": lambda tables: summary.fusion(tables["fusion"]),
                "reduced_unions": lambda tables: summary.reduced_unions(tables["fusion"]),
            },
            {"fusion": pictures.fusion},
            [page.fusion],
        ),
        "reduction": Part(
            plan.reduction,
            reduction,
            {"reduction": lambda tables: summary.reduction(tables["reduction"])},
            {"reduction": pictures.reduction},
            [page.reduction],
        ),
        "steps": Part(plan.steps, steps, {"steps": lambda tables: summary.steps(tables["steps"])}, {}, [page.steps]),
        "tasks": Part(
            plan.tasks,
            tasks,
            {
                "tasks": lambda tables: summary.tasks(tables["tasks"]),
                "rivals": lambda tables: summary.rivals(tables["tasks"]),
            },
            {"tasks": pictures.tasks},
            [page.tasks],
        ),
    },
)
