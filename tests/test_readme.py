import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_library_example_runs_as_written(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert abs(float(names["program"].value(names["point"])) - names["solution"].value) < 1e-9
    assert abs(names["reference"].value - names["solution"].value) <= names["solution"].gap + 1e-7
    assert "duality gap on this support" in printed
    assert len([line for line in block.splitlines() if line.strip()]) <= 20


def test_the_test_command_is_the_one_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("make test", "make lint"):
        assert command in README
        assert command in ci


def test_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).stat().st_size > 10_000 for picture in pictures)
