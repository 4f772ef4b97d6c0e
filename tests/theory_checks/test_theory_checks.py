"""Every claim of the theory at quick effort, and the frame around them: it must be able to say no."""

import ast
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html import unescape

import pytest

from meanfield.bench import provenance
from meanfield.bench.provenance import Provenance
from meanfield.pages import html
from meanfield.rates import slope
from meanfield.studies.convexity import Witness
from theory_checks import catalogue, page, pictures, runner, statistics
from theory_checks.__main__ import Options, main
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting, judge, ranked

CLAIMS = {claim.name: claim for claim in catalogue.claims()}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_holds_and_its_controls_are_rejected(name):
    verdict = judge(CLAIMS[name], Setting())
    assert not verdict.error, verdict.error
    assert verdict.holds, verdict.evidence.text
    assert verdict.controls
    assert not verdict.passing_controls, [verdict.controls[each].text for each in verdict.passing_controls]


def test_the_catalogue_names_every_file_of_claims():
    assert {claim.name.split(".")[0] for claim in CLAIMS.values()} == set(catalogue.FAMILIES)
    with pytest.raises(ValueError, match=r"only='invariance' is unknown.*'change_of_variables'.*mean 'invariances'"):
        catalogue.claims(["invariance"])
    assert [claim.name for claim in catalogue.claims(["invariances"])] == ["invariances.particles", "invariances.scale"]
    chosen = catalogue.claims(["mixture", "invariances.scale", "mixture"])
    assert [claim.name for claim in chosen] == ["mixture", "mixture.loss", "invariances.scale"]


def told(statistic, **more):
    return lambda setting: Evidence(statistic, f"found {statistic}", **more)


def made(statistic, control, **more):
    return Claim(
        name="made_up",
        statement="s",
        source="p",
        statistic="number",
        threshold=1.0,
        derivation="d",
        limits="l",
        measure=told(statistic),
        controls={"dropped": told(control)},
        axes=Axes("x", "y"),
        **more,
    )


@pytest.mark.parametrize(
    ("statistic", "control", "at_least", "holds", "rejected"),
    [
        (0.5, 2.0, False, True, True),
        (2.0, 3.0, False, False, True),
        (0.5, 0.5, False, True, False),
        (2.0, 0.5, True, True, True),
        (2.0, 3.0, True, True, False),
        (0.5, 0.1, True, False, True),
        (math.nan, math.nan, False, False, False),
        (math.nan, math.nan, True, False, False),
        (0.5, math.inf, False, True, True),
        (1.0, 1.0, False, True, False),
    ],
)
def test_a_verdict_needs_the_claim_and_its_control(statistic, control, at_least, holds, rejected):
    verdict = judge(made(statistic, control, at_least=at_least), Setting())
    assert (verdict.holds, verdict.control_rejected, verdict.passed) == (holds, rejected, holds and rejected)


def test_one_passing_control_of_several_fails_the_check():
    claim = replace(made(0.5, 2.0), controls={"a": told(3.0), "b": told(0.9)})
    verdict = judge(claim, Setting())
    assert verdict.passing_controls == ["b"]
    assert verdict.control_statistic == 0.9
    (line,) = page.failures([verdict.to_dict()])
    assert "THE CONTROL PASSES" in line
    assert "b; found 0.9" in line


def test_a_claim_without_controls_never_passes():
    assert not judge(replace(made(0.5, 2.0), controls={}), Setting()).passed


def raising(setting):
    raise RuntimeError("no measurement <today>")


def test_a_measurement_that_raises_is_a_failed_check():
    record = judge(replace(made(0.5, 2.0), measure=raising), Setting()).to_dict()
    assert not record["passed"]
    assert "no measurement <today>" in page.failures([record])[0]
    assert page.verdict(record) == "ERROR"
    text = html.render(page.assemble([record], Provenance("command", {})), {})
    assert "<pre>Traceback" in text
    assert "no measurement &lt;today&gt;" in text
    assert "<img" not in text


def test_records_are_strict_json_and_come_back_the_same():
    claim = replace(
        made(0.5, math.inf), measure=told(0.5, series=(Series("a", [0.0, 1.0], [1.0, math.nan], "points"),))
    )
    record = judge(claim, Setting()).to_dict()
    again = json.loads(json.dumps(record, allow_nan=False))
    assert float(again["control_statistic"]) == math.inf
    assert math.isnan(float(again["evidence"]["series"][0]["y"][1]))
    assert pictures.picture(again, claim.axes).startswith(b"\x89PNG")
    text = html.render(page.assemble([again], Provenance("command", {})), {"made_up": "made_up.png"})
    assert '<section id="made_up">' in text
    assert '<img src="made_up.png"' in text


def test_ranked_values_are_points_by_size():
    assert ranked("a", [3.0, 1.0, 2.0]) == Series("a", [0.0, 1.0, 2.0], [1.0, 2.0, 3.0], "points")


def test_draws_depend_on_seed_and_place_only():
    assert Setting(3).derived_seed(1, 2) == Setting(3, full=True).derived_seed(1, 2)
    assert len({Setting(seed).derived_seed(*place) for seed in (0, 1) for place in ((1,), (2,), (1, 2), (2, 1))}) == 8


def test_intervals_of_shares_and_slopes():
    low, high = statistics.share_interval(0, 20)
    assert (low, round(high, 4)) == (0.0, round(1 - 0.025 ** (1 / 20), 4))  # Clopper-Pearson, closed form at no success
    x = [8, 16, 32, 64]
    fitted = slope(x, [[3 / m] * 5 for m in x])
    assert fitted.value == pytest.approx(-1)
    assert fitted.low == pytest.approx(-1)
    assert fitted.high == pytest.approx(-1)
    spread = slope(x, [[2 / m, 4 / m] * 20 for m in x])
    assert spread.low < spread.value < spread.high
    assert math.isnan(statistics.largest([1.0, math.nan]))
    assert math.isnan(statistics.smallest([1.0, math.nan]))


CHEAP = "invariances.scale"


def run(*arguments):
    """The exit code."""
    try:
        main(arguments)
    except SystemExit as stopped:
        return stopped.code
    return 0


def again(names, directory, seed=0, full=False, device="cpu"):
    """Run the claims; which of them were there already."""
    kept = {}

    def announce(cell, known):
        kept[cell["claim"]] = known

    runner.run(runner.cells(names, [seed], full, device), directory, announce=announce)
    return kept


@pytest.fixture
def change(monkeypatch):
    """change(file): from now on that file says something else."""
    digest, changed = provenance.digest, set()

    def changing(paths):
        paths = list(paths)
        return digest(paths) + "".join(sorted(changed & {path.name for path in paths}))

    monkeypatch.setattr(provenance, "digest", changing)
    return changed.add


def test_a_verdict_is_kept_until_its_family_the_frame_or_the_library_changes(tmp_path, monkeypatch, change):
    monkeypatch.setattr(runner, "judge", lambda claim, setting: judge(made(0.5, 2.0), setting))
    names = ["invariances.scale", "invariances.particles", "mixture"]
    assert again(names, tmp_path) == dict.fromkeys(names, False)
    assert again(names, tmp_path) == dict.fromkeys(names, True)
    for elsewhere in ("page.py", "pictures.py", "catalogue.py", "__main__.py", "hybrids.py"):
        change(elsewhere)
    assert again(names, tmp_path) == dict.fromkeys(names, True)
    change("invariances.py")
    assert again(names, tmp_path) == {"invariances.scale": False, "invariances.particles": False, "mixture": True}
    change("claim.py")
    assert again(names, tmp_path) == dict.fromkeys(names, False)
    monkeypatch.setattr(provenance, "library", lambda: "another")
    assert again(names, tmp_path) == dict.fromkeys(names, False)


def test_the_sources_of_a_verdict_are_all_that_its_family_imports():
    for name in CLAIMS:
        own = {path.stem for path in runner.sources({"claim": name})}
        for path in runner.sources({"claim": name}):
            imported = {
                node.module.split(".")[1]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("theory_checks.")
            }
            assert imported <= own, (name, path)


def test_a_verdict_of_another_seed_effort_or_device_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "judge", lambda claim, setting: judge(made(0.5, 2.0), setting))
    assert again([CHEAP], tmp_path) == {CHEAP: False}
    for other in ({"seed": 1}, {"full": True}, {"device": "cuda"}):
        assert again([CHEAP], tmp_path, **other) == {CHEAP: False}


def test_an_error_is_not_believed_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "judge", lambda claim, setting: judge(replace(claim, measure=raising), setting))
    assert again([CHEAP], tmp_path) == {CHEAP: False}
    monkeypatch.undo()
    assert again([CHEAP], tmp_path) == {CHEAP: False}
    assert again([CHEAP], tmp_path) == {CHEAP: True}


def test_the_command_writes_its_page_and_goes_on_where_it_stopped(tmp_path, capsys):
    command = ["--only", CHEAP, "--jobs", "1", "--out", str(tmp_path / "a b"), "--seeds"]
    assert run(*command, "2") == 0
    first = capsys.readouterr()
    assert "holds (2 seeds)" in first.out
    assert "there already" not in first.err
    names = {"index.html", "results.json", f"{CHEAP}.png", "theory_checks.manifest.json", "cells"}
    assert {path.name for path in (tmp_path / "a b").iterdir()} == names
    results = json.loads((tmp_path / "a b" / "results.json").read_text())
    assert [record["seed"] for record in results["records"]] == [0, 1]

    assert run(*command, "2") == 0
    assert "2 of 2 cells were there already" in capsys.readouterr().err
    assert json.loads((tmp_path / "a b" / "results.json").read_text()) == results

    assert run(*command, "3") == 0
    assert "2 of 3 cells were there already" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_a_damaged_verdict_is_measured_again(tmp_path, capsys):
    """A truncated one used to end with the exit code of a claim that fails."""
    command = ["--only", CHEAP, "--jobs", "1", "--out", str(tmp_path), "--quiet"]
    assert run(*command) == 0
    (path,) = (tmp_path / "cells").iterdir()
    for damage in (lambda text: text[:200], lambda text: text.replace('"passed": true', '"passed": false')):
        whole = path.read_text()
        path.write_text(damage(whole))
        assert path.read_text() != whole
        capsys.readouterr()
        assert run(*command) == 0
        said = capsys.readouterr().err
        assert (said.count("\n"), said.count("warning: ")) == (1, 1)
        assert path.name in said
        assert "measured again" in said


def figures(record):
    return [record["statistic"], *(each["statistic"] for each in record["controls"].values()), record["evidence"]]


def test_the_command_on_the_page_gives_the_same_statistics(tmp_path, capsys):
    out = tmp_path / "a b"
    run("--out", str(out), "--only", "change_of_variables", "--only", CHEAP, "--quick", "--jobs", "1", "--seed", "2")
    results = json.loads((out / "results.json").read_text())
    words = shlex.split(unescape(re.search("Made by <code>(.*?)</code>", (out / "index.html").read_text())[1]))
    assert words[:3] == ["python", "-m", "theory_checks"]
    assert shlex.split(results["made"]["command"]) == words
    assert results["made"]["library"] == provenance.library("theory_checks")
    assert Options.from_dict(results["made"]["settings"]).command_line(*words[:3]) == shlex.join(words)

    for path in (out / "cells").iterdir():
        path.unlink()
    capsys.readouterr()
    assert run(*words[3:]) == 0
    assert "there already" not in capsys.readouterr().err
    fresh = json.loads((out / "results.json").read_text())
    assert fresh["made"] == results["made"]
    assert list(map(figures, fresh["records"])) == list(map(figures, results["records"]))


def test_every_option_is_on_the_command_line_of_its_settings():
    options = Options(only=("mixture", CHEAP), full=True, seed=3, seeds=2, jobs=1, out="a b", list=True, quiet=True)
    assert options.command_line("checks") == (
        f"checks --only=mixture --only={CHEAP} --full --seed=3 --seeds=2 --jobs=1 '--out=a b' --list --quiet"
    )
    assert Options.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_the_command_says_no_with_its_exit_code(monkeypatch, capsys):
    broken = replace(CLAIMS[CHEAP], controls={"nothing dropped": CLAIMS[CHEAP].measure})
    monkeypatch.setattr(catalogue, "claim", lambda name: broken)
    assert run("--only", CHEAP, "--jobs", "1") == 1
    text = capsys.readouterr().out
    assert "CONTROL PASSED" in text
    assert "THE CONTROL PASSES" in text
    assert run("--only", CHEAP, "--jobs", "1", "--quiet") == 1
    found = capsys.readouterr()
    assert "THE CONTROL PASSES" in found.out
    assert "CONTROL PASSED" not in found.out
    assert not found.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "nonsense"], "--only='nonsense' is unknown: choose one of 'definition', "),
        (["--only", "invariances.scal"], "did you mean 'invariances.scale'?"),
        (["--onyl", "mixture"], "Did you mean --only?"),
        (["--resume"], "Unknown option: --resume"),
        (["--device", "abacus"], "--device='abacus'"),
        (["--seeds", "0"], "--seeds=0 must be an integer of at least 1"),
        (["--seed", "0.5"], "'0.5' is no integer"),
    ],
)
def test_wrong_options_are_named_in_one_line(arguments, text, capsys):
    assert run(*arguments) == 2
    found = capsys.readouterr()
    assert not found.out
    assert found.err.count("\n") == 1
    assert found.err.startswith("error: ")
    assert text in found.err


def test_a_directory_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *arguments: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert run("--only", CHEAP, "--out", str(tmp_path / "file")) == 2
    assert capsys.readouterr().err.startswith("error: --out=")


def test_claims_are_listed_and_not_measured(capsys, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *arguments: pytest.fail("measured"))
    assert run("--list", "--only", "invariances") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["invariances.particles", CHEAP]


def heeds_ctrl_c():
    """A shell lets what it starts in the background ignore SIGINT, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "theory_checks", "--jobs", "1", "--seeds", "99", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--only", CHEAP], stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heeds_ctrl_c
    )
    while process.poll() is None and len(list(tmp_path.glob("cells/*.json"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"stopped; what was finished is in {tmp_path}, and the same command goes on from there" in stderr
    assert "Traceback" not in stderr


def test_witnesses_of_controls_can_be_replayed(tmp_path):
    """From the file, against the control's own function: the same violation."""
    from theory_checks import joint_convexity

    runner.run(runner.cells(["joint_convexity.segments"], [0], False, "cpu"), tmp_path)
    files = sorted((tmp_path / "witnesses").iterdir())
    assert len(files) == 6
    witness = Witness.load(
        tmp_path / "witnesses" / "joint_convexity.segments.weight_decay_for_the_source_penalty.safetensors"
    )
    found = []
    for instance, depth in ((0, 2), (1, 3), (2, 2), (3, 3), (4, 2), (5, 3)):
        variables = joint_convexity._variables(Setting(), instance, depth)
        if len(variables.template.vector()) == len(witness.start):
            penalty = joint_convexity.PENALTIES["weight decay for the source penalty"]
            found.append(witness.replay(joint_convexity._penalty_alone(penalty, variables)))
    assert any(abs(each / witness.violation - 1) < 1e-9 for each in found)
