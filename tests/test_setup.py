import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import meanfield

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE, TEST, DOCS = PROJECT["dependencies"], *(PROJECT["optional-dependencies"][name] for name in ("test", "docs"))


def pins():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(name): pinned for name, _, pinned in (line.partition("==") for line in lines if line)}


@pytest.mark.parametrize("line", [*CORE, *TEST, *DOCS])
def test_dependencies_are_pinned_within_their_bounds(line):
    wanted = Requirement(line)
    pinned = pins().get(canonicalize_name(wanted.name))
    assert pinned, f"{wanted.name} is not in constraints.txt"
    assert wanted.specifier.contains(pinned), f"{pinned} is outside {line}"


def test_pins_carry_no_local_build():
    assert all(pinned and "+" not in pinned for pinned in pins().values())


def test_version():
    assert PROJECT["version"] == meanfield.__version__
    assert f"version: {meanfield.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_templates_are_packaged():
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    patterns = tool["setuptools"]["package-data"]["meanfield.pages"]
    found = {path for pattern in patterns for path in (ROOT / "meanfield" / "pages").glob(pattern)}
    assert found == {path for path in (ROOT / "meanfield" / "pages" / "templates").iterdir() if path.is_file()}


def test_claims_of_ones_own_are_packaged():
    """`theory_checks.run` is part of the library; benchmarks and tests are not."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = {name.partition(".")[0] for name in setuptools.find_packages(str(ROOT), include=find["include"])}
    assert found == {"meanfield", "theory_checks"}


def test_imports_go_downward():
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_tests_and_lint():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111
    assert path.read_text().splitlines()[-2:] == ["make test", "make lint"]
