"""Commands that are ended at random moments: by signals, and by kill -9 of themselves or of one of their workers.

`python tests/kills.py` ends 40 and says what became of them; `tests/test_kills.py` takes some of these.  After every
end no process may be left ten seconds later, nothing that was finished may be lost, and the folder holds one result.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from command_line import tiny

from meanfield import load_network
from meanfield.storage import tensors
from meanfield.storage.results import Result

ROOT = Path(__file__).parent.parent
LEFT = 10.0  # seconds after which no process may be left
PATIENCE = 120.0  # for a command to end by itself
KINDS = ("SIGTERM", "SIGHUP", "two SIGINT", "kill -9 of the parent", "kill -9 of a worker")
QUICK_REPORT = (
    "from meanfield.studies.solve import measure; measure.TRAINED_WIDTHS = (); measure.SAMPLED_WIDTHS = (4,); "
    "measure.PEER_STEPS = 20; "
    "from meanfield import cli; cli.main()"
)


@dataclass(frozen=True)
class Command:
    """words: without --out.  result: its name in the folder.  kinds: one of each way to end it; a solve has no workers,
    and is killed at two moments.
    """

    name: str
    words: tuple[str, ...]
    result: str
    kinds: tuple[str, ...] = KINDS

    def line(self, out, *more):
        return [sys.executable, *self.words, *more, "--out", str(out)]


COMMANDS = {
    each.name: each
    for each in (
        Command(
            "solve",
            ("-c", QUICK_REPORT, *tiny("--widths=8,6", "--samples=10", "--rounds=3", "--flow-steps=150")),
            "solve",
            (*KINDS[:-1], "kill -9 of the parent"),
        ),
        Command(
            "widths",
            ("-m", "meanfield.cli", "widths", "--size=quick", "--part=kernel", "--part=coordinates", "--jobs=2"),
            "widths",
        ),
        Command(
            "graft",
            (
                "-m",
                "meanfield.cli",
                "graft",
                "--size=quick",
                "--part=across",
                "--network=vgg8",
                "--width=2",
                "--jobs=2",
            ),
            "graft",
        ),
        Command(
            "landscape",
            ("-m", "meanfield.cli", "landscape", "--size=quick", "--part=surfaces", "--width=4", "--jobs=2"),
            "landscape",
        ),
        Command(
            "transfer",
            ("-m", "meanfield.cli", "transfer", "--size=quick", "--part=alphas", "--network=cnn", "--jobs=2"),
            "transfer",
        ),
        Command(
            "theory_checks",
            ("-m", "theory_checks", "--only=change_of_variables", "--only=invariances", "--seeds=3", "--jobs=2"),
            "theory_checks",
        ),
    )
}


@dataclass
class Chain:
    """One folder, into which a command runs and is ended again and again, then once to its end."""

    command: Command
    home: Path
    chance: random.Random
    span: float  # seconds among which a moment is drawn
    told: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.out, self.whole = self.home / "out", self.home / "whole"
        if self.command.name == "solve":  # over an older result
            self.finish(self.out, "--seed=1")
        else:
            self.finish(self.whole)

    def finish(self, out, *more):
        done = subprocess.run(self.command.line(out, *more), env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert Result(out, self.command.result).faults() == []
        return done.stderr

    def kill(self, kind):
        """Start the command, end it, and look at what is left."""
        kept = self.cells()
        process = subprocess.Popen(
            self.command.line(self.out, "--seed=2") if self.command.name == "solve" else self.command.line(self.out),
            env=environment(),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            preexec_fn=heeds_signals,
        )
        until(lambda: process.poll() is not None or hears(process.pid), "the command does not start")
        moment = self.chance.uniform(0, self.span)
        until(lambda: process.poll() is not None, "", moment)
        early = process.poll() is not None
        if not early:
            self.strike(process, kind)
        process.wait(timeout=PATIENCE)
        gone = until(lambda: not alive(process.pid), f"{kind}: processes are left", LEFT, must=True)
        _, stderr = process.communicate()
        self.told.append(
            f"{self.command.name}, {kind} after {moment:.1f} s: code {process.returncode}, "
            f"{'it had ended by itself' if early else f'all gone {gone:.1f} s later'}; "
            f"{stderr.strip().splitlines()[-1] if stderr.strip() else 'silent'}"
        )
        assert "Traceback" not in stderr, stderr
        assert early or process.returncode in codes(kind), self.told[-1]
        assert kept <= self.cells(), "finished cells are lost"
        self.look(stderr)

    def strike(self, process, kind):
        if kind == "kill -9 of a worker":
            until(lambda: process.poll() is not None or workers(process.pid), "", 20.0)
            for worker in workers(process.pid)[:1]:
                worker.kill()

        elif kind.startswith("kill -9"):
            process.kill()
        elif kind == "two SIGINT":
            process.send_signal(signal.SIGINT)
            time.sleep(self.chance.choice([0.0, 0.02, 0.3]))
            process.send_signal(signal.SIGINT)
        else:
            process.send_signal(getattr(signal, kind))

    def cells(self):
        return {path.name for path in (self.out / "cells").glob("*.json")}

    def look(self, stderr):
        """One result, whole, of one run; what was said of it is true."""
        result = Result(self.out, self.command.result)
        assert result.faults() == []
        if self.command.name != "solve":
            return
        results, _ = json.loads(result.read("results.json")), load_network(self.out)
        about = tensors.unpack(result.read("network.safetensors"), "network")[1]
        assert about["made"] == results["made"]
        if "report.html" in result.listed():
            assert f"--seed={results['made']['settings']['seed']}" in result.read("report.html").decode()
        said = re.search(r"the best network so far, J = (\S+), is in", stderr)
        if said:
            assert results["made"]["settings"]["seed"] == 2
            assert f"{results['solution']['value']:.8g}" == said[1]

    def close(self):
        """Run to the end: kept cells are not measured again, and the tables are those of a run without a break."""
        kept = len(self.cells())
        if self.command.name == "solve":
            self.finish(self.out, "--seed=2")
            return
        stderr = self.finish(self.out)
        assert not kept or f"{kept} of " in stderr, (kept, stderr)
        for path in self.whole.glob("*.csv"):
            assert figures(path) == figures(self.out / path.name)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def heeds_signals():
    """What a shell lets its background ignore is inherited."""
    for name in ("SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def hears(pid):
    """Whether the process has its own answer to SIGHUP by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & 1 << (signal.SIGHUP - 1))


def workers(pid):
    """Those that have begun to run our code."""
    try:
        return [each for each in psutil.Process(pid).children() if "popen_loky" in " ".join(each.cmdline())]
    except psutil.Error:
        return []


def alive(session):
    """Processes of a session."""
    found = []
    for each in psutil.process_iter():
        try:
            if os.getsid(each.pid) == session and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each.pid)
        except (psutil.Error, OSError):
            continue
    return found


def codes(kind):
    """How the command may end; a worker may be gone before it was needed."""
    number = {"SIGTERM": 143, "SIGHUP": 129, "two SIGINT": 130, "kill -9 of the parent": -9}.get(kind)
    return (0, 75, -9) if number is None else (number, 0)  # 0: it was ending by itself


def until(condition, complaint, seconds=PATIENCE, must=False):
    """Wait; seconds that it took."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > seconds:
            assert not must, complaint
            break
        time.sleep(0.01)
    return time.perf_counter() - began


def figures(table):
    return [line for line in table.read_text().splitlines() if not line.startswith("#")]


def run(name, kinds, seed, span, home):
    """Of one command, ended in these ways one after the other; a line on each."""
    chain = Chain(COMMANDS[name], Path(home), random.Random(f"{name} {seed}"), span)
    for kind in kinds:
        chain.kill(kind)
    chain.close()
    return chain.told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="each ends every command in every way: 25 ends")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--span", type=float, default=8.0, help="seconds among which the moments are drawn")
    parser.add_argument("--only", choices=COMMANDS, action="append", default=[])
    options = parser.parse_args()
    for number in range(options.rounds):
        for name in options.only or COMMANDS:
            kinds = list(COMMANDS[name].kinds)
            random.Random(f"{options.seed + number} {name}").shuffle(kinds)
            home = tempfile.mkdtemp()
            for line in run(name, kinds, options.seed + number, options.span, home):
                print(line, flush=True)
            shutil.rmtree(home)


if __name__ == "__main__":
    main()
