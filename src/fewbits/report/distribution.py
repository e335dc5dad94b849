"""Histograms of weights and inputs, and the outlier channels, from :mod:`fewbits.evaluate.distribution`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from fewbits.report import figures
from fewbits.report.page import COLOURS, Section

Study = Mapping[str, Any]


def drawn(study: Study | None) -> dict[str, Any]:
    """Figures by name; none without a study."""
    if not study:
        return {}
    return {
        "weights": _histograms(study["edges"], study["weights"], "weight, in standard deviations of its tensor"),
        "inputs": _histograms(study["edges"], study["inputs"], "input, in standard deviations over the tensor"),
        "channels": _channels(study["channels"]),
    }


def sections(study: Study | None) -> list[Section]:
    """Sections of a page for :func:`drawn`."""
    if not study:
        return []
    return [
        Section("Weights of the original", "Share of the values, all blocks together.", figures=("weights",)),
        Section(
            "Inputs of the original",
            f"What the linear layers read, over {study['tokens']} tokens of the calibration text.",
            figures=("inputs",),
        ),
        Section(
            "Outlier channels",
            "The largest magnitude in each block's inputs, over their standard deviation; point at it for the channel.",
            figures=("channels",),
        ),
    ]


def _histograms(edges: Sequence[float], found: Mapping[str, Sequence[int]], label: str) -> figures.Figure:
    middle = [(a + b) / 2 for a, b in pairwise(edges)]
    series = [
        {
            "x": middle,
            "y": [n / (sum(counts) or 1) or None for n in counts],
            "name": kind,
            "colour": COLOURS[i % len(COLOURS)],
            "step": True,
        }
        for i, (kind, counts) in enumerate(found.items())
    ]
    return figures.lines(series, label, "share", log=(False, True))


def _channels(found: Sequence[Study]) -> figures.Figure:
    kinds = list(dict.fromkeys(c["kind"] for c in found))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": kind,
            "x": [c["block"] for c in found if c["kind"] == kind],
            "y": [c["sigmas"] for c in found if c["kind"] == kind],
            "text": [f"channel {c['channel']}: {c['absmax']:.3g}" for c in found if c["kind"] == kind],
            "marker": {"color": COLOURS[i % len(COLOURS)], "size": 7},
            "hovertemplate": f"block %{{x}}, {kind}<br>%{{text}}, %{{y:.0f}} σ<extra></extra>",
        }
        for i, kind in enumerate(kinds)
    ]
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    layout = {
        "xaxis": {"title": {"text": "block"}},
        "yaxis": {"type": "log", "title": {"text": "largest magnitude, in σ"}},
        "showlegend": True,
        "legend": legend,
    }
    return {"traces": traces, "layout": layout}
