"""A command line called in this process, with what it says and how it ends."""

import contextlib
import io
from dataclasses import dataclass

from meanfield import cli


@dataclass(frozen=True)
class Ended:
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments, main=cli.main):
    """`meanfield ARGUMENTS`, or another program's main."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(each) for each in arguments])
        except SystemExit as end:
            code = end.code or 0
    return Ended(code, out.getvalue(), err.getvalue())
