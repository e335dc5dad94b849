"""Draws the README's picture from ``results/quality.json``: KL against bits per weight, one bar per method. Plain SVG.

python benchmarks/picture.py docs/quality.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLOURS = {"rtn": "#9aa0a6", "awq": "#e8a33d", "gptq": "#4c8bf5", "awq+gptq": "#1e8e5a"}
LEFT, TOP, HEIGHT, BAR, GAP = 60, 50, 220, 52, 40


def main() -> None:
    cells = json.loads((Path(__file__).parent / "results" / "quality.json").read_text())
    groups = {bits: {c.split(":")[0]: v for c, v in cells.items() if c.split(":")[1] == bits} for bits in ("4", "3")}
    parts, x = [], LEFT
    for bits, found in groups.items():
        top, start = max(v["kl_mean"] for v in found.values()), x
        for method, v in found.items():
            h = HEIGHT * v["kl_mean"] / top
            y = TOP + HEIGHT - h
            parts.append(
                f'<rect x="{x}" y="{y:.1f}" width="{BAR - 8}" height="{h:.1f}" rx="3" fill="{COLOURS[method]}"/>'
            )
            middle = x + (BAR - 8) / 2
            parts.append(f'<text x="{middle}" y="{y - 6:.1f}" class="v">{v["kl_mean"]:.3f}</text>')
            parts.append(f'<text x="{middle}" y="{TOP + HEIGHT + 16}" class="l">{method}</text>')
            x += BAR + 14
        label = f"{bits} bits, groups of 64 ({next(iter(found.values()))['bits_per_weight']:.2f} bits per weight)"
        parts.append(f'<text x="{(start + x - 22) / 2}" y="{TOP + HEIGHT + 38}" class="g">{label}</text>')
        x += GAP
    width, height = x, TOP + HEIGHT + 60
    style = (
        "text{font-family:system-ui,sans-serif;text-anchor:middle;fill:#3c4043}"
        ".v{font-size:12px;font-weight:600}.l{font-size:11px}.g{font-size:12px}.t{font-size:14px;font-weight:600}"
        "@media(prefers-color-scheme:dark){text{fill:#e8eaed}}"
    )
    title = "KL divergence from the original, nats per token (less is better); SmolLM2-135M off its grid, WikiText-2"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    svg += f'<style>{style}</style><text x="{width / 2}" y="22" class="t" font-size="13">{title}</text>'
    Path(sys.argv[1]).write_text(svg + "".join(parts) + "</svg>\n")


if __name__ == "__main__":
    main()
