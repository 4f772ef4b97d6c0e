"""Surfaces that can be turned: what plotly is told, and that a page carries its script inside, once."""

import base64
import json

import numpy as np

from meanfield.pages import html, interactive
from meanfield.pages.html import Figure, Interactive, Page, Section
from meanfield.pages.interactive import Relief

MADE = {"command": "x", "library": "0", "versions": {}, "threads": {}}
VALUES = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # (x, y)
RELIEF = Relief("a </script><b>", [0.0, 1.0], [-1.0, 0.0, 1.0], VALUES, "note", [(0.0, -1.0, 1.0)], [(1.0, 1.0, 6.0)])


def numbers(entry):
    found = np.frombuffer(base64.b64decode(entry["bdata"]), entry["dtype"]) if isinstance(entry, dict) else entry
    shape = tuple(map(int, entry["shape"].split(","))) if isinstance(entry, dict) and "shape" in entry else (-1,)
    return np.reshape(found, shape)


def test_rows_lie_along_y_and_points_are_where_they_are():
    text = interactive.reliefs([RELIEF, RELIEF], "a", "b", "loss")
    figure = json.loads(text)
    height, checks, marks = figure["data"][:3]
    assert np.array_equal(numbers(height["z"]), VALUES.T)
    assert np.array_equal(numbers(height["x"]), RELIEF.x)
    assert np.array_equal(numbers(height["y"]), RELIEF.y)
    assert [float(numbers(checks[axis])[0]) for axis in "xyz"] == [1.0, 1.0, 6.0]
    assert [float(numbers(marks[axis])[0]) for axis in "xyz"] == [0.0, -1.0, 1.0]


def test_names_are_no_html_and_the_menu_shows_one_at_a_time():
    text = interactive.reliefs([RELIEF, RELIEF], "a", "b", "loss")
    assert "<" not in text
    figure = json.loads(text)
    menu, _ = figure["layout"]["updatemenus"]
    assert [each["args"][0]["visible"] for each in menu["buttons"]] == [
        [True] * 3 + [False] * 3,
        [False] * 3 + [True] * 3,
    ]
    assert menu["buttons"][0]["label"] == "a &lt;/script&gt;&lt;b&gt;"
    assert [each["visible"] for each in figure["data"]] == [True] * 3 + [False] * 3


def page(*items):
    return Page("T", "claim", [Section("S", items)], MADE)


def test_a_page_has_the_script_once_and_the_picture_without_it():
    turned = Interactive("p", "caption", interactive.reliefs([RELIEF], "a", "b", "loss"))
    text = html.render(page(turned, turned), {"p": "data:image/png;base64,AA"})
    assert text.count(interactive.script()[:200]) == 1
    assert text.count('<img src="data:image/png;base64,AA"') == 2
    assert 'src="http' not in text
    plain = html.render(page(Figure("p", "caption")), {"p": "data:image/png;base64,AA"})
    assert "Plotly" not in plain
