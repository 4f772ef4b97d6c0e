import numpy as np
import pytest

from meanfield.pages import plotting

ROWS = [
    {"round": 0, "flow_value": 0.03, "value": 0.02, "dual_value": 0.0199, "flow_gap": 1e-2, "gap": 1e-4},
    {"round": 1, "flow_value": 0.0195, "value": 0.0194, "dual_value": 0.01939, "flow_gap": 1e-4, "gap": 1e-5},
]


def texts(axes):
    legend = axes.get_legend()
    return [entry.get_text() for entry in legend.get_texts()] if legend else []


def test_values_and_the_dual_bound_share_one_axis_and_are_labelled():
    (axes,) = plotting.values(ROWS).axes
    assert any("on this support" in text for text in texts(axes))
    drawn = [list(line.get_ydata()) for line in axes.get_lines()]
    for name in ("flow_value", "value", "dual_value"):
        assert [row[name] for row in ROWS] in drawn
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_gaps_are_on_a_logarithmic_axis():
    (axes,) = plotting.gaps(ROWS, 1e-4).axes
    assert axes.get_yscale() == "log"
    assert [row["flow_gap"] for row in ROWS] in [list(line.get_ydata()) for line in axes.get_lines()]


def test_finite_networks_show_every_draw_and_the_limit():
    figure = plotting.finite_networks({8: [0.4, 0.3], 16: [0.2, 0.1]}, {8: [0.05]}, 0.02)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert any(np.allclose(line.get_ydata(), 0.02) for line in axes.get_lines())
    medians = [list(line.get_ydata()) for line in axes.get_lines()]
    assert any(np.allclose(line, [0.35, 0.15]) for line in medians if len(line) == 2)


def test_kernels_carry_their_masses():
    masses = [0.1, 0.6, 0.3]
    figure = plotting.kernels(np.arange(27.0).reshape(3, 1, 3, 3), masses)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["p = 0.600", "p = 0.300", "p = 0.100"]


@pytest.mark.parametrize("figure", [plotting.values(ROWS), plotting.gaps(ROWS, 1e-4)])
def test_png_is_a_picture(figure):
    assert plotting.png(figure).startswith(b"\x89PNG")


def band(label, value, reach=0.1):
    places = [f"conv{number}" for number in range(2, 2 + len(value))]
    return plotting.Band(label, places, value, [each - reach for each in value], [each + reach for each in value])


def test_bands_share_their_places_and_one_legend():
    panels = {"accuracy": [band("a", [0.9, 0.8, 0.7]), band("b", [0.5, 0.4])], "error": [band("b", [0.2, 0.3])]}
    figure = plotting.bands(panels, "layer", log=["error"])
    first, second = figure.axes
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["conv2", "conv3", "conv4"]
    assert (first.get_yscale(), second.get_yscale()) == ("linear", "log")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    same = [line.get_color() for axes in figure.axes for line in axes.get_lines() if line.get_label() == "b"]
    assert same[0] == same[1]


def test_infinite_intervals_of_bands_are_not_drawn_and_wide_ones_leave_room_for_values():
    (axes,) = plotting.bands({"error": [band("one pair", [0.2, 0.3], np.inf)]}, "layer", log=["error"]).axes
    low, high = axes.get_ylim()
    assert 0.1 < low < 0.2
    assert 0.3 < high < 0.6
    (axes,) = plotting.bands({"accuracy": [band("two pairs", [0.2, 0.3], 50.0)]}, "layer").axes
    assert axes.get_ylim()[1] - axes.get_ylim()[0] < 1


def test_shared_bands_have_one_range():
    figure = plotting.bands({"a": [band("x", [0.2, 0.3])], "b": [band("x", [5.0, 9.0])]}, "layer", shared=True)
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


def test_heat_maps_take_rectangles_with_blanks_and_numbers():
    matrix = np.array([[0.1, 20.0, np.nan], [0.5, 1e-9, 0.3]])
    panel, bar = plotting.heat_maps(
        {"a": matrix}, ["1", "2", "3"], "epoch", "layer", "error", rows=["u", "v"], log=True, numbers=True
    ).axes
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["u", "v"]
    assert [text.get_text() for text in panel.texts] == ["0.10", "20", "0.50", "1.0e-09", "0.30"]
    image = panel.get_images()[0]
    assert (image.norm.vmin, image.norm.vmax) == (pytest.approx(0.02), 20.0)  # three decades
    assert image.get_array().mask.sum() == 1
    assert bar.get_yscale() == "log"


def test_heat_maps_have_one_linear_scale_from_zero_unless_told():
    figure = plotting.heat_maps({"a": np.eye(2), "b": 3 * np.eye(2)}, ["1", "2"], "x", "y", "z")
    assert {(axes.get_images()[0].norm.vmin, axes.get_images()[0].norm.vmax) for axes in figure.axes[:2]} == {(0, 3)}


def test_long_names_of_ticks_are_turned():
    names = [f"conv{number}" for number in range(8)]
    panel, _ = plotting.heat_maps({"a": np.ones((8, 8))}, names, "x", "y", "z", log=True, lowest=0.5).axes
    assert {tick.get_rotation() for tick in panel.get_xticklabels()} == {45}


def test_confusion_has_a_number_in_every_cell_that_is_not_empty():
    counts = np.array([[5, 0, 1], [0, 7, 0], [2, 0, 0]])
    (axes,) = plotting.confusion(counts, ["a", "b $x", "c"]).axes
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "5"),
        ((2, 0), "1"),
        ((1, 1), "7"),
        ((0, 2), "2"),
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", r"b \$x", "c"]
    many = np.eye(40, dtype=int)
    assert not plotting.confusion(many, list(map(str, range(40)))).axes[0].texts


def test_contours_have_true_coordinates_and_a_cross_at_the_least_value():
    x, y = np.linspace(-1, 1, 9), np.linspace(0, 4, 5)
    values = (x[:, None] - 0.5) ** 2 + (y[None, :] - 3) ** 2
    shown = plotting.Contour(x, y, values, "note $", {"start": (0.25, 1.0)})
    figure = plotting.contours({"a": shown}, "x", "y", "loss")
    axes = figure.axes[0]
    places = {line.get_label(): (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.get_lines()}
    assert places == {"least of the grid": (0.5, 3.0), "start": (0.25, 1.0)}
    assert axes.get_title() == "a\nnote \\$"
    assert (axes.get_xlim(), axes.get_ylim()) == ((-1, 1), (0, 4))


def test_contours_draw_no_cross_that_the_error_does_not_tell_from_a_network():
    x = np.linspace(-1, 1, 9)
    values = (x[:, None] - 0.25) ** 2 + x[None, :] ** 2  # at the network 0.0625
    for error, labels in ((0.03, {"least of the grid", "network"}), (0.032, {"network"})):
        shown = plotting.Contour(x, x, values, "", {"network": (0.0, 0.0)}, error)
        axes = plotting.contours({"a": shown}, "x", "y", "loss").axes[0]
        assert {line.get_label() for line in axes.get_lines()} == labels
        assert axes.collections[0].norm.vmin == pytest.approx(error)


def test_contours_leave_blank_what_is_not_finite_and_take_equal_ratios_over_decades():
    x = np.linspace(-1, 1, 5)
    values = np.exp(4 * (x[:, None] + x[None, :]))
    values[0, 0], values[4, 4] = np.nan, np.inf
    figure = plotting.contours(
        {"a": plotting.Contour(x, x, values), "b": plotting.Contour(x, x, values * np.nan)}, "x", "y", "z"
    )
    filled = figure.axes[0].collections[0]
    assert filled.norm.vmin == pytest.approx(np.exp(-6), rel=1e-6)
    np.testing.assert_allclose(np.diff(np.log(filled.levels)), 12 / 15, rtol=1e-6)
    assert not figure.axes[1].collections


def test_lines_of_one_label_are_told_once():
    curves = [
        plotting.Line("random", [0, 1], [1, 2]),
        plotting.Line("random", [0, 1], [2, 3]),
        plotting.Line("b", [0, 1], [1, 1], 1),
    ]
    figure = plotting.lines({"left": curves, "right": curves}, "x", "y", log=["right"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["random", "b"]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log"]
    assert len(figure.axes[0].get_lines()) == 3


def test_a_scatter_has_every_point_and_one_look_per_label():
    panels = {"left": {"a": [(1.0, 2.0), (3.0, 4.0)], "b": [(5.0, 6.0)]}, "right": {"b": [(1.0, 1.0)]}}
    figure = plotting.scatter(panels, dict.fromkeys(panels, "value"), "loss", log=["left"])
    left, right = figure.axes
    assert [each.get_offsets().tolist() for each in left.collections] == [[[1, 2], [3, 4]], [[5, 6]]]
    assert np.array_equal(left.collections[1].get_facecolor(), right.collections[0].get_facecolor())
    assert (left.get_xscale(), right.get_xscale()) == ("log", "linear")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_bars_are_in_their_order_with_notes_and_finite_intervals():
    pair = [plotting.Bar("a", 0.9, 0.8, 0.95, "0.01"), plotting.Bar("b", 0.5, -np.inf, np.inf, look=1)]
    first, second = plotting.bars({"one": pair, "two": pair[1:]}, "accuracy").axes
    assert [patch.get_width() for patch in first.patches] == [0.9, 0.5]
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["a", "b"]
    assert first.get_ylim()[0] > first.get_ylim()[1]  # the first one on top
    assert [list(line.get_xdata()) for line in first.get_lines()] == [[0.8, 0.95]]
    assert [text.get_text() for text in first.texts] == ["0.01", ""]
    assert first.patches[1].get_facecolor() == second.patches[0].get_facecolor() != first.patches[0].get_facecolor()


def test_tracks_mark_their_ends_and_a_panel_may_show_a_part():
    ways = [plotting.Track(f"way {index}", [0.0, 1.0, 2.0 + index], [3.0, 4.0, 5.0]) for index in range(7)]
    alone = plotting.Track("a point", [1.0], [2.0])
    figure = plotting.tracks({"all": [*ways, alone], "part": ways[:1]}, "x", "y", {"part": (1.0, 6.0)})
    whole, part = figure.axes
    assert [each.get_offsets().tolist() for each in whole.collections] == [
        *([[2.0 + index, 5.0]] for index in range(7)),
        [[1.0, 2.0]],
    ]
    assert list(whole.get_lines()[2].get_xdata()) == [0.0, 1.0, 4.0]
    looks = [(line.get_color(), line.get_linestyle()) for line in whole.get_lines()]
    assert len(set(looks)) == 8
    assert (part.get_xlim(), part.get_ylim()) == ((1.0, 6.0), (1.0, 6.0))
    assert part.get_lines()[0].get_color() == looks[0][0]
    assert len(figure.legends[0].get_texts()) == 8
