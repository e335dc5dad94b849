"""The page of the outlier study: complete, self-contained, and true to its figures."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from fewbits.report import layers, outlier_page, picture, svg, table

SVG = "{http://www.w3.org/2000/svg}"


def outliers(share: float) -> dict[str, Any]:
    found = {"threshold": 6.0, "count": int(share * 1000), "share": share, "channels": 2, "tokens": 3}
    return found | {"heaviest": [(4, 0.75)] if share else [], "first_token": 0.5 if share else None}


def layer(block: int, names: list[str], absmax: float, share: float) -> dict[str, Any]:
    found = {"layers": [f"model.layers.{block}.{n}" for n in names], "block": block, "tokens": 10, "channels": 100}
    found |= {"absmax": absmax, "absmean": 0.1, "sigma": 0.2, "kurtosis": 4.0, "fixed": outliers(share)}
    return found | {"relative": outliers(share)}


@pytest.fixture
def study() -> dict[str, Any]:
    kinds = (["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"])
    found = [layer(b, names, 10.0 ** (b + i), 0.01 * b * i) for b in range(3) for i, names in enumerate(kinds)]
    zero = [
        {"share": s, "which": w, "values": 5, "kl_mean": kl, "perplexity": 30.0, "top1": 0.5}
        for s, w, kl in (
            (0.001, "largest", 2.0),
            (0.001, "random", 0.01),
            (0.01, "largest", 8.0),
            (0.01, "random", 0.1),
        )
    ]
    head = {"model": "a<b&c", "text": "c4", "samples": 2, "seq_len": 5, "sigmas": 6.0}
    return head | {"layers": found, "zeroing": zero}


def test_the_picture_shows_every_input_and_every_case(study: dict[str, Any]) -> None:
    hints = [t.text or "" for t in ET.fromstring(picture(study)).iter(f"{SVG}title")]
    assert "block 2, q, k: 100" in hints and "block 2, down: 1000" in hints
    assert sum(h.startswith("block") for h in hints) == 6
    assert "the largest: 2 nats at 0.1" in hints and "as many at random: 0.1 nats at 1" in hints


def test_the_page_stands_alone(study: dict[str, Any]) -> None:
    html = outlier_page(study)
    assert "a&lt;b&amp;c" in html and "a<b" not in html
    assert not re.search(r"<script|<link|src=|href=|url\(|@import", html)
    assert set(re.findall(r"https?://[^\"' ]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "The largest activation is 1000 (5000 sigmas)" in html
    assert html.count("<tr>") == 3 + 7


def test_tables(study: dict[str, Any]) -> None:
    assert table(study)[1] == ["0.1 %", "2", "0.01", "200", "30", "30", "0.500"]
    row = layers(study)[-1]
    assert row[0] == "model.layers.2.mlp.down_proj" and row[-2:] == ["50 %", "4 (75 %)"]


def test_without_outliers_and_without_zeroing(study: dict[str, Any]) -> None:
    study["layers"] = [layer(0, ["mlp.down_proj"], 1.0, 0.0)]
    del study["zeroing"]
    assert "none" in picture(study) and "Zeroing" not in outlier_page(study)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (0.01, 1e6), (3.0, 29.0), (1e-5, 1e-3)])
def test_ticks_are_round_few_and_inside(low: float, high: float, log: bool) -> None:
    ticks = svg.Axis(low, high, 0, 1, log).ticks()
    assert 1 <= len(ticks) <= 8 and all(low * 0.999 <= t <= high * 1.001 for t in ticks)
    if log:
        assert all(math.log10(t) == pytest.approx(round(math.log10(t))) for t in ticks)


def test_colours_darken() -> None:
    light = [sum(int(svg.shade(i / 10)[k : k + 2], 16) for k in (1, 3, 5)) for i in range(11)]
    assert light == sorted(light, reverse=True) and len(set(light)) == 11
