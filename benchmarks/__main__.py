"""`python -m benchmarks flow|optima|solve|growth|device|widths|grafting`: measure, print tables, write JSON and
pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import device, figures, flow_step, grafting, growth, optima, solve, tables, widths
from meanfield.storage import write_atomically

PIPED_WIDTH = 160  # columns, where the output is no terminal
DEFAULTS = flow_step.Settings()
PICTURES: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "solve": figures.solve_picture,
    "growth": figures.growth_picture,
}
LARGE_TEXT = (
    "also the next size that CLARABEL can do (about an hour, mostly its compilation, and 3 GiB) and N=64 at 8x8, "
    "widths 1024/128"
)
IN_PROCESS = "run everything in this process: quicker, but peak memory then means little"


def parser() -> argparse.ArgumentParser:
    description = "Benchmarks of meanfield against plain torch, known optima and other solvers."
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=description)
    kinds = top.add_subparsers(dest="benchmark", required=True)
    _add_flow(kinds)
    _add_optima(kinds)
    _add_solve(kinds)
    _add_growth(kinds)
    _add_device(kinds)
    _add_widths(kinds)
    _add_grafting(kinds)
    for kind in kinds.choices.values():
        text = "write the figures here, and a picture beside them where there is one; a directory gets BENCHMARK.json"
        kind.add_argument("--out", type=Path, default=None, metavar="DIR|FILE.json", help=text)
    return top


def _add_flow(kinds: Any) -> None:
    text = "a step of the particle flow against a training step of nn.Conv2d layers"
    flow = kinds.add_parser("flow", help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flow.add_argument(
        "--samples", type=_positive, default=DEFAULTS.samples, help="training images, the first of the ten digits"
    )
    flow.add_argument(
        "--widths",
        type=_positive,
        nargs=2,
        default=DEFAULTS.widths,
        metavar=("M1", "M2"),
        help="channels of the two layers",
    )
    flow.add_argument(
        "--dtypes", nargs="+", choices=tuple(flow_step.DTYPES), default=DEFAULTS.dtypes, help="what to measure"
    )
    flow.add_argument(
        "--repetitions", type=_positive, default=DEFAULTS.repetitions, help="timed blocks of each contender"
    )
    flow.add_argument("--block", type=_positive, default=DEFAULTS.block, help="steps in a timed block")
    flow.add_argument(
        "--training-steps",
        type=int,
        default=DEFAULTS.training_steps,
        help="steps before the accuracy is taken; 0 leaves it out",
    )
    flow.add_argument("--seed", type=int, default=DEFAULTS.seed, help="seed of both starts")


def _add_optima(kinds: Any) -> None:
    text = "the main job against known optima, several seeds (about 4 minutes)"
    known = kinds.add_parser("optima", help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    known.add_argument("--seeds-one", type=_positive, default=5, help="seeds of the one-layer problem")
    known.add_argument("--seeds-two", type=_positive, default=3, help="seeds of the two-layer problem")
    known.add_argument("--rounds", type=_positive, default=8, help="rounds of the two-layer alternation")


def _add_solve(kinds: Any) -> None:
    text = (
        "the splitting against cvxpy's CLARABEL and SCS on the same programs, pyscnn for one layer (about 10 minutes)"
    )
    solved = kinds.add_parser(
        "solve", help=text, description=solve.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    solved.add_argument("--quick", action="store_true", help="one tiny program and one loose gap")
    solved.add_argument("--large", action="store_true", help=LARGE_TEXT)
    solved.add_argument(
        "--gaps",
        type=_gap,
        nargs="+",
        default=None,
        help="relative gaps to reach, also the solvers' tolerances (1e-3 ... 1e-6)",
    )
    solved.add_argument(
        "--max-seconds", type=float, default=None, help=f"wall seconds of a run ({solve.Settings().max_seconds:g})"
    )
    solved.add_argument("--in-process", action="store_true", help=IN_PROCESS)


def _add_growth(kinds: Any) -> None:
    text = "time per iteration against particles, images and positions, with fitted exponents (about 5 minutes)"
    grown = kinds.add_parser(
        "growth", help=text, description=growth.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grown.add_argument("--quick", action="store_true", help="two tiny sizes a sweep")
    grown.add_argument(
        "--large", action="store_true", help="also N=64 at 8x8, widths 1024/128 (several minutes, 2 GiB)"
    )
    grown.add_argument("--in-process", action="store_true", help=IN_PROCESS)


def _add_device(kinds: Any) -> None:
    text = "the large sizes on a GPU; says so and ends where torch sees none"
    on_device = kinds.add_parser(
        "device", help=text, description=device.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_device.add_argument("--quick", action="store_true", help="one tiny size")
    on_device.add_argument("--in-process", action="store_true", help=IN_PROCESS)


def _add_widths(kinds: Any) -> None:
    text = (
        "a training step against plain torch, and what a sweep costs (about a minute); the study itself is `meanfield "
        "widths`"
    )
    width = kinds.add_parser(
        "widths", help=text, description=widths.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    width.add_argument("--width", type=_positive, default=widths.Settings.width, help="channels of every layer (256)")
    width.add_argument("--samples", type=_positive, default=widths.Settings.samples, help="training images (64)")
    width.add_argument("--dtype", choices=("float32", "float64"), default=widths.Settings.dtype, help="float32")
    width.add_argument("--quick", action="store_true", help="a few steps and cells, to see that it runs")


def _add_grafting(kinds: Any) -> None:
    text = (
        "grafts on VGG-16: seconds, memory against images, the floor, the whole matrix (about 12 minutes); the study "
        "itself is `meanfield graft`"
    )
    grafted = kinds.add_parser(
        "grafting", help=text, description=grafting.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grafted.add_argument(
        "--images", type=_positive, default=grafting.Settings.images, help="of the large grafts (10000)"
    )
    grafted.add_argument("--threads", type=_positive, default=grafting.Settings.threads, help="2")
    grafted.add_argument("--device", choices=("cpu", "cuda"), default=grafting.Settings.device, help="cpu")
    grafted.add_argument("--quick", action="store_true", help="a narrow network and few images, to see that it runs")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _gap(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{number:g} must lie between 0 and 1")
    return number


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> dict[str, Any]:
    given = vars(parser().parse_args(arguments))
    out, name, console = (
        given.pop("out"),
        given.pop("benchmark"),
        console or Console(width=None if sys.stdout.isatty() else PIPED_WIDTH),
    )
    measure = {
        "flow": measure_flow,
        "optima": measure_optima,
        "solve": measure_solve,
        "growth": measure_growth,
        "device": measure_device,
        "widths": measure_widths,
        "grafting": measure_grafting,
    }[name]
    found = measure(given, console)
    if out is not None:
        for path in write(found, name, out):
            console.print(f"figures written to {path}")
    return found


def write(found: dict[str, Any], name: str, out: Path) -> list[Path]:
    """Write the JSON, and the picture beside it; `out` is FILE.json or a directory."""
    path = out if out.suffix == ".json" else out / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [write_atomically(path, json.dumps(found, indent=2) + "\n")]
    if name in PICTURES:
        written.append(write_atomically(path.with_suffix(".png"), PICTURES[name](found)))
    return written


def measure_solve(given: dict[str, Any], console: Console) -> dict[str, Any]:
    gaps = given.pop("gaps")
    gaps = None if gaps is None else tuple(sorted(gaps, reverse=True))
    found = solve.run(solve.settings(fresh=not given.pop("in_process"), gaps=gaps, **given), _plainly(console))
    return _shown(found, tables.solve_tables(found), console)


def measure_growth(given: dict[str, Any], console: Console) -> dict[str, Any]:
    found = growth.run(growth.settings(fresh=not given.pop("in_process"), **given), _plainly(console))
    return _shown(found, tables.growth_tables(found), console)


def measure_device(given: dict[str, Any], console: Console) -> dict[str, Any]:
    found = device.run(device.settings(fresh=not given.pop("in_process"), **given), _plainly(console))
    return _shown(found, tables.device_tables(found), console)


def measure_widths(given: dict[str, Any], console: Console) -> dict[str, Any]:
    short = {"repetitions": 2, "block": 1, "warm_up": 1, "cells": 4, "cell_seconds": 0.01} if given.pop("quick") else {}
    found = widths.run(widths.Settings(**given, **short))
    return _shown(found, tables.widths_tables(found), console)


def measure_grafting(given: dict[str, Any], console: Console) -> dict[str, Any]:
    quick = given.pop("quick")
    found = grafting.run(
        replace(grafting.QUICK, device=given["device"]) if quick else grafting.Settings(**given), _plainly(console)
    )
    return _shown(found, tables.grafting_tables(found), console)


def _plainly(console: Console) -> Callable[[str], None]:
    """Lines of progress, square brackets and all."""
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def _shown(found: dict[str, Any], shown: Sequence[Table], console: Console) -> dict[str, Any]:
    for table in shown:
        console.print(table)
    return found


def measure_flow(given: dict[str, Any], console: Console) -> dict[str, Any]:
    found = flow_step.run(
        flow_step.from_dict({name: list(value) if isinstance(value, tuple) else value for name, value in given.items()})
    )
    console.print(speed_table(found))
    if found["training"]:
        console.print(training_table(found["training"]))
    return found


def measure_optima(given: dict[str, Any], console: Console) -> dict[str, Any]:
    found = optima.run(**given)
    one = Table(
        "seed",
        "J",
        "J minus exact optimum",
        "seconds",
        title=f"one ReLU layer, 64 particles; exact optimum {optima.EXACT_ONE_LAYER}",
    )
    for row in found["one_layer"]:
        one.add_row(str(row["seed"]), f"{row['value']:.11f}", f"{row['excess']:.1e}", f"{row['seconds']:.1f}")
    two = Table(
        "seed",
        "J",
        "flow gap per round",
        "J never rises",
        "cvxpy on the final program",
        "seconds",
        title="two tanh layers",
    )
    for row in found["two_layers"]:
        gaps = " ".join(f"{gap:.0e}" for gap in row["flow_gaps"])
        two.add_row(
            str(row["seed"]),
            f"{row['value']:.8f}",
            gaps,
            str(row["never_rises"]),
            f"{row['reference_value']:.8f}",
            f"{row['seconds']:.0f}",
        )
    console.print(one)
    console.print(two)
    return found


def speed_table(found: dict[str, Any]) -> Table:
    settings = found["settings"]
    title = (
        f"one step, {settings['samples']} images, widths {tuple(settings['widths'])}, one thread, medians of CPU "
        "seconds"
    )
    table = Table("dtype", "flow ms", "plain ms", "flow's speed", "flow MiB", "plain MiB", "flow's memory", title=title)
    for dtype, each in found["figures"].items():
        seconds, peak = each["seconds_per_step"], each["peak_bytes"]
        table.add_row(
            dtype,
            f"{1e3 * seconds['flow']:.1f}",
            f"{1e3 * seconds['plain']:.1f}",
            f"{each['speed_ratio']:.0%} {_verdict(each['fast_enough'], f'at least {flow_step.SPEED_REQUIRED:.0%}')}",
            f"{peak['flow'] / 2**20:.0f}",
            f"{peak['plain'] / 2**20:.0f}",
            f"{each['memory_ratio']:.2f}x {_verdict(each['small_enough'], f'at most {flow_step.MEMORY_ALLOWED:g}x')}",
        )
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
