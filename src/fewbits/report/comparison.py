"""The page of a comparison: what each method costs, where it errs, and the recipe to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from fewbits.report import distribution, figures
from fewbits.report.page import COLOURS, Section, build, chips, colours, menu, table

Found = Mapping[str, Any]
DASHES = ("solid", "dot", "dash", "dashdot")
AXES = ("size on disk", "bits per weight", "memory", "decode tokens per second")


def page(found: Found) -> str:
    """One HTML file from what :meth:`fewbits.compare.Comparison.run` returns. Raises RequestError without plotly."""
    made = [c for c in found["cells"] if c.get("quantize")]
    groups = list(dict.fromkeys(str(c["method"]) for c in made))
    colour = colours(groups)
    names = [c["name"] for c in sorted(made, key=_kl)]
    axes = [a for a in AXES if any(_cost(c, a) is not None for c in made)]
    controls = chips(groups, colour) + menu(names, "details of", "cell") + menu(axes, "against", "axis")
    drawn = {
        "pareto": {"axes": {a: _pareto(made, a, colour, found["reference"]) for a in axes}},
        "kl": _histogram(made, colour),
        "errors": {"by": {c["name"]: figures.heat(c["tensors"], "error", "relative output error") for c in made}},
        "bits": {"by": {c["name"]: figures.heat(c["tensors"], "bits_per_weight", "bits per weight", 3) for c in made}},
        "seconds": _seconds(made),
        "memory": _memory(found["events"], {c["name"]: colour[c["method"]] for c in made}),
    }
    drawn |= distribution.drawn(found.get("distribution"))
    data = {
        "figures": drawn,
        "tokens": {c["name"]: c.get("worst_tokens") or [] for c in made},
        "recipes": {c["name"]: _recipe(c, found) for c in made},
    }
    i = found["identity"]
    subtitle = f"{len(made)} results from {i['source']}; {i['windows']} windows of {i['ctx']} tokens of {i['text']}"
    return build(f"Comparison: {_last(i['source'])}", subtitle, controls, _sections(found, made), data)


def _sections(found: Found, made: Sequence[Found]) -> list[Section]:
    rows, groups = _rows(found)
    refused = [f"{c['name']}: {c['refused']}" for c in found["cells"] if c.get("refused")]
    said = f'<ul class="note">{"".join(f"<li>{escape(r)}</li>" for r in refused)}</ul>' if refused else ""
    return [
        Section("All results", "Best KL first. Buttons above hide methods.", table(rows, groups, 2) + said),
        Section(
            "Quality against cost",
            "Lower is better; the dotted line joins what no other result beats. Point at a result for its recipe.",
            figures=("pareto",),
            height=460,
        ),
        Section(
            "KL of single predictions",
            "How many predictions lie in each range of KL: a long tail to the right is what users notice.",
            figures=("kl",),
            height=460,
        ),
        Section(
            "Error by layer",
            figures.ERRORS,
            figures=("errors",),
        ),
        Section("Bits by layer", "Every parameter counted: codes, scales, zeros.", figures=("bits",)),
        Section(
            "Worst-predicted tokens", "Where the result differs most from the original.", '<div id="tokens"></div>'
        ),
        Section("Recipe", "What makes this result again.", '<pre id="recipe"></pre>'),
        Section("Time to quantize", "What was shared is drawn for each result that used it.", figures=("seconds",)),
        Section("Memory over the run", "Resident size of the process after each step.", figures=("memory",)),
        *distribution.sections(found.get("distribution")),
    ]


def _rows(found: Found) -> tuple[list[list[str]], list[str]]:
    """The table that the command prints, and the method of each row."""
    rows = [list(r) for r in found["table"]]
    methods = {c["name"]: str(c["method"]) for c in found["cells"]}
    return rows, [methods.get(r[0], "") for r in rows[1:]]


def _kl(cell: Found) -> float:
    kl = _own(cell).get("kl_mean")
    return float("inf") if kl is None else float(kl)


def _own(cell: Found) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (cell.get("eval") or {}).get("text") or {}
    return found


def _cost(cell: Found, axis: str) -> float | None:
    made, speed = cell.get("quantize") or {}, cell.get("speed") or {}
    value = {
        AXES[0]: made.get("size_bytes"),
        AXES[1]: made.get("bits_per_weight"),
        AXES[2]: speed.get("memory_bytes"),
        AXES[3]: speed.get("decode_tokens_per_s"),
    }[axis]
    return None if value is None else value / 1e6 if axis in (AXES[0], AXES[2]) else float(value)


def _pareto(made: Sequence[Found], axis: str, colour: Mapping[str, str], reference: Found) -> figures.Figure:
    points = []
    for c in made:
        own, q = _own(c), c["quantize"]
        lines = [
            c["name"],
            f"format {q['format']}, {q['bits_per_weight']:.3f} bits per weight, {q['size_bytes'] / 1e6:.1f} MB",
            *([f"perplexity {own['perplexity']:.3f}, KL {own['kl_mean']:.4f}, top-1 {own['top1']:.3f}"] if own else []),
            *_summary(c.get("plan") or ""),
        ]
        group = str(c["method"])
        point = {"name": c["name"], "group": group, "colour": colour[group], "hover": lines}
        points.append(point | {"x": _cost(c, axis), "y": own.get("kl_mean")})
    units = {AXES[0]: "MB", AXES[1]: "linear layers", AXES[2]: "MB", AXES[3]: "batch 1"}
    return figures.pareto(points, f"{axis}, {units[axis]}", best_small=axis != AXES[3])


def _summary(plan: str) -> list[str]:
    """The last rule of a recipe, for pointing at: what most of the weights become."""
    body = plan.partition("rules:")[2].partition("\ntransforms:")[0].rpartition("- match:")[2]
    said = [line.rstrip() for line in body.splitlines()[1:]]
    kept = [line for line in said if "ratios" not in line and line.strip(" -0123456789.")]
    return [line.replace(" ", "\u00a0") for line in kept[:12]]


def _histogram(made: Sequence[Found], colour: Mapping[str, str]) -> figures.Figure:
    series: list[dict[str, Any]] = []
    for c in made:
        dash = DASHES[sum(s["group"] == c["method"] for s in series) % len(DASHES)]
        if not (h := c.get("histogram")):
            continue
        middle = [10 ** ((a + b) / 2) for a, b in pairwise(h["edges"])]
        total = sum(h["counts"]) or 1
        series.append(
            {
                "x": middle,
                "y": [n / total for n in h["counts"]],
                "name": c["name"],
                "group": str(c["method"]),
                "colour": colour[str(c["method"])],
                "step": True,
                "dash": dash,
            }
        )
    return figures.lines(series, "KL, nats", "share of predictions", log=(True, False))


def _seconds(made: Sequence[Found]) -> figures.Figure:
    own = [c["quantize"].get("own_seconds", c["quantize"].get("seconds")) for c in made]
    shared = [
        c["quantize"]["seconds"] - c["quantize"]["own_seconds"] if "own_seconds" in c["quantize"] else 0.0 for c in made
    ]
    parts = {"own: fitting, solving, writing": own, "shared: calibration pass": shared}
    return figures.bars([c["name"] for c in made], parts, (COLOURS[0], "#9aa3b2"), "seconds")


def _memory(events: Sequence[Found], colour: Mapping[str, str]) -> figures.Figure | None:
    last = max((int(e["run"]) for e in events if "rss" in e), default=0)
    series: dict[str, dict[str, Any]] = {}
    for e in events:
        if "rss" in e and e["run"] == last and e.get("cell") in colour:
            name = str(e["cell"])
            s = series.setdefault(name, {"x": [], "y": [], "name": name, "colour": colour[name]})
            s["x"].append(e["t"])
            s["y"].append(e["rss"] / 1e6)
    return figures.lines(list(series.values()), "seconds since the start", "MB") if series else None


def _recipe(cell: Found, found: Found) -> str:
    i = found["identity"]
    plan = f"# recipe.yaml of {cell['name']}\n# fewbits quantize {i['source']} OUT --recipe recipe.yaml\n"
    return plan + str(cell.get("plan") or "")


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
