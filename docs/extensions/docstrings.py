"""Docstrings as they are written here, as reStructuredText.

They are plain text: `names` in single backquotes, arguments as lines "name: what it is", formulas and code as indented
blocks.  What reStructuredText would read otherwise (bars, stars, underscores) is escaped.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

ITEM = re.compile(r"^((?:\w+(?:\[[^\]]*\])?)(?:, \w+(?:\[[^\]]*\])?)*): (?=\S)")
ANOTHER = re.compile(r"(?<=\.)  (?=\w+(?:, \w+)*: \S)")  # sentences end in two blanks
CODE = re.compile(r"`([^`]+)`")


def restructured(lines: list[str]) -> list[str]:
    """Paragraphs become paragraphs, arguments a list, indented paragraphs literal blocks."""
    found: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = block.split("\n")
        if not block.strip():
            continue
        if rows[0].startswith((" ", ">>>")):
            found += ["::", "", *(f"    {row}" for row in rows), ""]
            continue
        for part in _parts(rows):
            name = ITEM.match(part)
            text = _escaped(part[name.end() :] if name else part)
            found += [f"- **{_escaped(name[1])}**: {text}" if name else text, ""]
    return found


def _parts(rows: list[str]) -> list[str]:
    """The text before the arguments, and each argument, joined to a line."""
    parts: list[list[str]] = [[]]
    for row in (piece for line in rows for piece in ANOTHER.split(line)):
        if ITEM.match(row):
            parts.append([])
        parts[-1].append(row.strip())
    return [" ".join(part) for part in parts if part]


def _escaped(text: str) -> str:
    """Text with `code` as ``code``, and nothing else that is markup."""
    pieces = CODE.split(text)
    plain = [re.sub(r"([\\*|`_<>])", r"\\\1", piece) for piece in pieces[::2]]
    code = [f"\\ ``{piece}``\\ " for piece in pieces[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""]))


def process(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """For `autodoc-process-docstring`."""
    lines[:] = restructured(lines)


def signature(
    app: Any, what: str, name: str, found: Any, options: Any, arguments: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """For `autodoc-process-signature`: types by their last name without the checks that go with them, and defaults that
    are made anew as dots.  A class that chooses what it makes in `__new__` has the arguments of its `__init__`.
    """
    if inspect.isclass(found) and "__new__" in vars(found) and "__init__" in vars(found):
        from sphinx.util.inspect import stringify_signature  # the tests run without it

        arguments = stringify_signature(inspect.signature(found.__init__), show_return_annotation=False)
        arguments = arguments.replace("(self, ", "(", 1)
    return _short(arguments), _short(returned)


def _short(text: str | None) -> str | None:
    return text and re.sub(r"~[\w.]*\.(\w+)", r"\1", _unchecked(text)).replace("<factory>", "...")


def _unchecked(text: str) -> str:
    """Every Annotated[type, checks] as the type."""
    while (start := text.find("Annotated[")) >= 0:
        depth, commas, at = 1, [], start + len("Annotated[")
        while depth:
            depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(text[at], 0)
            if depth == 1 and text[at] == ",":
                commas.append(at)
            at += 1
        text = text[:start] + text[start + len("Annotated[") : commas[0]] + text[at:]
    return text
