"""Checks of arguments: every error names the argument, says what came and what would be right."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

LONGEST = 200  # characters of a value in an error
MAX_SEED = 2**62
T = TypeVar("T")
Rule = Callable[[Any, str], Any]  # (value, name of the argument) -> the value as it is kept, or Misuse


class Misuse(ValueError):
    """A wrong argument: `argument` is its name, `value` what came, `remedy` what would be right, as the end of a
    sentence.

    str() is "argument=value remedy"; a command line says the same of its option.
    """

    def __init__(self, argument: str, value: Any, remedy: str) -> None:
        super().__init__(argument, value, remedy)  # the arguments, so that the error travels between processes
        self.argument, self.value, self.remedy = argument, value, remedy

    def __str__(self) -> str:
        said = " ".join(repr(self.value).split())  # of an array in one line, and not all of it
        return f"{self.argument}={said if len(said) <= LONGEST else said[: LONGEST - 3] + '...'} {self.remedy}"


class WrongType(Misuse, TypeError):
    """An argument of another class: `value` is the name of the class that came, `remedy` what was expected."""

    def __str__(self) -> str:
        return f"{self.argument} must be {self.remedy}, not {self.value}"


def instance(value: Any, argument: str, kinds: type[T] | tuple[type[T], ...] | Any) -> T:
    """Return `value` if it is of the class, or of one of the classes."""
    if isinstance(value, kinds):
        return value
    members = kinds if isinstance(kinds, tuple) else (kinds,)
    named = " or ".join("None" if each is type(None) else _named(each) for each in members)
    hint = (
        " (torch.as_tensor makes one of it)"
        if named == "a torch.Tensor" and (hasattr(value, "__array__") or isinstance(value, list))
        else ""
    )
    raise WrongType(argument, type(value).__name__, named + hint)


def _named(kind: type) -> str:
    place = kind.__module__
    place = "torch.nn" if place.startswith("torch.nn.") else place.split(".")[0]
    name = kind.__name__ if place in ("builtins", "collections", "meanfield") else f"{place}.{kind.__name__}"
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def one_of(value: Any, argument: str, options: Iterable[str]) -> str:
    """Return `value` if it is one of `options`; otherwise raise ValueError with the nearest option."""
    options = list(options)
    if isinstance(value, str) and value in options:
        return value
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise Misuse(argument, value, f"is unknown: choose one of {', '.join(map(repr, options))}{hint}")


def choices(options: Collection[str]) -> Rule:
    """One of the options at least, as a tuple."""

    def rule(value: Any, argument: str) -> tuple[str, ...]:
        if not isinstance(value, tuple) or not value:
            raise Misuse(argument, value, f"must name one at least of {', '.join(options)}")
        return tuple(one_of(each, argument, options) for each in value)

    return rule


def choice(options: Collection[str]) -> Rule:
    """One of the options that there are when the rule is asked: tables grow by what users register."""
    return partial(one_of, options=options)


def plain(value: Any) -> Any:
    """The number in a 0-dimensional array or tensor, or in a number of numpy; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def boolean(value: Any, argument: str) -> bool:
    if not isinstance(plain(value), bool):
        raise Misuse(argument, value, "must be True or False")
    return plain(value)


def number(value: Any, argument: str) -> float:
    """A finite one; integers stay what they are."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise Misuse(argument, value, "must be a finite number")
    return value  # type: ignore[return-value]


def integer(value: Any, argument: str, minimum: float = 1) -> int:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        least = f" of at least {minimum}" if math.isfinite(minimum) else ""
        raise Misuse(argument, value, f"must be an integer{least}")
    return int(value)


def at_least(minimum: int) -> Rule:
    return partial(integer, minimum=minimum)


def seed(value: Any, argument: str) -> int:
    """Small enough for torch's generators, after the sums and doublings by which others are made of it."""
    if integer(value, argument, minimum=0) >= MAX_SEED:
        raise Misuse(argument, value, f"must be less than {MAX_SEED}")
    return int(value)


def pair(value: Any, argument: str, minimum: int) -> tuple[int, int]:
    """An integer or a (height, width) pair of integers, as a pair."""
    value = plain(value)
    entries = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value, value)
    if len(entries) != 2:
        raise Misuse(argument, value, "must be one integer or a pair (height, width)")
    height, width = (integer(entry, argument, minimum) for entry in entries)
    return height, width


def nonnegative(value: Any, argument: str) -> float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise Misuse(argument, value, "must be a finite number of at least 0")
    return float(value)


def positive(value: Any, argument: str) -> float:
    if nonnegative(value, argument) == 0:
        raise Misuse(argument, value, "must be greater than 0")
    return float(value)


def seconds(value: Any, argument: str) -> float:
    """A time of at least 0, infinity included."""
    value = plain(value)
    return math.inf if isinstance(value, Real) and value == math.inf else nonnegative(value, argument)


def gibibytes(value: Any, argument: str) -> float:
    """An amount of memory in GiB, infinity included: a number, or a text such as 3GiB or 500MiB."""
    value = plain(value)
    units = {
        "": 1.0,
        "GIB": 1.0,
        "G": 1.0,
        "MIB": 2**-10,
        "M": 2**-10,
        "KIB": 2**-20,
        "GB": 1e9 / 2**30,
        "MB": 1e6 / 2**30,
    }
    if isinstance(value, str):
        found = re.fullmatch(
            r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)\s*([a-z]*)", value.strip(), re.ASCII | re.IGNORECASE
        )
        if found is None or found[2].upper() not in units or not 0 < (size := float(found[1])) < math.inf:
            raise Misuse(argument, value, "must be an amount of memory: GiB, or with its unit, such as 3GiB or 500MiB")
        return size * units[found[2].upper()]
    return math.inf if isinstance(value, Real) and value == math.inf else positive(value, argument)


def path(value: Any, argument: str) -> Path:
    """Text as well."""
    if not isinstance(value, (str, Path)) or not str(value):
        raise Misuse(argument, value, "must be the path of a file or directory")
    return Path(value)


def widths(value: Any, layers: int, argument: str = "widths", minimum: int = 1) -> tuple[int, ...]:
    """One integer of at least `minimum` per convolutional layer."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise Misuse(argument, value, f"must be a sequence of {layers} integers, one per layer")
    entries = tuple(integer(entry, argument, minimum) for entry in value)
    if len(entries) != layers:
        raise Misuse(argument, entries, f"has {len(entries)} entries; the architecture has {layers} layers")
    return entries


def shaped(tensor: Any, shape: tuple[int, ...], argument: str) -> torch.Tensor:
    import torch  # a second, which checks of plain values do not need

    if not isinstance(tensor, torch.Tensor):
        raise WrongType(argument, type(tensor).__name__, f"a torch.Tensor of shape {shape}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)}; expected {shape}")
    return tensor


def working(dtype: torch.dtype | None, argument: str = "dtype") -> torch.dtype | None:
    """float32 or float64, in which everything here computes; None leaves a dtype as it is."""
    import torch

    if dtype not in (None, torch.float32, torch.float64):
        raise Misuse(argument, dtype, "must be torch.float32 or torch.float64")
    return dtype


def finite(tensor: torch.Tensor, argument: str) -> torch.Tensor:
    """Refuse NaN and infinities, naming the first bad position, and tensors whose entries nothing here can read."""
    import torch

    if tensor.is_complex():
        raise ValueError(f"{argument} has the dtype {tensor.dtype}; give real entries")
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "has no entries (it is on the device 'meta')" if tensor.is_meta else f"has the layout {tensor.layout}"
        raise ValueError(f"{argument} {kind}; give a dense tensor with entries")
    # the extremes tell of NaN as well, and take no memory; whole numbers are finite
    if (
        tensor.is_floating_point()
        and tensor.numel()
        and not bool(torch.stack(tensor.detach().aminmax()).isfinite().all())
    ):
        where = tuple(int(i) for i in (~tensor.isfinite()).nonzero()[0])
        raise ValueError(f"{argument}{list(where)} is {tensor[where].item()}; every entry must be finite")
    return tensor
