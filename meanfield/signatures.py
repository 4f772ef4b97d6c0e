"""Arguments of public functions, checked by their annotations: what a signature says is what is accepted.

    @checked
    def solve(problem: Problem, *, steps: Count = 2000, tolerance: Positive = 1e-10, step: Positive | None = None): ...

An annotation Annotated[type, rule, ...] has rules, functions (value, argument) -> the value as it is used, or Misuse.
A class asks for its instances, Callable for what can be called, bool for True or False, float for a finite number.
Other annotations, such as sequences, are left to the function.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import typing
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, Union

from meanfield.validation import (
    Rule,
    at_least,
    boolean,
    gibibytes,
    instance,
    integer,
    nonnegative,
    number,
    positive,
    seconds,
    seed,
)

P = ParamSpec("P")
R = TypeVar("R")

Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Seed = Annotated[int, seed]
Number = Annotated[float, number]
Positive = Annotated[float, positive]
Nonnegative = Annotated[float, nonnegative]
Seconds = Annotated[float, seconds]
Gibibytes = Annotated[float | str, gibibytes]


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its arguments checked before it runs; raises Misuse and TypeError, each naming the argument."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound, rules = signature.bind(*args, **kwargs), rules_of(function)
        except TypeError as error:  # python's own words lack the name
            raise TypeError(f"{function.__name__}() {error}") from None
        for name, value in bound.arguments.items():
            if name in rules:
                bound.arguments[name] = rules[name](value, name)
        return function(*bound.args, **bound.kwargs)

    return call


@functools.cache
def rules_of(function: Callable[..., Any]) -> dict[str, Rule]:
    """Argument -> its check; of a function as it was written, when it is first called."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        single = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if single and name in hints and (rule := _rule(hints[name])) is not None:
            found[name] = rule
    return found


def _rule(hint: Any) -> Rule | None:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        if all(_is_ours(each) for each in inner if each is not NoneType):
            return functools.partial(instance, kinds=inner)
        rules = [_rule(each) for each in inner if each is not NoneType]
        if len(rules) > 1 or not rules[0]:
            return None
        return _or_none(rules[0]) if NoneType in inner else rules[0]
    if origin is Annotated:
        return functools.partial(_all, rules=inner[1:])
    if origin is collections.abc.Callable:
        return _callable
    plain = {bool: boolean, int: functools.partial(integer, minimum=-math.inf), float: number}
    if hint in plain:
        return plain[hint]
    is_class = inspect.isclass(hint) and origin is None and hint is not Any
    return functools.partial(instance, kinds=hint) if is_class else None


def _is_ours(hint: Any) -> bool:
    """Whether it is a class of torch or of this library."""
    return inspect.isclass(hint) and hint.__module__.split(".")[0] in ("torch", "meanfield")


def _or_none(rule: Rule) -> Rule:
    return lambda value, argument: None if value is None else rule(value, argument)


def _all(value: Any, argument: str, rules: tuple[Rule, ...]) -> Any:
    for rule in rules:
        value = rule(value, argument)
    return value


def _callable(value: Any, argument: str) -> Any:
    if not callable(value):
        raise TypeError(f"{argument} must be a function, not {type(value).__name__}")
    return value
