import json
import math
import re
from html import unescape
from itertools import product

import pytest

from meanfield.bench.provenance import Provenance
from meanfield.pages import html
from meanfield.pages.html import Figure, Table
from meanfield.rates import Interval
from meanfield.studies.grafting import page, pictures, summary
from meanfield.studies.grafting.study import STUDY

MADE = Provenance("meanfield graft --size=full", {"size": "full"})

LAYERS = ("conv2", "conv3", "conv4", "linear1")
ERRORS = {"trained": 0.1, "untrained": 0.3, "permuted_labels": 0.4, "rotated": 0.1, "self": 1e-13}
TRANSPORT = {"trained": 0.5, "untrained": 1.0, "permuted_labels": 2.0, "rotated": 1.5, "self": 0.0}
MOVED = {
    "features_lower_mean": 0.2,
    "features_lower_variance": 1.0,
    "features_upper_mean": 0.1,
    "features_upper_variance": 1.2,
}


def graft_row(pair, arm, layer, method="least_squares", error=None, **names):
    """A graft whose error grows by a tenth from its layer to the output."""
    usual = (TRANSPORT if method == "transport" else ERRORS)[arm] * 1.01**pair if error is None else error
    place = LAYERS.index(layer)
    distances = {"mmd": usual + 0.01, "sliced_wasserstein": usual, "cka": 1 - usual}
    later = {f"error_{other}": usual * (1 if other == layer else 1.1) for other in LAYERS[place:]}
    figures = {
        "accuracy": 0.8 * (1 - usual / 4),
        "upper_accuracy": 0.8,
        "error": usual,
        "output_error": 1.1 * usual,
        **later,
        **distances,
        **MOVED,
    }
    return {"pair": pair, "arm": arm, **names, "layer": layer, "position": place + 2, "method": method, **figures}


def starts(pairs=4, arms=tuple(ERRORS), methods=("least_squares", "transport"), same=()):
    """same: layers at which controls are as good as trained donors."""
    return [
        graft_row(
            pair,
            arm,
            layer,
            method,
            ERRORS["trained"] if layer in same and arm != "self" and method == "least_squares" else None,
        )
        for pair, arm, layer, method in product(range(pairs), arms, LAYERS, methods)
    ]


def trajectory(pairs=3, ridge=2.0, epochs=(0, 1, 2)):
    """Trained pairs are `ridge` times closer at equal epochs, controls are not; the epochs have
    effects of their own.
    """
    rows = []
    for pair, arm, below, above in product(range(pairs), ("trained", "permuted_labels", "self"), epochs, epochs):
        if arm == "self" and pair:
            continue
        strength = {"permuted_labels": 1.1 ** (pair - 1)}.get(arm, ridge * 1.01**pair)
        apart = strength if below != above else 0.0 if arm == "self" else 1.0
        for method in ("least_squares", "transport"):
            error = 0.1 * apart * (1 + below) * (1 + 2 * above)
            row = graft_row(pair, arm, "conv3", method, error, lower_epoch=below, upper_epoch=above)
            rows.append({**row, "mmd": error})
    return rows


def epochs():
    places = product(("lower", "upper"), ("trained", "permuted_labels"), (0, 5), LAYERS)
    return [
        graft_row(0, arm, layer, error=0.5 / (1 + epoch), moving=moving, epoch=epoch)
        for moving, arm, epoch, layer in places
    ]


def across():
    return [
        graft_row(0, arm, above, lower_layer=below)
        for arm, (below, above) in product(
            ("trained", "untrained"), [("conv2", "conv3"), ("conv2", "conv4"), ("conv3", "conv4")]
        )
    ]


def crossed(name, values, arms=("trained", "untrained"), methods=("least_squares",)):
    return [
        graft_row(0, arm, layer, method, **{f"lower_{name}": below, f"upper_{name}": above})
        for arm, below, above, layer, method in product(arms, values, values, LAYERS, methods)
        if name == "width" or arm == "trained" or below == values[0]
    ]


def procedures():
    figures = {"least_squares": (0.5, 0.2, 0.1), "adam": (0.48, 0.25, 20.0)}
    return [
        {"pair": 0, "layer": layer, "method": method, "accuracy": accuracy, "fit_error": error, "cpu_seconds": seconds}
        for layer in LAYERS
        for method, (accuracy, error, seconds) in figures.items()
    ]


def train():
    named = {"width": 8, "penalty": "l12", "strength": 1.0, "epoch": 2}
    scores = [("true", 0.9), ("true", 0.95), ("permuted", 0.1)]
    ends = [
        {"seed": 0, **named, "labels": labels, "accuracy": held_out, "held_out_accuracy": held_out}
        for labels, held_out in scores
    ]
    return [{"seed": 0, **named, "labels": "true", "epoch": 1, "accuracy": 0.3}, *ends]


def classes(pairs=4):
    shares = {"conv2": 0.9, "conv3": 0.3, "conv4": 0.05, "linear1": 0.02}
    return [
        {"pair": pair, "layer": layer, "position": i + 2, "class_error": share * 1.01**pair}
        for pair in range(pairs)
        for i, (layer, share) in enumerate(shares.items())
    ]


TABLES = {
    "train": train(),
    "starts": starts(same=("conv2",)),
    "classes": classes(),
    "l2": starts(2, ("trained", "untrained"), ("least_squares",)),
    "trajectory": trajectory(),
    "epochs": epochs(),
    "across": across(),
    "strengths": crossed("strength", (0.5, 1.0)),
    "widths": crossed("width", (4, 8, 16), methods=("least_squares", "transport")),
    "procedures": procedures(),
}
PICTURES = {
    "starts": {"profiles", "methods", "later"},
    "classes": {"classes"},
    "l2": {"l2"},
    "trajectory": {"trajectory_error", "trajectory_transport", "trajectory_mmd", "ridge"},
    "epochs": {"epochs"},
    "across": {"across"},
    "strengths": {"strengths"},
    "widths": {"widths"},
}
HEADINGS = {
    "starts": "Grafts between",
    "classes": "More than the class",
    "l2": "With the L2 penalty",
    "trajectory": "The same path",
    "epochs": "From when on",
    "across": "Into another",
    "strengths": "Strength of",
    "widths": "Width",
    "procedures": "Least squares against",
    "train": "The networks",
}


def record(tables):
    return STUDY.page(STUDY.summary(tables), tables, MADE)


def section(tables, title):
    (found,) = [each for each in record(tables).sections if each.title == title]
    return found.items


def rendered(tables):
    """A page with empty pictures."""
    return html.render(record(tables), dict.fromkeys({name for names in PICTURES.values() for name in names}, ""))


def words(page):
    return unescape(re.sub(r"<[^>]+>", "", page.split("</style>")[1]))


def read(tables):
    return words(rendered(tables))


def test_every_part_has_its_pictures_and_its_section():
    files = STUDY.files(TABLES, MADE)
    text = files["graft.html"]
    drawn = {name.removesuffix(".png") for name in files if name.endswith(".png")}
    assert drawn == {name for names in PICTURES.values() for name in names}
    assert set(files) <= set(STUDY.names())
    assert text.count("data:image/png;base64,") == len(drawn)
    assert "<code>meanfield graft --size=full</code>" in text
    assert "nan" not in words(text).replace(MADE.library, "")


def test_the_page_has_its_sections_in_this_order():
    assert [each.title for each in record(TABLES).sections] == [
        "Grafts between networks from different starts",
        "Spans or distributions?",
        "What later layers make of the error",
        "Distances and errors",
        "More than the class?",
        "With the L2 penalty instead",
        "The same path through training?",
        "From when on?",
        "Into another layer",
        "Strength of the penalty",
        "Width",
        "Least squares against the authors' procedure",
        "The networks",
        "What this does not say",
    ]


def test_every_picture_is_shown_once_and_is_one_of_its_part():
    for part, rows in TABLES.items():
        items = [item for each in record({part: rows}).sections for item in each.items]
        shown = [item.name for item in items if isinstance(item, Figure)]
        assert sorted(shown) == sorted(PICTURES.get(part, ()))


def test_the_summary_is_strict_json_with_intervals_as_dicts():
    found = json.loads(STUDY.files({"starts": starts(1)}, MADE)["summary.json"])
    assert found["starts"][0]["error"] == {"value": pytest.approx(0.1), "low": 0.0, "high": None}
    # the moments are all equal
    assert {row["distance"] for row in found["correlations"]} == {"mmd", "sliced_wasserstein", "cka"}
    assert found["made"]["settings"] == {"size": "full"}


def test_the_figures_of_every_part_have_their_names():
    named = {"starts", "correlations", "classes", "l2", "strengths", "widths", "trajectory", "procedures"}
    assert set(STUDY.summary(TABLES)) == named


@pytest.mark.parametrize("part", TABLES)
def test_any_part_may_stand_alone(part):
    text = rendered({part: TABLES[part]})
    assert [other for other, heading in HEADINGS.items() if f"<h2>{heading}" in text] == [part]
    assert "What this does not say" in text


def test_nothing_at_all_is_a_page_too():
    assert "What this does not say" in STUDY.files({"train": []}, MADE)["graft.html"]


def test_layers_are_named_at_which_trained_donors_are_separated_from_controls():
    text = read({"starts": starts(same=("conv2",))})
    assert "Over 4 pairs, grafts on trained donors keep between" in text
    apart = "at conv3 to linear1, not at conv2"
    assert (
        text.count(
            f"With intervals apart, their accuracy lies below that of trained donors {apart}, their error above "
            f"{apart}."
        )
        == 2
    )
    assert "at every layer, their error above at every layer" in read({"starts": starts()})
    assert "at no layer, their error above at no layer" in read({"starts": starts(same=LAYERS)})
    assert "at conv3 and linear1, not at conv2 and conv4" in read({"starts": starts(same=("conv2", "conv4"))})


def test_one_pair_gives_no_intervals():
    text = read({"starts": starts(1), "trajectory": trajectory(1)})
    assert "Over 1 pair," in text
    assert "One pair gives no intervals." in text
    assert "inf" not in text


def test_rotation_is_seen_by_transport_alone():
    text = read({"starts": starts()})
    assert "least squares leaves trained donors an error of 0.10, transport 0.51, 5.0 times as much" in text
    assert (
        "changes no error of least squares by more than 0 of itself; it multiplies the error of transport by 3.0"
        in text
    )
    assert (
        "Untrained donors have 3.0 times the error of trained ones by least squares and 2.0 times by transport." in text
    )
    off = [{**row, "error": 2 * row["error"]} if row["arm"] == "rotated" else row for row in starts()]
    assert "should leave least squares alone, but changes its error by up to 100%" in read({"starts": off})


def test_the_claim_holds_the_mean_accuracies():
    text = read({"starts": starts(1)})
    assert (
        "a network keeps 97.5% of its accuracy, averaged over the layers of the graft; 92.5% with untrained donors "
        "and 90.0% with" in text
    )


def test_a_planted_ridge_is_the_contrast_and_effects_of_one_epoch_are_not():
    text = read({"trajectory": trajectory(ridge=2.0)})
    assert f"At conv3 pairs of trained networks have contrasts of {math.log(2.02):.2f} (" in text
    assert (
        "with the donor trained on permuted labels the contrasts are 0.00 (-0.24 to 0.24) for the error of least "
        "squares, no ridge by" in text
    )


def test_of_many_layers_the_text_tells_the_deepest():
    rows = trajectory() + [{**row, "layer": "conv10"} for row in trajectory(ridge=4.0)]
    text = read({"trajectory": rows})
    assert f"At conv10 pairs of trained networks have contrasts of {math.log(4.04):.2f} (" in text
    assert "The table has conv3 too." in text
    assert "At conv3" not in text


def test_the_ridge_is_drawn_without_what_depends_on_one_epoch_alone():
    panel = pictures.ridge({"trajectory": trajectory(1, ridge=2.0)}).axes[0]
    drawn = panel.get_images()[0].get_array()
    assert drawn.tolist() == [pytest.approx([2**-0.5, 2**0.5]), pytest.approx([2**0.5, 2**-0.5])]


def test_one_epoch_has_no_contrast():
    rows = {"trajectory": trajectory(epochs=(0, 1))}
    assert "too few epochs" in read(rows)
    drawn = PICTURES["trajectory"] - {"ridge"}
    assert set(STUDY.pictures(rows)) == drawn
    items = section(rows, "The same path through training?")
    assert {item.name for item in items if isinstance(item, Figure)} == drawn


def test_the_contrast_is_explained_with_a_superscript():
    assert "c that different epochs are e<sup>c</sup> times as far apart" in rendered({"trajectory": trajectory()})


def test_epochs_layers_skipped_procedures_and_networks_are_told_in_figures():
    text = read(TABLES)
    assert "As the donor goes from epoch 0 to 5, it goes from 0.55 to 0.092 with trained donors" in text
    assert "the output error goes from 0.11 for 1 layer to 0.11 for 2 layers with trained donors" in text
    assert "ends 2.0 points below the accuracy of least squares, with 25.0% more error" in text
    assert "takes 200 times the CPU seconds, on average over 4 layers" in text
    assert "3 networks were trained." in text
    assert "90.0% to 95.0%" in text
    assert "With least squares and trained donors the output error lies between 0.11 and 0.11" in text


def test_the_error_is_followed_through_later_layers_of_one_graft():
    assert "it is multiplied by 1.1 with trained donors" in read({"starts": starts()})


def test_matrices_are_geometric_means_with_blanks_where_nothing_was_measured():
    rows = [{"a": 0, "b": 0, "error": 1.0}, {"a": 0, "b": 0, "error": 4.0}, {"a": 1, "b": 0, "error": 3.0}]
    found = pictures._matrix(rows, "a", "b", [0, 1], [0, 1], "error")
    assert found[:, 0].tolist() == pytest.approx([2.0, 3.0])
    assert all(map(math.isnan, found[:, 1]))


def test_untrained_donors_are_one_line_of_the_strengths():
    figure = pictures.strengths({"strengths": TABLES["strengths"]})
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["untrained", "0.5", "1"]
    assert len(figure.axes[0].texts) == 6


def test_layers_are_in_the_order_of_the_network():
    rows = [{"layer": name} for name in ("linear1", "conv10", "conv2", "conv9")]
    assert summary.layers_upwards(rows, "layer") == ["conv2", "conv9", "conv10", "linear1"]


def test_intervals_without_ends_are_shown_as_values():
    assert str(Interval(0.5, -math.inf, math.inf)) == "0.5"
    assert page._hundredths(Interval(-0.001, -0.02, 0.2)) == "0.00 (-0.02 to 0.20)"


def test_the_page_says_where_a_graft_knows_more_than_the_class():
    text = read({"starts": starts(), "classes": classes()})
    assert "know more of the host than its class at conv2 to conv3, not at conv4 to linear1" in text
    alone = read({"classes": classes()})
    assert "between 0.020 and 0.91" in alone
    assert "know more of the host" not in alone


def test_grafts_and_the_label_alone_are_drawn_together():
    lines = lambda tables: [each.get_label() for each in pictures.classes(tables).axes[0].get_lines()]  # noqa: E731
    both = lines({"starts": starts(), "classes": classes()})
    assert {"trained", "untrained", "the label alone"} <= set(both)
    assert "trained" not in lines({"classes": classes()})


def test_the_tables_of_a_profile_hold_every_layer_and_arm():
    items = section({"starts": starts()}, "Grafts between networks from different starts")
    accuracy, error = (item.table for item in items[3:])
    assert list(accuracy.head) == ["connecting layer", "trained", "untrained", "trained on permuted labels"]
    assert [row[0] for row in error.rows] == list(LAYERS)
    assert [row[1].value for row in accuracy.rows] == pytest.approx([0.975] * 4, abs=1e-3)
    assert [row[2].value for row in error.rows] == pytest.approx([0.33 * 1.01**1.5] * 4)


def test_the_networks_are_counted_by_their_settings():
    *_, table = section({"train": train()}, "The networks")
    assert isinstance(table, Table)
    assert table.rows == [
        ["true", "l12", "1", 8, 2, 2, "90.0% to 95.0%", "90.0% to 95.0%"],
        ["permuted", "l12", "1", 8, 2, 1, "10.0%", "10.0%"],
    ]


def test_hosts_that_are_constant_leave_a_page():
    rows = [{**row, "error": math.nan, "output_error": math.nan} if row["pair"] == 0 else row for row in starts()]
    files = STUDY.files({"starts": rows}, MADE)
    assert "it is multiplied by 1.1 with trained donors" in files["graft.html"]
    assert "profiles.png" in files
