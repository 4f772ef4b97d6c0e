"""A study in one record: its parts, how much of them, and what is said of them; run, summed up and written here.

A part is entered once, in the record of its study: which cells it has, what measures one, which figures, pictures and
sections its rows give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from meanfield.bench import sweep
from meanfield.bench.provenance import Provenance
from meanfield.bench.sweep import Cell, Measure, Tables
from meanfield.pages import html
from meanfield.pages.html import Section
from meanfield.validation import one_of

CELLS = "cells"  # the folder of finished cells
Found = Mapping[str, Any]  # name of a figure -> what it is


@dataclass(frozen=True)
class Part:
    """One question of a study.

    cells(subject, sizes, seed): what is to be measured.  measure: a cell -> its rows.
    figures, pictures: name -> function of all tables; a picture may be None.
    sections: functions of (figures, tables) that give a section of the page each.
    files: name -> function of all tables, for what no CSV can hold.
    """

    cells: Callable[..., Sequence[Cell]]
    measure: Measure
    figures: Mapping[str, Callable[[Tables], Any]] = field(default_factory=dict)
    pictures: Mapping[str, Callable[[Tables], Any]] = field(default_factory=dict)
    sections: Sequence[Callable[[Found, Tables], Section]] = ()
    files: Mapping[str, Callable[[Tables], bytes | str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Parts in the order of the page, sizes by name, and what the page says as a whole.

    name: of its page, and of its directory under runs/.  claim(figures): the sentence at the head of the page.
    groundwork: parts measured before the others, whose cells are made from all cells of these, as cells(cells).
    common(subject): entries of every cell, such as a digest of the images.  places(directory): further arguments of the
        measures, on which no row depends.  closing: sections at the end of the page.
    data(subject): which images are read, in a line.  check(subject, plan): refuses, in the user's terms, what a cell of
        the plan could not do.
    """

    name: str
    title: str
    parts: Mapping[str, Part]
    sizes: Mapping[str, Any]
    claim: Callable[[Found], str]
    groundwork: Mapping[str, Part] = field(default_factory=dict)
    common: Callable[[Any], Cell] = lambda subject: {}
    places: Callable[[Path], Mapping[str, str]] = lambda directory: {}
    closing: Sequence[Section] = ()
    data: Callable[[Any], str] = lambda subject: ""
    check: Callable[[Any, Mapping[str, Sequence[Cell]]], None] = lambda subject, plan: None

    def plan(self, subject: Any, sizes: Any, seed: int = 0, parts: Sequence[str] = ()) -> dict[str, list[Cell]]:
        """The cells of the wanted parts (default: all), groundwork first; parts without cells are left out."""
        wanted = [one_of(part, "part", self.parts) for part in parts] or list(self.parts)
        found = {part: list(self.parts[part].cells(subject, sizes, seed)) for part in self.parts if part in wanted}
        every = [cell for cells in found.values() for cell in cells]
        first = {part: list(each.cells(every)) for part, each in self.groundwork.items()}
        return {part: cells for part, cells in {**first, **found}.items() if cells}

    def run(
        self,
        subject: Any,
        sizes: Any,
        directory: str | Path | None = None,
        *,
        seed: int = 0,
        parts: Sequence[str] = (),
        announce: Callable[[str, Cell, bool], None] = lambda part, cell, kept: None,
        **options: Any,
    ) -> Tables:
        """Rows of every part; finished cells are kept in `directory`/cells.  Without it nothing is kept; what the
        measures write by the way goes to a directory for this call.

        options: jobs and backend of `sweep.run`.
        """
        directory, common = None if directory is None else Path(directory), self.common(subject)
        tables: Tables = {}
        with TemporaryDirectory() if directory is None else nullcontext(directory) as place:
            for part, cells in self.plan(subject, sizes, seed, parts).items():
                tables[part] = sweep.run(
                    self._all[part].measure,
                    [{**cell, **common} for cell in cells],
                    None if directory is None else directory / CELLS,
                    announce=lambda cell, kept, part=part: announce(part, cell, kept),
                    places=self.places(Path(place)),
                    **options,
                )
        return tables

    @property
    def _all(self) -> dict[str, Part]:
        return {**self.parts, **self.groundwork}

    def summary(self, tables: Tables) -> dict[str, Any]:
        """The figures that the study is for, from whichever tables there are."""
        return {name: make(tables) for part in self._there(tables) for name, make in part.figures.items()}

    def pictures(self, tables: Tables) -> dict[str, Any]:
        """Name -> Figure, for the tables there are."""
        drawn = {name: draw(tables) for part in self._there(tables) for name, draw in part.pictures.items()}
        return {name: picture for name, picture in drawn.items() if picture is not None}

    def files(self, tables: Tables, made: Provenance, *, report: bool = True) -> dict[str, bytes | str]:
        """Name -> content: the tables as CSV, files of the parts' own and, with `report`, the page, its pictures as PNG
        and summary.json.
        """
        found: dict[str, bytes | str] = {f"{part}.csv": sweep.table(rows, made) for part, rows in tables.items()}
        tables = {part: rows for part, rows in tables.items() if rows}
        found |= {name: make(tables) for part in self._there(tables) for name, make in part.files.items()}
        if not report:
            return found
        figures = self.summary(tables)
        return {**found, **html.files(self.page(figures, tables, made), self.name, self.pictures(tables), figures)}

    def names(self) -> list[str]:
        """Of the files that there may be."""
        drawn = [f"{name}.png" for part in self._all.values() for name in part.pictures]
        others = [name for part in self._all.values() for name in part.files]
        return [*(f"{part}.csv" for part in self._all), *drawn, *others, html.SUMMARY, self.page_name]

    def folders(self) -> list[str]:
        """Of what is kept beside them."""
        home = Path("out")
        return [CELLS, *(Path(place).name for place in self.places(home).values() if Path(place).parent == home)]

    @property
    def page_name(self) -> str:
        return html.page_name(self.name)

    def page(self, found: Found, tables: Tables, made: Provenance) -> html.Page:
        """The sections of the parts that there are, groundwork after the others."""
        sections = [write(found, tables) for part in self._there(tables) for write in part.sections]
        return html.Page(self.title, self.claim(found), [*sections, *self.closing], asdict(made))

    def _there(self, tables: Tables) -> list[Part]:
        return [part for name, part in self._all.items() if tables.get(name)]
