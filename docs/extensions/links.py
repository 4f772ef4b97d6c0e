"""Links inside a built site that lead nowhere: `python docs/extensions/links.py DIRECTORY`; exits with 1 if one does.

Every href and src without a scheme has to be a file, and what follows # an id in it.
"""

from __future__ import annotations

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The links of a page, and the places in it to which others may lead."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.places.add(value)


@cache
def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def dead(directory: Path) -> list[str]:
    """ "page: link" for every link that leads nowhere."""
    found = []
    for page in sorted(directory.rglob("*.html")):
        for link in _read(page).links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            if target.is_dir():
                target /= "index.html"
            known = target.is_file() and target.is_relative_to(directory.resolve() if address.path else directory)
            lost = address.fragment and target.suffix == ".html" and known
            if not known or (lost and unquote(address.fragment) not in _read(target).places):
                found.append(f"{page.relative_to(directory)}: {link}")
    return found


def main(directory: str) -> int:
    found = dead(Path(directory).resolve())
    for line in found:
        print(line)
    print(f"{len(found)} dead links in {sum(1 for _ in Path(directory).rglob('*.html'))} pages")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
