import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from meanfield import data
from meanfield.cli import app
from meanfield.storage import load_network

TINY = ["solve", "--widths", "6,4", "--samples", "6", "--rounds", "1", "--flow-steps", "20"]


def run(*arguments):
    return CliRunner().invoke(app, [*arguments])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--classes", "3,x"], ["--classes='3,x'", "3,5"]),
        (["--classes", "3"], ["--classes=3", "at least two"]),
        (["--classes", "3,12"], ["--classes=", "12"]),
        (["--widths", "6,0"], ["--widths=0", "at least 1"]),
        (["--rounds", "0"], ["--rounds=0", "at least 1"]),
        (["--pool", "3"], ["--pool=3", "choose one of"]),
        (["--samples", "9999"], ["--samples=9999"]),
        (["--activation", "tan"], ["--activation='tan'", "'tanh'"]),
        (["--readout", "averag"], ["--readout='averag'", "'average'"]),
        (["--readout-penalty", "-1"], ["--readout-penalty=-1.0", "at least 0"]),
        (["--source-penalty", "nan"], ["--source-penalty=nan"]),
        (["--kernel-size", "9", "--stride", "9", "--pooling", "max"], ["pool_size"]),
        (["--data", "missing.npz"], ["--data='missing.npz'", "does not exist"]),
        (["--data", "digit"], ["--data='digit'", "'digits'"]),
        (["--device", "tpu"], ["--device='tpu'"]),
        (["--tolerance", "0"], ["--tolerance=0.0"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, parts):
    result = run(*TINY, *arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr


def test_out_is_refused_before_the_solve(tmp_path):
    (tmp_path / "file").touch()
    result = run(*TINY, "--out", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "--out=" in result.stderr


def test_json_is_alone_on_stdout():
    found = json.loads(run(*TINY, "--json").stdout)
    assert found["solution"]["value"] > 0
    assert len(found["rounds"]) == 1


def test_warning_of_attainment_is_one_line():
    assert run(*TINY, "--activation", "relu").stderr.count("infimum over all measures") == 1


def test_help_states_every_default():
    text = " ".join(run("solve", "--help").stdout.split())
    names = [name for name in text.split() if name.startswith("--") and name not in ("--help", "--out", "--out.")]
    assert text.count("Default:") >= len(set(names))


def test_ctrl_c_keeps_the_best_network(tmp_path):
    command = [sys.executable, "-m", "meanfield.cli", "solve", "--widths", "6,4", "--samples", "6", "--rounds", "999", "--tolerance", "1e-15"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.stderr.readline()  # the first round is done
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=50)
    assert process.returncode == 130, stderr
    assert "network.safetensors" in stderr
    assert not (tmp_path / "report.html").exists()
    assert load_network(tmp_path).widths[0] <= 6
    assert data.load("digits", samples=6).input_shape == (1, 8, 8)


WIDTHS = ["widths", "--size", "quick", "--part", "kernel", "--part", "coordinates", "--jobs", "1"]


def test_a_width_study_leaves_tables_and_a_page_and_goes_on_where_it_stopped(tmp_path):
    first = run(*WIDTHS, "--out", str(tmp_path))
    assert first.exit_code == 0, first.stderr
    assert "page: " in first.stdout
    tables = {name: (tmp_path / f"{name}.csv").read_bytes() for name in ("kernel", "coordinates")}
    assert "Tangent kernel" in (tmp_path / "widths.html").read_text()
    removed = sorted((tmp_path / "cells").glob("*.json"))[0]
    removed.unlink()
    second = run(*WIDTHS, "--out", str(tmp_path), "--no-report", "--quiet")
    assert "21 of 22 cells were there already" in second.stderr
    assert {name: (tmp_path / f"{name}.csv").read_bytes() for name in tables} == tables
    assert removed.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--part", "sample"], ["--part='sample'", "'sampled'"]),
        (["--size", "huge"], ["--size='huge'", "'full'"]),
        (["--jobs", "0"], ["--jobs=0", "at least 1"]),
        (["--data", "missing.npz"], ["missing.npz", "does not exist"]),
        (["--samples", "9999"], ["--samples=9999"]),
        (["--backend", "clouds"], ["clouds"]),
    ],
)
def test_bad_input_of_a_study_is_one_line(arguments, parts, tmp_path):
    result = run("widths", "--size", "quick", "--part", "kernel", "--out", str(tmp_path), "--quiet", *arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr
