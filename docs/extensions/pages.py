"""Pages of studies as they were committed: they go into the site beside the texts that link to them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference
from sphinx.transforms import SphinxTransform

FOLDERS = ("theory_checks", "grafting", "widths")


class Linked(SphinxTransform):
    """A link to a page or a table in one of the folders leads there, and not to a copy to be downloaded."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        up = "../" * self.env.docname.count("/")
        for node in list(self.document.findall(download_reference)):
            target = _within(node["reftarget"], self.env.docname)
            if target.split("/")[0] in FOLDERS:
                node.replace_self(nodes.reference("", "", *node.children, refuri=up + target, internal=True))


def _within(target: str, document: str) -> str:
    """The target of a link in a document, as a path below docs/."""
    parts: list[str] = []
    for part in [] if target.startswith("/") else document.split("/")[:-1]:
        parts.append(part)
    for part in target.strip("/").split("/"):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def copy(app: Any, error: Exception | None) -> None:
    """For `build-finished`."""
    if error is None:
        for name in FOLDERS:
            kept = shutil.ignore_patterns("witnesses", "cells", "*.manifest.json")
            shutil.copytree(Path(app.srcdir) / name, Path(app.outdir) / name, dirs_exist_ok=True, ignore=kept)
