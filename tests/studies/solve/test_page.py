import json
import re

import pytest
from typer.testing import CliRunner

from meanfield import Problem, data
from meanfield.cli import app
from meanfield.storage import load_network
from meanfield.studies.solve import measure as findings

FIGURES = ("values", "gaps", "populations", "kernels", "images", "predictions", "finite", "segment")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    patch = pytest.MonkeyPatch()
    patch.setattr(findings, "TRAINED_WIDTHS", (4,))
    patch.setattr(findings, "SAMPLED_WIDTHS", (4, 8))
    arguments = [
        "--widths",
        "6,4",
        "--samples",
        "6",
        "--rounds",
        "1",
        "--flow-steps",
        "20",
        "--out",
        str(out),
        "--quiet",
    ]
    result = CliRunner().invoke(app, ["solve", *arguments])
    patch.undo()
    assert result.exit_code == 0, result.output
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


def test_damaged_files_are_named(directory, tmp_path):
    (tmp_path / "network.json").write_bytes((directory / "network.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"network\.safetensors does not exist"):
        load_network(tmp_path)
    (tmp_path / "network.safetensors").write_bytes((directory / "network.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="perhaps truncated"):
        load_network(tmp_path)
    (tmp_path / "network.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_network(tmp_path)
