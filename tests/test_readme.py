import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_runs_as_written(tmp_path):
    (example,) = blocks("python")
    path = tmp_path / "example.py"
    path.write_text(example)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-W", "error", str(path)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "duality gap" in done.stdout
    assert "cvxpy: " in done.stdout


def test_the_example_is_short():
    (example,) = blocks("python")
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 20


def test_the_test_command_is_the_one_of_the_ci():
    promised = re.findall(r"^make \w+", blocks("sh")[0], re.MULTILINE)
    assert promised == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_files_named_in_the_text_exist():
    for name in ("constraints.txt", "CITATION.cff", "LICENSE", "Makefile", "benchmarks", "meanfield/certificates/duality.py", "tests/data"):
        assert (ROOT / name).exists(), name


def test_pictures_exist():
    for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link
