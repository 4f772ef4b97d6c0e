import errno
import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
from command_line import run, solve, tiny
from image_files import grey, save

import meanfield
from benchmarks.__main__ import main as benchmarks
from meanfield import cli, data
from meanfield.bench import command
from meanfield.data import dataset
from meanfield.storage import load_network, locks
from theory_checks.__main__ import main as checks


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--classes", "3,x"], ["--classes=3,x", "contains x, not a class of digits"]),
        (["--classes", "3"], ["--classes=3", "two classes at least"]),
        (["--classes", "3,12"], ["--classes=", "12"]),
        (["--widths", "6,0"], ["--widths=0", "at least 1"]),
        (["--rounds", "0"], ["--rounds=0", "at least 1"]),
        (["--pool", "3"], ["--pool=3", "choose one of"]),
        (["--samples", "9999"], ["--samples=9999"]),
        (["--activation", "tan"], ["--activation='tan'", "'tanh'"]),
        (["--readout", "averag"], ["--readout='averag'", "'average'"]),
        (["--readout-penalty", "-1"], ["--readout-penalty=-1.0", "at least 0"]),
        (["--source-penalty", "nan"], ["--source-penalty=nan"]),
        (["--kernel-size", "9", "--stride", "9", "--pooling", "max"], ["--pooling='max'", "pool_size"]),
        (["--data", "missing.npz"], ["missing.npz", "does not exist"]),
        (["--data", "digit"], ["--data='digit'", "'digits'"]),
        (["--device", "tpu"], ["--device='tpu'"]),
        (["--tolerance", "0"], ["--tolerance=0.0"]),
        (["--pair", "3"], ["--pair=3", "two classes at least"]),
        (["--pair", "3,5", "--pair", "3,6"], ["--pair specified multiple times"]),
        (["--classes", "3,5", "--classes", "all"], ["--classes specified multiple times"]),
        (["--pair", "3,8"], ["--pair=3,8", "must be two of the classes 3, 5"]),
        (["--pair", "3,5,5"], ["--pair=3,5,5", "must be two of the classes 3, 5"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, parts):
    result = solve(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr


def test_out_is_refused_before_the_solve(tmp_path):
    (tmp_path / "file").touch()
    result = solve("--out", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "--out=" in result.stderr


COMMANDS = [
    ("solve", cli.main, tiny("--flow-steps=5")[1:], "report.html"),
    ("widths", cli.main, ["--size=quick", "--part=kernel", "--jobs=1"], "widths.html"),
    ("graft", cli.main, ["--size=quick", "--part=across", "--jobs=1"], "graft.html"),
    ("landscape", cli.main, ["--size=quick", "--part=trajectory", "--jobs=1"], "landscape.html"),
    ("transfer", cli.main, ["--size=quick", "--part=widths", "--jobs=1"], "transfer.html"),
    ("theory_checks", checks, ["--only=change_of_variables", "--jobs=1"], "index.html"),
    ("flow", benchmarks, [], "flow.json"),
]


@pytest.mark.parametrize(("name", "main", "words", "page"), COMMANDS, ids=[each[0] for each in COMMANDS])
class TestOut:
    """Every command refuses what it cannot write to, or should not, in one line and before the work."""

    def refused(self, name, main, words, out, *more):
        first = [name] if main in (cli.main, benchmarks) else []
        before = listing(out.parent)
        result = run(*first, *words, "--quiet", "--out", out, *more, main=main)
        assert result.exit_code == 2, result.stderr
        assert result.stderr.count("\n") == 1
        assert f"--out={str(out)!r}" in result.stderr
        assert listing(out.parent) == before
        return result.stderr

    def test_places_that_are_no_directories(self, tmp_path, name, main, words, page):
        (tmp_path / "file").touch()
        os.mkfifo(tmp_path / "pipe")
        for place in ("file", "pipe", "file/deeper"):
            assert "cannot be written to" in self.refused(name, main, words, tmp_path / place)
        empty = run(*([name] if main is not checks else []), *words, "--out", "", main=main)
        assert (empty.exit_code, empty.stderr) == (2, "error: --out='' must be the path of a file or directory\n")

    def test_a_page_that_is_a_directory(self, tmp_path, name, main, words, page):
        """It used to be found after all the work."""
        (tmp_path / page).mkdir()
        said = self.refused(name, main, words, tmp_path, "--overwrite")
        assert f"{page} is a directory; give another one" in said

    def test_a_file_of_others(self, tmp_path, name, main, words, page):
        (tmp_path / page).write_text("theirs")
        said = self.refused(name, main, words, tmp_path)
        assert f"holds {page}, which is no part of an earlier" in said
        assert "--overwrite" in said

    def test_a_folder_in_use(self, tmp_path, name, main, words, page):
        with locks.held(tmp_path):
            assert f"is in use by another command (process {os.getpid()})" in self.refused(name, main, words, tmp_path)


def listing(directory):
    """Everything below, with the contents of files."""
    found = sorted(directory.rglob("*")) if directory.is_dir() else []
    return [(path, path.read_bytes() if path.is_file() else None) for path in found if path.name != locks.LOCK]


def test_a_refusal_leaves_no_folder(tmp_path):
    for words in (["solve", "--data", "missing.npz"], ["widths", "--size=quick", "--part=kernel", "--samples=9999"]):
        assert run(*words, "--out", tmp_path / "a" / "b").exit_code == 2
        assert list(tmp_path.iterdir()) == []


def test_an_older_report_is_replaced_with_overwrite_only(tmp_path):
    (tmp_path / "results.json").write_text("theirs")
    (tmp_path / "notes.txt").write_text("theirs")
    assert solve("--out", tmp_path).exit_code == 2
    assert solve("--out", tmp_path, "--overwrite", "--data", "missing.npz").exit_code == 2
    assert (tmp_path / "results.json").read_text() == "theirs"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a.csv"),
            75,
            "error: out/a.csv: No space left on device",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x.npz"), 2, "error: x.npz: Permission denied"),
        (MemoryError(), 75, "error: memory ran out; give it less at a time: fewer or smaller images, fewer particles"),
    ],
)
def test_a_machine_that_is_too_small_says_so_in_one_line(error, code, said, capsys):
    with pytest.raises(SystemExit) as ended, command.one_line_errors():
        raise error
    assert (ended.value.code, capsys.readouterr().err) == (code, said + "\n")


def test_memory_that_runs_out_over_images_is_no_misuse(monkeypatch, capsys):
    def short(address):
        raise MemoryError

    monkeypatch.setattr(dataset, "read", short)
    ended = solve("--data", "digits", "--samples", "7")
    assert ended.exit_code == 75
    assert ended.stderr.startswith("error: memory ran out over digits, ")


def test_a_fault_of_the_library_has_an_exit_code_of_its_own(capsys):
    """1 is the code of theory_checks for a claim that fails."""
    with pytest.raises(SystemExit) as ended, command.one_line_errors():
        raise AssertionError("never")
    assert ended.value.code == 70
    assert "AssertionError: never" in capsys.readouterr().err


def test_warnings_are_one_line_each(capsys):
    with command.one_line_errors():
        warnings.simplefilter("always")
        warnings.warn("first\nsecond", stacklevel=1)
    assert capsys.readouterr().err == "warning: first second\n"


def test_json_is_alone_on_stdout():
    found = json.loads(solve("--json").stdout)
    assert found["solution"]["value"] > 0
    assert len(found["rounds"]) == 1
    assert found["predictions"]["held_out"]["count"] == 359


def test_warning_of_attainment_is_one_line():
    assert solve("--activation", "relu").stderr.count("infimum over all measures") == 1


def test_help_states_every_default():
    text = run("solve", "--help").stdout
    options = re.findall(r"(?m)^│ (--[a-z-]+)", text)
    assert len(options) == 36
    bounds = {"--amplitude-bound", "--attained", "--input-bound", "--max-seconds", "--max-memory"}
    silent = {"--samples", "--split", "--readout-penalty", "--attained", "--pair"} | bounds  # "Without it: ..."
    flags = {"--out", "--resume", "--overwrite", "--json", "--quiet"}
    assert text.count("[default:") == len(options) - len(silent | flags)
    assert text.count("Without") >= len(silent)


def test_a_mistyped_option_or_command_is_told_the_nearest():
    assert run("solve", "--wdths", "3").stderr == "error: Unknown option: --wdths. Did you mean --widths?\n"
    wrong = run("slove")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    assert 'Did you mean "solve"?' in wrong.stderr


def test_no_command_costs_an_import_before_it_is_asked_for():
    code = "import sys; from meanfield import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("solve", "widths", "graft", "landscape", "transfer"))


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "meanfield", "--version"], capture_output=True, text=True)
    assert done.stdout == f"meanfield {meanfield.__version__}\n", done.stderr


def test_a_class_named_like_a_number_is_not_the_place_of_another(tmp_path):
    """--classes 01,cat took the class at place 1."""
    for number, name in enumerate(("01", "bear", "cat", "1_0")):
        for image in range(2):
            save(tmp_path / "zoo" / name / f"{image}.png", grey(40 * number + 50 + image, (4, 4)))
    for classes in ("01,cat", "cat,1_0"):
        said = solve("--data", tmp_path / "zoo", "--classes", classes, "--samples", "4").stderr
        assert "classes {} (2), {} (2)".format(*classes.split(",")) in said


def test_numbers_with_zeros_in_front_are_classes_as_the_folders_are(tmp_path):
    for number, name in enumerate(("01", "02", "10")):
        save(tmp_path / name / "0.png", grey(40 * number + 50))
    assert data.load(tmp_path, classes=("02", "10")).classes == (2, 10)


@pytest.mark.skipif(os.name == "nt", reason="closes a pipe")
def test_a_reader_that_has_gone_is_no_misuse():
    code = "from meanfield.bench.command import one_line_errors\n"
    code += "with one_line_errors(): raise BrokenPipeError"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("program", ["theory_checks.__main__", "benchmarks.__main__"])
def test_help_of_the_other_programs_costs_no_torch(program):
    code = f"import sys, atexit; from {program} import main; atexit.register(lambda: print('torch' in sys.modules)); "
    done = subprocess.run([sys.executable, "-c", code + "main(['--help'])"], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "False", done.stderr


def test_ctrl_c_keeps_the_best_network(tmp_path):
    words = tiny("--rounds=999", "--flow-steps=800", "--tolerance=1e-15")
    command = [sys.executable, "-m", "meanfield.cli", *words]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr.readline().startswith("data: digits: 6 images")
    process.stderr.readline()  # the first round is done
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=50)
    assert process.returncode == 130, stderr
    assert "network.safetensors" in stderr
    assert not (tmp_path / "report.html").exists()
    assert load_network(tmp_path).widths[0] <= 6
    assert data.load("digits", samples=6).input_shape == (1, 8, 8)


@pytest.fixture
def zoo(tmp_path):
    """Folders of digits under names, and a file beside them."""
    digits = data.load("digits", classes=(3, 5), samples=40)
    for index, (image, label) in enumerate(zip(digits.inputs, digits.labels.tolist())):
        save(tmp_path / "zoo" / {3: "zebra", 5: "a $x_t"}[label] / f"{index:02}.png", image[0] * 255)
    (tmp_path / "zoo" / "notes.gif").write_bytes(b"")
    return tmp_path / "zoo"


@pytest.mark.parametrize("command", ["solve", "widths", "graft", "landscape", "transfer"])
@pytest.mark.parametrize("place", [".", "runs/digits"])
def test_a_result_is_not_written_among_the_images(command, place, zoo, monkeypatch):
    """The folder of the result was made first and read as a class without images."""
    monkeypatch.chdir(zoo)
    before = sorted(zoo.rglob("*"))
    classes = () if command in ("graft", "landscape", "transfer") else ("--classes", "all")
    ended = run(command, "--data", ".", *classes, "--out", place)
    assert ended.exit_code == 2
    assert ended.stderr == f"error: --out={place!r} lies in the directory of images --data='.'; give one outside it\n"
    assert sorted(zoo.rglob("*")) == before


def test_what_was_read_is_said_before_the_run_and_in_its_results(zoo):
    found = solve("--data", zoo, "--classes", "zebra,a $x_t", "--json")
    read = (
        "zoo: 6 images of 1 x 4 x 4 (channels x height x width), values 0..0.89, classes zebra (3), a $x_t (3), 34 "
        "more held out; read from 0..255 (uint8), divided by 255; one of every class in turn; averaged over 2 x 2 "
        "pixels; left out: 1 .gif"
    )
    assert found.stderr.splitlines()[0] == f"data: {read}"
    assert json.loads(found.stdout)["made"]["data"] == read
    assert "data:" not in solve("--data", zoo, "--quiet").stderr


def test_classes_by_other_labels_are_refused_in_one_line(zoo):
    wrong = solve("--data", zoo, "--classes", "zebra,ant")
    assert wrong.stderr == "error: --classes=zebra,ant contains ant, not a class of zoo, which has a $x_t, zebra\n"


def test_a_split_of_a_file_is_taken_by_its_name(tmp_path):
    digits = data.load("digits", classes=(3, 5), samples=40).inputs[:, 0].numpy()
    labels = data.load("digits", classes=(3, 5), samples=40).labels.numpy()[:, None]
    np.savez(tmp_path / "a.npz", x_train=digits[:20], y_train=labels[:20], x_test=digits[20:], y_test=labels[20:])
    ends = [solve("--data", tmp_path / "a.npz", *split) for split in ([], ["--split=train"], ["--split", "test"])]
    values = [end.stdout.splitlines()[0] for end in ends]
    assert values[0] == values[1] != values[2]
    assert "left out: test, which split=test takes" in ends[0].stderr
    assert solve("--data", "digits", "--split", "test").stderr.startswith(
        "error: --split='test' concerns arrays in a file"
    )


@pytest.mark.parametrize(
    ("side", "count", "arguments", "message"),
    [
        (
            25,
            40,
            ["--pool", "5"],
            "--pool=5 does not do for part limit, which averages images of 25 x 25 over twice as",
        ),
        (12, 40, ["--pool", "4", "--part", "coordinates"], "8 x 8 pixels: choose one of [1, 2, 3, 6], or other parts"),
        (8, 16, ["--part", "sampled"], "--samples=16 leaves no image of a.npz held out, which part sampled judges"),
    ],
)
def test_images_that_some_part_cannot_take_are_refused_before_the_first_cell(tmp_path, side, count, arguments, message):
    """--pool=5 used to fail after 78 s with --pool=10, which nobody typed."""
    images = np.random.default_rng(0).random((count, side, side))
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(count) % 2)
    arguments = ["--size", "quick", "--classes", "0,1", "--data", tmp_path / "a.npz", *arguments]
    result = run("widths", *arguments, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


WIDTHS = ["widths", "--size", "quick", "--part", "kernel", "--part", "coordinates", "--jobs", "1"]


def test_a_width_study_leaves_tables_and_a_page_and_goes_on_where_it_stopped(tmp_path):
    first = run(*WIDTHS, "--out", str(tmp_path))
    assert first.exit_code == 0, first.stderr
    assert "page: " in first.stdout
    tables = {name: rows(tmp_path / f"{name}.csv") for name in ("kernel", "coordinates")}
    assert "Tangent kernel" in (tmp_path / "widths.html").read_text()
    removed = sorted((tmp_path / "cells").glob("*.json"))[0]
    removed.unlink()
    second = run(*WIDTHS, "--out", str(tmp_path), "--no-report", "--quiet")
    assert "21 of 22 cells were there already" in second.stderr
    assert {name: rows(tmp_path / f"{name}.csv") for name in tables} == tables
    assert removed.exists()


def test_what_a_page_says_made_it_gives_the_same_figures(tmp_path):
    """A page used to name neither classes nor samples nor the images."""
    digits = data.load("digits", classes=(0, 1), samples=40)
    np.savez(tmp_path / "zeros & ones.npz", x=digits.inputs.numpy(), y=digits.labels.numpy())
    options = ["--data", tmp_path / "zeros & ones.npz", "--classes", "1,0", "--samples", "8", "--part", "kernel"]
    assert run("widths", "--size", "quick", "--jobs", "1", *options, "--out", tmp_path / "first").exit_code == 0
    page = (tmp_path / "first" / "widths.html").read_text()
    assert "Data: zeros &amp; ones.npz: 8 images of 1 x 4 x 4" in page
    stated = html.unescape(re.search("Made by <code>(.*?)</code>", page)[1])
    program, *words = shlex.split(stated)
    words = [word for word in words if not word.startswith("--out=")]
    assert program == "meanfield"
    assert run(*words, "--out", tmp_path / "second").exit_code == 0
    assert rows(tmp_path / "second" / "kernel.csv") == rows(tmp_path / "first" / "kernel.csv")
    others = [
        word for word in words if not word.startswith("--data=")
    ]  # other digits: the figures do follow the images
    assert run(*others, "--out", tmp_path / "third", "--no-report").exit_code == 0
    assert rows(tmp_path / "third" / "kernel.csv") != rows(tmp_path / "first" / "kernel.csv")


def rows(table):
    """A table without what made it."""
    return [line for line in table.read_text().splitlines() if not line.startswith("#")]


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
    size = [] if "--size" in arguments else ["--size", "quick"]
    result = run("widths", *size, "--part", "kernel", "--out", tmp_path, "--quiet", *arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.fixture
def images(tmp_path):
    """A file of 50 digits of two classes, 4x4."""
    digits = data.load("digits", classes=[0, 1], samples=50, pool=2)
    np.savez(tmp_path / "images.npz", x=digits.inputs.numpy(), y=digits.labels.numpy())
    return str(tmp_path / "images.npz")


GRAFT = {"--network": "vgg8", "--width": "2", "--size": "quick", "--jobs": "1"}


def graft(*arguments):
    own = [word for name, value in GRAFT.items() if name not in arguments for word in (name, value)]
    return run("graft", *own, *arguments)


def test_a_graft_study_leaves_tables_and_a_page_and_goes_on_where_it_stopped(tmp_path, images):
    arguments = ["--data", images, "--part", "l2", "--part", "across", "--out", tmp_path]
    first = graft(*arguments)
    assert first.exit_code == 0, first.stderr
    tables = {name: rows(tmp_path / f"{name}.csv") for name in ("train", "l2", "across")}
    page = (tmp_path / "graft.html").read_text()
    assert f"--data={images} --samples=40 --split --network=vgg8 --width=2" in page
    assert "With the L2 penalty instead" in page
    second = graft(*arguments, "--no-report", "--quiet")
    assert "10 of 10 cells were there already" in second.stderr
    assert "page: " in first.stdout
    assert "page: " not in second.stdout
    assert {name: rows(tmp_path / f"{name}.csv") for name in tables} == tables


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--part", "start"], ["--part='start'", "'starts'"]),
        (["--network", "residual"], ["--network='residual'", "'vgg8'"]),
        (["--size", "huge"], ["--size='huge'", "'authors'"]),
        (["--width", "0"], ["--width=0", "at least 1"]),
        (["--penalty", "l3"], ["--penalty='l3'", "'l12'"]),
        (["--strength", "-1"], ["--strength=-1.0", "at least 0"]),
        (["--samples", "9999"], ["--samples=9999"]),
        (["--data", "missing.npz"], ["missing.npz", "does not exist"]),
        (["--seed", "-1"], ["--seed=-1", "at least 0"]),
    ],
)
def test_bad_input_of_a_graft_study_is_one_line(arguments, parts, tmp_path):
    part = [] if "--part" in arguments else ["--part", "starts"]
    result = graft(*part, "--out", tmp_path, "--quiet", *arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (20, ["--samples", "20"], "--samples=20 are all images of a.npz; leave some to be held out"),
        (
            20,
            ["--samples", "18"],
            "--samples=18 leaves 2 of 20 images held out, on which features are compared; leave 4",
        ),
        (2, [], "--samples=2 are all images of a.npz"),
    ],
)
def test_too_few_images_for_a_graft_are_refused_before_the_first_cell(tmp_path, count, arguments, message):
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).random((count, 8, 8)), y=np.arange(count) % 2)
    result = graft("--data", tmp_path / "a.npz", "--out", tmp_path / "out", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_of_a_graft_study_states_what_is_left_open():
    text = run("graft", "--help").stdout
    assert len(re.findall(r"(?m)^│ (--[a-z-]+)", text)) == 19
    assert " ".join(text.split()).count("Without") == 6
    assert text.count("[default:") == 19 - 6 - len(("--out", "--overwrite", "--report", "--quiet"))
    assert "Parts: starts, classes," in " ".join(text.split())
