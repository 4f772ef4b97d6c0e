"""From records to one HTML page and a rich table: what was claimed, measured, and what became of the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from rich.table import Table

Record = Mapping[str, Any]
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
    found = Table(title="Claims and their controls", show_lines=False)
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


def html(records: Sequence[Record], images: Mapping[str, str], command: str) -> str:
    """The page; images: claim -> address of its picture."""
    groups = grouped(records)
    passed = sum(all(record["passed"] for record in group) for group in groups.values())
    controls = sum(len(group[0]["controls"]) for group in groups.values())
    summary = (
        f"{passed} of {len(groups)} claims hold with all of their {controls} negative controls rejected. A control is "
        "the same measurement without an assumption of the theory; a claim whose control passes counts as failed."
    )
    return Template((Path(__file__).parent / "template.html").read_text(encoding="utf-8")).substitute(
        title="What the theory claims, measured",
        summary=escape(summary),
        table=_html_table(groups),
        sections="\n".join(_section(group, images.get(name)) for name, group in groups.items()),
        footer=f"Made by <code>{escape(command)}</code>.",
    )


def _html_table(groups: Mapping[str, Sequence[Record]]) -> str:
    kinds = ["", *[' class="number"'] * 4, ""]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, COLUMNS))
    lines = []
    for name, group in groups.items():
        cells = [f'<a href="#{escape(name)}">{escape(name)}</a>', *map(escape, _row(group)[1:-1]), _badge(group)]
        lines.append("<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, cells)) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _badge(group: Sequence[Record]) -> str:
    passed = all(record["passed"] for record in group)
    return f'<span class="verdict {"good" if passed else "bad"}">{escape(_row(group)[-1])}</span>'


def _section(group: Sequence[Record], image: str | None) -> str:
    first = group[0]
    rows = [("measured", first["evidence"], first["statistic"])] if first["evidence"] else []
    rows += [(f"control: {name}", evidence, evidence["statistic"]) for name, evidence in first["controls"].items()]
    body = "".join(
        f"<tr><td>{escape(name)}</td><td "
        f'class="number">{number(statistic)}</td><td>{escape(evidence["text"])}</td></tr>'
        for name, evidence, statistic in rows
    )
    caption = f"{escape(first['name'])}: measured on the left, controls on the right"
    picture = f'<figure><img src="{escape(image)}" alt="{caption}"></figure>' if image else ""
    error = f"<pre>{escape(first['error'])}</pre>" if first["error"] else ""
    return (
        f'<section id="{escape(first["name"])}"><h2>{escape(first["statement"])}</h2>'
        f'<p>{_badge(group)} <span class="soft">{escape(first["name"])}; {escape(first["source"])}</span></p>'
        f"<p>Statistic: {escape(first['measured'])}. Holds if {threshold(first)}: "
        f"{escape(first['derivation'])}.</p>{error}"
        f'<div class="scroll"><table><thead><tr><th></th><th class="number">statistic</th><th>seed '
        f"{first['seed']}</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>{picture}<p><b>What it does not show.</b> "
        f"{escape(first['limits'])}</p></section>"
    )
