"""The page of a timing: tokens per second by batch size, and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.report import figures
from fewbits.report.page import COLOURS, Section, build, table


def page(found: Mapping[str, Any]) -> str:
    """One HTML file from the JSON of ``fewbits bench``. Raises RequestError without plotly."""
    models = [m for m in (found, found.get("reference")) if m]
    names = [_last(m["model"]) for m in models]
    names = names if len(set(names)) == len(names) else [m["model"] for m in models]
    rows = [
        ["load, s", *(f"{m['load_seconds']:.2f}" for m in models)],
        ["memory of the model, MB", *(f"{m['memory_bytes'] / 1e6:,.1f}" for m in models)],
        ["peak memory of the process, MB", *(f"{m['peak_rss_bytes'] / 1e6:,.1f}" for m in models)],
    ]
    for i, rate in enumerate(found["batches"]):
        for kind in ("prompt", "decode"):
            values = [m["batches"][i] for m in models]
            cells = (f"{v[f'{kind}_tokens_per_s']:,.1f} (± {50 * v[f'{kind}_spread']:.0f} %)" for v in values)
            rows.append([f"{kind} tokens/s, batch {rate['batch']}", *cells])
    sections = [
        Section("Figures", "Medians; in brackets half the range of the rounds.", table([["", *names], *rows])),
        *(Section(f"{kind.title()} tokens per second", figures=(kind,)) for kind in ("decode", "prompt")),
    ]
    drawn = {kind: _rates(models, names, kind) for kind in ("decode", "prompt")}
    title = f"Speed: {names[0]}"
    how = (
        f"prompts of {found['prompt']} tokens, {found['tokens']} decoded, {found['threads']} threads, {found['dtype']}"
    )
    return build(title, how, "", sections, {"figures": drawn, "tokens": {}, "recipes": {}})


def _rates(models: Any, names: Any, kind: str) -> figures.Figure:
    series = [
        {
            "x": [r["batch"] for r in m["batches"]],
            "y": [r[f"{kind}_tokens_per_s"] for r in m["batches"]],
            "name": name,
            "colour": COLOURS[i],
        }
        for i, (m, name) in enumerate(zip(models, names, strict=True))
    ]
    found = figures.lines(series, "batch size", "tokens per second")
    for trace in found["traces"]:
        trace["mode"] = "lines+markers"
    return found


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
