import math

import pytest

from meanfield.pages import words


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.two(0.1), "0.10"),
        (words.two(2), "2.0"),
        (words.two(23.4), "23"),
        (words.two(1234.4), "1234"),
        (words.scientific(0.00123), "1.23e-03"),
        (words.scientific(0), "0"),
        (words.scientific(None), "unknown"),
        (words.scientific(math.inf), "unknown"),
        (words.number(1 / 3), "0.33333333"),
        (words.finite(1.005), "1.00"),
        (words.finite(math.nan), "undefined"),
        (words.by((64, 32)), "64 × 32"),
        (words.listed(["a"]), "a"),
        (words.listed(["a", "b", "c"]), "a, b and c"),
        (words.count(1, "layer"), "1 layer"),
        (words.count(0, "layer"), "0 layers"),
        (words.capital("seeds differ"), "Seeds differ"),
        (words.capital(""), ""),
        (words.percent_more(0.123), "12.3% more"),
        (words.percent_more(-0.123), "12.3% less"),
    ],
)
def test_figures_are_said_as_a_reader_expects(said, expected):
    assert said == expected
