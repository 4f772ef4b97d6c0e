"""The tutorials run as written, as scripts: what the gallery shows, without Sphinx."""

import runpy
from pathlib import Path

import matplotlib
import pytest

TUTORIALS = sorted((Path(__file__).parent.parent.parent / "docs" / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_draws(path, monkeypatch):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: None)  # on a screen it would wait for somebody to close the window
    pyplot.close("all")
    runpy.run_path(str(path), run_name="__main__")
    assert pyplot.get_fignums()
    pyplot.close("all")


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    title, line = text.splitlines()[1:3]
    assert set(line) == {"="}
    assert len(line) == len(title)


def test_all_tutorials_are_there():
    assert [path.stem.split("_")[1] for path in TUTORIALS] == [str(number) for number in range(1, 10)]
