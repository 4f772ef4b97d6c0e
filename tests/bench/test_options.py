import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
from cyclopts import Parameter
from hypothesis import given
from hypothesis import strategies as st

from meanfield.bench import command, options
from meanfield.bench.options import WORK, Settings, at_least, choice, flag, listing, option
from meanfield.validation import Misuse, positive


@dataclass(frozen=True, kw_only=True)
class Asked(Settings):
    count: Annotated[int, option("How many.", WORK), at_least(1)] = 3
    rate: Annotated[float | None, option("How fast.", WORK), positive] = None
    kind: Annotated[str, option("Which.", WORK), choice(("one", "two"))] = "one"
    widths: Annotated[tuple[int, ...], listing("Widths.", WORK), options.positive_integers] = (4, 2)
    classes: options.Classes = (3, 5)
    data: options.Data = "digits"
    seed: options.Seed = 0
    gaps: Annotated[tuple[float, ...] | None, listing("Gaps.", WORK)] = None
    dtypes: Annotated[tuple[str, ...], listing("Types.", WORK)] = ("float32",)
    part: Annotated[tuple[str, ...], option("Parts.", WORK)] = ()
    report: Annotated[bool, flag("Report.", WORK, "--no-report")] = True
    split: Annotated[bool | None, flag("Split.", WORK, "--file-order")] = None
    out: options.Out = None


def read(*words):
    """What the command line makes of words."""
    app, heard = command.application("program", "A test."), []

    def run(asked: Annotated[Asked, Parameter(name="*")] = Asked()):
        heard.append(asked)

    app.command(run, name="run")
    command.main(app, ["run", *words])
    return heard.pop()


settings = st.builds(
    Asked,
    count=st.integers(1, 99),
    rate=st.none() | st.floats(1e-9, 1e9),
    kind=st.sampled_from(("one", "two")),
    widths=st.lists(st.integers(1, 99), min_size=1, max_size=3),
    classes=st.none() | st.lists(st.integers(-5, 9), min_size=2, max_size=3).map(tuple),
    gaps=st.none() | st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=3).map(tuple),
    dtypes=st.lists(st.sampled_from(options.DTYPES), min_size=1, max_size=2).map(tuple),
    part=st.lists(st.text(min_size=1, max_size=5).filter(lambda text: "\x00" not in text), max_size=2).map(tuple),
    report=st.booleans(),
    split=st.sampled_from((None, True, False)),
    out=st.none() | st.sampled_from(("a b", "-x", "it's", "ü")),
)


@given(settings)
def test_settings_survive_json_and_their_own_command_line(asked):
    assert Asked.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    program, *words = shlex.split(asked.command_line("program"))
    assert program == "program"
    assert read(*words) == asked


def test_defaults_are_not_spelled_out():
    assert Asked().command_line("python", "-m", "it") == "python -m it"


def test_fields_of_other_settings_are_left_alone():
    assert Asked.from_dict({"count": 4, "others": 1}) == Asked(count=4)


def test_values_are_kept_as_their_rules_return_them():
    asked = Asked(rate=2, widths=[3, 1], out="here")
    assert Asked(classes=(np.int64(3), np.int64(1))).classes == (3, 1)
    assert isinstance(asked.rate, float)
    assert (asked.widths, asked.out) == ((3, 1), Path("here"))
    assert hash(asked) == hash(Asked(rate=2.0, widths=(3, 1), out=Path("here")))


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"count": 0}, "at least 1"),
        ({"count": True}, "integer"),
        ({"count": 2.0}, "integer"),
        ({"count": None}, "integer"),
        ({"rate": 0}, "greater than 0"),
        ({"rate": float("nan")}, "finite"),
        ({"kind": "tow"}, "did you mean 'two'"),
        ({"widths": ()}, "sequence of integers"),
        ({"widths": (3, 0)}, "at least 1"),
        ({"widths": "12"}, "sequence of integers"),
        ({"classes": (3,)}, "two classes"),
        ({"data": ""}, "name of a data set"),
        ({"seed": -1}, "at least 0"),
        ({"seed": 2**62}, "less than"),
        ({"part": "sampled"}, "of type tuple"),
        ({"report": 1}, "of type bool"),
        ({"out": ""}, "path"),
    ],
)
def test_misuse_carries_the_argument_what_came_and_the_remedy(changed, remedy):
    ((argument, value),) = changed.items()
    with pytest.raises(Misuse, match=remedy) as caught:
        Asked(**changed)
    assert (caught.value.argument, caught.value.value) in ((argument, value), (argument, 0))  # of a tuple, the entry


@pytest.mark.parametrize(
    "word",
    [
        *("--count=0.5", "--count=1e2", "--count=x", "--widths=3,", "--gaps=1,x", "--rate=fast", "--kind=tow"),
        *("--count=1_0", "--count=٣", "--widths=6_4,3", "--rate=1_0", "--gaps=1_0"),  # numbers to Python
    ],
)
def test_what_is_typed_is_read_strictly_and_refused_in_one_line(word, capsys):
    with pytest.raises(SystemExit) as end:
        read(word)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("\n") == 1
    assert word.split("=")[0] in said
    assert word.split("=")[1] in said
