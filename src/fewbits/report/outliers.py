"""The outlier study as a page, a picture and a table, from the JSON that ``fewbits inspect --activations`` prints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from fewbits.report import svg

Study = Mapping[str, Any]
_TOP, _HIGH, _WIDE = 48.0, 300.0, 250.0


def picture(study: Study) -> str:
    """SVG: the largest magnitude by block and input, the share of outliers by block, and what zeroing costs."""
    panels = [_maxima, _shares, *([_zeroing] if study.get("zeroing") else [])]
    parts = [part for i, panel in enumerate(panels) for part in panel(study, 60.0 + i * 370.0)]
    title = f"Activation outliers of {study['model']}"
    return svg.drawing(
        parts, 370.0 * len(panels) + 20, _TOP + _HIGH + 50 + 16 * max(4, len(_grid(study, lambda x: 0.0))), title
    )


def page(study: Study) -> str:
    """One HTML file without scripts that shows everything offline."""
    title = escape(f"Activation outliers of {study['model']}")
    facts = f"{study['samples']} rows of {study['seq_len']} tokens of {study['text']}"
    style = (
        ":root{color-scheme:light dark}"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 10px;text-align:right}"
        "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#8882}"
    )
    body = [f"<h1>{title}</h1><p>{escape(facts)}. {escape(_sentence(study))}</p>", picture(study)]
    if study.get("zeroing"):
        body.append("<h2>Zeroing</h2>" + _html(table(study)))
    body.append("<h2>Inputs of the linear layers</h2>" + _html(layers(study)))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"</head><body>{''.join(body)}</body></html>\n"
    )


def table(study: Study) -> list[list[str]]:
    """Rows of the zeroing experiment, the head first; the ratio is of the two KL divergences."""
    rows = [
        ["share zeroed", "KL, largest", "KL, random", "ratio", "perplexity, largest", "perplexity, random", "top-1"]
    ]
    pairs = _pairs(study)
    for share, (large, rand) in sorted(pairs.items()):
        ratio = large["kl_mean"] / rand["kl_mean"] if rand["kl_mean"] else float("inf")
        row = [f"{100 * share:g} %", f"{large['kl_mean']:.3g}", f"{rand['kl_mean']:.3g}", f"{ratio:,.0f}"]
        rows.append([*row, f"{large['perplexity']:,.5g}", f"{rand['perplexity']:.4g}", f"{large['top1']:.3f}"])
    return rows


def layers(study: Study) -> list[list[str]]:
    """Rows of the inputs, the head first."""
    k = study["sigmas"]
    head = ["input of", "largest", "mean", "sigma", "kurtosis", "share ≥ 6", "channels", "tokens", f"share ≥ {k:g} σ"]
    rows = [[*head, "channels", "in first tokens", "heaviest channel"]]
    for x in study["layers"]:
        fixed, rel = x["fixed"], x["relative"]
        first = "" if rel["first_token"] is None else f"{100 * rel['first_token']:.0f} %"
        heavy = f"{rel['heaviest'][0][0]} ({100 * rel['heaviest'][0][1]:.0f} %)" if rel["heaviest"] else ""
        row = [x["layers"][0]]
        row += [f"{x[key]:.3g}" for key in ("absmax", "absmean", "sigma", "kurtosis")]
        row += [f"{fixed['share']:.2e}", f"{fixed['channels']}/{x['channels']}", f"{fixed['tokens']}/{x['tokens']}"]
        rows.append([*row, f"{rel['share']:.2e}", str(rel["channels"]), first, heavy])
    return rows


def _sentence(study: Study) -> str:
    top = max(study["layers"], key=lambda x: x["absmax"])
    value, sigma = top["absmax"], top["sigma"]
    where = f"The largest activation is {value:.4g} ({value / sigma:.0f} sigmas) and enters {top['layers'][0]}."
    pairs = _pairs(study)
    if not pairs:
        return where
    share, (large, rand) = min(pairs.items(), key=lambda item: abs(item[0] - 0.001))
    return (
        f"{where} Zeroing the largest {100 * share:g} % costs {large['kl_mean']:.3g} nats per token, "
        f"as many at random {rand['kl_mean']:.3g}."
    )


def _pairs(study: Study) -> dict[float, tuple[Any, Any]]:
    cases = {(z["share"], z["which"]): z for z in study.get("zeroing") or ()}
    return {share: (cases[share, "largest"], cases[share, "random"]) for share, _ in cases}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _kind(layer: Mapping[str, Any]) -> str:
    """What an input is called whatever its block and expert: ``q_proj, k_proj, v_proj``."""
    names = [_last(re.sub(r"\.\d+(?=\.)", "", n)) for n in layer["layers"]]
    common = "experts " if re.search(r"experts\.\d+\.", layer["layers"][0]) else ""
    return common + ", ".join(n.removesuffix("_proj") for n in names)


def _grid(study: Study, value: Any) -> dict[str, dict[int, float]]:
    """The largest of ``value(layer)`` by kind and block."""
    found: dict[str, dict[int, float]] = {}
    for x in study["layers"]:
        row = found.setdefault(_kind(x), {})
        row[x["block"]] = max(value(x), row.get(x["block"], 0.0))
    return found


def _maxima(study: Study, left: float) -> list[str]:
    grid = _grid(study, lambda x: x["absmax"])
    blocks = 1 + max(x["block"] for x in study["layers"])
    values = [v for row in grid.values() for v in row.values() if v > 0]
    colour = svg.Axis(min(values), max(values) * (1 + 1e-9), 0.0, 1.0, log=True)
    size = (_WIDE / len(grid), _HIGH / blocks)
    parts = [svg.text(left - 40, 18, "Largest magnitude of an activation", "t"), svg.text(left - 40, 38, "block")]
    for column, (kind, row) in enumerate(grid.items()):
        x = left + column * size[0]
        parts += [
            svg.cell(x, _TOP + b * size[1], size, colour(v) if v > 0 else 0.0, f"block {b}, {kind}: {v:.4g}")
            for b, v in row.items()
        ]
        parts.append(svg.text(x + size[0] / 2, _TOP + _HIGH + 17, kind, "m"))
    step = 1 + blocks // 10
    parts += [svg.text(left - 6, _TOP + (b + 0.5) * size[1] + 4, str(b), "e") for b in range(0, blocks, step)]
    return parts + _key(colour, left)


def _key(colour: svg.Axis, left: float) -> list[str]:
    """The colour scale under the heat map, with the values at its ends and in its middle."""
    y, n = _TOP + _HIGH + 36, 50
    parts = [svg.cell(left + i * _WIDE / n, y, (_WIDE / n + 0.3, 10), i / (n - 1), "") for i in range(n)]
    middle = (colour.low * colour.high) ** 0.5
    for share, value, kind in ((0.0, colour.low, ""), (0.5, middle, "m"), (1.0, colour.high, "e")):
        parts.append(svg.text(left + share * _WIDE, y + 26, svg.number(value), kind))
    return parts


def _shares(study: Study, left: float) -> list[str]:
    grid = _grid(study, lambda x: 100 * x["relative"]["share"])
    values = [v for row in grid.values() for v in row.values() if v > 0]
    title = svg.text(left - 40, 18, f"Share of values ≥ {study['sigmas']:g} sigmas of their input", "t")
    if not values:
        return [title, svg.text(left, _TOP + 40, "none")]
    x = svg.Axis(0, max(1, *(b for row in grid.values() for b in row)), left, left + _WIDE)
    y = svg.Axis(*svg.decades(values), _TOP + _HIGH, _TOP, log=True)
    parts = [title, *svg.axes(x, y, ("block", "%"))]
    for i, (kind, row) in enumerate(grid.items()):
        parts += svg.line([(b, v) for b, v in row.items() if v > 0], x, y, i, kind, "% in block")
    return parts + svg.legend(list(grid), left, _TOP + _HIGH + 54)


def _zeroing(study: Study, left: float) -> list[str]:
    pairs = _pairs(study)
    curves = {which: [(100 * s, p[i]["kl_mean"]) for s, p in sorted(pairs.items())] for i, which in enumerate(_NAMES)}
    values = [v for curve in curves.values() for _, v in curve if v > 0] or [1.0]
    x = svg.Axis(*svg.decades([100 * s for s in pairs]), left, left + _WIDE, log=True)
    y = svg.Axis(*svg.decades(values), _TOP + _HIGH, _TOP, log=True)
    parts = [svg.text(left - 40, 18, "What setting activations to zero costs", "t")]
    parts += svg.axes(x, y, ("share set to zero in the input of every linear layer, %", "KL, nats per token"))
    for i, (name, curve) in enumerate(curves.items()):
        parts += svg.line([(a, b) for a, b in curve if b > 0], x, y, i, name, "nats")
    return parts + svg.legend(list(curves), left, _TOP + _HIGH + 54)


_NAMES = ("the largest", "as many at random")


def _html(rows: list[list[str]]) -> str:
    head, *rest = rows
    cells = "".join(f"<th>{escape(c)}</th>" for c in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rest)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"
