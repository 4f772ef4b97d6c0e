"""Checks of arguments: every error names the argument, says what came and what would be right."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args, get_type_hints

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


LONGEST = 200  # characters of a value in an error


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


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which raises WrongType where an argument is not of the class that its annotation names.

    Classes of torch and of this library are checked, with their unions; numbers, strings and containers have checks of
    their own.
    """
    signature = inspect.signature(function)

    @functools.cache
    def expected() -> dict[str, tuple[type, ...]]:  # when it is called: annotations may name what is defined later
        hints = get_type_hints(function)
        return {name: kinds for name in signature.parameters if (kinds := _classes(hints.get(name)))}

    @functools.wraps(function)
    def checked(*arguments: P.args, **named: P.kwargs) -> R:
        given = signature.bind(*arguments, **named).arguments
        for name, kinds in expected().items():
            if name in given and signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                for index, value in enumerate(given[name]):
                    instance(value, kinds, f"{name}[{index}]")
            elif name in given:
                instance(given[name], kinds, name)
        return function(*arguments, **named)

    return checked


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes of an annotation, none if there is anything in it but None and classes of torch and this library."""
    members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    ours = [each for each in members if getattr(each, "__module__", "").split(".")[0] in ("torch", "meanfield")]
    others = set(members) - set(ours) - {type(None)}
    return () if others or not all(isinstance(each, type) for each in ours) else members


def instance(value: Any, kinds: type[T] | tuple[type[T], ...], argument: str) -> T:
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


def one_of(value: Any, options: Iterable[str], argument: str) -> str:
    """Return `value` if it is one of `options`; otherwise raise ValueError with the nearest option."""
    options = list(options)
    if isinstance(value, str) and value in options:
        return value
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise Misuse(argument, value, f"is unknown: choose one of {', '.join(map(repr, options))}{hint}")


def integer(value: Any, argument: str, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise Misuse(argument, value, f"must be an integer of at least {minimum}")
    return int(value)


def pair(value: Any, argument: str, minimum: int) -> tuple[int, int]:
    """An integer or a (height, width) pair of integers, as a pair."""
    entries = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(entries) != 2:
        raise Misuse(argument, value, "must be one integer or a pair (height, width)")
    height, width = (integer(entry, argument, minimum) for entry in entries)
    return height, width


def nonnegative(value: Any, argument: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise Misuse(argument, value, "must be a finite number of at least 0")
    return float(value)


def positive(value: Any, argument: str) -> float:
    if nonnegative(value, argument) == 0:
        raise Misuse(argument, value, "must be greater than 0")
    return float(value)


def widths(value: Any, layers: int, argument: str = "widths") -> tuple[int, ...]:
    """One positive integer per convolutional layer."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise Misuse(argument, value, f"must be a sequence of {layers} integers, one per layer")
    entries = tuple(integer(entry, argument) for entry in value)
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


def finite(tensor: torch.Tensor, argument: str) -> torch.Tensor:
    """Refuse NaN and infinities, naming the first bad position."""
    bad = ~tensor.isfinite()
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{argument}{list(where)} is {tensor[where].item()}; every entry must be finite")
    return tensor
