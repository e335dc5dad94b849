"""The shell of every page: one file that works offline, on a phone, in light and in dark.

Python says what is shown (sections of HTML, figures and rows as data); ``page.js`` draws with plotly, whose code is
inside the file, and reacts to filters; ``page.css`` is the look. Text of models is data, never markup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from fewbits.errors import RequestError

COLOURS = (
    "#4c8bf5",
    "#e8833a",
    "#1e9e63",
    "#b04ac6",
    "#d93a36",
    "#9a7b4f",
    "#12a5b5",
    "#c2a000",
    "#7c6cf0",
    "#e0559a",
)


@dataclass(frozen=True)
class Section:
    """A part of the page: ``body`` is HTML, ``figures`` are names of what ``page.js`` draws below it."""

    title: str
    note: str = ""
    body: str = ""
    figures: tuple[str, ...] = ()
    height: int = 380

    def html(self) -> str:
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        drawn = "".join(
            f'<div class="figure" id="{escape(f)}" style="height:{self.height}px"></div>' for f in self.figures
        )
        return f"<section><h2>{escape(self.title)}</h2>{note}{self.body}{drawn}</section>"


def build(title: str, subtitle: str, controls: str, sections: Sequence[Section], data: Mapping[str, Any]) -> str:
    """The whole page. Raises RequestError when plotly is not installed."""
    script = _plotly() if any(s.figures for s in sections) else ""
    folder = resources.files("fewbits.report")
    css, js = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    payload = (
        json.dumps(finite(data), allow_nan=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\!--")
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{css}</style></head><body>'
        f'<header><div><h1>{escape(title)}</h1><p class="note">{escape(subtitle)}</p></div>'
        '<button id="theme" type="button" aria-label="light or dark">◐</button></header>'
        f'<nav id="controls">{controls}</nav><main>{"".join(s.html() for s in sections)}</main>'
        f'<script type="application/json" id="data">{payload}</script>'
        f"<script>{script}</script><script>{js}</script></body></html>\n"
    )


def table(rows: Sequence[Sequence[str]], groups: Sequence[str] = (), left: int = 1) -> str:
    """An HTML table of text, the head first; ``groups`` (one per row of the body) are what filters hide rows by."""
    head, *body = rows
    marks = [f' data-group="{escape(g, quote=True)}"' if g else "" for g in groups] or [""] * len(body)
    cells = [
        f"<tr{mark}>" + "".join(f"<td{_side(i, left)}>{escape(x)}</td>" for i, x in enumerate(row)) + "</tr>"
        for mark, row in zip(marks, body, strict=True)
    ]
    top = "".join(f"<th{_side(i, left)}>{escape(x)}</th>" for i, x in enumerate(head))
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(cells)}</tbody></table></div>'


def chips(groups: Sequence[str], colours: Mapping[str, str]) -> str:
    """Buttons that show or hide everything of a group."""
    return "".join(
        f'<button type="button" class="chip" aria-pressed="true" data-group="{escape(g, quote=True)}" '
        f'style="--own:{colours[g]}">{escape(g)}</button>'
        for g in groups
    )


def menu(names: Sequence[str], label: str, key: str) -> str:
    """A choice of one name, known to the script as ``key``."""
    options = "".join(f"<option>{escape(n)}</option>" for n in names)
    return f'<label>{escape(label)} <select id="{escape(key)}">{options}</select></label>'


def colours(groups: Sequence[str]) -> dict[str, str]:
    """One colour per group, in order."""
    return {g: COLOURS[i % len(COLOURS)] for i, g in enumerate(groups)}


def finite(data: Any) -> Any:
    """``data`` with None, which JSON can say and plotly leaves out, for what is not a finite number."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {k: finite(v) for k, v in data.items()}
    return [finite(v) for v in data] if isinstance(data, (list, tuple)) else data


def _side(column: int, left: int) -> str:
    return ' class="l"' if column < left else ""


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise RequestError(
            "pages need plotly, which is not installed; pip install 'fewbits[report]', or leave the page out"
        ) from None
    return str(get_plotlyjs())
