"""Every figure of docs/what_this_proves.md stands in a stored result of the claim that its paragraph names.

A paragraph with figures begins with a comment,  <!-- claim, claim; given: 1, 2 -->.  What is given is no measurement:
sizes, exponents, thresholds.  "benchmarks.unseen" and "benchmarks.proven" name the figures of those benchmarks.
"""

import json
import re
from pathlib import Path

import pytest

from theory_checks import catalogue

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "what_this_proves.md").read_text()
RECORDS = {each["name"]: each for each in json.loads((DOCS / "theory_checks" / "results.json").read_text())["records"]}
UNSEEN, PROVEN = (json.loads((DOCS / name / f"{name}.json").read_text()) for name in ("unseen", "proven"))
MEASURED = {
    "benchmarks.unseen": [UNSEEN["figures"], UNSEEN["level"]],
    "benchmarks.proven": [row | {"curve": row["curve"][:1]} for row in PROVEN["rows"]],
}
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
NO_FIGURE = r"```.*?```|`[^`]*`|!?\[[^\]]*\]\([^)]*\)|\(p, W, U\)|section \d+|NeurIPS \d+"
PARAGRAPHS = [paragraph for paragraph in re.split(r"\n\s*\n", PAGE) if paragraph.strip()]


def told(text):
    """The numbers of a text, as they are written; a minus after a digit or a letter is a dash."""
    return [each.replace(",", "").rstrip(",") for each in re.findall(rf"(?<![\w.])(?:(?<=\w)-)?{NUMBER}", text)]


def figures(paragraph):
    head = re.match(r"<!-- (.*?) -->\n", paragraph)
    body = re.sub(NO_FIGURE, " ", paragraph[head.end() :] if head else paragraph, flags=re.DOTALL)
    return head[1] if head else "", told(body)


def matches(token, value):
    """Whether a stored value is the token, rounded as the token is: as it stands, to or from per cent, or with its sign
    turned.
    """
    mantissa, _, power = token.partition("e")
    step = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    return any(
        abs(abs(float(token)) - abs(value) * unit) <= 0.5000001 * step + 1e-12 * abs(value) for unit in (1, 100, 0.01)
    )


def stored(name):
    if name in MEASURED:
        return [float(token) for token in told(json.dumps(MEASURED[name]))]
    record = RECORDS[name]
    parts = [record["evidence"], *record["controls"].values()]
    numbers = [float(part["statistic"]) for part in parts] + [float(record["threshold"])]
    return numbers + [float(number) for part in parts for number in told(part["text"])]


def unfounded(paragraph):
    """The figures of a paragraph that are neither given nor in the results it names."""
    head, found = figures(paragraph)
    names, _, given = head.partition("given: ")  # a size that is chosen, an exponent, a number of layers
    allowed = {each.strip() for each in given.split(",") if each.strip()}
    names = filter(None, names.removesuffix("; ").split(", "))
    values = [value for name in names for value in stored(name)]
    return [token for token in found if token not in allowed and not any(matches(token, v) for v in values)]


@pytest.mark.parametrize("paragraph", PARAGRAPHS, ids=range(len(PARAGRAPHS)))
def test_every_figure_is_in_the_stored_results(paragraph):
    assert not unfounded(paragraph), paragraph


def test_a_wrong_figure_is_found():
    some = next(each for each in PARAGRAPHS if "mixture" in figures(each)[0])
    assert not unfounded(some)
    assert unfounded(some.replace("17 to 40", "17 to 45")) == ["45"]
    assert unfounded(some.split("\n", 1)[1])  # without its comment


def test_numbers_are_read_and_rounded_as_they_are_written():
    assert told("17,280 pairs, slope -1.76 (-1.88 to -1.63), at most 6e-5 of 30.") == [
        "17280",
        "-1.76",
        "-1.88",
        "-1.63",
        "6e-5",
        "30",
    ]
    assert matches("23.5", 0.2351)
    assert matches("6e-5", 6.1e-5)
    assert not matches("40", 0.391)
    assert matches("2.5e-5", 2.4566e-5)
    assert not matches("2.5e-5", 2.56e-5)


def test_the_stored_run_holds_every_claim():
    assert set(RECORDS) == {claim.name for claim in catalogue.claims()}
    assert all(record["passed"] and record["full"] for record in RECORDS.values())
