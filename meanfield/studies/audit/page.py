"""The page of an audit: its table, and the masses before and after repopulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from meanfield.auditing import Audit
from meanfield.pages import html, plotting
from meanfield.pages.html import Figure, Note, Page, Section, Table
from meanfield.pages.words import by, number, scientific
from meanfield.storage import networks

NAME, MASSES = "audit", "masses"
REPOPULATED = "repopulated.safetensors"
FILES = (html.page_name(NAME), html.SUMMARY, f"{MASSES}.png", REPOPULATED)
HEADS = {
    "quantity": "",
    "network": "the network",
    "repopulated": "repopulated",
    "grown": "with features it lacks",
}


def files(found: Audit, figures: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, bytes | str]:
    """Name -> content of the page, its picture, summary.json and the repopulated network."""
    before, after = ([p.tolist() for p in each.masses] for each in (found.network, found.repopulated.network))
    drawn = {MASSES: plotting.populations(before, after)}
    pages = html.files(_page(found, figures, made), NAME, drawn, figures)
    return {**pages, REPOPULATED: networks.pack(found.repopulated.network, made)}


def _page(found: Audit, figures: Mapping[str, Any], made: Mapping[str, Any]) -> Page:
    gain = found.value - found.repopulated.value
    claim = Markup(
        "The network has J = <b>{}</b>. Its own features allow <b>{}</b>: repopulation alone lowers J by {:.2%}, and "
        "no population of these features lies more than {} below the network."
    ).format(number(found.value), number(found.repopulated.value), gain / found.value, scientific(found.gap))
    return Page(f"Audit of {figures['path']}", claim, [*_sections(found, figures)], made, "All figures: summary.json.")


def _sections(found: Audit, figures: Mapping[str, Any]) -> list[Section]:
    heads = list(found.table[0])
    rows = [[_cell(row[head]) for head in heads] for row in found.table]
    rows += [[name, *(_cell(values.get(head)) for head in heads[1:])] for name, values in figures["accuracy"].items()]
    penalty = found.problem.penalty
    prices = (
        f"J is the mean {found.problem.loss.name} loss over {found.problem.count:,} images plus the penalties: source "
        f"{penalty.source:.4g}, readout {penalty.readout:.4g}, input {penalty.input:.4g}, {figures['prices']}."
    )
    explained = (
        "Repopulated: masses, kernels between features and the readout are free, the features are those of the "
        "network. A layer of so many features is worth 1 / sum p² equal ones. A dead feature is zero at every "
        "position of every image."
    )
    said = [f"The program: {found.repopulated.message}."]
    said += [] if found.unseen is None else [f"The search: {found.unseen.summary()}."]
    picture = Figure(
        MASSES,
        "Masses per layer, heaviest first: equal in the network as it was trained, and where the convex program of its "
        f"features puts them ({by(found.network.widths)} features before, "
        f"{by(found.repopulated.network.widths)} after).",
        wide=True,
    )
    limits = Note(
        "What it does not say:",
        "the gap is about J on these images and the features at hand. A smaller J is no promise about other images, "
        "and features that nobody has tried may allow less still.",
    )
    table = Table([HEADS[head] for head in heads], rows)
    return [
        Section("What its own features allow", [prices, table, explained, *said]),
        Section("Masses", [picture, limits]),
    ]


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
