import json
import re

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from matplotlib.figure import Figure as Drawn

from meanfield.pages import html
from meanfield.pages.html import Details, Figure, Note, Page, Section, Table

MADE = {
    "command": "meanfield 'a<b'",
    "library": "0123",
    "versions": {"torch": "2", "numpy": "1"},
    "threads": {"torch": 2},
}


def page(*items):
    return Page(
        "A & b", Markup("x<sub>1</sub> is <b>{}</b>").format("<1>"), [Section("One <two>", items, "place")], MADE
    )


def test_text_is_escaped_and_markup_is_not():
    text = html.render(page("J < 1 & more", Markup("λ<sub>s</sub>")), {})
    assert "<title>A &amp; b</title>" in text
    assert "x<sub>1</sub> is <b>&lt;1&gt;</b>" in text
    assert '<section id="place">' in text
    assert "<h2>One &lt;two&gt;</h2>" in text
    assert "<p>J &lt; 1 &amp; more</p>" in text
    assert "<p>λ<sub>s</sub></p>" in text


def test_a_table_shows_values_as_they_are_and_none_as_nothing():
    table = Table(["name <x>", "value"], [["a&b", 1.5], [None, Markup("<b>0</b>")]], text=(0,))
    for text in (html.render(page(table), {}), html.render(page(Details("more", table)), {})):
        assert re.findall(r"<th(?: [^>]*)?>(.*?)</th>", text) == ["name &lt;x&gt;", "value"]
        assert re.findall(r"<td(.*?)>(.*?)</td>", text) == [
            (' class="text"', "a&amp;b"),
            ("", "1.5"),
            (' class="text"', ""),
            ("", "<b>0</b>"),
        ]
    assert "<details><summary>more</summary>" in text


def test_a_picture_has_its_caption_and_a_missing_one_is_an_error():
    shown = page(Figure("loss", 'J "falls"', wide=True), Note("Read:", "carefully"))
    text = html.render(shown, {"loss": "data:image/png;base64,AA"})
    assert '<figure class="wide"><img src="data:image/png;base64,AA" alt="J &#34;falls&#34;">' in text
    assert '<p class="warning"><strong>Read:</strong> carefully</p>' in text
    with pytest.raises(UndefinedError, match="loss"):
        html.render(shown, {})


def test_the_footer_says_what_made_the_page():
    text = html.render(page(), {})
    assert "Made by <code>meanfield &#39;a&lt;b&#39;</code>." in text
    assert "Library 0123; torch 2, numpy 1. Threads: torch 2." in " ".join(text.split())


def test_the_files_of_a_page_are_itself_its_pictures_and_figures():
    found = html.files(page(Figure("loss", "J")), "name", {"loss": Drawn()}, {"slope": float("nan"), "at": (1, 2)})
    assert set(found) == {"name.html", "loss.png", "summary.json"}
    assert html.inline(found["loss.png"]) in found["name.html"]
    assert json.loads(found["summary.json"]) == {"made": MADE, "slope": None, "at": [1, 2]}
