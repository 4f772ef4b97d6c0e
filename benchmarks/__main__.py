"""`python -m benchmarks flow|optima`: measure, print tables, write JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import flow_step, optima
from meanfield.storage import write_atomically

DEFAULTS = flow_step.Settings()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of meanfield against plain torch and against known optima.")
    kinds = top.add_subparsers(dest="benchmark", required=True)
    form = argparse.ArgumentDefaultsHelpFormatter
    flow = kinds.add_parser("flow", help="a step of the particle flow against a training step of nn.Conv2d layers", formatter_class=form)
    flow.add_argument("--samples", type=_positive, default=DEFAULTS.samples, help="training images, the first of the ten digits")
    flow.add_argument("--widths", type=_positive, nargs=2, default=DEFAULTS.widths, metavar=("M1", "M2"), help="channels of the two layers")
    flow.add_argument("--dtypes", nargs="+", choices=tuple(flow_step.DTYPES), default=DEFAULTS.dtypes, help="what to measure")
    flow.add_argument("--repetitions", type=_positive, default=DEFAULTS.repetitions, help="timed blocks of each contender")
    flow.add_argument("--block", type=_positive, default=DEFAULTS.block, help="steps in a timed block")
    flow.add_argument("--training-steps", type=int, default=DEFAULTS.training_steps, help="steps before the accuracy is taken; 0 leaves it out")
    flow.add_argument("--seed", type=int, default=DEFAULTS.seed, help="seed of both starts")
    known = kinds.add_parser("optima", help="the main job against known optima, several seeds (about 4 minutes)", formatter_class=form)
    known.add_argument("--seeds-one", type=_positive, default=5, help="seeds of the one-layer problem")
    known.add_argument("--seeds-two", type=_positive, default=3, help="seeds of the two-layer problem")
    known.add_argument("--rounds", type=_positive, default=8, help="rounds of the two-layer alternation")
    for kind in (flow, known):
        kind.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the figures here")
    return top


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> dict[str, Any]:
    given = vars(parser().parse_args(arguments))
    out, console = given.pop("out"), console or Console()
    found = (measure_flow if given.pop("benchmark") == "flow" else measure_optima)(given, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(found, indent=2) + "\n")
        console.print(f"figures written to {out}")
    return found


def measure_flow(given: dict[str, Any], console: Console) -> dict[str, Any]:
    found = flow_step.run(flow_step.from_dict({name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}))
    console.print(speed_table(found))
    if found["training"]:
        console.print(training_table(found["training"]))
    return found


def measure_optima(given: dict[str, Any], console: Console) -> dict[str, Any]:
    found = optima.run(**given)
    one = Table("seed", "J", "J minus exact optimum", "seconds", title=f"one ReLU layer, 64 particles; exact optimum {optima.EXACT_ONE_LAYER}")
    for row in found["one_layer"]:
        one.add_row(str(row["seed"]), f"{row['value']:.11f}", f"{row['excess']:.1e}", f"{row['seconds']:.1f}")
    two = Table("seed", "J", "flow gap per round", "J never rises", "cvxpy on the final program", "seconds", title="two tanh layers")
    for row in found["two_layers"]:
        gaps = " ".join(f"{gap:.0e}" for gap in row["flow_gaps"])
        two.add_row(str(row["seed"]), f"{row['value']:.8f}", gaps, str(row["never_rises"]), f"{row['reference_value']:.8f}", f"{row['seconds']:.0f}")
    console.print(one)
    console.print(two)
    return found


def speed_table(found: dict[str, Any]) -> Table:
    settings = found["settings"]
    title = f"one step, {settings['samples']} images, widths {tuple(settings['widths'])}, one thread, medians of CPU seconds"
    table = Table("dtype", "flow ms", "plain ms", "flow's speed", "flow MiB", "plain MiB", "flow's memory", title=title)
    for dtype, each in found["figures"].items():
        seconds, peak = each["seconds_per_step"], each["peak_bytes"]
        table.add_row(
            dtype, f"{1e3 * seconds['flow']:.1f}", f"{1e3 * seconds['plain']:.1f}",
            f"{each['speed_ratio']:.0%} {_verdict(each['fast_enough'], f'at least {flow_step.SPEED_REQUIRED:.0%}')}",
            f"{peak['flow'] / 2**20:.0f}", f"{peak['plain'] / 2**20:.0f}",
            f"{each['memory_ratio']:.2f}x {_verdict(each['small_enough'], f'at most {flow_step.MEMORY_ALLOWED:g}x')}",
        )  # fmt: skip
    return table


def _verdict(kept: bool, required: str) -> str:
    return f"({required}: {'kept' if kept else 'MISSED'})"


def training_table(trained: dict[str, Any]) -> Table:
    title = f"accuracy after {trained['steps']} steps; {trained['held_out_images']} images held out"
    table = Table("", "training", "held out", title=title)
    for name in flow_step.CONTENDERS:
        table.add_row(name, f"{trained[name]['training_accuracy']:.1%}", f"{trained[name]['held_out_accuracy']:.1%}")
    return table


if __name__ == "__main__":
    main()
