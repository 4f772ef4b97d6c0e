"""The width study in one record: a part is entered here and nowhere else."""

from __future__ import annotations

from meanfield.bench.study import Part, Study
from meanfield.studies.widths import coordinates, networks, page, pictures, plan, summary, trajectories

STUDY = Study(
    name="widths",
    title="Finite networks against the continuous one",
    claim=page.claim,
    sizes=plan.SIZES,
    # a file of the same name with other images is another study
    common=lambda task: {"images": task.digest()},
    data=lambda task: task.images().summary,
    check=plan.check,
    parts={
        "sampled": Part(
            plan.sampled,
            networks.sampled,
            {"sampled": lambda tables: summary.sampled_rates(tables["sampled"])},
            {"sampled": pictures.sampled},
            [page.sampled],
        ),
        "limit": Part(plan.limit, networks.limit),
        "trained": Part(
            plan.trained,
            networks.trained,
            {"trained": lambda tables: summary.trained_shares(tables["trained"], tables.get("limit", ()))},
            {"trained": pictures.trained},
            [page.trained],
        ),
        "trajectories": Part(
            plan.trajectories,
            trajectories.pair,
            {"trajectories": lambda tables: summary.trajectory_rates(tables["trajectories"])},
            {"trajectories": pictures.trajectories, "times": pictures.times},
            [page.trajectories],
        ),
        "gallery": Part(plan.gallery, trajectories.gallery, {}, {"seeds": pictures.seeds}, [page.gallery]),
        "statistics": Part(
            plan.statistics, trajectories.statistics, {}, {"distributions": pictures.distributions}, [page.statistics]
        ),
        "coordinates": Part(
            plan.coordinates,
            coordinates.check,
            {"coordinates": lambda tables: summary.coordinate_slopes(tables["coordinates"])},
            {"coordinates": pictures.coordinates},
            [page.coordinates],
        ),
        "kernel": Part(
            plan.kernel,
            networks.kernel,
            {"kernel": lambda tables: {"slope": summary.rate(tables["kernel"], "relative_error", "median")}},
            {"kernel": pictures.kernel},
            [page.kernel],
        ),
    },
)
