"""Sweeps: one function over many cells, in parallel, every finished cell kept at once, never measured twice.

A cell is a dict of plain JSON values; the function turns it into rows, dicts of plain values, and must depend on the
cell alone.  joblib runs the cells: in processes of this machine, or on a cluster with the backends "dask" and "ray"
once their packages are installed and connected.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from meanfield.bench import provenance, workers
from meanfield.bench.provenance import Provenance
from meanfield.storage import files
from meanfield.validation import Misuse, integer

Cell = dict[str, Any]
Row = dict[str, Any]
Rows = Sequence[Row]
Tables = dict[str, list[Row]]
Measure = Callable[..., list[Row]]


def run(
    measure: Measure,
    cells: Sequence[Cell],
    directory: str | Path | None = None,
    *,
    jobs: int = 1,
    backend: str = "loky",
    announce: Callable[[Cell, bool], None] = lambda cell, kept: None,
    places: Mapping[str, str] | None = None,
    sources: Callable[[Cell], Iterable[Path]] | None = None,
    lasting: Callable[[list[Row]], bool] = lambda rows: True,
) -> list[Row]:
    """Rows of all cells in the order of the cells, whatever order they were finished in.

    places: further arguments of `measure`, such as directories, on which its rows do not depend.

    With `directory` every finished cell is a file there, written whole or not at all; a later call with the same
    directory takes it from there if the cell, the whole library, the package of the measure (or the files
    `sources(cell)` in its place) and the versions of what it computes with are the same.  A file that is damaged, or
    holds another cell than its name says, is named in a warning and its cell measured again.  Rows that are not
    `lasting`, such as those of a failure, are not kept.  announce(cell, kept) is called once for every cell, kept where
    it was there already.
    """
    workers.require_backend(backend)
    keeper = None if directory is None else _Keeper(Path(directory), measure, sources)
    found: dict[int, list[Row]] = {}
    for index, cell in enumerate(cells):
        rows = None if keeper is None else keeper.stored(cell)
        if rows is not None:
            found[index] = rows
            announce(cell, True)
    waiting = [(index, cell) for index, cell in enumerate(cells) if index not in found]
    for index, rows in _measured(measure, waiting, integer(jobs, "jobs"), backend, places or {}):
        if keeper is not None and lasting(rows):
            keeper.keep(cells[index], rows)
        found[index] = json.loads(json.dumps(rows))  # as it will be read back
        announce(cells[index], False)
    return [row for index in range(len(cells)) for row in found[index]]


def product_of(fixed: Cell, **lists: Iterable[Any]) -> list[Cell]:
    """`fixed` with every choice from lists of settings, the last one running fastest."""
    return [{**fixed, **dict(zip(lists, values))} for values in product(*lists.values())]


def select(rows: Rows, **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def groups(rows: Rows, *names: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _measured(
    measure: Measure, waiting: Sequence[tuple[int, Cell]], jobs: int, backend: str, places: Mapping[str, str]
) -> Iterator[tuple[int, list[Row]]]:
    """Results as they are finished."""
    return workers.results(_one, [(measure, *each, places) for each in waiting], jobs, backend)


def _one(measure: Measure, index: int, cell: Cell, places: Mapping[str, str]) -> tuple[int, list[Row]]:
    return index, measure(cell, **places)


class _Keeper:
    """Finished cells in a directory, a file each, named by everything that its rows depend on."""

    def __init__(
        self, directory: Path, measure: Measure, sources: Callable[[Cell], Iterable[Path]] | None = None
    ) -> None:
        self.measure = _named(measure)
        self.directory, self.sources = directory, sources

    def key(self, cell: Cell) -> dict[str, Any]:
        """What the rows of a cell depend on, of JSON kinds."""
        package = self.measure.split(":")[0]
        code = provenance.package(package) if self.sources is None else provenance.digest(self.sources(cell))
        versions = provenance.versions(provenance.NUMERICAL)
        made_by = {"measure": self.measure, "code": code, "library": provenance.library(), "versions": versions}
        return json.loads(json.dumps({"made_by": made_by, "cell": cell}))

    def path(self, key: dict[str, Any]) -> Path:
        return self.directory / f"{files.checksum(json.dumps(key, sort_keys=True))[:24]}.json"

    def keep(self, cell: Cell, rows: list[Row]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        key = self.key(cell)
        record = {**key, "rows": json.loads(json.dumps(rows))}
        files.write_atomically(self.path(key), json.dumps({**record, "sha256": _checksum(record)}) + "\n")

    def stored(self, cell: Cell) -> list[Row] | None:
        key = self.key(cell)
        if self.path(key).is_dir():  # said now: the rows could not be kept after the work
            raise ValueError(f"{self.path(key)} is a directory where a cell is kept; remove it")
        try:
            return _rows(self.path(key), key)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            warnings.warn(f"{error}; its cell is measured again", stacklevel=3)
            return None


def _rows(path: Path, key: dict[str, Any]) -> list[Row]:
    """ValueError, which names the file, unless it is of this key and as it was written."""
    record = files.parse(files.read(path), path)
    if not isinstance(record, dict) or record.pop("sha256", None) != _checksum(record):
        raise ValueError(f"{path} was changed or is no cell: its checksum does not fit")
    if record != {**key, "rows": record.get("rows")}:
        raise ValueError(f"{path} holds another cell than its name says")
    return record["rows"]


def _checksum(record: dict[str, Any]) -> str:
    return files.checksum(json.dumps(record, sort_keys=True))


def _named(measure: Measure) -> str:
    """Of lambdas and of functions inside functions there may be several by one name."""
    module, name = getattr(measure, "__module__", None), getattr(measure, "__qualname__", "<none>")
    if module is None or "<" in name:
        raise Misuse("measure", measure, "must be a function of a module, for its cells are kept under its name")
    return f"{module}:{name}"


def table(rows: Iterable[Row], made: Provenance | None = None) -> str:
    """A CSV file, a column for every key in the order of first appearance, floats to the last bit.  Lists and dicts,
    such as the values of a surface, are no entries of a table: their keys have no column.

    made: said in lines that begin with #, before the names of the columns.
    """
    rows = list(rows)
    nested = {key for row in rows for key, value in row.items() if isinstance(value, (list, dict))}
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in nested))
    text = io.StringIO(newline="")
    said = made.lines() if made is not None else ()
    text.writelines(f"# {line}\n" for each in said for line in each.splitlines())  # a quoted name may have several
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: repr(row[key]) if isinstance(row[key], float) else row[key] for key in columns if key in row}
        for row in rows
    )
    return text.getvalue()
