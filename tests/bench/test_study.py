import json
import os
import shlex
import subprocess
import sys

import pytest

from meanfield.bench.provenance import Provenance
from meanfield.bench.study import Part, Study
from meanfield.pages.html import Section, Table
from meanfield.validation import Misuse


def noted(cell, places=""):
    return [{"m": cell["m"], "square": cell["m"] ** 2, "mark": cell["mark"], "places": places}]


def total(tables, part):
    return sum(row["square"] for row in tables[part])


def part(name, first):
    return Part(
        lambda subject, sizes, seed: [{"m": seed + first + m} for m in range(sizes)],
        noted,
        {name: lambda tables: total(tables, name)},
        sections=[lambda found, tables: Section(f"Part {name}", [f"total {found[name]}", Table(["m"], [[1], [None]])])],
    )


@pytest.fixture
def study():
    return Study(
        name="toys",
        title="Toys & more",
        claim=lambda found: f"known: {', '.join(found)}",
        parts={"low": part("low", 0), "high": part("high", 10), "empty": Part(lambda *_: [], noted)},
        sizes={"quick": 1, "default": 2},
        groundwork={"ground": Part(lambda cells: [{"m": max(cell["m"] for cell in cells)}], noted)},
        common=lambda subject: {"mark": subject},
        places=lambda directory: {"places": directory.name},
        closing=[Section("Limits", ["none"])],
    )


def test_the_plan_has_the_wanted_parts_behind_their_groundwork(study):
    assert study.plan("x", 2, seed=1) == {
        "ground": [{"m": 12}],
        "low": [{"m": 1}, {"m": 2}],
        "high": [{"m": 11}, {"m": 12}],
    }
    assert study.plan("x", 1, parts=["low"]) == {"ground": [{"m": 0}], "low": [{"m": 0}]}
    with pytest.raises(Misuse, match=r"part='hihg' is unknown.*did you mean 'high'"):
        study.plan("x", 1, parts=["hihg"])


def test_rows_carry_what_is_common_and_cells_are_kept(study, tmp_path):
    heard = []
    options = {"backend": "sequential", "announce": lambda name, cell, kept: heard.append((name, kept))}
    tables = study.run("x", 1, tmp_path, **options)
    assert tables["high"] == [{"m": 10, "square": 100, "mark": "x", "places": tmp_path.name}]
    assert study.run("x", 1, tmp_path, **options) == tables
    assert heard == [
        ("ground", False),
        ("low", False),
        ("high", True),
        *((name, True) for name in ("ground", "low", "high")),
    ]
    again = study.run("y", 1, tmp_path, **options)
    assert again["high"][0]["mark"] == "y"


def test_without_a_directory_nothing_is_kept_and_measures_have_places_all_the_same(study):
    (row,) = study.run("x", 1, parts=["low"], backend="sequential")["low"]
    assert row["places"]
    assert row["square"] == 0


def test_tables_and_pages_say_what_made_them(study):
    made = Provenance("toys --seed=1 '<a b>'", {"seed": 1})
    files = study.files(study.run("x", 2, backend="sequential"), made)
    text = files["toys.html"]
    assert set(files) <= set(study.names())
    assert text.index("Part low") < text.index("Part high") < text.index("Limits")
    assert "<h1>Toys &amp; more</h1>" in text
    assert "known: low, high" in text
    assert "toys --seed=1 &#39;&lt;a b&gt;&#39;" in text
    assert made.library in text
    found = json.loads(files["summary.json"])
    assert (found["low"], found["made"]["command"]) == (1, made.command)
    assert files["low.csv"].splitlines()[0] == f"# Made by: {made.command}"
    tables = study.run("x", 2, backend="sequential")
    assert set(study.files(tables, made, report=False)) == {"ground.csv", "low.csv", "high.csv"}


TOY = '''
"""Square some widths."""
'''
TOY_COMMAND = '''
from meanfield.bench.command import StudyOptions, run_study
from meanfield.bench.study import Part, Study
from meanfield.pages.html import Section, Table


def cells(options, sizes, seed):
    return [{"width": width, "seed": seed} for width in sizes]


def measure(cell):
    return [{"width": cell["width"], "square": cell["width"] ** 2 + cell["seed"]}]


def largest(tables):
    return max(row["square"] for row in tables["squares"])


def squares(found, tables):
    return Section("Squares", [Table(["width", "square"], [list(row.values()) for row in tables["squares"]])])


STUDY = Study(
    name="toy",
    title="Squares of widths",
    claim=lambda found: f"The largest square is {found['largest']}.",
    parts={"squares": Part(cells, measure, {"largest": largest}, {}, [squares])},
    sizes={"quick": (1, 2), "default": (1, 2, 3)},
)


def command(options: StudyOptions) -> None:
    """Square some widths, and write a page."""
    run_study(STUDY, options, options, "meanfield", "toy")
'''
ENTER = "import sys; from meanfield import cli, studies; studies.__path__.append(sys.argv.pop(1)); cli.main()"


@pytest.fixture
def toy(tmp_path):
    """`meanfield` with one more folder of studies."""
    folder = tmp_path / "studies" / "toy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(TOY.lstrip())
    (folder / "command.py").write_text(TOY_COMMAND.lstrip())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*words):
        command = [sys.executable, "-c", ENTER, str(folder.parent), *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_a_study_is_added_in_thirty_lines_and_run_from_the_command_line(toy, tmp_path):
    assert len([line for line in TOY_COMMAND.splitlines() if line.strip()]) <= 30
    assert "Square some widths." in toy("--help").stdout
    help_text = " ".join(toy("toy", "--help").stdout.split())
    assert "Parts: squares. Sizes: quick, default." in help_text
    done = toy("toy", "--size", "quick", "--seed", "5", "--jobs", "1", "--backend", "threading", "--out", "a b")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "a b" / "squares.csv").read_text().splitlines()
    assert table[3:] == ["width,square", "1,6", "2,9"]
    assert "The largest square is 9." in (tmp_path / "a b" / "toy.html").read_text()
    wrong = toy("toy", "--size", "quik")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: --size='quik' is unknown: choose one of 'quick', 'default'; did you mean 'quick'?\n",
    )
    # the command line that its own page states gives the same table
    stated = json.loads((tmp_path / "a b" / "summary.json").read_text())["made"]["command"]
    (tmp_path / "a b" / "squares.csv").unlink()
    assert shlex.split(stated)[:2] == ["meanfield", "toy"]
    assert toy(*shlex.split(stated)[1:]).returncode == 0
    assert (tmp_path / "a b" / "squares.csv").read_text().splitlines() == table
