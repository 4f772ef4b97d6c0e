"""How a page is written: a record of sections, turned into one HTML file of the house's look by a template.

Text is escaped wherever it comes from; what is HTML already is a `Markup`.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from meanfield.pages import interactive
from meanfield.storage import to_json

SUMMARY = "summary.json"
Results = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """The picture of that name, drawn for the page, and what to see in it."""

    name: str
    caption: str
    wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Interactive:
    """The picture of that name and, where there are scripts and WebGL, above it one that can be turned: `plot` (JSON,
    see `interactive.reliefs`).
    """

    name: str
    caption: str
    plot: str
    kind: str = "interactive"


@dataclass(frozen=True)
class Table:
    """Plain values, None as an empty cell; `text` names the columns of prose, which may break into lines."""

    head: Sequence[str | Markup]
    rows: Sequence[Sequence[Any]]
    text: Collection[int] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Note:
    """A paragraph that must not be missed; `word` is set in bold in front of it."""

    word: str
    text: str
    kind: str = "note"


@dataclass(frozen=True)
class Verbatim:
    """Text that keeps its lines, such as what a program printed."""

    text: str
    kind: str = "verbatim"


@dataclass(frozen=True)
class Details:
    """A table that is folded away until it is asked for."""

    summary: str
    table: Table
    kind: str = "details"


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order: paragraphs (text), figures, tables, notes."""

    title: str
    items: Sequence[Any]
    id: str = ""


@dataclass(frozen=True)
class Page:
    """A title, a sentence that says what was found, sections, and what made it (see `bench.provenance`)."""

    title: str
    claim: str | Markup
    sections: Sequence[Section]
    made: Mapping[str, Any]
    remark: str = "The tables are the CSV files beside this page."


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("meanfield.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def render(page: Page, images: Mapping[str, str]) -> str:
    """The page; images: name -> address of the picture (see `inline`)."""
    turned = any(getattr(item, "kind", "") == "interactive" for section in page.sections for item in section.items)
    return _template().render(page=page, images=images, script=Markup(interactive.script()) if turned else "")


def inline(image: bytes) -> str:
    """A PNG as the address of an <img> inside the page."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def files(page: Page, name: str, drawn: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, bytes | str]:
    """Name -> content: pictures (name -> matplotlib Figure) as PNG, `found` as summary.json, and name.html."""
    from meanfield.pages import plotting

    pictures = {each: plotting.png(figure) for each, figure in drawn.items()}
    return {
        **{f"{each}.png": content for each, content in pictures.items()},
        SUMMARY: to_json({"made": page.made, **found}),
        page_name(name): render(page, {each: inline(content) for each, content in pictures.items()}),
    }


def page_name(name: str) -> str:
    return f"{name}.html"
