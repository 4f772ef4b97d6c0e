"""Surfaces to be turned by hand: plotly figures as JSON, and the script that draws them, for a page to carry inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CAMERA = {"eye": {"x": 1.5, "y": 1.5, "z": 1.0}, "center": {"x": 0, "y": 0, "z": -0.15}}
Points = Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Relief:
    """A surface: values (n, m) at x (n,) and y (m,), marked points (x, y, value) in it, a note to be read with it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    values: np.ndarray
    note: str
    marks: Points = ()
    checks: Points = ()


def reliefs(shown: Sequence[Relief], x: str, y: str, z: str) -> str:
    """One figure, as JSON, with a menu that shows one of the surfaces at a time, and one for a logarithmic height."""
    from plotly import graph_objects

    figure: Any = graph_objects.Figure()
    for index, each in enumerate(shown):
        figure.add_trace(_height(graph_objects, each, z, visible=index == 0))
        figure.add_trace(_points(graph_objects, each.checks, "exact, at check points", "#222222", 2.5, index == 0))
        figure.add_trace(_points(graph_objects, each.marks, "networks", "#D55E00", 6, index == 0))
    traces = 3
    menu = [
        {
            "label": _plain(each.label),
            "method": "update",
            "args": [
                {"visible": [place // traces == index for place in range(traces * len(shown))]},
                {"title.text": _plain(each.note)},
            ],
        }
        for index, each in enumerate(shown)
    ]
    heights = [{"label": kind, "method": "relayout", "args": ["scene.zaxis.type", kind]} for kind in ("linear", "log")]
    beside = {"showactive": True, "yanchor": "top", "xanchor": "left"}
    figure.update_layout(
        title={"text": _plain(shown[0].note), "font": {"size": 14}, "y": 0.98, "yanchor": "top"},
        scene={"xaxis_title": x, "yaxis_title": y, "zaxis_title": z, "aspectmode": "cube", "camera": CAMERA},
        updatemenus=[
            {"buttons": menu, "x": 0.0, "y": 1.0, **beside},
            {"buttons": heights, "x": 0.0, "y": 0.86, "type": "buttons", "direction": "right", **beside},
        ],
        legend={"x": 0, "y": 0},
        margin={"l": 0, "r": 0, "t": 70, "b": 0},
        height=620,
    )
    # "</script>" in a label would end the element that holds this
    return json.dumps(json.loads(figure.to_json())).replace("<", "\\u003c")


def script() -> str:
    """plotly.js, as a page carries it inside, once."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _height(graph_objects: Any, relief: Relief, z: str, visible: bool) -> Any:
    # plotly has rows along y
    return graph_objects.Surface(
        x=np.asarray(relief.x),
        y=np.asarray(relief.y),
        z=np.asarray(relief.values).T,
        colorscale="Viridis",
        colorbar={"title": {"text": z}, "len": 0.7},
        contours={"z": {"show": True, "usecolormap": True, "project": {"z": True}}},
        hovertemplate="(%{x:.3f}, %{y:.3f}): %{z:.4g}<extra></extra>",
        name=_plain(relief.label),
        visible=visible,
    )


def _points(graph_objects: Any, points: Points, name: str, color: str, size: float, visible: bool) -> Any:
    places = np.asarray(points, dtype=float).reshape(-1, 3)
    return graph_objects.Scatter3d(
        x=places[:, 0],
        y=places[:, 1],
        z=places[:, 2],
        mode="markers",
        marker={"size": size, "color": color},
        name=name,
        showlegend=bool(len(places)),
        visible=visible,
    )


def _plain(text: str) -> str:
    """Names that users gave are no HTML, which plotly takes its texts for."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
