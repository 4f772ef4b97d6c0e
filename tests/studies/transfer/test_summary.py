"""Figures of the transfer study from tables whose figures are known."""

from __future__ import annotations

import math

import pytest

from meanfield.rates import Interval
from meanfield.studies.transfer import page, pictures, summary


def cell(seed, alpha, ratio, **gaps):
    row = {"network": "mlp", "width": 4, "scale": 1.0, "epochs": 3, "seed": seed, "alpha": alpha, "ratio": ratio}
    for gap, (value, reach) in gaps.items():
        row |= {gap: value, f"{gap}_low": value - reach, f"{gap}_high": value + reach}
    return row


ROWS = [
    cell(0, 1.0, 2.0, I=(0.5, 0.1), R=(-0.3, 0.4), P=(0.01, 0.02)),
    cell(0, 10.0, 2.0, I=(0.01, 0.005), R=(0.1, 0.05), P=(-0.03, 0.04)),
    cell(1, 1.0, 1.0, I=(0.3, 0.1), R=(-0.01, 0.1), P=(0.0, 0.01)),
    cell(1, 10.0, 1.0, I=(0.0, 0.01), R=(0.05, 0.1), P=(-0.01, 0.005)),
]


def test_gaps_are_counted_per_cell_and_averaged_per_training():
    found = {row["gap"]: row for row in summary.regimes(ROWS)}
    assert found["I"]["cells"] == 4
    assert found["I"]["trainings"] == 2
    assert found["I"]["mean"].value == pytest.approx((0.51 / 2 + 0.3 / 2) / 2)
    assert found["P"]["mean"].value == pytest.approx((0.02 + 0.005) / 2)
    assert found["P"]["mean"].low < 0 < found["P"]["mean"].high
    assert (found["P"]["largest"], found["P"]["near"], found["P"]["zero_inside"]) == (0.03, 3, 3)
    assert (found["I"]["near"], found["R"]["near"]) == (2, 1)
    assert found["I"]["near_below_ratio"] == pytest.approx(1.0)  # of the cells that are far 2 / 1 and 1 / 1
    assert found["R"]["near_below_ratio"] == pytest.approx(0.1)
    told = page._verdict([found["I"], found["R"]])
    assert "the start does not matter in 2 of 4 cells (all where |theta_0| / |alpha Delta| is below 1.0)" in told
    assert "with noise in 1 of 4 cells (all where |theta_0| / |alpha Delta| is below 0.10)" in told


def test_the_factor_is_chosen_on_validation_images_training_by_training():
    rows = [
        {"network": "cnn", "arm": "fresh start", "seed": seed, "alpha": alpha, "validation_accuracy": seen}
        | {"held_out_accuracy": unseen}
        for seed, alpha, seen, unseen in [
            (0, 1.0, 0.5, 0.9),
            (0, 3.0, 0.6, 0.4),
            (1, 1.0, 0.8, 0.6),
            (1, 3.0, 0.7, 1.0),
        ]
    ]
    (found,) = summary.chosen(rows)
    assert found["alphas"] == [3.0, 1.0]
    assert found["accuracy"].value == pytest.approx(0.5)
    assert found["at_one"].value == pytest.approx(0.75)
    assert (found["at_one"].low, found["at_one"].high) == (0.0, 1.0)  # Student's reach of two values, cut off


def test_slopes_and_distances_of_widths():
    rows = [
        {
            "depth": 1,
            "width": width,
            "scaling": "standard",
            "arm": "own start",
            "run": run,
            "error": factor / width**0.5,
        }
        for width in (4, 16)
        for run, factor in enumerate((2, 4))
    ]
    (found,) = summary.distances(rows)
    assert found["slope"].value == pytest.approx(-0.5)
    assert found["error"].value == pytest.approx(3 / 4)


def test_points():
    assert summary.points(Interval(0.123, 0.1, 0.15)) == "12.3 (10.0 to 15.0)"
    assert summary.points(Interval(0.123, -math.inf, math.inf)) == "12.3"


def task_row(seed, method, first, second, **more):
    named = {"network": "cnn", "tasks": "two tasks", "heads": "task", "seed": seed, "method": method}
    figures = {"accuracy_1": first, "accuracy_2": second, "loss_1": 0.1, "loss_2": 0.3, "loss": 0.2}
    figures |= {"accuracy": (first + second) / 2, "forgetting": 1 - first, "status": "completed"}
    found = {**named, **figures, "chosen": None, "strengths": [], "line_1": [1.0, first], "line_2": [0.2, second]}
    return {**found, **more}


TRIED = [0.1, 1.0, 10.0]
TASKS = [
    *(task_row(seed, summary.REDUCED, 0.98, 0.96 + 0.01 * seed) for seed in (0, 1, 2)),
    *(task_row(seed, "EWC", 0.9, 0.94, chosen=TRIED[seed], strengths=TRIED) for seed in (2, 1, 0)),
    *(task_row(seed, "replay", first, 0.98) for seed, first in enumerate((0.96, 0.98, 0.97))),
    *(task_row(seed, "ensemble", 0.99, 0.97, line_1=[], line_2=[], status="diverged") for seed in (0, 1, 2)),
]


def test_methods_are_averaged_over_seeds_and_rivals_paired_by_them():
    found = {row["method"]: row for row in summary.tasks(TASKS)}
    ewc = found["EWC"]
    assert (ewc["seeds"], ewc["chosen"], ewc["at_an_end"], ewc["diverged"]) == (3, [10.0, 1.0, 0.1], 2, 0)
    assert ewc["accuracy"].value == pytest.approx(0.92)
    assert ewc["forgetting"].value == pytest.approx(0.1)
    assert (found["ensemble"]["diverged"], found["ensemble"]["chosen"], found["ensemble"]["at_an_end"]) == (3, [], 0)
    pairs = {row["method"]: row for row in summary.rivals(TASKS)}
    assert list(pairs) == ["EWC", "replay"]  # nobody was trained jointly
    assert pairs["EWC"]["difference"].value == pytest.approx(0.055)
    reach = 4.302653 * 0.005 / math.sqrt(3)  # Student's t of two degrees of freedom
    assert pairs["EWC"]["difference"].high == pytest.approx(0.055 + reach, abs=1e-8)
    assert pairs["EWC"]["separated"]
    assert not pairs["replay"]["separated"]  # 0, -0.5 and 0.5 points


def test_the_page_says_who_separates_and_the_picture_has_the_lines():
    tables = {"tasks": TASKS}
    found = {"tasks": summary.tasks(TASKS), "rivals": summary.rivals(TASKS)}
    _, picture, text, table = page.tasks(found, tables).items
    assert picture.name == "tasks"
    assert text.startswith("Two tasks, a head per task (cnn, 3 seeds): the reduced union")
    assert "5.5 (4.3 to 6.7) to EWC (separated) and 0.0 (-1.2 to 1.2) to replay (not separated)." in text
    assert table.rows[1][2:4] == ["90.0 (90.0 to 90.0)", "94.0 (94.0 to 94.0)"]
    assert [row[0] for row in table.rows] == [summary.REDUCED, "EWC", "replay", "ensemble"]
    assert table.rows[1][-3:] == ["10, 1, 0.1", 2, None]
    whole, near = pictures.tasks(tables).axes
    assert [line.get_xdata().tolist() for line in whole.get_lines()][1] == pytest.approx([100.0, 90.0, 90.0])
    assert whole.collections[0].get_offsets().tolist()[0] == pytest.approx([98.0, 97.0])
    assert near.get_xlim() == pictures.CORNER
    five = [{**row, "accuracy_3": 0.5} for row in TASKS]
    assert pictures.tasks({"tasks": five}) is None
    alone = [row for row in TASKS if row["seed"] == 0]  # one seed: no interval, and nothing is said to separate
    found = {"tasks": summary.tasks(alone), "rivals": summary.rivals(alone)}
    assert "separated" not in page.tasks(found, {"tasks": alone}).items[2]
