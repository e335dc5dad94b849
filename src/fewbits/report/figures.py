"""Figures as plotly's traces and layouts: plain data in, plain data out. Colours of text and grid are the page's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Figure = dict[str, Any]
Event = Mapping[str, Any]
SCALE = "Viridis"
ERRORS = "Relative error of each layer's output on the calibration text; of the weights where nothing was calibrated."


def layer_of(name: str) -> tuple[int, str]:
    """Block and projection of a weight's name: ``model.layers.3.self_attn.q_proj`` is ``(3, "q")``; experts are one
    projection. Block -1 for a weight outside the blocks.
    """
    numbers = re.search(r"\.(\d+)\.", f".{name}.")
    local = re.sub(r"\.\d+(?=\.)", "", name.rpartition(".")[0])
    last = name.rpartition(".")[2].removesuffix("_proj")
    return (int(numbers[1]) if numbers else -1), ("experts " if "expert" in local else "") + last


def grid(tensors: Sequence[Event], key: str) -> tuple[list[str], list[int], list[list[float | None]]]:
    """``tensors`` as a matrix of ``key``: projections, blocks, and ``[projection][block]``, the largest of several."""
    found: dict[str, dict[int, float]] = {}
    for e in tensors:
        if e.get(key) is None:
            continue
        block, kind = layer_of(str(e["name"]))
        row = found.setdefault(kind, {})
        row[block] = max(float(e[key]), row.get(block, -math.inf))
    blocks = sorted({b for row in found.values() for b in row})
    return list(found), blocks, [[row.get(b) for b in blocks] for row in found.values()]


def heat(tensors: Sequence[Event], key: str, unit: str, digits: int = 4) -> Figure:
    """A heat map, projections by blocks."""
    kinds, blocks, z = grid(tensors, key)
    trace = {
        "type": "heatmap",
        "x": blocks,
        "y": kinds,
        "z": z,
        "colorscale": SCALE,
        "hovertemplate": f"block %{{x}}, %{{y}}<br>%{{z:.{digits}f}} {escape(unit)}<extra></extra>",
        "colorbar": {"thickness": 10, "title": {"text": unit, "side": "right"}},
        "xgap": 1,
        "ygap": 1,
    }
    whole = {"dtick": 1} if len(blocks) <= 12 else {}  # no ticks between blocks
    layout = {
        "xaxis": {"title": {"text": "block"}} | whole,
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    return {"traces": [trace], "layout": layout}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other one beats in both coordinates (smaller is better), by the first."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def pareto(points: Sequence[Mapping[str, Any]], label: str, best_small: bool = True) -> Figure:
    """KL against what it costs. A point has ``x, y, name, group, colour, hover`` (lines of text)."""
    traces: list[dict[str, Any]] = []
    usable = [p for p in points if p["x"] is not None and p["y"]]
    sign = 1.0 if best_small else -1.0
    best = [(sign * x, y) for x, y in front([(sign * p["x"], p["y"]) for p in usable])]
    xs, ys = [x for x, _ in best], [y for _, y in best]
    line = {"dash": "dot", "width": 1.5, "color": "#8a93a3"}
    traces.append({"type": "scatter", "mode": "lines", "x": xs, "y": ys, "line": line, "hoverinfo": "skip"})
    for p in usable:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [p["x"]],
                "y": [p["y"]],
                "text": [escape(p["name"])],
                "textposition": "top center",
                "group": p["group"],
                "marker": {"size": 11, "color": p["colour"]},
                "hovertemplate": "<br>".join(escape(line) for line in p["hover"]) + "<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": label}},
        "yaxis": {"type": "log", "title": {"text": "KL from the original, nats per token"}, "exponentformat": "power"},
        "hovermode": "closest",
    }
    return {"traces": traces, "layout": layout}


def lines(series: Sequence[Mapping[str, Any]], x: str, y: str, log: tuple[bool, bool] = (False, False)) -> Figure:
    """Lines with names. A series has ``x, y, name, colour`` and perhaps ``group``, ``dash``, ``step``."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": list(s["x"]),
            "y": list(s["y"]),
            "name": escape(s["name"]),
            "group": s.get("group"),
            "line": {
                "color": s["colour"],
                "width": 1.8,
                "dash": s.get("dash", "solid"),
                "shape": "hvh" if s.get("step") else "linear",
            },
            "hovertemplate": f"{escape(s['name'])}<br>%{{x:.4g}}: %{{y:.4g}}<extra></extra>",
        }
        for s in series
    ]
    logarithmic = {"type": "log", "exponentformat": "power"}
    axes = {
        name: {"title": {"text": title}} | (logarithmic if wanted else {})
        for name, title, wanted in zip(("xaxis", "yaxis"), (x, y), log, strict=True)
    }
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 11}}
    return {"traces": traces, "layout": axes | {"showlegend": True, "legend": legend}}


def bars(names: Sequence[str], parts: Mapping[str, Sequence[float | None]], colours: Sequence[str], x: str) -> Figure:
    """Horizontal bars, one per name, each made of ``parts``."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [escape(n) for n in names],
            "x": list(values),
            "name": escape(part),
            "marker": {"color": colour},
            "hovertemplate": f"%{{y}}, {escape(part)}: %{{x:.3g}}<extra></extra>",
        }
        for (part, values), colour in zip(parts.items(), colours, strict=False)
    ]
    layout = {
        "barmode": "stack",
        "showlegend": len(parts) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": x}},
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    return {"traces": traces, "layout": layout}
