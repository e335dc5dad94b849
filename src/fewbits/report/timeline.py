"""Time and memory over a run, from the log that ``quantize --log`` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fewbits.report import figures
from fewbits.report.page import COLOURS, Section

TITLES = {
    "seconds": ("Time over the run", "Blocks done; one line per run of a job that was interrupted and resumed."),
    "memory": ("Memory over the run", "Resident size of the process after each block."),
}
"""Title and note of each figure of :func:`drawn`."""


def drawn(events: Sequence[Mapping[str, Any]]) -> dict[str, figures.Figure]:
    """Progress and memory over the seconds of each run, from events with ``run, t, rss``; nothing without blocks."""
    done = [e for e in events if e.get("event") == "block" and not e.get("resumed")]
    if not done:
        return {}

    def over(value: Callable[[Mapping[str, Any]], float], title: str) -> figures.Figure:
        runs = list(dict.fromkeys(e["run"] for e in done))
        series = []
        for i, run in enumerate(runs):
            own = [e for e in done if e["run"] == run]
            named = {"name": f"run {run}", "colour": COLOURS[i % len(COLOURS)]}
            series.append(named | {"x": [e["t"] for e in own], "y": [value(e) for e in own]})
        return figures.lines(series, "seconds since the start", title)

    return {"seconds": over(lambda e: e["block"] + 1, "blocks"), "memory": over(lambda e: e["rss"] / 1e6, "MB")}


def sections(events: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Their places on the page."""
    return [Section(*TITLES[name], figures=(name,)) for name in drawn(events)]
