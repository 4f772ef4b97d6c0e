"""How a page is written: its look, figures and tables, strict JSON."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from meanfield import storage
from meanfield.pages import plotting

Results = dict[str, Any]


def to_json(results: Results) -> str:
    """Strict JSON: NaN and infinities become null, dataclasses objects."""
    return json.dumps(_strict(results), indent=2, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _strict(asdict(value))
    if isinstance(value, dict):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def publish(
    directory: str | Path, name: str, drawn: Mapping[str, Any], found: Any, page: Callable[[dict[str, bytes]], str]
) -> Path:
    """Write figures (name -> Figure) as PNG, `found` as summary.json and the page that is made of the pictures;
    returns the page's path.
    """
    directory = Path(directory)
    figures = {each: plotting.png(picture) for each, picture in drawn.items()}
    for each, content in figures.items():
        storage.write_atomically(directory / f"{each}.png", content)
    storage.write_atomically(directory / "summary.json", to_json(found))
    return storage.write_atomically(directory / name, page(figures))


def inline(image: bytes) -> str:
    """A PNG as the address of an <img> inside the page."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def assemble(title: str, claim: str, sections: Iterable[str], footer: str) -> str:
    """A page of the house's look from pieces of HTML."""
    template = Template(files("meanfield.pages").joinpath("templates/page.html").read_text(encoding="utf-8"))
    inside = "\n".join(f"<section>{section}</section>" for section in sections)
    return template.substitute(title=title, claim=claim, sections=inside, footer=footer)


def figure(images: dict[str, str], name: str, caption: str, *, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return (
        f'<figure{kind}><img src="{images[name]}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False) -> str:
    """Cells are HTML already."""
    cell = '<td class="text">' if text else "<td>"
    body = "".join("<tr>" + "".join(f"{cell}{entry}</td>" for entry in row) + "</tr>" for row in rows)
    return (
        f"<div "
        f'class="scroll"><table><thead><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def plain_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of plain values, None as an empty cell."""
    return table(
        [escape(each) for each in head], [["" if cell is None else escape(str(cell)) for cell in row] for row in rows]
    )
