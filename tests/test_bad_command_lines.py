"""Command lines that are wrong, generated from the options of every program: one line that names the option, exit code
2, at once, and nothing left behind.
"""

import importlib
import importlib.util
import itertools
import typing
from types import NoneType

import numpy as np
import pytest
from command_line import run

from benchmarks import __main__ as benchmarks
from meanfield import cli
from meanfield.bench import options
from theory_checks import __main__ as theory_checks

WRONG = {
    bool: ["maybe"],
    int: ["0.5", "x", "", "nan", "1e3", "-7"],
    float: ["x", "", "nan", "inf", "-1", "1e999"],
    tuple: ["", ",", "-1,4", "3;5", "nan"],
    str: ["nosuch", ""],
}
BENCHMARKS = ("solve", "flow", "growth", "optima", "widths", "grafting", "device")
COMMANDS = [
    (cli.main, "solve", "meanfield.studies.solve"),
    (cli.main, "widths", "meanfield.studies.widths"),
    (cli.main, "graft", "meanfield.studies.grafting"),
    (cli.main, "landscape", "meanfield.studies.landscape"),
    (cli.main, "transfer", "meanfield.studies.transfer"),
    *((benchmarks.main, name, f"benchmarks.{name}") for name in BENCHMARKS),
]


def settings_of(package):
    command = importlib.import_module(f"{package}.command").command
    return typing.get_type_hints(command)["options"]


def wrong_values(plain):
    kind = next(each for each in options._alternatives(plain) if each is not NoneType)
    if kind in WRONG:
        return WRONG[kind]
    entries = typing.get_args(kind)
    return [""] if not entries else WRONG[tuple] if entries[0] is not str else WRONG[str]


def lines():
    """(main, words, the option that is wrong)."""
    kinds = [(main, [name], settings_of(package)) for main, name, package in COMMANDS]
    for main, words, kind in [*kinds, (theory_checks.main, [], theory_checks.Options)]:
        for name, (plain, _) in options._declared(kind).items():
            typed = f"--{name.replace('_', '-')}"
            for value in wrong_values(plain):
                yield main, [*words, f"{typed}={value}"], typed


CONTRADICTORY = [
    ("/nowhere/at/all", ["solve", "--data", "/nowhere/at/all"]),
    ("--classes", ["solve", "--classes", "3,3"]),
    ("--classes", ["solve", "--classes", "3,99"]),
    ("--samples", ["solve", "--samples", "99999999999"]),
    ("--samples", ["solve", "--samples", "1"]),
    ("--pool", ["solve", "--pool", "3"]),
    ("--widths", ["solve", "--widths", "9999999999,4"]),
    ("--widths", ["solve", "--widths", "64,32", "--kernel-size", "4000001"]),
    ("--pooling", ["solve", "--pool", "8", "--pooling", "average"]),
    ("--device", ["solve", "--device", "cpu:7"]),
    ("--part", ["widths", "--part", "nosuch"]),
    ("--backend", ["widths", "--backend", "nosuch"]),
    ("--only", ["--only", "nosuch"]),
]
BAD = [pytest.param(*each, id=" ".join(map(repr, each[1]))) for each in lines()]


def test_there_are_hundreds_of_bad_lines():
    assert len(BAD) >= 250


def refused(main, words, typed, folder):
    ended = run(*words, main=main)
    assert ended.exit_code == 2, ended
    *read, said = ended.stderr.strip().splitlines()
    assert said.startswith("error: ")
    assert typed in said
    assert all(line.startswith("data: ") for line in read)
    assert not ended.stdout
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("main", "words", "typed"), BAD)
def test_a_wrong_value_is_refused_by_name(main, words, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(main, words, typed, tmp_path)


@pytest.mark.parametrize(("typed", "words"), CONTRADICTORY)
def test_what_cannot_be_is_refused_by_name_before_work_begins(typed, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(theory_checks.main if words[0] == "--only" else cli.main, words, typed, tmp_path)


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_backend_without_its_package_says_what_to_install(backend, package, tmp_path, monkeypatch):
    """It was refused by joblib below a bar of progress, without the option's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(cli.main, ["widths", "--backend", backend], f"pip install {package}", tmp_path)


def test_what_is_missing_is_not_said_to_be_all(tmp_path, monkeypatch):
    """--split was said to be "all"."""
    monkeypatch.chdir(tmp_path)
    images, labels = [[[0.5]], [[1.0]]], [0, 1]
    np.savez(tmp_path / "a.npz", x_test=images, y_test=labels, x_val=images, y_val=labels)
    ended = run("solve", "--data", tmp_path / "a.npz")
    assert ended.stderr.startswith("error: --split must say which images of ")


@pytest.mark.parametrize(
    "words", list(itertools.product(["solve", "widths", "graft", "landscape", "transfer"], ["--nosuch", "--sampels=3"]))
)
def test_an_unknown_option_is_refused_by_name(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(cli.main, words, words[1].split("=")[0], tmp_path)
