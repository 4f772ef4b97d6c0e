import numpy as np
import pytest

from meanfield import plotting

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
