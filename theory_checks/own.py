"""A claim of one's own in the frame of ours: measured with its controls, and written down in a page like ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from meanfield.bench.provenance import Provenance, library
from meanfield.signatures import Seed, checked
from meanfield.storage.results import opened
from meanfield.validation import Misuse, instance, path
from theory_checks import page, runner
from theory_checks.claim import Claim, Setting, Verdict, judge

KEPT = "witnesses"  # folder beside the page


@checked
def run(
    *claims: Claim,
    directory: Annotated[str | Path, path] | None = None,
    full: bool = False,
    seed: Seed = 0,
    device: str = "cpu",
    overwrite: bool = False,
) -> list[Verdict]:
    """Measure claims and their controls, in their order.

    `passed` of a verdict says that the claim holds and that every control was rejected.  A claim without controls does
    not pass, and neither does one whose measurement raises: `error` has the traceback.

    directory: where index.html, results.json, a picture of every claim and the witnesses of controls (seed 0) are
    written, in place of what an earlier call wrote there; files of others are refused without overwrite.  full, seed,
    device: the Setting that measurements get.

    Misuse without a claim, and where two have one name or a name is no name of a file.
    """
    names = [instance(claim, "claims", Claim).name for claim in claims]
    _require_names(names)
    setting = Setting(seed, full, device)
    if directory is None:
        return [judge(claim, setting) for claim in claims]
    with opened(directory, "theory_checks", page.names(names), (KEPT,), overwrite=overwrite) as result:
        verdicts = [judge(claim, setting) for claim in claims]
        for verdict in verdicts:
            runner.save_witnesses(verdict, Path(directory) / KEPT)
        records, axes = [verdict.to_dict() for verdict in verdicts], {claim.name: claim.axes for claim in claims}
        result.publish(page.files(records, _made(names, setting), axes))
    return verdicts


def _made(names: Sequence[str], setting: Setting) -> Provenance:
    settings = {"claims": names, "full": setting.full, "seed": setting.seed, "device": setting.device}
    return Provenance("theory_checks.run(...)", settings, library("theory_checks"))


def _require_names(names: Sequence[str]) -> None:
    if not names:
        raise Misuse("claims", (), "must be one Claim at least")
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise Misuse("name", name, "names files: use letters, digits, '_', '-' and '.'")
        if names.count(name) > 1:
            raise Misuse("name", name, "is that of two claims; each needs its own")
