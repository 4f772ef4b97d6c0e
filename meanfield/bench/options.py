"""One dialect of settings: a field is declared once, with its type, its default, its help and its rule.

The same declaration serves the command line, Python and stored JSON: `Settings` checks every field when it is made,
whoever makes it, and what is wrong is a `Misuse` that names the field.  Options that several commands share stand at
the end of this file.
"""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Self, Union

from cyclopts import Group, Parameter

from meanfield.validation import Misuse, Rule, at_least, choice, gibibytes, integer, one_of, path, positive, seed

PANELS = ("Data", "Network", "Objective", "Work", "Output")
DATA, MODEL, OBJECTIVE, WORK, OUTPUT = (Group(name, sort_key=place) for place, name in enumerate(PANELS))
FLAT = Parameter(name="*")  # of a command's one argument: the fields of its settings are the options
DTYPES = ("float64", "float32")


def option(text: str, panel: Group, **parameter: Any) -> Parameter:
    """How a field looks on the command line: its help and the panel of the help page that it stands in."""
    return Parameter(help=text, group=panel, **{"converter": _read, **parameter})


def flag(text: str, panel: Group, negative: str = "") -> Parameter:
    """An option without a value; `negative` is its opposite, where it is on by default or may be left open."""
    return Parameter(help=text, group=panel, negative=negative, show_default=False)


def listing(text: str, panel: Group, *, all_for_none: bool = False) -> Parameter:
    """A tuple as one value, its entries separated by commas; None is spelled "all" where the field allows it.  Entries
    that may be text as well as integers are told apart by the field's rule.
    """
    read, show = (_read_all, spelled) if all_for_none else (_read_listing, lambda value: value and spelled(value))
    return option(text, panel, n_tokens=1, show_default=show, converter=read)


def positive_integers(value: Any, argument: str) -> tuple[int, ...]:
    """One at least."""
    if not isinstance(value, tuple) or not value:
        raise Misuse(argument, value, "must be a sequence of integers, such as (64, 32)")
    return tuple(integer(entry, argument) for entry in value)


def labels(value: Any, argument: str) -> tuple[int | str, ...]:
    """Two at least, integers or names."""
    known = isinstance(value, tuple) and all(
        isinstance(each, (Integral, str)) and each != "" and not isinstance(each, bool) for each in value
    )
    if not known or len(value) < 2:
        raise Misuse(argument, value, "must be two classes at least, such as 3,5")
    return tuple(_label(each) for each in value)


def _label(text: int | str) -> int | str:
    """An integer where it is written as one; 01 and 1_0 are names."""
    return int(text) if re.fullmatch("0|-?[1-9][0-9]*", str(text)) else text


def source(value: Any, argument: str) -> str:
    """Of images."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise Misuse(argument, value, "must be the name of a data set or the path of a file or directory")
    return value


def split(value: Any, argument: str) -> str:
    """Of a file."""
    if not isinstance(value, str) or not value:
        raise Misuse(argument, value, "must be train, test or another split that the file has")
    return value


def device(value: Any, argument: str) -> str:
    """One that torch can use now."""
    if value == "cpu":
        return value
    import torch  # a second, which help and the default do not need

    if not re.fullmatch("cuda(:[0-9]+)?", str(value)):
        one_of(value, argument, ("cpu", "cuda", "cuda:N"))
    if not torch.cuda.is_available():
        raise Misuse(argument, value, "asks for CUDA, which torch does not find on this machine; use cpu")
    try:
        torch.zeros(1, device=value)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        raise Misuse(argument, value, f"cannot be used ({text}); use cpu, cuda or cuda:N") from None
    return str(value)


def spelled(value: Any) -> str:
    """A value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else "all" if value is None else str(value)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Plain values, checked when they are made; equal where the values are.

    A field is Annotated[type, option(...), rule, ...].  Rules see the value in turn, None where the type allows it
    excepted, and return it as it is kept.  Lists become tuples: settings survive JSON.
    """

    def __post_init__(self) -> None:
        for name, (kind, rules) in _declared(type(self)).items():
            value = getattr(self, name)
            if value is None and NoneType in _alternatives(kind):
                continue
            value = tuple(value) if isinstance(value, list) else value
            for rule in rules:
                value = rule(value, name)
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From the entries of a dict that are fields; others are left alone."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Field -> plain value, ready for JSON."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def variant(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def command_line(self, *program: str) -> str:
        """The command that makes these settings, quoted for a shell: every option that is not at its default."""
        changed = [each for each in fields(self) if getattr(self, each.name) != each.default]
        return shlex.join(
            [*program, *(word for each in changed for word in _words(type(self), each.name, getattr(self, each.name)))]
        )


def _words(kind: type[Settings], name: str, value: Any) -> list[str]:
    """A field as options on a command line."""
    typed, parameter = f"--{name.replace('_', '-')}", _parameter(kind, name)
    if isinstance(value, bool):
        return [
            typed
            if value
            else str(parameter.negative[0] if isinstance(parameter.negative, tuple) else parameter.negative)
        ]
    if parameter.n_tokens is None and isinstance(value, tuple):  # may be given again
        return [f"{typed}={entry}" for entry in value]
    return [f"{typed}={spelled(value)}"]


@cache
def _hints(kind: type[Settings]) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _parameter(kind: type[Settings], name: str) -> Parameter:
    return next(each for each in _hints(kind)[name].__metadata__ if isinstance(each, Parameter))


@cache
def _declared(kind: type[Settings]) -> dict[str, tuple[Any, tuple[Rule, ...]]]:
    """Field -> its type and rules; the type alone is the rule where there is no other."""
    found = {}
    for name in (each.name for each in fields(kind)):
        hint = _hints(kind)[name]
        plain, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        rules = tuple(each for each in extras if not isinstance(each, Parameter))
        found[name] = plain, rules or (partial(_of_type, kinds=_alternatives(plain)),)
    return found


def _of_type(value: Any, argument: str, kinds: tuple[Any, ...]) -> Any:
    wanted = tuple(typing.get_origin(each) or each for each in kinds if each is not NoneType)
    if not isinstance(value, wanted):
        raise Misuse(argument, value, f"must be of type {' or '.join(each.__name__ for each in wanted)}")
    return value


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, UnionType) else (kind,)


def _read(kind: Any, tokens: Sequence[Any]) -> Any:
    """What was typed, strictly: 0.5 is no integer."""
    kinds, texts = _alternatives(kind), [token.value for token in tokens]
    wanted = next(each for each in kinds if each is not NoneType)
    if wanted == tuple[str, ...]:
        return tuple(texts)
    if wanted is Path:
        return texts[0]  # the rule makes a path of it: Path("") would be the current directory
    try:
        return _number(wanted, texts[0])
    except ValueError:
        raise ValueError(f"{texts[0]!r} is no {'integer' if wanted is int else 'number'}") from None


def _number(kind: Any, text: str) -> Any:
    """Text is itself; a number is one that everybody reads so, unlike 6_4 and digits of other scripts."""
    if kind is not str and (not text.isascii() or "_" in text):
        raise ValueError
    return kind(text)


def _as_typed(kind: Any, tokens: Sequence[Any]) -> Any:
    """The text, for a rule that reads it."""
    return tokens[0].value


def _read_all(kind: Any, tokens: Sequence[Any]) -> Any:
    return None if [token.value for token in tokens] == ["all"] else _read_listing(kind, tokens)


def _read_listing(kind: Any, tokens: Sequence[Any]) -> Any:
    if len(tokens) > 1:  # the parser takes it for a tuple that grows
        raise ValueError(f"Parameter {tokens[0].keyword} specified multiple times.")
    wanted = next(each for each in _alternatives(kind) if each is not NoneType)
    kinds, text = _alternatives(typing.get_args(wanted)[0]), tokens[0].value
    entry = str if str in kinds else kinds[0]
    try:
        return tuple(_number(entry, part) for part in text.split(","))
    except ValueError:
        what = "integers separated by commas, such as 64,32" if entry is int else "numbers separated by commas"
        raise ValueError(f"{text!r} must be {what}") from None


# Options of several commands.

Data = Annotated[
    str,
    option(
        "Images to learn: digits (8x8, inside scikit-learn), mnist (28x28, needs the extra meanfield[data]), a "
        "FILE.npz with images and labels under customary names (x and y, x_train and y_train, images and labels), or "
        "a DIRECTORY with a folder of images per class or the binary files of CIFAR. What these leave open is said by "
        "FILE.npz:images=KEY,labels=KEY,axes=NHWC,range=0..255, any of these entries.",
        DATA,
    ),
    source,
]
Classes = Annotated[
    tuple[int | str, ...] | None,
    listing(
        "Which classes to tell apart, labels or names, separated by commas, or all. With two classes the "
        "first one is +1.",
        DATA,
        all_for_none=True,
    ),
    labels,
]
Samples = Annotated[
    int,
    option(
        "How many images to use, the first ones in file order, or one of every class in turn where the source keeps "
        "classes apart; the rest is held out.",
        DATA,
    ),
    at_least(1),
]
Pool = Annotated[
    int, option("Average images over windows of N x N pixels first; 1 leaves them as they are.", DATA), at_least(1)
]
Split = Annotated[
    str | None,
    option("train, test, ...: which images of a file that has several. Without it: train.", DATA),
    split,
]
Seed = Annotated[int, option("Seed of everything that is drawn.", WORK), seed]
Jobs = Annotated[int, option("How many pieces of work are measured at a time, one thread each.", WORK), at_least(1)]
MaxSeconds = Annotated[
    float | None,
    option("Stop after about this many seconds and keep what there is. Without it: no limit.", WORK),
    positive,
]
MaxMemory = Annotated[
    float | None,
    option(
        "Memory that this process may hold: GiB, or a text such as 500MiB. A run that will need more is refused before "
        "it starts. Without it: most of what is free.",
        WORK,
        converter=_as_typed,
    ),
    gibibytes,
]
Dtype = Annotated[str, option("float64 or float32.", WORK), choice(DTYPES)]
Device = Annotated[str, option("cpu, cuda or cuda:N.", WORK), device]
Out = Annotated[
    Path | None, option("Directory for everything that is written; it is made if it is missing.", OUTPUT), path
]
Overwrite = Annotated[
    bool,
    flag("Replace files in --out that no earlier run of this command wrote, or that were changed since.", OUTPUT),
]
Quiet = Annotated[bool, flag("No progress and no summary.", OUTPUT)]
