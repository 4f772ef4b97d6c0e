import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXTENDING, RANKS = ((ROOT / "docs" / name).read_text() for name in ("extending.md", "ranks.md"))


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(example, directory):
    path = directory / "example.py"
    path.write_text(example)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        cwd=directory,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_as_written(tmp_path):
    printed = run(blocks("python")[0], tmp_path)
    assert "duality gap" in printed
    assert "cvxpy: " in printed


def test_the_convexity_example_runs_as_written(tmp_path):
    assert run(blocks("python")[1], tmp_path).startswith("True")


def test_the_grafting_example_runs_as_written(tmp_path):
    assert run(blocks("python")[2], tmp_path).startswith("relative error 0.")


def test_the_landscape_example_runs_as_written(tmp_path):
    printed = run(blocks("python")[3], tmp_path)
    assert "Surface(met" in printed
    assert "torch.Size([201, 201])" in printed


def test_the_transfer_example_runs_as_written(tmp_path):
    assert "Norm(start=" in run(blocks("python")[4], tmp_path)


def test_the_audit_example_runs_as_written(tmp_path):
    assert "layer 1: features with mass" in run(blocks("python")[5], tmp_path)


@pytest.mark.parametrize("example", blocks("python", EXTENDING + RANKS))
def test_a_recipe_runs_as_written(example, tmp_path):
    assert run(example, tmp_path)


def test_the_examples_are_short():
    assert all(sum(bool(line.strip()) for line in example.splitlines()) <= 20 for example in blocks("python"))


def test_the_test_command_is_the_one_of_the_ci():
    promised = re.findall(r"^make \w+", blocks("sh")[0], re.MULTILINE)
    assert promised == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_files_named_in_the_text_exist():
    for name in (
        "constraints.txt",
        "CITATION.cff",
        "LICENSE",
        "Makefile",
        "benchmarks",
        "meanfield/certificates/duality.py",
        "tests/data",
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/what_this_proves.md",
        "docs/finite_networks.md",
        "docs/extending.md",
        "docs/ranks.md",
        "docs/studies/landscapes.md",
        "docs/studies/transfer.md",
    ],
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\[[^\]]*\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / link).exists(), link
