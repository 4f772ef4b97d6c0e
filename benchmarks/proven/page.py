"""The table of the benchmark in a page: the lines below its mark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks import tables
from meanfield.validation import Misuse

MARK = "<!-- benchmarks.proven -->\n"
TABLE = re.compile(f"(?<={re.escape(MARK)})" + r"(?:\|.*\n)+")


def read(page: Path) -> str:
    """The text of a page that has the table; raises Misuse where it has not."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if not TABLE.search(text):
        raise Misuse("page", page, f"must be a page with a table below the line {MARK.strip()}")
    return text


def update(page: Path, found: dict[str, Any]) -> None:
    page.write_text(TABLE.sub(lambda _: markdown(found), read(page)), encoding="utf-8")


def markdown(found: dict[str, Any]) -> str:
    """The benchmark's table."""
    (table,) = tables.proven(found)
    columns = [[str(each).replace("|", r"\|") for each in (column.header, *column.cells)] for column in table.columns]
    head, *rows = zip(*columns)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, *rows)).replace("\n", f"\n{'|---' * len(head)}|\n", 1)
