"""Surfaces as files for other programs: .npz, JSON and NetCDF (classic format), all surfaces of a table in each."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.io import netcdf_file

from meanfield.bench.sweep import Row, Rows
from meanfield.storage import to_json

FIGURES = ("error", "evaluations", "least", "largest")
WORDS = ("status", "plane", "normalise")


def npz(rows: Rows) -> bytes:
    """LABEL/axis (n,), LABEL/FIGURE (n, n), the first axis along the plane's first direction."""
    buffer, arrays = io.BytesIO(), {}
    for row in rows:
        arrays[f"{label(row)}/axis"] = np.asarray(row["axis"], dtype=np.float64)
        for figure, values in row["values"].items():
            arrays[f"{label(row)}/{figure}"] = np.asarray(values, dtype=np.float64)
    np.savez_compressed(buffer, **_slashed(arrays))
    return buffer.getvalue()


def json(rows: Rows) -> str:
    """The rows as they are, by label."""
    return to_json({label(row): row for row in rows})


def netcdf(rows: Rows) -> bytes:
    """Dimensions first and second of every surface with their coordinates, its values over both, its figures as
    attributes.  Names have underscores for what NetCDF does not take.
    """
    buffer = io.BytesIO()
    file = netcdf_file(buffer, "w")
    for row in rows:
        dimensions = [f"{_named(label(row))}_{place}" for place in ("first", "second")]
        for dimension in dimensions:
            file.createDimension(dimension, len(row["axis"]))
            file.createVariable(dimension, "f8", (dimension,))[:] = row["axis"]
        for figure, values in row["values"].items():
            variable = file.createVariable(f"{_named(label(row))}_{_named(figure)}", "f8", tuple(dimensions))
            variable[:] = np.asarray(values, dtype=np.float64)
            for name in FIGURES:
                setattr(variable, name, float(row[name]))
            for name in WORDS:
                setattr(variable, name, str(row[name]))
    file.flush()
    return buffer.getvalue()


def label(row: Row) -> str:
    """The arm, or the name of the file of a network."""
    return str(row["arm"])


def _named(text: str) -> str:
    found = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in text)
    return found if found[:1].isalpha() else f"s_{found}"


def _slashed(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Names that zip takes as paths stay inside the archive."""
    return {name.replace("..", "__").lstrip("/"): values for name, values in arrays.items()}
