"""The list of slow tests names tests that are there."""

from pathlib import Path

import pytest
from slow_tests import CLAIMS, SLOW

from theory_checks.catalogue import claim


@pytest.mark.parametrize("name", sorted({name.split("[")[0] for name in SLOW}))
def test_a_slow_test_is_there(name):
    file, function = name.split("::")
    assert f"\ndef {function}(" in (Path(__file__).parent / file).read_text()


@pytest.mark.parametrize("name", CLAIMS)
def test_a_slow_claim_is_there(name):
    assert claim(name).name == name
