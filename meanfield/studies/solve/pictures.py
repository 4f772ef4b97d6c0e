"""The pictures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meanfield.pages import plotting
from meanfield.pages.html import Results

NAMES = ("values", "gaps", "populations", "kernels", "images", "predictions", "finite", "segment")


def pictures(results: Results) -> dict[str, Any]:
    """Name -> Figure, for everything that the results allow."""
    rows, finite, segment, populations = (results[name] for name in ("rounds", "finite", "segment", "populations"))
    found: dict[str, Any] = {}
    if rows:
        found["values"] = plotting.values(rows)
        found["gaps"] = plotting.gaps(rows, results["made"]["settings"]["tolerance"])
    found["populations"] = plotting.populations(populations["before"], populations["after"])
    found["kernels"] = plotting.kernels(np.array(results["kernels"]["entries"]), results["kernels"]["masses"])
    found["images"] = _image_strip(results["predictions"])
    found["predictions"] = _prediction_scatter(results["predictions"])
    sampled, trained = ({int(m): drawn for m, drawn in finite[kind].items()} for kind in ("sampled", "trained"))
    if sampled or trained:
        found["finite"] = plotting.finite_networks(sampled, trained, finite["limit"])
    if "skipped" not in segment:
        found["segment"] = plotting.segment(segment, segment["midpoint_violation"])
    return found


def _image_strip(predictions: Results) -> Any:
    classes, judged = predictions["classes"], predictions["training"]
    what = "F" if len(classes) == 2 else "margin"
    rows = list(zip(judged["images"], judged["class_index"], judged["predicted"], judged["shown"]))
    captions = [f"{classes[true]}, read as {classes[guess]}\n{what} = {shown:+.2f}" for _, true, guess, shown in rows]
    return plotting.image_strip(np.array(judged["images"]), captions, [true == guess for _, true, guess, _ in rows])


def _prediction_scatter(predictions: Results) -> Any:
    judged = {"training": predictions["training"], "held out": predictions["held_out"]}
    groups = {name: list(zip(found["class_index"], found["shown"])) for name, found in judged.items() if found}
    label = output_label(predictions["classes"])
    return plotting.predictions(groups, predictions["classes"], label)


def output_label(classes: Sequence[str]) -> str:
    """What is drawn of every image."""
    return f"output F (above 0: {classes[0]})" if len(classes) == 2 else "margin: true class minus best other"
