"""The page of one run: error and bits of every layer, the worst ones, and the recipe, from the events it left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.report import distribution, events, figures, timeline
from fewbits.report.page import COLOURS, Section, build, table

WORST = 15


def page(run: Mapping[str, Any]) -> str:
    """One HTML file. ``run`` has ``path``, ``events`` (:func:`fewbits.report.events.read`), ``plan`` (YAML), perhaps
    ``distribution`` of the original and ``timeline`` (events with ``run, t, rss``). Raises RequestError without plotly.
    """
    made = events.tensors(run["events"])
    worst = [[e["name"], f"{e['bits_per_weight']:.3f}", f"{e['error']:.4f}"] for e in events.worst(made, WORST)]
    seen = distribution.drawn(run.get("distribution"))
    drawn = {
        "errors": figures.heat(made, "error", "relative output error"),
        "bits": figures.heat(made, "bits_per_weight", "bits per weight", 3),
        "spread": _spread(made),
    } | timeline.drawn(run.get("timeline") or [])
    sections = [
        Section(
            "Error by layer",
            figures.ERRORS,
            figures=("errors",),
            height=460,
        ),
        Section("Bits by layer", "Every parameter counted: codes, scales, zeros.", figures=("bits",)),
        Section("Error by projection", "Block by block.", figures=("spread",)),
        Section(
            "Worst layers",
            "Give these more bits first.",
            table([["layer", "bits per weight", "error"], *worst]),
        ),
        *timeline.sections(run.get("timeline") or []),
        *distribution.sections(run.get("distribution")),
        Section("Recipe", "What makes this result again: quantize --recipe FILE.", '<pre id="recipe"></pre>'),
    ]
    # The recipe is looked up by the name in the menu "cell", which a page of one run does not have.
    data = {"figures": drawn | seen, "tokens": {}, "recipes": {"undefined": run["plan"]}}
    subtitle = f"{len(made)} quantized layers"
    return build(f"Quantized: {str(run['path']).rstrip('/').rpartition('/')[2]}", subtitle, "", sections, data)


def _spread(made: Any) -> figures.Figure:
    kinds, blocks, z = figures.grid(made, "error")
    series = [
        {"x": blocks, "y": row, "name": kind, "colour": COLOURS[i % len(COLOURS)]}
        for i, (kind, row) in enumerate(zip(kinds, z, strict=True))
    ]
    return figures.lines(series, "block", "relative error", log=(False, True))
