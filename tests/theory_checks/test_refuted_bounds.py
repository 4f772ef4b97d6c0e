"""Bounds that a network lies below."""

import pytest

from theory_checks import stationary_points


def test_the_highest_bound_that_no_network_is_below_counts():
    assert stationary_points._unrefuted([0.1, 0.3, 0.2], 0.25) == 0.2
    with pytest.raises(RuntimeError, match="missed features"):
        stationary_points._unrefuted([0.3], 0.25)
