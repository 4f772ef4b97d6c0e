"""The benchmarks' figures as rich tables: a function per benchmark, of all that is written of it."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from meanfield.bench.options import spelled


def flow(found: dict[str, Any]) -> list[Table]:
    """Speed and memory, and the accuracies where they were taken."""
    return [_speed(found), *([_accuracies(found["training"])] if found["training"] else [])]


def _speed(found: dict[str, Any]) -> Table:
    settings = found["made"]["settings"]
    title = (
        f"one step, {settings['samples']} images, widths {spelled(settings['widths'])}, one thread, medians of CPU "
        "seconds"
    )
    table = Table("dtype", "flow ms", "plain ms", "flow's speed", "flow MiB", "plain MiB", "flow's memory", title=title)
    for dtype, each in found["figures"].items():
        seconds, peak, wanted = each["seconds_per_step"], each["peak_bytes"], each["required"]
        table.add_row(
            dtype,
            f"{1e3 * seconds['flow']:.1f}",
            f"{1e3 * seconds['plain']:.1f}",
            f"{each['speed_ratio']:.0%} (at least {wanted['speed_ratio']:.0%}: {_kept(each['fast_enough'])})",
            _mebibytes(peak["flow"]),
            _mebibytes(peak["plain"]),
            f"{each['memory_ratio']:.2f}x (at most {wanted['memory_ratio']:g}x: {_kept(each['small_enough'])})",
        )
    return table


def _accuracies(trained: dict[str, Any]) -> Table:
    title = f"accuracy after {trained['steps']} steps; {trained['held_out_images']} images held out"
    table = Table("", "training", "held out", title=title)
    for name in ("flow", "plain"):
        table.add_row(name, f"{trained[name]['training_accuracy']:.1%}", f"{trained[name]['held_out_accuracy']:.1%}")
    return table


def optima(found: dict[str, Any]) -> list[Table]:
    """One layer, two layers."""
    title = f"one ReLU layer, {found['particles']} particles; exact optimum {found['exact_one_layer']}"
    one = Table("seed", "J", "J minus exact optimum", "seconds", title=title)
    for row in found["one_layer"]:
        one.add_row(str(row["seed"]), _fixed(row["value"], 11), _scientific(row["excess"]), _fixed(row["seconds"], 1))
    columns = ("seed", "J", "flow gap per round", "J never rises", "cvxpy on the final program", "seconds")
    two = Table(*columns, title="two tanh layers")
    for row in found["two_layers"]:
        two.add_row(
            str(row["seed"]),
            _fixed(row["value"], 8),
            " ".join(f"{gap:.0e}" for gap in row["flow_gaps"]),
            str(row["never_rises"]),
            _fixed(row["reference_value"], 8),
            _fixed(row["seconds"], 0),
        )
    return [one, two]


def solve(found: dict[str, Any]) -> list[Table]:
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
    return _with_skipped(table, case)


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
        targets = "; ".join(f"{target['text']}: {_kept(target['kept'])}" for target in row["targets"])
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
    return _with_skipped(table, case)


def _with_skipped(table: Table, case: dict[str, Any]) -> Table:
    for entry in case["skipped"]:
        table.add_row(entry["contender"], "", escape(f"skipped: {entry['reason']}"))
    return table


def growth(found: dict[str, Any]) -> list[Table]:
    """One table per sweep, with the fitted exponents as its caption, and the targets."""
    tables = [_sweep(name, sweep) for name, sweep in found["sweeps"].items()]
    if found["targets"]:
        table = Table("target", "worst of the large sizes", "", title="targets")
        for target in found["targets"]:
            table.add_row(target["text"], f"{target['worst']:.2f}", _kept(target["kept"]))
        tables.append(table)
    return [*tables, _streamed(found["streamed"])] if "streamed" in found else tables


def _streamed(found: dict[str, Any]) -> Table:
    columns = ("images", "rank", "freeze s", "peak MiB", "program s", "iterations", "proven gap", "peak MiB")
    table = Table(*columns, title="growth with images at full size; one thread, CPU seconds")
    table.caption = _exponents(found["exponents"])
    for row in found["rows"]:
        if "failed" in row:
            table.add_row(str(row["size"]), "", escape(f"failed: {row['failed']}"))
            continue
        table.add_row(
            str(row["size"]),
            str(row["rank"]),
            _fixed(row["freeze_seconds"]),
            _mebibytes(row["freeze_peak_bytes"]),
            _fixed(row["program_seconds"]),
            str(row["iterations"]),
            f"{row['relative_gap']:.1e}",
            _mebibytes(row["peak_bytes"]),
        )
    return table


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
        "freeze s",
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
            _fixed(row["freeze_seconds"]),
            _mebibytes(row["peak_bytes"]),
        )
    return table


def _exponents(found: dict[str, Any]) -> str:
    texts = []
    for key, fit in found.items():
        if fit["slope"] is not None:
            named = key.removesuffix("_seconds").replace("_", " ")
            error = "" if fit["error"] is None else f" +- {fit['error']:.2f}"
            texts.append(f"{named} {fit['slope']:.2f}{error} (last two sizes {fit['upper']:.2f})")
    return "exponents: " + ", ".join(texts) if texts else "no exponents"


def device(found: dict[str, Any]) -> list[Table]:
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


def widths(found: dict[str, Any]) -> list[Table]:
    """Seconds per step, and the overhead of a sweep."""
    settings, step, cost = found["made"]["settings"], found["step"], found["sweep"]
    title = (
        f"one training step, {settings['samples']} images 8x8, two layers of {settings['width']}, {settings['dtype']}, "
        "one thread"
    )
    steps = Table("step", "CPU ms, median", "finite.train / it", title=title)
    ratios = {"plain": step["ratio"], "plain with penalties": step["ratio_with_penalties"]}
    for name, seconds in step["seconds_per_step"].items():
        steps.add_row(name, f"{1e3 * seconds:.1f}", f"{ratios[name]:.2f}" if name in ratios else "")
    sweeps = Table("cells", "jobs", "their seconds", "wall seconds", "overhead", "starting workers", title="a sweep")
    sweeps.add_row(
        str(cost["cells"]),
        str(settings["jobs"]),
        f"{cost['cell_seconds']:.2f}",
        f"{cost['wall_seconds']:.2f}",
        f"{cost['overhead']:.1%}",
        f"{cost['start_up_seconds']:.1f} s",
    )
    return [steps, sweeps]


def grafting(found: dict[str, Any]) -> list[Table]:
    """Large grafts, memory against images, and the peer."""
    title = (
        f"VGG-16 at 32x32, width {found['width']}, {found['made']['settings']['device']}; at most "
        f"{found['allowed_seconds']:g} s: {_kept(found['fast_enough'])}"
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
    flat = f"peak memory grows by {found['memory_growth']:.1%} over them ({_kept(found['memory_flat'])})"
    peer = Table(
        "contender",
        "CPU s",
        title=f"{found['peer']['layer']} of a narrow network against the whole design matrix; {flat}",
    )
    for name, seconds in found["peer"]["cpu_seconds"].items():
        peer.add_row(name, f"{seconds:.3f}")
    peer.add_row("largest difference of kernels", _scientific(found["peer"]["largest_difference"]))
    return [grafts, peer]


def landscape(found: dict[str, Any]) -> list[Table]:
    """Milliseconds a point, and seconds of a surface within a tolerance."""
    title = f"a point of a loss surface, {found['images']} images, one thread, medians of CPU milliseconds"
    columns = ("network", "parameters", "exact", "functional_call", "loss_landscapes", "exact / loss_landscapes")
    surface = f"surface {found['grid']}x{found['grid']} within {found['tolerance']:.0%}, CPU s"
    table = Table(*columns, "largest relative difference", "prepared ms", surface, "evaluations", title=title)
    table.caption = found["missing"] and escape(found["missing"])
    for row in found["rows"]:
        target = "" if row["fast_enough"] is None else f" (at most {row['target']:g}: {_kept(row['fast_enough'])})"
        table.add_row(
            row["network"],
            str(row["parameters"]),
            *(_fixed(row["milliseconds"].get(name)) for name in columns[2:5]),
            _fixed(row["ratio"]) + target,
            _scientific(row["largest_relative_difference"]),
            f"{1e3 * row['prepared_seconds']:.0f}",
            _fixed(row["surface_seconds"]),
            f"{row['surface_evaluations']} ({row['surface_status']})",
        )
    return [table]


def peers(found: dict[str, Any]) -> list[Table]:
    """Accuracy and cost of classifiers of the same images."""
    title = f"{found['images']:,} training images, {found['held_out_images']:,} held out; one thread"
    table = Table("contender", "pixels", "CPU s", "training", "held out", "J", "proven gap", title=title)
    for row in found["rows"]:
        table.add_row(
            row["contender"],
            row["pixels"],
            _fixed(row["cpu_seconds"], 1),
            f"{row['training']:.1%}",
            f"{row['held_out']:.1%}",
            _fixed(row.get("value"), 5),
            _scientific(row.get("gap")),
        )
    return [table]


def unseen(found: dict[str, Any]) -> list[Table]:
    """How often twice the starts lower the bound by more than a start falls short, beside the chance that was said."""
    each = found["figures"]
    title = (
        f"{each['problems']} problems; twice the starts lowered {each['more_than_said']} bounds by more than was said "
        f"(at most {found['level']:.0%}), {each['lowered']} at all (said: at most {each['lowered_expected']:.1f})"
    )
    table = Table("by more than start", "said, at most", "share", "at the first multipliers", title=title)
    for rank, at in each["at_rank"].items():
        table.add_row(str(rank), f"{at['said']:.1%}", f"{at['share']:.1%}", f"{at['share_there']:.1%}")
    return [table]


def proven(found: dict[str, Any]) -> list[Table]:
    """How much of J is proven over all measures, at the first multipliers and in all; what is left out, and why."""
    columns = ("layers", "images", "kernel", "penalties", "J", "gap", "at first", "proven", "seconds", "by |f| <= 1")
    table = Table(*columns, "method", caption=escape("; ".join(map(_left_out, found["skipped"]))) or None)
    for row in found["rows"]:
        table.add_row(
            f"{row['layers']} {row['activation']}",
            f"{row['images']} {row['data']} {' and '.join(map(str, row['classes']))} of {row['side']}x{row['side']}",
            row["kernel"],
            ", ".join(f"{each:g}" for each in row["penalties"]),
            _fixed(row["value"], 6),
            _scientific(row["gap"]),
            f"{row['curve'][0][1]:.2%}",
            f"{row['share']:.2%}",
            _fixed(row["seconds"], 0),
            "" if row["trivial"] is None else f"{row['trivial']:.2%}",
            row["kind"].partition(",")[0],
        )
    return [table]


def _left_out(entry: dict[str, str]) -> str:
    return f"{entry['cases']} left out: {entry['reason']}"


def _scientific(number: float | None) -> str:
    return "" if number is None else f"{number:.1e}"


def _fixed(number: float | None, digits: int = 2) -> str:
    return "" if number is None else f"{number:.{digits}f}"


def _mebibytes(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def _kept(target: bool) -> str:
    return "kept" if target else "MISSED"
