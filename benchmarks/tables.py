"""The benchmarks' figures as rich tables."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table


def solve_tables(found: dict[str, Any]) -> list[Table]:
    """Two tables per two-layer case (runs; times at each gap) and one per one-layer case."""
    tables = []
    for case in found["cases"]:
        tables += [_runs(case), _at_gap(case)]
    return tables + [_one_layer(case) for case in found["one_layer"]]


def _runs(case: dict[str, Any]) -> Table:
    title = f"{case['name']}: {case['constraints_per_feature']} constraints per feature; one thread"
    columns = (
        "contender",
        "its tolerance",
        "status",
        "compile CPU s",
        "solve CPU s",
        "peak MiB",
        "value",
        "proven gap",
        "excess",
        "violation",
    )
    table = Table(*columns, title=title)
    for run in case["runs"]:
        table.add_row(
            run["contender"],
            _scientific(run["tolerance"]),
            escape(run["status"]),
            _fixed(run.get("compile_cpu_seconds")),
            _fixed(run.get("cpu_seconds")),
            _mebibytes(run.get("peak_bytes")),
            *_verdict(run),
        )
    for entry in case["skipped"]:
        table.add_row(entry["contender"], "", escape(f"skipped: {entry['reason']}"))
    return table


def _at_gap(case: dict[str, Any]) -> Table:
    table = Table(
        "proven gap",
        "contender",
        "solve CPU s",
        "splitting is faster by",
        "target",
        title=f"{case['name']}: CPU seconds to a proven gap",
    )
    for row in case["at_gap"]:
        targets = "; ".join(f"{target['text']}: {'kept' if target['kept'] else 'MISSED'}" for target in row["targets"])
        for index, (name, seconds) in enumerate(row["cpu_seconds"].items()):
            faster = row["times_faster"].get(name)
            table.add_row(
                _scientific(row["gap"]),
                name,
                _fixed(seconds),
                "" if faster is None else f"{faster:.1f}x",
                "" if index else targets,
            )
        if not row["cpu_seconds"]:
            table.add_row(_scientific(row["gap"]), "none got there", "", "", targets)
    return table


def _one_layer(case: dict[str, Any]) -> Table:
    title = f"one ReLU layer, {case['images']} digits 0 and 1, {case['case']}; excess over {case['excess_over']}"
    table = Table(
        "contender", "its tolerance", "status", "CPU s", "peak MiB", "particles", "value", "excess", title=title
    )
    for run in case["runs"]:
        table.add_row(
            run["contender"],
            _scientific(run["tolerance"]),
            escape(run["status"]),
            _fixed(run.get("cpu_seconds")),
            _mebibytes(run.get("peak_bytes")),
            str(run.get("particles", "")),
            _fixed(run.get("value"), 9),
            _scientific(run.get("excess")),
        )
    for entry in case["skipped"]:
        table.add_row(entry["contender"], "", escape(f"skipped: {entry['reason']}"))
    return table


def growth_tables(found: dict[str, Any]) -> list[Table]:
    """One table per sweep, with the fitted exponents as its caption, and the targets."""
    tables = [_sweep(name, sweep) for name, sweep in found["sweeps"].items()]
    if found["targets"]:
        table = Table("target", "worst of the large sizes", "", title="targets")
        for target in found["targets"]:
            table.add_row(target["text"], f"{target['worst']:.2f}", "kept" if target["kept"] else "MISSED")
        tables.append(table)
    return tables


def _sweep(name: str, sweep: dict[str, Any]) -> Table:
    columns = (
        "case",
        "rank",
        "iteration ms",
        "products ms",
        "ratio",
        "products GFLOP/s",
        "matmul GFLOP/s",
        "share",
        "basis s",
        "peak MiB",
    )
    table = Table(
        *columns, title=f"growth with {name}; one thread, CPU seconds", caption=_exponents(sweep["exponents"])
    )
    for row in sweep["rows"]:
        if "failed" in row:
            table.add_row(row["case"], escape(f"failed: {row['failed']}"))
            continue
        table.add_row(
            row["case"],
            str(row["rank"]),
            f"{1e3 * row['iteration_seconds']:.2f}",
            f"{1e3 * row['products_seconds']:.2f}",
            f"{row['over_products']:.2f}",
            f"{row['products_gflops']:.1f}",
            f"{row['matmul_gflops']:.1f}",
            f"{row['products_share']:.0%}",
            _fixed(row["basis_seconds"]),
            _mebibytes(row["peak_bytes"]),
        )
    return table


def _exponents(found: dict[str, Any]) -> str:
    texts = []
    for key, fit in found.items():
        if fit["slope"] is not None:
            error = "" if fit["error"] is None else f" +- {fit['error']:.2f}"
            texts.append(
                f"{key.removesuffix('_seconds')} {fit['slope']:.2f}{error} (last two sizes {fit['upper']:.2f})"
            )
    return "exponents: " + ", ".join(texts) if texts else "no exponents"


def device_tables(found: dict[str, Any]) -> list[Table]:
    tables = []
    for case in found["cases"]:
        columns = ("dtype", "tolerance", "status", "seconds", "peak MiB", "value", "proven gap", "excess", "violation")
        table = Table(*columns, title=f"{case['name']} on {found['device']}")
        for run in case["runs"]:
            table.add_row(
                run["dtype"],
                _scientific(run["tolerance"]),
                escape(run["status"]),
                _fixed(run.get("wall_seconds")),
                _mebibytes(run.get("peak_bytes")),
                *_verdict(run),
            )
        tables.append(table)
    return tables


def _verdict(run: dict[str, Any]) -> list[str]:
    """What the judge found: value, proven gap, excess, violation."""
    violation = _scientific(run.get("violation")) + ("" if run["feasible"] else " infeasible")
    return [
        _fixed(run.get("value"), 9),
        _scientific(run.get("relative_gap")),
        _scientific(run.get("excess")),
        violation,
    ]


def _scientific(number: float | None) -> str:
    return "" if number is None else f"{number:.1e}"


def _fixed(number: float | None, digits: int = 2) -> str:
    return "" if number is None else f"{number:.{digits}f}"


def _mebibytes(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def widths_tables(found: dict[str, Any]) -> list[Table]:
    """Seconds per step, and the overhead of a sweep."""
    settings, step, cost = found["settings"], found["step"], found["sweep"]
    title = (
        f"one training step, {settings['samples']} images 8x8, {settings['depth']} layers of {settings['width']}, "
        f"{settings['dtype']}, one thread"
    )
    steps = Table("step", "CPU ms, median", "finite.train / it", title=title)
    ratios = {"plain": step["ratio"], "plain with penalties": step["ratio_with_penalties"]}
    for name, seconds in step["seconds_per_step"].items():
        steps.add_row(name, f"{1e3 * seconds:.1f}", f"{ratios[name]:.2f}" if name in ratios else "")
    sweeps = Table("cells", "jobs", "their seconds", "wall seconds", "overhead", "starting workers", title="a sweep")
    sweeps.add_row(
        str(settings["cells"]),
        str(settings["jobs"]),
        f"{cost['cell_seconds']:.2f}",
        f"{cost['wall_seconds']:.2f}",
        f"{cost['overhead']:.1%}",
        f"{cost['start_up_seconds']:.1f} s",
    )
    return [steps, sweeps]


def grafting_tables(found: dict[str, Any]) -> list[Table]:
    """Large grafts, memory against images, and the peer."""
    kept = "kept" if found["fast_enough"] else "MISSED"
    title = (
        f"VGG-16 at 32x32, width {found['settings']['width']}, {found['settings']['device']}; at most "
        f"{found['allowed_seconds']:g} s: {kept}"
    )
    columns = (
        "layer",
        "images",
        "unknowns",
        "rank",
        "rows",
        "seconds",
        "CPU s",
        "floor s",
        "peak MiB",
        "relative error",
    )
    grafts = Table(*columns, title=title)
    for each in (*found["grafts"], *found["memory"]):
        sizes = (str(each[name]) for name in ("images", "unknowns", "rank", "rows"))
        times = (f"{each[name]:.1f}" for name in ("seconds", "cpu_seconds", "floor_seconds"))
        grafts.add_row(each["layer"], *sizes, *times, _mebibytes(each["peak_bytes"]), f"{each['error']:.4f}")
    flat = (
        f"peak memory grows by {found['memory_growth']:.1%} over them ({'kept' if found['memory_flat'] else 'MISSED'})"
    )
    peer = Table(
        "contender",
        "CPU s",
        title=f"{found['peer']['layer']} of a narrow network against the whole design matrix; {flat}",
    )
    for name, seconds in found["peer"]["cpu_seconds"].items():
        peer.add_row(name, f"{seconds:.3f}")
    peer.add_row("largest difference of kernels", _scientific(found["peer"]["largest_difference"]))
    return [grafts, peer]
