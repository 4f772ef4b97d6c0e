"""From records to one HTML page and a rich table: what was claimed, measured, and what became of the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from markupsafe import Markup
from rich.table import Table

from meanfield.bench.provenance import Provenance
from meanfield.pages import html
from meanfield.pages.html import Figure, Page, Section, Verbatim
from meanfield.storage import to_json
from theory_checks import pictures
from theory_checks.claim import Axes

Record = Mapping[str, Any]
PAGE, RESULTS = "index.html", "results.json"
TITLE = "Claims and their controls"
FAILED_CONTROL = "CONTROL PASSED"


def grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Name -> its records, by seed."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda each: each["seed"]):
        found.setdefault(record["name"], []).append(record)
    return found


def verdict(record: Record) -> str:
    if record["error"]:
        return "ERROR"
    if not record["holds"]:
        return "FAILS"
    return "holds" if record["control_rejected"] else FAILED_CONTROL


def number(value: Any) -> str:
    return f"{float(value):.3g}"


def span(values: Sequence[Any]) -> str:
    """One number, or the range over seeds."""
    low, high = min(values, key=float), max(values, key=float)
    return number(low) if number(low) == number(high) else f"{number(low)} to {number(high)}"


def threshold(record: Record) -> str:
    return f"{'≥' if record['at_least'] else '≤'} {number(record['threshold'])}"


def _row(records: Sequence[Record]) -> list[str]:
    first, words = records[0], sorted({verdict(record) for record in records})
    said = " / ".join(words) + (f" ({len(records)} seeds)" if len(records) > 1 else "")
    measured, control = (span([record[key] for record in records]) for key in ("statistic", "control_statistic"))
    return [
        first["name"],
        measured,
        threshold(first),
        control,
        f"{sum(r['seconds'] for r in records) / len(records):.1f}",
        said,
    ]


COLUMNS = ("claim", "statistic", "holds if", "closest control", "seconds", "verdict")


def table(records: Sequence[Record]) -> Table:
    """The verdicts for a terminal."""
    found = Table(title=TITLE, show_lines=False)
    for index, column in enumerate(COLUMNS):
        found.add_column(column, justify="right" if 0 < index < 5 else "left", overflow="fold")
    for name, group in grouped(records).items():
        row = _row(group)
        passed = all(record["passed"] for record in group)
        found.add_row(name, *row[1:-1], f"[{'green' if passed else 'bold red'}]{row[-1]}[/]")
    return found


def failures(records: Sequence[Record]) -> list[str]:
    """One line for everything that is not as it should be."""
    lines = []
    for record in records:
        where = f"{record['name']}, seed {record['seed']}"
        if record["error"]:
            lines.append(f"{where}: the measurement raised\n{record['error']}")
        elif not record["holds"]:
            measured = f"{number(record['statistic'])} where {threshold(record)} was needed"
            lines.append(f"{where}: the claim fails, {measured}; {record['evidence']['text']}")
        for name in record["passing_controls"]:
            control = record["controls"][name]
            lines.append(f"{where}: THE CONTROL PASSES, so the check is worth nothing: {name}; {control['text']}")
    return lines


def files(records: Sequence[Record], made: Provenance, axes: Mapping[str, Axes]) -> dict[str, bytes | str]:
    """Name -> content: the picture of every claim as PNG, results.json and the page that links them."""
    drawn = {
        f"{name}.png": pictures.picture(first, axes[name])
        for name, (first, *_) in grouped(records).items()
        if first["evidence"]
    }
    images = {file.removesuffix(".png"): file for file in drawn}
    return {
        **drawn,
        RESULTS: to_json({"made": made, "records": records}),
        PAGE: html.render(assemble(records, made), images),
    }


def names(claims: Sequence[str]) -> list[str]:
    """Of the files that there may be."""
    return [*(f"{name}.png" for name in claims), RESULTS, PAGE]


def assemble(records: Sequence[Record], made: Provenance) -> Page:
    """The page; the figure of a claim has its name."""
    groups = grouped(records)
    passed = sum(all(record["passed"] for record in group) for group in groups.values())
    controls = sum(len(group[0]["controls"]) for group in groups.values())
    summary = (
        f"{passed} of {len(groups)} claims hold with all of their {controls} negative controls rejected. A control is "
        "the same measurement without an assumption of the theory; a claim whose control passes counts as failed."
    )
    rows = [[_link(name), *_row(group)[1:-1], _badge(group)] for name, group in groups.items()]
    sections = [Section(TITLE, [html.Table(COLUMNS, rows)]), *map(_section, groups.values())]
    remark = "Every record is in results.json beside this page."
    return Page("What the theory claims, measured", summary, sections, asdict(made), remark)


def _link(name: str) -> Markup:
    return Markup('<a href="#{0}">{0}</a>').format(name)


def _badge(group: Sequence[Record]) -> Markup:
    passed = all(record["passed"] for record in group)
    return Markup('<span class="verdict {}">{}</span>').format("good" if passed else "bad", _row(group)[-1])


def _section(group: Sequence[Record]) -> Section:
    first = group[0]
    name, evidence = first["name"], first["evidence"]
    place = Markup('{} <span class="soft">{}; {}</span>').format(_badge(group), name, first["source"])
    rule = f"Statistic: {first['measured']}. Holds if {threshold(first)}: {first['derivation']}."
    error = [Verbatim(first["error"])] if first["error"] else []
    caption = f"{name}: measured on the left, controls on the right"
    picture = [Figure(name, caption, wide=True)] if evidence else []
    limits = Markup("<b>What it does not show.</b> {}").format(first["limits"])
    return Section(first["statement"], [place, rule, *error, _evidence(first), *picture, limits], id=name)


def _evidence(record: Record) -> html.Table:
    """What was measured, and below it each control."""
    found = {"measured": record["evidence"]} if record["evidence"] else {}
    found |= {f"control: {name}": evidence for name, evidence in record["controls"].items()}
    rows = [[name, number(evidence["statistic"]), evidence["text"]] for name, evidence in found.items()]
    return html.Table(["", "statistic", f"seed {record['seed']}"], rows, text={0, 2})
