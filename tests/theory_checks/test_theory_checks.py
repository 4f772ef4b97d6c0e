"""Every claim of the theory at quick effort, and the frame around them: it must be able to say no."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meanfield.bench.rates import slope
from meanfield.studies.convexity import Witness
from theory_checks import catalogue, page, pictures, runner, statistics
from theory_checks.__main__ import app
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting, judge

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
    with pytest.raises(ValueError, match="no_such_claim: no such claim; there are change_of_variables"):
        catalogue.claims(["no_such_claim"])
    assert [claim.name for claim in catalogue.claims(["invariances"])] == ["invariances.particles", "invariances.scale"]


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


def test_a_measurement_that_raises_is_a_failed_check():
    def raising(setting):
        raise RuntimeError("no measurement today")

    verdict = judge(replace(made(0.5, 2.0), measure=raising), Setting())
    assert not verdict.passed
    assert "no measurement today" in page.failures([verdict.to_dict()])[0]
    assert page.verdict(verdict.to_dict()) == "ERROR"


def test_records_are_strict_json_and_come_back_the_same():
    claim = replace(
        made(0.5, math.inf), measure=told(0.5, series=(Series("a", [0.0, 1.0], [1.0, math.nan], "points"),))
    )
    record = judge(claim, Setting()).to_dict()
    again = json.loads(json.dumps(record, allow_nan=False))
    assert float(again["control_statistic"]) == math.inf
    assert math.isnan(float(again["evidence"]["series"][0]["y"][1]))
    assert pictures.picture(again, claim.axes).startswith(b"\x89PNG")
    assert "made_up" in page.html([again], {}, "command")


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


def test_a_stored_verdict_is_taken_only_if_the_code_is_the_same(tmp_path, monkeypatch):
    tasks = [(CHEAP, Setting())]
    (tmp_path / "verdicts").mkdir()
    (first,) = runner.run(tasks, tmp_path)
    monkeypatch.setattr(runner, "_measure", lambda task, directory: pytest.fail("measured again"))
    assert list(runner.run(tasks, tmp_path, resume=True)) == [first]
    monkeypatch.setattr(
        runner, "_measure", lambda task, directory: {"name": CHEAP, "seed": 0, "full": False, "fresh": True}
    )
    assert next(runner.run(tasks, tmp_path))["fresh"]
    (tmp_path / "verdicts" / f"{CHEAP}.quick.0.json").write_text(json.dumps(first | {"code": "older"}))
    assert next(runner.run(tasks, tmp_path, resume=True))["fresh"]


def test_the_digest_of_a_claim_covers_its_own_file_and_the_frame():
    assert (
        runner.fingerprint("invariances.scale")
        == runner.fingerprint("invariances.particles")
        != runner.fingerprint("mixture")
    )
    for name in runner.FRAME:
        assert (Path(runner.__file__).parent / f"{name}.py").exists()


def test_the_command_writes_its_page_and_says_yes(tmp_path):
    result = CliRunner().invoke(app, ["--only", CHEAP, "--jobs", "1", "--seeds", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "holds (2 seeds)" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "results.json", f"{CHEAP}.png", "verdicts"}
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 2


def test_the_command_says_no_with_its_exit_status(monkeypatch):
    broken = replace(CLAIMS[CHEAP], controls={"nothing dropped": CLAIMS[CHEAP].measure})
    monkeypatch.setattr(runner, "claim", lambda name: broken)
    result = CliRunner().invoke(app, ["--only", CHEAP, "--jobs", "1"])
    assert result.exit_code == 1
    assert "CONTROL PASSED" in result.output
    assert "THE CONTROL PASSES" in result.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--only", "nonsense"], "no such claim"),
        (["--resume"], "needs --out"),
        (["--device", "abacus"], "cannot be used"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_wrong_options_are_named(options, text):
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert text in " ".join(result.output.split())


def test_witnesses_of_controls_can_be_replayed(tmp_path):
    """From the file, against the control's own function: the same violation."""
    from theory_checks import joint_convexity

    (tmp_path / "verdicts").mkdir()
    list(runner.run([("joint_convexity.segments", Setting())], tmp_path))
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
