"""The pictures of a report."""

from __future__ import annotations

from typing import Any

import numpy as np

from meanfield.pages import plotting
from meanfield.pages.html import Results

ANSWER = ("confusion", "values", "gaps", "proof", "images", "predictions")
PARTICLES = ("populations", "kernels")
CLOSE = ("finite", "segment")
SMALL = "small_"  # in front of the names of the small program's particles
NAMES = (*ANSWER, *PARTICLES, *CLOSE, *(SMALL + name for name in PARTICLES))


def pictures(results: Results) -> dict[str, Any]:
    """Name -> Figure, for everything that the results allow."""
    small = results.get("small", {"skipped": ""})
    found = {**_answer(results), **_particles(results)}
    if "finite" in results:
        return found | _close(results)
    return found if "skipped" in small else found | _particles(small, SMALL) | _close(small)


def _answer(results: Results) -> dict[str, Any]:
    rows, judged = results["rounds"], results["predictions"]
    found: dict[str, Any] = {"confusion": _confusion(judged)}
    if rows:
        found["values"] = plotting.values(rows)
        found["gaps"] = plotting.gaps(rows, results["made"]["settings"]["tolerance"])
    proven = results["solution"]["proven"]
    if proven and proven["curve"]:
        seconds, bounds = zip(*proven["curve"])
        shares = [bound / results["solution"]["value"] for bound in bounds]
        found["proof"] = plotting.proof([*seconds, proven["seconds"]], [*shares, shares[-1]])
    return found | {"images": _image_strip(judged), "predictions": _prediction_scatter(judged)}


def _particles(results: Results, prefix: str = "") -> dict[str, Any]:
    populations, kernels = results["populations"], results["kernels"]
    return {
        f"{prefix}populations": plotting.populations(populations["before"], populations["after"]),
        f"{prefix}kernels": plotting.kernels(np.array(kernels["entries"]), kernels["masses"]),
    }


def _close(results: Results) -> dict[str, Any]:
    finite, segment = results["finite"], results["segment"]
    found: dict[str, Any] = {}
    sampled, trained = ({int(m): drawn for m, drawn in finite[kind].items()} for kind in ("sampled", "trained"))
    if sampled or trained:
        found["finite"] = plotting.finite_networks(sampled, trained, finite["limit"])
    if "skipped" not in segment:
        found["segment"] = plotting.segment(segment, segment["midpoint_violation"])
    return found


def _confusion(predictions: Results) -> Any:
    judged = predictions["held_out"] or predictions["training"]
    return plotting.confusion(np.array(judged["confusion"]), predictions["classes"])


def _image_strip(predictions: Results) -> Any:
    classes, shown = predictions["classes"], predictions["images"]
    what = "F" if predictions["outputs"] == 1 else "margin"
    rows = list(zip(shown["class_index"], shown["predicted"], shown["shown"]))
    captions = [f"{classes[true]}, read as {classes[guess]}\n{what} = {value:+.2f}" for true, guess, value in rows]
    return plotting.image_strip(np.array(shown["pixels"]), captions, [true == guess for true, guess, _ in rows])


def _prediction_scatter(predictions: Results) -> Any:
    judged = {"training": predictions["training"], "held out": predictions["held_out"]}
    groups = {name: list(zip(found["class_index"], found["shown"])) for name, found in judged.items() if found}
    return plotting.predictions(groups, predictions["classes"], output_label(predictions))


def output_label(predictions: Results) -> str:
    """What is drawn of every image: an only output, or how far that of the true class is above the others."""
    one = predictions["outputs"] == 1
    return f"output F (above 0: {predictions['classes'][0]})" if one else "margin: true class minus best other"
