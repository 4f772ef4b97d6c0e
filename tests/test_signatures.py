"""Arguments are what their annotations say; calls that are not, generated from the signatures, name the argument."""

import inspect
import math
import typing
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Annotated, Any

import pytest
import torch
from strategies import seeded

import meanfield as mf
from meanfield import certificates, finite, measures, starts
from meanfield.certificates import sphere
from meanfield.signatures import Count, Gibibytes, Natural, Nonnegative, Positive, Seconds, Seed, checked
from meanfield.studies import convexity
from meanfield.validation import choice


class Odd:
    """Of no type that anything accepts."""

    def __repr__(self) -> str:
        return "Odd()"


NO_INTEGERS = [2.5, "3", True, math.nan, -3, Odd()]
NO_NUMBERS = [math.nan, "x", True, Odd()]
BAD = {
    int: [2.5, "3", True, math.nan, Odd()],
    float: [*NO_NUMBERS, math.inf],
    bool: ["yes", 2, Odd()],
    Count: [*NO_INTEGERS, 0],
    Natural: NO_INTEGERS,
    Seed: [*NO_INTEGERS, 2**62],
    Positive: [*NO_NUMBERS, -1.0, 0.0, math.inf],
    Nonnegative: [*NO_NUMBERS, -1.0, math.inf],
    Seconds: [*NO_NUMBERS, -1.0],
    Gibibytes: [*NO_NUMBERS, -1.0, 0.0, "3 apples", "-1GiB", "0MiB", 1e-6],
    Sequence[int]: [5, "64,32", (0.5, 1), (True, True), (-1, -1), Odd()],
    str: ["nosuch", "", 5, Odd()],
}


def bad_values(hint: Any) -> list[Any]:
    """What an annotation does not allow."""
    options = typing.get_args(hint) if NoneType in typing.get_args(hint) else ()
    plain = next((each for each in options if each is not NoneType), hint)
    missing = [] if options else [None]
    if plain in BAD:
        return BAD[plain] + missing
    if typing.get_origin(plain) is Annotated:  # a choice
        return BAD[typing.get_args(plain)[0]] + missing if typing.get_args(plain)[0] in BAD else ["", 5, Odd()]
    if inspect.isclass(plain) or typing.get_origin(plain) in (Callable, typing.get_origin(Callable[[], int])):
        return [5, "x", Odd(), *missing]
    return []


ARCHITECTURE = mf.Architecture((1, 4, 4), [mf.Conv(3, padding=1, activation="tanh")] * 2)
INPUTS = torch.rand(5, 1, 4, 4, generator=seeded(0), dtype=torch.float64)
LABELS = [1.0, -1.0, 1.0, 1.0, -1.0]
PROBLEM = mf.Problem(ARCHITECTURE, INPUTS, LABELS, "logistic")
NETWORK = starts.draw(PROBLEM, (3, 2), seeded(1), "low_rank")
PROGRAM = mf.ConvexProgram.freeze(PROBLEM, NETWORK)
RELU = mf.Problem(mf.Architecture((1, 4, 4), [mf.Conv((1, 2))]), INPUTS, LABELS)
ONE_LAYER = starts.draw(RELU, (3,), seeded(2))
ROWS = torch.randn(6, 2, generator=seeded(3), dtype=torch.float64)
SQUARE = lambda x: x.square().sum()  # noqa: E731
MAIN_JOB = {"problem": PROBLEM, "rounds": 1, "flow_steps": 1}
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    mf.solve: {"widths": (3, 2), **MAIN_JOB},
    mf.solvers.alternating.solve: {"network": NETWORK, **MAIN_JOB},
    mf.solvers.flow.solve: {"problem": PROBLEM, "network": NETWORK, "steps": 2},
    mf.solvers.splitting.solve: {"program": PROGRAM, "max_iterations": 5},
    mf.solvers.reference.solve: {"program": PROGRAM},
    mf.solvers.arrangements.solve: {"problem": RELU},
    certificates.search_features: {"problem": PROBLEM, "output": torch.zeros(5, 1).double(), "starts": 2, "steps": 2},
    finite.train: {"problem": PROBLEM, "widths": (3, 2), "steps": 2},
    finite.sample: {"network": NETWORK, "widths": (3, 2), "generator": seeded(1)},
    finite.vgg: {"depth": 11, "input_shape": (1, 32, 32), "classes": 2, "width": 1, "generator": seeded(1)},
    starts.draw: {"problem": PROBLEM, "widths": (3, 2), "generator": seeded(1)},
    measures.mixture: {"first": NETWORK, "second": NETWORK, "t": 0.5},
    finite.FiniteCNN.random: {"architecture": ARCHITECTURE, "widths": (3, 2), "inputs": INPUTS, "generator": seeded(1)},
    mf.ConvexProgram.freeze: {"problem": PROBLEM, "network": NETWORK},
    mf.ConvexProgram.with_candidates: {"problem": PROBLEM, "network": NETWORK, "candidates": NETWORK},
    measures.interpolate: {"first": NETWORK, "second": NETWORK, "t": 0.5},
    measures.split: {"network": NETWORK, "layer": 0, "particle": 0, "shares": torch.tensor([0.5, 0.5]).double()},
    measures.merge: {"network": NETWORK, "layer": 0, "particles": (0, 1)},
    measures.extend: {"network": NETWORK, "copies": (1, 1), "noise": 0.1, "generator": seeded(1)},
    measures.permute: {"network": NETWORK, "orders": [torch.tensor([2, 1, 0]), torch.tensor([1, 0])]},
    measures.balance: {"network": ONE_LAYER, "input_strength": 0.1, "readout_strength": 0.1},
    convexity.curvature: {"function": SQUARE, "point": ROWS[0]},
    convexity.falsify: {"function": SQUARE, "feasible_sampler": lambda g: ROWS[0], "budget": 3},
    convexity.segments: {"function": SQUARE, "points": ROWS},
    sphere.maximise: {"A": ROWS, "W": ROWS[:, :1], "max_seconds": 0.1},
    sphere.Search.__init__: {"self": object.__new__(sphere.Search), "A": ROWS, "W": ROWS[:, :1]},
    sphere.Search(ROWS, ROWS[:, :1]).refine: {"max_seconds": 0.1},
    certificates.prove: {
        "problem": RELU,
        "output": torch.zeros(5, 1).double(),
        "network": ONE_LAYER,
        "seconds": 0.0,
    },
}
BAD_CALLS = [
    pytest.param(function, name, value, id=f"{function.__module__.split('.')[-1]}.{function.__name__}-{name}-{value!r}")
    for function in CALLS
    for name, hint in typing.get_type_hints(function, include_extras=True).items()
    if name in inspect.signature(function).parameters and hint is not Any
    for value in bad_values(hint)
]


def test_there_are_hundreds_of_bad_calls():
    assert len(BAD_CALLS) >= 400


@pytest.mark.parametrize(("function", "name", "value"), BAD_CALLS)
def test_a_bad_call_is_refused_in_one_line_that_names_the_argument(function, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError)) as refusal:
        function(**{**CALLS[function], name: value})
    text = str(refusal.value)
    assert name in text
    assert "\n" not in text
    assert not list(tmp_path.iterdir())


def test_the_calls_that_bad_ones_are_made_of_are_good():
    for function, arguments in CALLS.items():
        if function not in (mf.solve, mf.solvers.alternating.solve, mf.solvers.arrangements.solve):
            function(**arguments)


def test_contradictions_are_named():
    with pytest.raises(ValueError, match="widths="):
        mf.solve(PROBLEM, (3, 2, 1))
    with pytest.raises(ValueError, match="clones="):
        mf.solvers.alternating.solve(PROBLEM, NETWORK, clones=(1,))
    with pytest.raises(ValueError, match="batch_size=9 is more than the 5 images"):
        finite.train(PROBLEM, (3, 2), batch_size=9)
    with pytest.raises(TypeError, match="nosuch"):
        mf.solve(PROBLEM, (3, 2), nosuch=1)


def test_arguments_reach_the_function_as_their_rules_make_them():
    @checked
    def called(
        a: Count, b: Positive | None = None, *c: int, d: Annotated[str, choice(("x", "y"))] = "x", **rest: Any
    ) -> Any:
        """Documented."""
        return a, b, c, d, rest

    assert called(True + 1, 2, "unchecked", d="y", e=5) == (2, 2.0, ("unchecked",), "y", {"e": 5})
    assert called(1, None) == (1, None, (), "x", {})
    assert (called.__doc__, called.__name__) == ("Documented.", "called")
    with pytest.raises(ValueError, match="d='z' is unknown: choose one of 'x', 'y'"):
        called(1, d="z")
    with pytest.raises(TypeError, match=r"^called\(\) missing a required argument: 'a'"):
        called()
