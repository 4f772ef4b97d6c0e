"""What arrays of images and labels mean: axes, range, classes.  What is ambiguous is refused, what is guessed is said.

A range is taken for granted where the values or their type single it out: booleans; fractions within 0..1; whole
numbers up to 16 exactly, as scikit-learn's digits, or beyond it up to 255.  Whole numbers 0 and 1 may be bits or nearly
black bytes, those up to 15 and above 255 have no usual range, and negative ones neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from meanfield.data.source import printable
from meanfield.validation import Misuse

ROUNDING = 1e-6  # of fractions in float32, after some arithmetic
USUAL_CHANNELS = (1, 3)
LEAST_SIDE, LONGEST = 4, 4  # of flattened images; length over breadth
DARK = 128
Said = list[str]


def arranged(array: np.ndarray, where: str, axes: str | None) -> tuple[np.ndarray, Said]:
    """(N, C, H, W), and what was guessed on the way."""
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(
            f"{where}: images have shape {array.shape}; expected (N, H, W) or (N, C, H, W), none of them 0"
        )
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{where}: images{list(place)} is {array[place]}; every pixel must be finite")
    if axes is not None:
        return _by_letters(array, where, axes), []
    if array.ndim == 2:
        return _unflattened(array, where)
    found, doubts = (array[:, None], []) if array.ndim == 3 else _channels_first(array, where)
    height, width = found.shape[2:]
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(
            f"{where}: images have shape {array.shape}, which would be {height} x {width} pixels; store them "
            f"as (N, H, W) or (N, C, H, W), or say axes={'NHW' if array.ndim == 3 else 'NCHW'} if it is meant"
        )
    return found, doubts


def _by_letters(array: np.ndarray, where: str, axes: str) -> np.ndarray:
    if sorted(axes) not in (sorted("NHW"), sorted("NCHW")):
        raise Misuse("axes", axes, "must be the letters N, H, W and perhaps C, each once, such as NHWC")
    if len(axes) != array.ndim:
        raise Misuse("axes", axes, f"has {len(axes)} letters; the images of {where} have shape {array.shape}")
    found = array.transpose([axes.index(letter) for letter in "NCHW" if letter in axes])
    return found if "C" in axes else found[:, None]


def _unflattened(array: np.ndarray, where: str) -> tuple[np.ndarray, Said]:
    side = math.isqrt(array.shape[1])
    if side**2 != array.shape[1] or side < LEAST_SIDE:
        raise ValueError(
            f"{where}: images have shape {array.shape}; expected (N, H, W) or (N, C, H, W), or rows that are square "
            f"images of {LEAST_SIDE} x {LEAST_SIDE} pixels at least"
        )
    return array.reshape(-1, 1, side, side), [f"rows of {array.shape[1]} values read as {side} x {side} pixels"]


def _channels_first(array: np.ndarray, where: str) -> tuple[np.ndarray, Said]:
    first, last = (array.shape[axis] in USUAL_CHANNELS for axis in (1, 3))
    if first and last and len(set(array.shape[1:])) == 1 == array.shape[1]:
        return array, []  # single pixels
    if first == last:
        raise ValueError(
            f"{where}: images have shape {array.shape}, in which "
            f"{'either the second or the last' if first else 'no'} axis is plainly that of 1 or 3 channels; say "
            "axes=NCHW or axes=NHWC"
        )
    if first:
        return array, []
    return np.moveaxis(array, -1, 1), ["the last axis read as that of the channels"]


def scaled(
    array: np.ndarray, where: str, limits: tuple[float, float] | None, of_bytes: bool = False
) -> tuple[Tensor, Said, Said]:
    """Images as bytes or as float64 in [0, 1], how that was done, and what was guessed.

    of_bytes: the format of the files says that 255 is white.
    """
    lowest, highest = array.min(), array.max()
    (low, high), doubts = (limits, []) if limits else _range(array, lowest, highest, where, of_bytes)
    if limits and (lowest < low or highest > high):
        raise Misuse(
            "range",
            f"{low:g}..{high:g}",
            f"does not hold the images of {where}, which lie in {lowest:.9g}..{highest:.9g}",
        )
    how = (
        "as they are" if (low, high) == (0, 1) else f"divided by {high:g}" if low == 0 else f"{low:g}..{high:g} as 0..1"
    )
    notes = [f"read from {lowest:g}..{highest:g} ({array.dtype}), {how}"]
    if array.dtype == np.uint8 and (low, high) == (0, 255):
        return torch.from_numpy(np.ascontiguousarray(array)), notes, doubts
    images = (np.ascontiguousarray(array, dtype=np.float64) - low) / (high - low)
    return torch.from_numpy(images.clip(0, 1)), notes, doubts


def _range(
    array: np.ndarray, lowest: np.number, highest: np.number, where: str, of_bytes: bool
) -> tuple[tuple[float, float], Said]:
    if array.dtype.kind == "b":
        return (0, 1), []
    fractions = array.dtype.kind == "f" and (highest <= 1 + ROUNDING or bool((array != np.floor(array)).any()))
    kind, top = ("floating-point", 1) if fractions else ("integer", 255)
    slack = ROUNDING if fractions else 0
    if lowest < -slack or highest > top + slack:
        raise ValueError(
            f"{where}: {kind} images lie in {lowest:.9g}..{highest:.9g}; expected 0..{top} (say which values are black "
            f"and white, as range={_usual(float(lowest), float(highest), bool(fractions))}, or rescale them)"
        )
    return _of_fractions(lowest, highest) if fractions else _of_integers(int(highest), where, of_bytes)


def _of_fractions(lowest: np.number, highest: np.number) -> tuple[tuple[float, float], Said]:
    if lowest < 0 or highest > 1:
        return (0, 1), [f"values up to {max(-lowest, highest - 1):.1g} outside 0..1 cut off, as rounding"]
    if 0 < highest <= 1 / 16:
        return (0, 1), [f"no value above {highest:.2g}: very dark, or divided twice"]
    return (0, 1), []


def _of_integers(highest: int, where: str, of_bytes: bool) -> tuple[tuple[float, float], Said]:
    if highest == 1 or (0 < highest < 16 and not of_bytes):
        raise ValueError(
            f"{where}: images are whole numbers in 0..{highest}, which may be of the range 0..{_white(highest)} "
            f"or of 0..255; say range=0..{_white(highest)} or range=0..255"
        )
    if of_bytes or highest == 0:
        return (0, 255), [f"no value above {highest} of 255"] if 0 < highest < 255 / 8 else []
    if highest == 16:
        return (0, 16), ["whole numbers up to 16 exactly: range=0..16 is assumed"]
    return (0, 255), [f"no value above {highest}: range=0..255 is assumed"] if highest < DARK else []


def _usual(lowest: float, highest: float, fractions: bool) -> str:
    """A range that holds these values: whole numbers around a few units, otherwise that of some bits."""
    reach = max(-lowest, highest)
    if reach > 2**32:
        return "LOW..HIGH"
    if fractions and reach <= 16:
        return f"{min(0, math.floor(lowest))}..{math.ceil(highest)}"
    if lowest >= 0:
        return f"0..{_white(highest)}"
    half = 2 ** max(7, math.ceil(max(-lowest - 1, highest)).bit_length())
    return f"{-half}..{half - 1}"


def _white(highest: float) -> int:
    """The next number of which one is 1, 15, 255, 4095 and so on."""
    bits = max(1, math.ceil(highest)).bit_length()
    return 2 ** next((usual for usual in (1, 4, 8, 12, 16, 32) if bits <= usual), bits) - 1


def classes(array: np.ndarray, count: int, where: str) -> tuple[Tensor, dict[int, str]]:
    """Labels (N,) int64 and their names, where they are text."""
    column = array[:, 0] if array.shape == (count, 1) else array
    if column.shape != (count,):
        hint = "; of one-hot rows store argmax(1)" if array.ndim == 2 and len(array) == count else ""
        raise ValueError(
            f"{where}: labels have shape {array.shape}; expected ({count},), one for each of the {count} images{hint}"
        )
    if column.dtype.kind in "US":
        return _of_text(column, where)
    bad = np.zeros(count, dtype=bool)
    if column.dtype.kind == "f":
        bad = ~np.isfinite(column) | (column != np.floor(column)) | (abs(column) > 2.0**53)
    elif column.dtype.kind == "u":
        bad = column > np.iinfo(np.int64).max
    if bad.any():
        raise ValueError(
            f"{where}: labels contain {column[bad.argmax()]}; labels are classes and must be integers of 64 bits"
        )
    return torch.from_numpy(column.astype(np.int64)), {}


def text(array: np.ndarray, where: str) -> np.ndarray:
    """As str."""
    try:
        return array.astype(str)
    except UnicodeError as error:
        raise ValueError(f"{where} are no text ({error}); store names as str or labels as integers") from error


def _of_text(column: np.ndarray, where: str) -> tuple[Tensor, dict[int, str]]:
    names, index = np.unique(text(column, f"{where}: labels"), return_inverse=True)
    if not all(name.strip() for name in names):
        raise ValueError(f"{where}: labels contain {str(names[0])!r}, which names no class")
    labels, named = numbered([str(name) for name in names], f"{where}: the labels")
    return torch.tensor(labels)[torch.from_numpy(index.reshape(-1))], named


def numbered(names: Sequence[str], where: str) -> tuple[tuple[int, ...], dict[int, str]]:
    """Labels of names and their names: the names as integers where all are (of at most 18 digits, so that int64 holds
    them), otherwise their positions.
    """
    if not all(re.fullmatch("-?[0-9]{1,18}", name) for name in names):
        return tuple(range(len(names))), dict(enumerate(names))
    labels = tuple(int(name) for name in names)
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"{where} {', '.join(map(repr, map(printable, names)))} name one integer twice; rename or merge them"
        )
    return labels, {}
