import html
import json
import re
import shlex

import pytest
from command_line import run, solve

from meanfield import Problem, data
from meanfield.pages import plotting
from meanfield.storage import load_network, tensors
from meanfield.storage.results import Result
from meanfield.studies.solve import measure, page, pictures
from meanfield.studies.solve.command import STATE

FIGURES = {*pictures.ANSWER, *pictures.PARTICLES, *pictures.CLOSE} - {"proof"}  # nothing was to be proven


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    patch = pytest.MonkeyPatch()
    patch.setattr(measure, "TRAINED_WIDTHS", (4,))
    patch.setattr(measure, "SAMPLED_WIDTHS", (4, 8))
    patch.setattr(measure, "PEER_STEPS", 20)
    result = solve("--out", out, "--quiet")
    patch.undo()
    assert result.exit_code == 0, result.stderr
    return out


def test_page_is_self_contained_and_holds_every_figure(directory):
    text = (directory / "report.html").read_text()
    assert text.count("data:image/png;base64,") == len(FIGURES)
    assert not re.search(r"https?://|src=.(?!data:)|<script|<link", text)
    assert all((directory / f"{name}.png").stat().st_size > 1000 for name in FIGURES)
    assert not list(directory.glob(".*"))


def test_results_agree_with_the_saved_network(directory):
    results = json.loads((directory / "results.json").read_text())
    network, images = load_network(directory), data.load("digits", classes=(3, 5), samples=6, pool=2)
    problem = Problem(network.architecture, images.inputs, images.targets("squared"))
    assert float(problem.value(network)) == pytest.approx(results["solution"]["value"], abs=1e-8)
    assert results["segment"]["midpoint_violation"]["program"] <= 1e-12


def test_the_report_ends_with_the_time_of_the_solve(tmp_path):
    """It took minutes more than --max-seconds allowed."""
    ended = solve("--flow-steps=5", "--max-seconds=1e-9", "--out", tmp_path, "--quiet")
    assert ended.exit_code == 0, ended.stderr
    results, text = (json.loads((tmp_path / "results.json").read_text()), (tmp_path / "report.html").read_text())
    assert results["segment"] == {"skipped": measure.NO_TIME}
    assert not results["finite"]["sampled"]
    assert not results["finite"]["trained"]
    assert f"Not measured: {measure.NO_TIME}." in text
    assert f"No finite network was trained beside it: {measure.NO_TIME}." in text
    assert not (tmp_path / "segment.png").exists()
    assert not Result(tmp_path, "solve").faults()


def test_memory_that_runs_out_in_the_report_leaves_the_network_and_one_line(tmp_path, monkeypatch):
    def short(*arguments):
        raise MemoryError

    monkeypatch.setattr(measure, "_judged", short)
    ended = solve("--flow-steps=5", "--out", tmp_path, "--quiet")
    assert ended.exit_code == 75
    assert ended.stderr.startswith("memory ran out: the best network so far, J = ")
    assert ended.stderr.count("\n") == 1
    assert load_network(tmp_path).widths[0] == 6


def test_every_file_says_what_made_it_and_that_gives_the_same_figures(directory, tmp_path, monkeypatch):
    """A page used to drop most options of the run that made it."""
    monkeypatch.setattr(measure, "TRAINED_WIDTHS", ())
    monkeypatch.setattr(measure, "SAMPLED_WIDTHS", (4,))
    monkeypatch.setattr(measure, "PEER_STEPS", 20)
    results = json.loads((directory / "results.json").read_text())
    command, library = results["made"]["command"], results["made"]["library"]
    assert html.escape(command) in (directory / "report.html").read_text()
    assert tensors.read(directory / "network.safetensors")[1]["made"]["library"] == library
    words = [word for word in shlex.split(command)[1:] if not word.startswith("--out")]
    assert run(*words, "--out", tmp_path).exit_code == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["made"]["library"] == library
    for name in ("solution", "rounds", "populations", "kernels"):
        assert timeless(again[name]) == timeless(results[name])


def timeless(value):
    """Without the seconds."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key != "seconds"}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def test_damaged_files_are_named(directory, tmp_path):
    (tmp_path / "network.safetensors").write_bytes((directory / "network.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="perhaps truncated"):
        load_network(tmp_path)


def test_the_result_is_whole_and_lists_its_files(directory):
    assert Result(directory, "solve").faults() == []
    assert {path.name for path in directory.iterdir()} == {
        *(name for name in page.FILES if not name.startswith(("small_", "proof"))),
        "solve.manifest.json",
        STATE,  # the rounds ended it: more of them may go on
    }


def test_names_of_classes_are_shown_as_they_are(directory):
    """A name with dollars used to be a formula, which matplotlib may refuse."""
    results = json.loads((directory / "results.json").read_text())
    results["predictions"]["classes"] = ["cost $\\frac$", "zebra"]
    assert page._title(results) == "A continuous CNN on digits: cost $\\frac$ against zebra"
    drawn = pictures.pictures(results)
    for name in ("images", "predictions"):
        plotting.png(drawn[name])
    ticks = [label.get_text() for label in drawn["predictions"].axes[0].get_xticklabels()]
    assert ticks == [r"cost \$\frac\$", "zebra"]
    assert "digits: 6 images of 1 x 4 x 4" in (directory / "report.html").read_text()


def test_the_bound_of_a_search_stands_beside_what_more_starts_would_do():
    row = {"search_bound": 0.25, "search_starts": 256, "unseen_chance": 0.125, "unseen_lowering": 0.0}
    told = dict(page._unproven([row | {"refuted_bound": None}]))
    assert told["best of 256 starts, not proven"] == "0.25"
    assert told["chance that as many lower it, estimated"] == "at most 13%"
    assert "with a chance of 5% by more than" in told
    few = page._unproven([row | {"refuted_bound": None, "unseen_lowering": None}])
    assert len(few) == 2
    assert page._unproven([row | {"refuted_bound": 0.5}]) == [["bound of the last search, refuted by J", "0.5"]]
    assert page._unproven([{}]) == page._unproven([]) == page._unproven([row | {"search_bound": None}]) == []
