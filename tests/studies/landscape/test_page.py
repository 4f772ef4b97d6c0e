"""The page of the landscape study from tables with known answers: every part, and what its sentences say."""

import io
import json
import math
import re
from html import unescape

import numpy as np
import pytest
from scipy.io import netcdf_file

from meanfield.bench.provenance import Provenance
from meanfield.studies.landscape import archives, page, pictures, summary
from meanfield.studies.landscape.measure import SHARPNESS
from meanfield.studies.landscape.study import STUDY

MADE = Provenance("meanfield landscape", {"size": "quick"})
AXIS = [-1.0, 0.0, 1.0]
LADDER = {"relu": 0.0, "l2 0.01": 0.01, "l2 0.1": 0.1}
OTHERS = ("tanh", "gelu", "vgg11", "residual")


def named(arm, seed, loss="cross_entropy"):
    return {"arm": arm, "seed": seed, "trained_with": loss, "l2": LADDER.get(arm)}


def surface(arm, seed=0, scale=1.0, **more):
    values = [[scale * (1 + a**2 + 2 * b**2) for b in AXIS] for a in AXIS]
    figures = {"plane": "random", "normalise": "filter", "error": 0.01 * scale, "status": "met", "evaluations": 107.0}
    figures |= {"checks": 26, "least": scale, "largest": 4 * scale, "warnings": ["biases do not move"]}
    figures["errors"] = {"train loss": 0.01 * scale, "held out loss": 0.02 * scale, "train accuracy": 1.0}
    places = {"marks": {"network": [0.0, 0.0]}, "axis": AXIS, "check_points": [[1.0, 0.0, 2 * scale]]}
    return {**named(arm, seed), **figures, **places, "values": {"train loss": values, "held out loss": values}, **more}


def measured(arm, seed, sharpness, loss, train_loss, **more):
    """A network; `sharpness` of all measures but the rise, which falls with it."""
    values = {name: sharpness if name != "rise" else 1 / sharpness for name in SHARPNESS}
    ends = {f"{name}_{end}": value for name, value in values.items() for end in ("low", "high")}
    scores = {"train_loss": train_loss, "train_accuracy": 1.0, "held_out_loss": loss, "held_out_accuracy": 0.9}
    return {**named(arm, seed), "epoch": 3, "parameters": 10, **scores, **values, **ends, **more}


def sharpness(matched):
    """At the end the ladder is ordered by the penalty, held-out loss by training loss; matched by nothing at all."""
    rows, noise = [], np.random.default_rng(3)
    for index, arm in enumerate((*LADDER, *OTHERS)):
        for seed in range(2):
            at_end = (1 + index + seed / 10, 1 + index + seed / 10, 0.1 * (1 + index + seed / 10))
            figures = (*np.exp(noise.normal(size=2)).tolist(), 0.15 * (1 + 1e-7 * seed)) if matched else at_end
            more = {"target": 0.15, "reached": True} if matched else {}
            rows.append(measured(arm, seed, *figures, **more))
    if matched:
        rows.append({**named("permuted labels", 0), "target": 0.15, "reached": False})
    else:
        rows.append(measured("permuted labels", 0, 1.0, 9.0, 9.0))
    return rows


def toy():
    ratios = {"as it is": 1.0, "as it is, balanced": 0.9, "per layer": 1.0, "per channel": 3.0}
    rows = [
        surface("", seed, activation=activation, writing=writing, mean_loss=2.0 * ratio, difference=0.0)
        for activation in ("relu", "tanh")
        for seed in range(2)
        for writing, ratio in ratios.items()
    ]
    return [{name: value for name, value in row.items() if name not in ("arm", "l2", "trained_with")} for row in rows]


def slices():
    shared = {"seed": 0, "axis": AXIS, "parameters": 100, "status": "converged", "top": 20.0, "top_low": 19.9}
    shared |= {"top_high": 20.1, "smallest": -0.5, "smallest_low": -0.6, "smallest_high": -0.4}
    shared |= {"trace": 50.0, "trace_low": 48.0, "trace_high": 52.0}
    kinds = {"largest eigenvalue": 20.0, "smallest eigenvalue": -0.5}
    rows = [{"kind": "random", "curvature": bend} for bend in (0.4, 0.5, 0.6)]
    rows += [{"kind": kind, "curvature": bend} for kind, bend in kinds.items()]
    return [{**row, **shared, "values": [1 + row["curvature"] * t * t / 2 for t in AXIS]} for row in rows]


def joins():
    heights = {"weights": 4.0, "matched": 1.0, "displacement": 0.5, "mixture": 0.0}
    return [
        {
            "pair": pair,
            "width": width,
            "how": how,
            "figure": figure,
            "barrier": height * (1 + pair) / width,
            "relative": height,
            "chord": 1.0,
            "times": [0.0, 0.5, 1.0],
            "values": [1.0, 1.0 + height * (1 + pair) / width, 1.0],
        }
        for figure in ("train loss", "train J")
        for width in (8, 16)
        for pair in range(2)
        for how, height in heights.items()
    ]


def metric():
    """Eigenvalues that stay in the metric of the flow and fall like 1/m in the weights."""
    drawn = [
        {"width": width, "draw": draw, "metric": name, "top": top, "gauss_newton": 1.5 * top, "rest": -rest}
        for width in (8, 16)
        for draw in range(2)
        for name, top, rest in (("flow", 3.0, 0.5 * width), ("weights", 3.0 / width, 0.5))
    ]
    return [*drawn, {**drawn[0], "width": None, "draw": None, "top": 3.1}]


def trajectory():
    shared = {**named("relu", 0), "explained": 0.98, "null": 0.85, "null_low": 0.8, "null_high": 0.9}
    losses = [(2.0, 1.0), (0.5, 0.5), (0.1, 0.1)]
    places = [{"a": -1.0, "b": 0.5, "distance": 0.1}] * 3
    return [
        {**shared, "epoch": epoch, **place, "loss": loss, "loss_on_plane": flat}
        for epoch, (place, (loss, flat)) in enumerate(zip(places, losses))
    ]


def train():
    settings = {"network": "cnn", "activation": "relu", "loss": "cross_entropy", "penalty": "none", "strength": 0.0}
    settings |= {"labels": "true", "width": 16}
    scores = {"train_loss": 0.1, "train_accuracy": 1.0, "held_out_loss": 0.2, "held_out_accuracy": 0.97}
    return [{**settings, "seed": seed, "epoch": epoch, **scores} for seed in range(2) for epoch in (0, 3)]


TABLES = {
    "train": train(),
    "surfaces": [surface("relu"), surface("tanh", scale=2.0, status="not met")],
    "sharpness": sharpness(False),
    "matched": sharpness(True),
    "toy": toy(),
    "slices": slices(),
    "joins": joins(),
    "metric": metric(),
    "trajectory": trajectory(),
}


def written(**tables):
    """The text of the page, without tags."""
    tables = tables or TABLES
    text = STUDY.page(STUDY.summary(tables), tables, MADE)
    items = [item for section in text.sections for item in (section.title, *section.items)]
    return "\n".join([str(text.claim), *(item for item in items if isinstance(item, str))])


@pytest.mark.slow
def test_every_part_has_its_pictures_its_section_and_its_files():
    files = STUDY.files(TABLES, MADE)
    drawn = {"surfaces", "sharpness", "matched", "toy", "slices", "joins", "barriers", "metric", "trajectory"}
    tables = {f"{part}.csv" for part in TABLES}
    others = {"landscape.html", "summary.json", "surfaces.npz", "surfaces.json", "surfaces.nc"}
    assert set(files) == {*(f"{name}.png" for name in drawn), *tables, *others} == set(STUDY.names())
    text = unescape(files["landscape.html"])
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Surfaces",
        "Sharpness at the end of training",
        "Sharpness at equal training loss",
        "Which measure goes with held-out loss?",
        "What a filter is",
        "What a random slice hides",
        "Two networks, joined in four ways",
        "Which curvature has a limit",
        "The path on a plane",
        "The networks",
        "What this does not say",
    ]
    assert text.count('type="application/json"') == 1
    assert "values" not in files["surfaces.csv"].splitlines()[-2]


@pytest.mark.slow
def test_any_part_alone_has_a_page():
    for part, rows in TABLES.items():
        assert "landscape.html" in STUDY.files({part: rows}, MADE), part


def test_correlations_are_those_of_the_tables():
    found = {(row["when"], row["measure"], row["against"]): row for row in summary.correlations(TABLES)}
    end = "end of training"
    assert found[end, "trace", "l2"]["spearman"].value == pytest.approx(math.sqrt(32 / 35))  # ties within a rung
    assert found[end, "rise", "l2"]["spearman"].value == pytest.approx(-math.sqrt(32 / 35))
    assert found[end, "trace", "held_out_loss"]["spearman"].value == pytest.approx(1)
    assert found[end, "train_loss", "held_out_loss"]["spearman"].value == pytest.approx(1)
    assert ("equal training loss", "train_loss", "held_out_loss") not in found
    # the same networks at both times, and none that never has the loss
    assert {row["networks"] for row in found.values() if row["against"] == "held_out_loss"} == {14}
    assert {row["networks"] for row in found.values() if row["against"] == "l2"} == {6}


def test_what_hangs_on_one_arm_is_said():
    """Two arms that are ordered one way, and a third one far away that makes the whole go the other way."""
    pairs = {"a": [(1.0, 2.0), (2.0, 1.0)], "b": [(1.5, 1.9), (1.8, 1.2)], "c": [(9.0, 9.0), (8.0, 8.0)]}
    rows = [{"arm": arm, "x": x, "y": y} for arm, places in pairs.items() for x, y in places]
    found = summary._without(rows, "x", "y")
    low, high = found["without_an_arm"]
    assert low == pytest.approx(-1)
    assert high > 0.4
    assert not found["without_any"]


def test_a_correlation_that_one_arm_makes_is_said_to_hang_on_it():
    """Six arms in an order of y that has a rank correlation of 0.03 with that of x, and one far above in both."""
    places = [*enumerate((2, 4, 0, 5, 1, 3)), (50, 50)]
    rows = [{"arm": x, "x": x + shift / 10, "y": y + shift / 10} for x, y in places for shift in range(2)]
    assert not summary._without(rows, "x", "y")["without_any"]
    assert summary._without([{**row, "y": row["x"]} for row in rows], "x", "y")["without_any"]


def test_what_is_matched_and_who_is_left_out():
    found = summary.reach(TABLES["matched"])
    assert found["networks"] == 14
    assert found["largest_deviation"] == pytest.approx(1e-7)
    assert found["left_out"] == {"permuted labels": 1}
    assert found["targets"] == {"cross_entropy": 0.15}


def test_a_table_without_a_relation_is_said_to_have_none():
    text = written()
    assert "At equal training loss none of 9 measures of sharpness goes with held-out loss over 14 networks" in text
    related = [
        {**row, **dict.fromkeys(SHARPNESS, row["held_out_loss"])} if row["reached"] else row
        for row in TABLES["matched"]
    ]
    assert "over 14 networks, 9 measures of 9 go with held-out loss by rank correlation, whichever arm" in written(
        **{**TABLES, "matched": related}
    )


def test_the_ladder_says_where_measures_order_oppositely():
    assert "they order the same networks oppositely" in written()
    same = [{**row, "rise": row["trace"]} for row in TABLES["sharpness"]]
    assert "oppositely" not in written(**{**TABLES, "sharpness": same})


def test_surfaces_say_whether_they_keep_their_tolerance():
    text = written()
    assert "One surface" not in text
    assert "1 surface of 2 keeps the tolerance" in text
    assert (
        pictures.note(TABLES["surfaces"][1]) == "estimated error 0.67% of the range, 107 evaluations, tolerance not met"
    )
    assert pictures.note({**surface("a"), "status": "exact"}) == "exact, 107 evaluations"


def test_writings_are_in_units_of_the_network_s_own():
    found = {(row["activation"], row["writing"]): row["ratio"].value for row in summary.writings(TABLES["toy"])}
    assert found["relu", "per channel"] == pytest.approx(3)
    assert found["relu", "per layer"] == pytest.approx(1)
    assert "times the network's own where the layer is rescaled, and 3.0 times where channels are" in written()


def test_curvatures_are_against_the_trace_over_d():
    found = summary.curvatures(TABLES["slices"])
    assert found["random"].value == pytest.approx(0.5)
    assert (found["trace_over_size"].value, found["trace_over_size"].low) == (0.5, 0.48)
    assert "40 times as much, and the smallest -0.5 (-0.6 to -0.4)" in written()


def test_a_surface_says_how_it_was_found_and_the_grid_that_it_has():
    assert "the grid of 3x3 has 9 points" in written()
    rows = [surface("relu", status="exact", error=0.0, evaluations=9.0)]
    text = page.surfaces({"surfaces": summary.surfaces(rows)}, {"surfaces": rows}).items[0]
    assert text.endswith("Every value is evaluated, at the 9 points of a grid of 3x3.")


def test_that_the_loss_bends_down_is_said_only_where_the_slice_does():
    assert "the loss bends by -0.50: downward" in written()
    kinked = [
        row | ({"values": [1 + abs(t) for t in AXIS]} if row["kind"] == "smallest eigenvalue" else {})
        for row in TABLES["slices"]
    ]
    (text, _) = page.slices({"slices": summary.curvatures(kinked)}, {}).items
    assert "upward. That curvature is of the smooth piece at hand" in text


def test_barriers_have_slopes_where_they_are_above_zero():
    found = {(row["figure"], row["how"]): row["slope"].value for row in summary.slopes(TABLES["joins"])}
    assert set(found) == {
        (figure, how) for figure in ("train loss", "train J") for how in ("weights", "matched", "displacement")
    }
    assert list(found.values()) == pytest.approx([-1] * 6)
    (mixture,) = [
        row
        for row in summary.barriers(TABLES["joins"])
        if (row["figure"], row["how"], row["width"]) == ("train J", "mixture", 8)
    ]
    assert mixture["barrier"].value == 0


def test_slopes_of_curvatures_are_those_of_the_samples():
    found = {(row["metric"], row["figure"]): row for row in summary.in_metrics(TABLES["metric"])}
    assert found["flow", "top"]["means"] == {"8": 3.0, "16": 3.0}
    slopes = {key: row["slope"].value for key, row in found.items()}
    wanted = {("flow", "top"): 0, ("flow", "rest"): 1, ("weights", "top"): -1, ("weights", "rest"): 0}
    assert {key: slopes[key] for key in wanted} == pytest.approx(wanted, abs=1e-12)
    assert (found["flow", "top"]["source"], found["weights", "top"]["source"]) == (3.1, None)


def test_a_path_says_where_the_plane_shows_another_loss():
    (found,) = summary.paths(TABLES["trajectory"])
    assert (found["epoch"], found["factor"], found["null"].value) == (0, pytest.approx(2), 0.85)
    assert "epoch 0 has the loss 2, and its place on the plane 1, where the plane explains 98.0%" in written()


class TestArchives:
    ROWS = (surface("relu"), surface("residual, batch norm", scale=2.0))

    def test_npz(self):
        found = np.load(io.BytesIO(archives.npz(self.ROWS)), allow_pickle=False)
        assert np.array_equal(found["relu/axis"], AXIS)
        assert np.array_equal(found["residual, batch norm/train loss"], self.ROWS[1]["values"]["train loss"])
        assert archives.npz(self.ROWS) == archives.npz(self.ROWS)

    def test_json(self):
        found = json.loads(archives.json(self.ROWS))
        assert found["residual, batch norm"]["values"] == self.ROWS[1]["values"]

    def test_netcdf(self):
        with netcdf_file(io.BytesIO(archives.netcdf(self.ROWS)), mmap=False) as found:
            variable = found.variables["residual__batch_norm_train_loss"]
            assert variable.dimensions == ("residual__batch_norm_first", "residual__batch_norm_second")
            assert np.array_equal(variable[:], self.ROWS[1]["values"]["train loss"])
            assert (variable.error, variable.status) == (pytest.approx(0.02), b"met")
            assert np.array_equal(found.variables["relu_first"][:], AXIS)


def test_reliefs_hold_the_checks_and_the_marks_at_their_height():
    relief = page._relief(TABLES["surfaces"][1])
    assert relief.marks == [(0.0, 0.0, 2.0)]
    assert relief.checks == [(1.0, 0.0, 4.0)]
