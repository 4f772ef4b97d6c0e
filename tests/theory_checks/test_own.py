"""A claim of one's own in the frame of ours: what passes, what does not, and its page."""

import json

import pytest
import torch

import theory_checks
from meanfield.studies import convexity
from meanfield.validation import Misuse
from theory_checks import Axes, Claim, Evidence, Series


def measured(function):
    def measure(setting):
        sample = lambda g: torch.rand(2, generator=g, dtype=torch.float64)  # noqa: E731
        found = convexity.falsify(function, sample, 300, seed=setting.derived_seed(1))
        text = f"the worst of {len(found.reached)} restarts: {found.witness.relative:.2g}"
        series = Series("restarts", list(range(len(found.reached))), found.reached, "points")
        return Evidence(found.witness.relative, text, series=(series,), witness=found.witness)

    return measure


def claim(name="norms", function=lambda x: x.norm() + 1, **controls):
    return Claim(
        name=name,
        statement="A norm is convex.",
        source="the triangle inequality",
        statistic="the largest rise above a chord, relative",
        threshold=1e-12,
        derivation="rounding of two square roots",
        limits="It says nothing of other norms.",
        measure=measured(function),
        controls={name: measured(each) for name, each in controls.items()},
        axes=Axes("restart", "rise"),
    )


def concave(x):
    return x.sqrt().sum()


def test_a_claim_with_a_rejected_control_passes_and_has_its_page(tmp_path):
    first, second = theory_checks.run(
        claim(concave=concave), claim("wrong", concave, concave=concave), directory=tmp_path, seed=0
    )
    assert first.passed
    assert (second.holds, second.passed, second.control_rejected) == (False, False, True)
    page = (tmp_path / "index.html").read_text()
    assert "A norm is convex." in page
    assert "1 of 2 claims hold with all of their 2 negative controls rejected" in page
    assert [each["name"] for each in json.loads((tmp_path / "results.json").read_text())["records"]] == [
        "norms",
        "wrong",
    ]
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    kept = convexity.Witness.load(tmp_path / "witnesses" / "norms.concave.safetensors")
    assert kept.replay(concave) == first.controls["concave"].witness.violation
    theory_checks.run(claim("norms", concave=concave), directory=tmp_path)  # takes the place of the older page
    assert not (tmp_path / "wrong.png").exists()


def test_a_control_that_passes_and_none_at_all_are_failures():
    passing, without, raising = theory_checks.run(
        claim(square=lambda x: x.square().sum()), claim("alone"), claim("raises", lambda x: x.no_such_thing, c=concave)
    )
    assert (passing.holds, passing.passed, passing.passing_controls) == (True, False, ["square"])
    assert (without.holds, without.passed) == (True, False)
    assert not raising.passed
    assert "no_such_thing" in raising.error
    (late,) = theory_checks.run(claim(concave=concave, broken=lambda x: x.no_such_thing))
    assert (late.holds, late.control_rejected, late.passed) == (True, True, False)


def test_seed_and_effort_reach_the_measurement():
    seen = []
    spying = Claim(**{**claim().__dict__, "measure": lambda setting: seen.append(setting) or Evidence(0.0, "")})
    theory_checks.run(spying, full=True, seed=7)
    assert [(each.seed, each.full, each.device) for each in seen] == [(7, True, "cpu")]


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ((), r"claims=\(\) must be one Claim at least"),
        ((claim(), claim()), "name='norms' is that of two claims"),
        ((claim("../x"),), "name='../x' names files"),
    ],
)
def test_claims_that_cannot_be_told_apart_or_written_are_refused(claims, message):
    with pytest.raises(Misuse, match=message):
        theory_checks.run(*claims)


def test_the_folder_of_somebody_else_is_refused_before_the_work(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    never = claim(function=lambda x: pytest.fail("measured"))
    with pytest.raises(Misuse, match=r"index\.html"):
        theory_checks.run(never, directory=tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"
