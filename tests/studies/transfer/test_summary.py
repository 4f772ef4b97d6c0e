"""Figures of the transfer study from tables whose figures are known."""

from __future__ import annotations

import math

import pytest

from meanfield.rates import Interval
from meanfield.studies.transfer import page, summary


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
