"""Sweeps: one function over many cells, in parallel, every finished cell kept at once, never measured twice.

A cell is a dict of plain JSON values; the function turns it into rows, dicts of plain values, and must depend on the
cell alone.  joblib runs the cells: in processes of this machine, or on a cluster with the backends "dask" and "ray"
once their packages are installed and connected.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed, parallel_config

from meanfield.bench import provenance
from meanfield.bench.provenance import Provenance
from meanfield.storage import write_atomically
from meanfield.validation import Misuse, integer

Cell = dict[str, Any]
Row = dict[str, Any]
Rows = Sequence[Row]
Tables = dict[str, list[Row]]
Measure = Callable[..., list[Row]]
BATCHED = ("dask", "ray")  # these hand results back all at once: they get a few cells per worker at a time
BATCH = 4
PACKAGES = {"dask": ("distributed", "dask[distributed]"), "ray": ("ray", "ray")}  # modules, and what pip calls them


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
    `sources(cell)` in its place) and the versions of what it computes with are the same.  Rows that are not `lasting`,
    such as those of a failure, are not kept.  announce(cell, kept) is called once for every cell, kept where it was
    there already.
    """
    require_backend(backend)
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


def require_backend(backend: str) -> str:
    """Return `backend`; Misuse, before any work is done, where its package is not installed."""
    module, package = PACKAGES.get(backend, (None, ""))
    if module is not None and find_spec(module) is None:
        raise Misuse("backend", backend, f"needs a package that is not installed: pip install '{package}'")
    return backend


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
    if backend == "ray":  # which joblib does not know by itself
        importlib.import_module("ray.util.joblib").register_ray()
    if backend not in BATCHED:
        with parallel_config(backend=backend, n_jobs=jobs):
            yield from Parallel(return_as="generator_unordered")(
                delayed(_one)(measure, *each, places) for each in waiting
            )  # type: ignore[misc]
        return
    for first in range(0, len(waiting), BATCH * jobs):
        with parallel_config(backend=backend, n_jobs=jobs):
            yield from Parallel()(
                delayed(_one)(measure, *each, places) for each in waiting[first : first + BATCH * jobs]
            )  # type: ignore[misc]


def _one(measure: Measure, index: int, cell: Cell, places: Mapping[str, str]) -> tuple[int, list[Row]]:
    torch.set_num_threads(1)  # cells run side by side, and the same sums come out on every number of cores
    return index, measure(cell, **places)


class _Keeper:
    """Finished cells in a directory, a file each, named by everything that its rows depend on."""

    def __init__(
        self, directory: Path, measure: Measure, sources: Callable[[Cell], Iterable[Path]] | None = None
    ) -> None:
        self.measure = _named(measure)
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.sources = directory, sources

    def made_by(self, cell: Cell) -> dict[str, Any]:
        package = self.measure.split(":")[0]
        code = provenance.package(package) if self.sources is None else provenance.digest(self.sources(cell))
        versions = provenance.versions(provenance.NUMERICAL)
        return {"measure": self.measure, "code": code, "library": provenance.library(), "versions": versions}

    def path(self, cell: Cell) -> Path:
        named = json.dumps({**self.made_by(cell), "cell": cell}, sort_keys=True)
        return self.directory / f"{hashlib.sha256(named.encode()).hexdigest()[:24]}.json"

    def keep(self, cell: Cell, rows: list[Row]) -> None:
        record = {"made_by": self.made_by(cell), "cell": cell, "rows": rows}
        write_atomically(self.path(cell), json.dumps(record) + "\n")

    def stored(self, cell: Cell) -> list[Row] | None:
        path = self.path(cell)
        if not path.exists():
            return None
        try:
            return json.loads(path.read_bytes())["rows"]
        except ValueError as error:
            raise ValueError(
                f"{path} is not JSON ({error}); it was not written by a sweep or was changed: delete it"
            ) from error


def _named(measure: Measure) -> str:
    """Of lambdas and of functions inside functions there may be several by one name."""
    module, name = getattr(measure, "__module__", None), getattr(measure, "__qualname__", "<none>")
    if module is None or "<" in name:
        raise Misuse("measure", measure, "must be a function of a module, for its cells are kept under its name")
    return f"{module}:{name}"


def write_table(rows: Iterable[Row], path: str | Path, made: Provenance | None = None) -> Path:
    """A CSV file, a column for every key in the order of first appearance, floats to the last bit.

    made: said in lines that begin with #, before the names of the columns.
    """
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    said = made.lines() if made is not None else ()
    text.writelines(f"# {line}\n" for each in said for line in each.splitlines())  # a quoted name may have several
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: repr(value) if isinstance(value, float) else value for key, value in row.items()} for row in rows
    )
    return write_atomically(Path(path), text.getvalue())
