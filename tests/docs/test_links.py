import pytest

from docs.extensions import links


@pytest.fixture
def site(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "index.html").write_text('<h1 id="top"><a href="below/page.html#here">a</a><a href="#top">b</a></h1>')
    (tmp_path / "below" / "page.html").write_text(
        '<p id="here"><a href="../index.html">a</a><a href="https://a.org/no">b</a><img src="../picture%20.png">'
    )
    (tmp_path / "picture .png").write_bytes(b"")
    return tmp_path


def test_a_site_without_dead_links(site):
    assert links.dead(site) == []
    assert links.main(str(site)) == 0


@pytest.mark.parametrize("link", ["none.html", "below/page.html#there", "#nowhere", "../outside.html"])
def test_a_dead_link_is_named(site, link):
    (site.parent / "outside.html").write_text("")
    with (site / "index.html").open("a") as page:
        page.write(f'<a href="{link}">c</a>')
    assert links.dead(site) == [f"index.html: {link}"]
    assert links.main(str(site)) == 1
