"""The grafting study: its cells, its arithmetic on tables with known answers, one small real run."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from meanfield.bench.classifiers import Classifier, layers_of
from meanfield.data.cifar import CIFAR_10_FILES
from meanfield.finite import evaluate
from meanfield.grafting import graft
from meanfield.studies.grafting import command, summary
from meanfield.studies.grafting import measure as grafting
from meanfield.studies.grafting.command import Options, classifier, settled
from meanfield.studies.grafting.plan import ARMS, SIZES, Sizes
from meanfield.studies.grafting.study import STUDY
from meanfield.validation import Misuse

TINY = Classifier(network="vgg8", width=2, samples=120)
SMALL = Sizes(
    epochs=2,
    checkpoints=(0, 1, 2),
    pairs=2,
    inside=1,
    others=1,
    strengths=(1.0, 4.0),
    factors=(1.0, 2.0),
    layers=("conv3",),
    procedures=1,
)


def cells(part, base=TINY, sizes=SMALL):
    return STUDY.plan(base, sizes, parts=[part])[part]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_the_plan_trains_what_is_grafted_once_and_nothing_else(size):
    plan = STUDY.plan(TINY, size)
    assert next(iter(plan)) == "train"
    trained = [Classifier.from_dict(cell) for cell in plan["train"]]
    assert len(set(trained)) == len(trained)
    ends = [
        (cell[end], cell[f"{end}_epoch"])
        for part, found in plan.items()
        if part != "train"
        for cell in found
        for end in ("lower", "upper")
    ]
    wanted = [Classifier.from_dict(settings) for settings, epoch in ends if epoch]
    assert trained == list(dict.fromkeys(wanted))  # in the order of first need
    assert all(epoch in settings["checkpoints"] for settings, epoch in ends)


@pytest.mark.parametrize(
    ("size", "left_out"),
    [("quick", {"procedures"}), ("default", {"l2", "strengths", "widths", "procedures"}), ("full", set())],
)
def test_sizes_have_the_parts_that_they_say(size, left_out):
    assert set(STUDY.plan(TINY, SIZES[size])) == {"train", *STUDY.parts} - left_out


def test_hosts_of_the_classes_are_those_of_the_starts():
    found = cells("classes")
    assert [cell["names"]["pair"] for cell in found] == [0, 1]
    hosts = [cell["upper"] for cell in cells("starts") if cell["names"]["arm"] == "trained"]
    assert [cell["upper"] for cell in found] == [cell["lower"] for cell in found] == hosts


def test_pairs_share_no_network_and_arms_are_what_they_say():
    found = cells("starts")
    assert len(found) == 2 * len(ARMS)
    hosts = {cell["names"]["pair"]: cell["upper"]["seed"] for cell in found}
    donors = {cell["names"]["pair"]: cell["lower"]["seed"] for cell in found if cell["names"]["arm"] == "trained"}
    assert len({*hosts.values(), *donors.values()}) == 4
    for cell in found:
        arm, pair = cell["names"]["arm"], cell["names"]["pair"]
        assert cell["lower"]["seed"] == (hosts if arm == "self" else donors)[pair]
        assert cell["lower_epoch"] == (0 if arm == "untrained" else 2)
        assert cell["lower"]["labels"] == ("permuted" if arm == "permuted_labels" else "true")
        assert cell["rotated"] == (arm == "rotated")
        assert (cell["upper_epoch"], cell["upper"]["labels"]) == (2, "true")


def test_matrices_have_every_entry():
    assert {
        (cell["lower_epoch"], cell["upper_epoch"]) for cell in cells("trajectory") if cell["names"]["arm"] == "trained"
    } == set(product((0, 1, 2), repeat=2))
    trained = [cell for cell in cells("strengths") if cell["names"]["arm"] == "trained"]
    assert {(cell["lower"]["strength"], cell["upper"]["strength"]) for cell in trained} == set(
        product((1.0, 4.0), repeat=2)
    )
    assert {(cell["lower"]["width"], cell["upper"]["width"]) for cell in cells("widths")} == set(
        product((2, 4), repeat=2)
    )
    moving = {(cell["names"]["moving"], cell["lower_epoch"], cell["upper_epoch"]) for cell in cells("epochs")}
    assert moving == {("lower", epoch, 2) for epoch in (0, 1, 2)} | {("upper", 2, epoch) for epoch in (0, 1, 2)}


def trajectory_rows(bonus, pairs=3):
    """Errors donor effect x host effect, times exp(bonus) off the diagonal."""
    rows = []
    for pair, s, t in product(range(pairs), (0, 1, 4, 9), (0, 1, 4, 9)):
        error = math.exp(0.3 * s - 0.7 * t + pair + (bonus * (1 + 0.1 * pair) if s != t else 0.0))
        named = {"pair": pair, "arm": "trained", "layer": "conv3", "lower_epoch": s, "upper_epoch": t}
        rows += [
            {**named, "method": method, "error": error, "mmd": error**2} for method in ("least_squares", "transport")
        ]
    return rows


def test_the_contrast_sees_a_ridge_and_nothing_else():
    for bonus in (0.0, 0.5, -0.2):
        found = {(row["method"], row["figure"]): row["contrast"] for row in summary.contrasts(trajectory_rows(bonus))}
        assert found["least_squares", "error"].value == pytest.approx(bonus * 1.1, abs=1e-12)
        assert found["transport", "error"].value == pytest.approx(bonus * 1.1, abs=1e-12)
        assert found["least_squares", "mmd"].value == pytest.approx(2 * bonus * 1.1, abs=1e-12)


def start_rows(errors, accuracies):
    """arm -> values over pairs, one layer."""
    shared = {"method": "least_squares", "layer": "conv5", "position": 5, "upper_accuracy": 0.5}
    return [
        {**shared, "arm": arm, "pair": pair, "error": error, "output_error": error, "accuracy": accuracy}
        for arm in errors
        for pair, (error, accuracy) in enumerate(zip(errors[arm], accuracies[arm]))
    ]


def test_arms_are_separated_only_where_intervals_do_not_overlap():
    errors = {"trained": [0.1, 0.11, 0.12], "untrained": [0.4, 0.5, 0.45], "permuted_labels": [0.1, 0.9, 0.2]}
    accuracies = {"trained": [0.5, 0.49, 0.5], "untrained": [0.48, 0.5, 0.49], "permuted_labels": [0.3, 0.31, 0.29]}
    found = {row["arm"]: row for row in summary.starts(start_rows(errors, accuracies))}
    assert (found["untrained"]["error_separated"], found["untrained"]["accuracy_separated"]) == (True, False)
    assert (found["permuted_labels"]["error_separated"], found["permuted_labels"]["accuracy_separated"]) == (
        False,
        True,
    )
    assert not found["trained"]["error_separated"]
    assert found["trained"]["relative_accuracy"].value == pytest.approx(2 * (0.5 + 0.49 + 0.5) / 3)
    assert found["untrained"]["error"].value == pytest.approx((0.4 * 0.5 * 0.45) ** (1 / 3))


def test_hosts_that_are_constant_are_left_out_of_mean_errors():
    nan = math.nan
    errors = {"trained": [0.1, nan, 0.1], "untrained": [nan, nan, nan]}
    rows = start_rows(errors, {"trained": [0.5] * 3, "untrained": [0.4] * 3})
    found = {row["arm"]: row for row in summary.starts(rows)}
    assert found["trained"]["error"].value == pytest.approx(0.1)
    assert math.isnan(found["untrained"]["error"].value)
    assert not found["untrained"]["error_separated"]
    assert found["untrained"]["relative_accuracy"].value == pytest.approx(0.8)


def test_rank_correlations_of_monotone_tables():
    rows = []
    for layer, arm, pair in product(("conv2", "conv3"), ("trained", "untrained", "self"), range(4)):
        x = pair + 10 * (arm == "untrained")
        moments = {"features_lower_mean": 1.0 + x, "features_upper_mean": 1.0}
        moments |= {"features_lower_variance": math.exp(-x), "features_upper_variance": 1.0}
        rows.append(
            {
                "layer": layer,
                "arm": arm,
                "method": "transport",
                "error": x**3,
                "mmd": x,
                "sliced_wasserstein": x,
                "cka": -x,
                **moments,
            }
        )
        if arm == "self":
            rows[-1] |= {"error": 100.0 * pair, "mmd": -pair}  # would spoil it
    found = {row["distance"]: row for row in summary.correlations(rows)}
    assert {name: round(row["mean"], 12) for name, row in found.items()} == {
        "mmd": 1,
        "sliced_wasserstein": 1,
        "cka": -1,
        "mean_difference": 1,
        "log_variance_ratio": 1,
    }
    assert found["mmd"]["layers"] == 2


def test_procedures_in_points_and_ratios():
    rows = [
        {"layer": "conv2", "method": "least_squares", "accuracy": 0.90, "fit_error": 0.10, "cpu_seconds": 0.5},
        {"layer": "conv2", "method": "adam", "accuracy": 0.89, "fit_error": 0.101, "cpu_seconds": 20.0},
    ]
    (found,) = summary.procedures(rows)
    assert found["accuracy_points"] == pytest.approx(-1)
    assert found["excess"] == pytest.approx(0.01)
    assert found["ratio"] == pytest.approx(40)


def test_matrix_takes_the_upper_half_of_the_layers():
    rows = [
        {
            "arm": "trained",
            "method": "least_squares",
            "a": 1,
            "b": 2,
            "position": position,
            "accuracy": position / 10,
            "upper_accuracy": 1.0,
            "output_error": position,
        }
        for position in (2, 3, 4, 5, 6)
    ]
    (found,) = summary.matrix(rows, "a", "b")
    assert found["relative_accuracy"] == pytest.approx(0.5)
    assert found["output_error"] == pytest.approx(5)


def test_a_rotation_keeps_spans_and_sizes():
    network = TINY.start().eval()
    images = TINY.images().inputs[:40]
    for layer in ("conv3", "linear1"):
        turned = grafting.rotated(network, layer, seed=3)
        before, after = (each[: list(dict(each.named_children())).index(layer)](images) for each in (network, turned))
        torch.testing.assert_close(before.square().sum(1), after.square().sum(1), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(before, after, atol=1e-3)
        host = TINY.variant(seed=5).start().eval()
        errors = [graft(donor, host, layer, images).error for donor in (network, turned)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_rows_say_what_grafts_do(tmp_path):
    cell = next(cell for cell in cells("starts") if cell["names"]["arm"] == "trained")
    rows = grafting.pair(cell, str(tmp_path))
    lower, upper = (Classifier.from_dict(cell[end]).at(2, tmp_path) for end in ("lower", "upper"))
    images = TINY.images()
    assert [(row["layer"], row["method"]) for row in rows] == list(
        product(layers_of(upper)[1:], ("least_squares", "transport"))
    )
    for row in rows:
        found = graft(lower, upper, row["layer"], images.inputs, row["method"])
        score = evaluate(found.network, images.held_out, images.held_out_labels)
        assert (row["accuracy"], row["loss"]) == pytest.approx(tuple(score))
        assert row["fit_error"] == pytest.approx(found.error, rel=1e-6)
        with torch.no_grad():
            ours, theirs = found.network(images.held_out).double(), upper(images.held_out).double()
        assert row["output_error"] == pytest.approx(
            float((ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum()), rel=1e-4
        )
        assert row["error_linear1"] == row["output_error"]
        assert -1 - 1e-9 <= row["cka"] <= 1 + 1e-9
    assert rows[0]["upper_accuracy"] == evaluate(upper, images.held_out, images.held_out_labels).accuracy
    assert (rows[0]["lower_seed"], rows[0]["upper_seed"], rows[0]["lower_epoch"]) == (0, 1, 2)


def test_what_the_label_alone_says(tmp_path):
    (cell, *_) = cells("classes")
    upper, images = Classifier.from_dict(cell["upper"]).at(2, tmp_path), TINY.images()
    found = {row["layer"]: row["class_error"] for row in grafting.classes(cell, str(tmp_path))}
    names = list(dict(upper.named_children()))
    for layer in ("conv2", "linear1"):
        part = upper[: names.index(layer) + 1]
        with torch.no_grad():
            seen, goal = part(images.inputs).double(), part(images.held_out).double()
        means = torch.stack([seen[images.labels == label].mean(0) for label in range(10)])
        axes = (0, 2, 3) if goal.ndim == 4 else (0,)
        expected = (goal - means[images.held_out_labels]).square().sum() / (
            goal - goal.mean(axes, keepdim=True)
        ).square().sum()
        assert found[layer] == pytest.approx(float(expected), rel=1e-6)
    assert list(found) == list(layers_of(upper)[1:])


def test_layers_of_the_matrices_are_those_the_network_has():
    deep = replace(SMALL, layers=("conv4", "conv13"))
    assert cells("trajectory", sizes=deep)[0]["connections"] == ["conv4"]
    none = replace(SMALL, layers=("conv13",))
    # the fourth of six
    assert cells("trajectory", sizes=none)[0]["connections"] == ["conv4"]


def test_strengths_are_in_units_of_the_classifier_s():
    weak = TINY.variant(penalty="l2", strength=0.01)
    found = cells("strengths", weak)
    assert {cell["upper"]["strength"] for cell in found} == {0.01, 0.04}
    assert STUDY.plan(TINY.variant(penalty="none", strength=0.0), SMALL, parts=["strengths"]) == {}


def test_a_start_does_not_know_its_strength():
    untrained = [cell for cell in cells("strengths") if cell["names"]["arm"] == "untrained"]
    assert [(cell["lower"]["strength"], cell["upper"]["strength"]) for cell in untrained] == [(1.0, 1.0), (1.0, 4.0)]
    assert {cell["lower_epoch"] for cell in untrained} == {0}


@pytest.mark.parametrize("part", ["strengths", "widths"])
def test_rows_name_the_settings_of_both_ends(part):
    field = part.removesuffix("s")
    for cell in cells(part):
        assert [cell["names"][f"{end}_{field}"] for end in ("lower", "upper")] == [
            cell[end][field] for end in ("lower", "upper")
        ]


def test_a_donor_that_is_the_host_is_perfect(tmp_path):
    cell = next(cell for cell in cells("starts") if cell["names"]["arm"] == "self")
    for row in grafting.pair(cell, str(tmp_path)):
        assert row["fit_error"] < 1e-6
        # 120 images do not determine a kernel
        assert row["output_error"] < (1e-10 if row["method"] == "transport" else 1e-2)
        assert (row["mmd"], row["sliced_wasserstein"]) == pytest.approx((0, 0), abs=1e-6)


def test_the_study_runs_and_goes_on_where_it_was(tmp_path):
    heard = []
    parts, sizes = ["starts", "across"], replace(SMALL, pairs=1)
    listen = lambda part, cell, kept: heard.append((part, kept))  # noqa: E731
    tables = STUDY.run(TINY, sizes, tmp_path, parts=parts, announce=listen)
    assert list(tables) == ["train", "starts", "across"]
    assert {(row["lower_layer"], row["layer"]) for row in tables["across"]} == {
        (f"conv{i}", f"conv{j}") for i, j in product(range(2, 6), repeat=2) if i < j
    }
    trained = len(STUDY.plan(TINY, sizes, parts=parts)["train"])
    assert [part for part, _ in heard[:trained]] == ["train"] * trained
    assert len(list((tmp_path / "networks").iterdir())) == trained  # nothing is trained on the way
    again = STUDY.run(TINY, sizes, tmp_path, parts=parts, announce=listen)
    assert again == tables
    kept = [known for _, known in heard]
    assert kept == [False] * (len(kept) // 2) + [True] * (len(kept) // 2)
    assert set(STUDY.summary(tables)) == {"starts", "correlations"}


def test_cells_name_the_images():
    assert STUDY.common(TINY) == {"images": TINY.images().digest}
    assert STUDY.common(TINY.variant(split=1)) != STUDY.common(TINY)


def test_what_is_left_open_is_settled_and_the_rest_stays():
    found = settled(Options())
    assert (found.samples, found.split, found.network, found.width, found.strength) == (1437, True, "vgg11", 8, 1.0)
    assert settled(found) == found
    typed = Options(samples=100, split=False, network="vgg8", width=3, strength=2.0, size="authors")
    assert settled(typed) == typed
    assert settled(Options(penalty="l2")).strength == 0.008
    assert settled(Options(penalty="none")).strength == 0.0
    authors = settled(Options(size="authors", width=2))
    assert (authors.network, authors.width) == ("vgg16", 2)
    assert "--split --network=vgg16" in authors.command_line("meanfield", "graft")
    assert "--file-order" in typed.command_line("meanfield", "graft")


@pytest.mark.parametrize(("size", "preset"), [("default", "default"), ("authors", "authors")])
def test_the_classifier_is_the_one_that_was_asked_for(size, preset):
    given = {"samples": 100, "network": "vgg8", "width": 3, "penalty": "l2", "strength": 0.5, "dtype": "float64"}
    found = classifier(settled(Options(split=True, size=size, **given)))
    assert found == Classifier(preset=preset, split=0, **given)
    assert classifier(settled(Options(split=False, size=size, **given))).split is None


def test_cifar_keeps_its_own_test_images(tmp_path):
    records = np.tile(np.uint8(np.arange(10))[:, None], (1, 3073))
    for name in CIFAR_10_FILES:
        (tmp_path / name).write_bytes(records.tobytes())
    found = settled(Options(data=str(tmp_path)))
    assert (found.samples, found.split) == (50_000, False)
    assert settled(Options(data=str(tmp_path), samples=50)).split is False


def test_the_command_takes_networks_that_the_controls_can_take_apart():
    with pytest.raises(Misuse, match=r"network='residual' is unknown"):
        Options(network="residual")


def test_the_command_runs_the_study_of_its_settings(monkeypatch):
    heard = []
    monkeypatch.setattr(command, "run_study", lambda *arguments: heard.append(arguments))
    command.command(Options(network="vgg8", samples=100, seed=3))
    ((study, options, base, *program),) = heard
    assert (study, program) == (STUDY, ["meanfield", "graft"])
    assert (options.samples, options.split, base.samples, base.network) == (100, True, 100, "vgg8")
