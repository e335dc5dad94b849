"""A few marks of SVG: a panel with axes, lines and cells. Text takes the colour of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#3c4043}.t{font-weight:600;font-size:13px}.m{text-anchor:middle}"
    ".e{text-anchor:end}.g{stroke:#9aa0a6;stroke-opacity:.35}@media(prefers-color-scheme:dark){text{fill:#e8eaed}}"
)
LINES = ("#4c8bf5", "#e8833a", "#1e8e5a", "#b04ac6", "#c5221f", "#7a6a53")
_RAMP = ((237, 244, 252), (120, 170, 235), (38, 98, 190), (12, 40, 100))  # one hue, light to dark


@dataclass(frozen=True)
class Axis:
    """Values ``low .. high`` onto pixels ``start .. stop``, by their logarithm if ``log``."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (v - low) / ((high - low) or 1.0)

    def ticks(self) -> list[float]:
        """Powers of ten, or at most six round steps."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**p for p in powers][:: 1 + len(powers) // 7]
        unit = 10.0 ** math.floor(math.log10(self.high - self.low))
        step = next(unit * f for f in (0.1, 0.2, 0.5, 1.0, 2.0) if (self.high - self.low) / (unit * f) <= 6)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def decades(values: Sequence[float]) -> tuple[float, float]:
    """The powers of ten around positive values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def text(x: float, y: float, content: str, kind: str = "") -> str:
    """One line of text; ``kind`` is a class of the style sheet: t(itle), m(iddle), e(nd)."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(content)}</text>'


def axes(x: Axis, y: Axis, labels: tuple[str, str]) -> list[str]:
    """Grid lines, tick labels and the two axis titles of a panel."""
    parts = []
    for v in y.ticks():
        parts += [_rule(x.start, y(v), x.stop, y(v)), text(x.start - 6, y(v) + 4, number(v), "e")]
    for v in x.ticks():
        parts += [_rule(x(v), y.start, x(v), y.start + 4), text(x(v), y.start + 17, number(v), "m")]
    parts.append(text((x.start + x.stop) / 2, y.start + 34, labels[0], "m"))
    return [*parts, text(x.start - 40, y.stop - 10, labels[1])]


def line(points: Points, x: Axis, y: Axis, index: int, name: str, unit: str) -> list[str]:
    """A line with its points; each point says its value when pointed at."""
    colour = LINES[index % len(LINES)]
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    marks = [
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"><title>{escape(name)}: {number(b)} {unit} at '
        f"{number(a)}</title></circle>"
        for a, b in points
    ]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>', *marks]


def legend(names: Sequence[str], x: float, y: float) -> list[str]:
    """Names under each other, each with its line's colour."""
    parts = []
    for i, name in enumerate(names):
        parts.append(f'<rect x="{x}" y="{y + 16 * i - 8}" width="12" height="4" fill="{LINES[i % len(LINES)]}"/>')
        parts.append(text(x + 18, y + 16 * i - 2, name))
    return parts


def cell(x: float, y: float, size: tuple[float, float], share: float, hint: str) -> str:
    """A rectangle of a heat map; ``share`` 0 .. 1 is how dark it is."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{size[0]:.1f}" height="{size[1]:.1f}" fill="{shade(share)}">'
        f"<title>{escape(hint)}</title></rect>"
    )


def shade(share: float) -> str:
    """A colour of the ramp for 0 .. 1."""
    at = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    i = min(int(at), len(_RAMP) - 2)
    mixed = (a + (b - a) * (at - i) for a, b in zip(_RAMP[i], _RAMP[i + 1], strict=True))
    return "#" + "".join(f"{round(c):02x}" for c in mixed)


def drawing(parts: Sequence[str], width: float, height: float, title: str) -> str:
    """The whole picture."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><style>{STYLE}</style>' + "".join(parts) + "</svg>\n"
    )


def number(value: float) -> str:
    """Three digits, without an exponent where none is needed."""
    if 1000 <= abs(value) < 1e5:
        return f"{value:.0f}"
    return f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.0e}"


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="g"/>'
