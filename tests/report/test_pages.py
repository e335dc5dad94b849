"""Pages from runs and comparisons: what they hold as data, and how they behave in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbits.cli import main
from fewbits.cli.log import read
from fewbits.compare import rows
from fewbits.report import checkpoint, comparison, events, figures, speed
from tests.report import browser
from tests.tiny import tiny_model

pytest.importorskip("plotly")

BLOCKS = 3
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def tensors(scale: float) -> list[dict[str, Any]]:
    return [
        {
            "event": "tensor",
            "name": f"model.layers.{b}.{k}",
            "block": b,
            "error": scale * (1 + b + 0.1 * i),
            "bits_per_weight": 4.25,
        }
        for b in range(BLOCKS)
        for i, k in enumerate(KINDS)
    ]


def cell(method: str, bits: int, kl: float, size: float) -> dict[str, Any]:
    made = {"format": "gptq", "bits_per_weight": bits + 0.25, "size_bytes": size, "seconds": 9.0, "own_seconds": 4.0}
    scores = {"perplexity": 20.0, "kl_mean": kl, "top1": 0.9}
    timed = {"memory_bytes": size * 1.1, "decode_tokens_per_s": 50 / bits, "prompt_tokens_per_s": 500}
    counts = [0] * 60
    counts[30 + bits] = 100
    edges = [-8 + i / 6 for i in range(61)]
    bad = {
        "kl": 3.0,
        "p": 0.9,
        "q": 0.01,
        "same": False,
        "before": "the <b>old",
        "token": " </script>",
        "after": " cat",
    }
    plan = f"method: {method}\nrules:\n- match: '*'\n  recipe:\n    grid:\n      kind: int\n      bits: {bits}\n"
    return {
        "name": f"{method}-{bits}",
        "method": method,
        "bits": bits,
        "format": None,
        "refused": None,
        "quantize": made,
        "eval": {"text": scores},
        "speed": timed,
        "tensors": tensors(kl),
        "histogram": {"edges": edges, "counts": counts},
        "worst_tokens": [bad],
        "plan": plan,
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    made = [cell("rtn", 4, 0.05, 9e7), cell("gptq", 4, 0.02, 9e7), cell("gptq", 3, 0.2, 7e7), cell("awq", 3, 0.3, 8e7)]
    refused = {"name": "nf4", "method": "nf4", "refused": "its blocks are 64 long"}
    identity = {"source": "models/small", "windows": 4, "ctx": 32, "text": "held.txt"}
    study = {
        "edges": [-1.0, 0.0, 1.0],
        "weights": {"q": [5, 5], "down": [4, 6]},
        "inputs": {"q": [9, 1]},
        "channels": [{"block": 0, "kind": "q", "channel": 7, "absmax": 30.0, "sigmas": 15.0}],
        "tokens": 10,
    }
    seen = [{"event": "block", "block": b, "cell": "gptq-4", "rss": 1e9 + b, "t": b, "run": 1} for b in range(3)]
    result = {
        "source": "models/small",
        "main": "text",
        "texts": {"text": "held.txt"},
        "identity": identity,
        "reference": {"size_bytes": 2e8, "bits_per_weight": 16.0, "eval": {"text": {"perplexity": 18.0}}},
        "cells": [*made, refused],
        "shared": {"seconds": 5.0, "cells": {"gptq-4": 4.0}},
        "events": seen,
        "distribution": study,
    }
    return result | {"table": rows(result)}


def data(page: str) -> dict[str, Any]:
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert inside
    found: dict[str, Any] = json.loads(inside[1])
    return found


def test_layers_of_names() -> None:
    assert figures.layer_of("model.layers.11.self_attn.q_proj") == (11, "q")
    assert figures.layer_of("transformer.h.3.mlp.c_fc") == (3, "c_fc")
    assert figures.layer_of("model.layers.2.mlp.experts.7.down_proj") == (2, "experts down")
    assert figures.layer_of("lm_head") == (-1, "lm_head")


def test_the_front_is_what_nothing_beats() -> None:
    points = [(3, 1), (1, 5), (2, 2), (2, 3), (4, 1), (5, 0.5)]
    assert figures.front(points) == [(1, 5), (2, 2), (3, 1), (5, 0.5)]
    beaten = {p for p in points if any(a <= p[0] and b <= p[1] and (a, b) != p for a, b in points)}
    assert set(figures.front(points)) == set(points) - beaten


def test_the_heat_map_holds_every_layer() -> None:
    made = [*tensors(1.0), {"event": "tensor", "name": "model.layers.1.mlp.down_proj", "error": 9.0}]
    kinds, blocks, z = figures.grid(made, "error")
    assert kinds == ["q", "o", "down"] and blocks == [0, 1, 2]
    assert z[2][1] == 9.0 and z[0] == [1.0, 2.0, 3.0]  # of two values the larger


def test_the_page_of_a_comparison(found: dict[str, Any]) -> None:
    page = comparison.page(found)
    inside = data(page)
    ours = page[: page.index("<script>")] + page[page.rindex("<script>") :]  # what is between is plotly's own code
    assert not re.search(r'(src|href)="(?!data:)|https?:', ours)
    axes = inside["figures"]["pareto"]["axes"]
    assert list(axes) == ["size on disk", "bits per weight", "memory", "decode tokens per second"]
    line, *points = axes["size on disk"]["traces"]
    assert [p["y"] for p in points] == [[0.05], [0.02], [0.2], [0.3]]
    assert (line["x"], line["y"]) == ([70.0, 90.0], [0.2, 0.02])
    faster = axes["decode tokens per second"]["traces"][0]  # more is better here
    assert sorted(zip(faster["x"], faster["y"], strict=True)) == [(12.5, 0.02), (50 / 3, 0.2)]
    assert "bits:\u00a04" in points[0]["hovertemplate"] and points[1]["group"] == "gptq"
    assert set(inside["recipes"]) == {"rtn-4", "gptq-4", "gptq-3", "awq-3"}
    assert "--recipe recipe.yaml" in inside["recipes"]["awq-3"] and "bits: 3" in inside["recipes"]["awq-3"]
    assert inside["figures"]["errors"]["by"]["rtn-4"]["traces"][0]["z"][0] == pytest.approx([0.05, 0.1, 0.15])
    assert "its blocks are 64 long" in page
    assert "</script> cat" not in page and inside["tokens"]["rtn-4"][0]["token"] == " </script>"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.find() is None:
        pytest.skip("no Chromium; set FEWBITS_CHROMIUM")
    with browser.Browser(tmp_path_factory.mktemp("profile")) as b:
        yield b


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1600, False), (390, True)])
def test_in_a_browser(chromium: browser.Browser, found: dict[str, Any], tmp_path: Path, width: int, dark: bool) -> None:
    """Draws without a console error or a request, fits its width, and does what its controls say."""
    file = tmp_path / "page.html"
    file.write_text(comparison.page(found), encoding="utf-8")
    b = chromium
    b.problems.clear()
    b.requests.clear()
    b.open(file, width, dark=dark)
    assert b.js("document.documentElement.scrollWidth") == width
    shown = "getComputedStyle(document.body).backgroundColor"
    light, night = "rgb(251, 251, 253)", "rgb(20, 22, 26)"
    assert b.js(shown) == (night if dark else light)
    assert b.js("document.querySelectorAll('.figure .main-svg').length") > 8

    names = "[...document.querySelectorAll('#pareto .scatterlayer .trace path.point')].length"
    visible = "[...document.querySelectorAll('tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[0].textContent)"
    assert b.js(names) == 4 and len(b.js(visible)) >= 6
    b.click(".chip[data-group=gptq]")
    b.wait(f"{names} === 2")
    assert not any(str(n).startswith("gptq") for n in b.js(visible))
    b.click(".chip[data-group=gptq]")
    b.wait(f"{names} === 4")

    assert "bits: 4" in b.js("document.getElementById('recipe').textContent")  # the best result is picked first
    choose = (
        "(() => { const m = document.getElementById('%s'); m.value = '%s'; m.dispatchEvent(new Event('change')) })()"
    )
    b.js(choose % ("cell", "awq-3"))
    assert "method: awq" in b.js("document.getElementById('recipe').textContent")
    assert b.js("document.querySelector('#tokens mark').textContent") == " </script>"
    assert b.js("document.querySelectorAll('#tokens b').length") == 0
    b.js(choose % ("axis", "memory"))
    b.wait("document.querySelector('#pareto .xtitle').textContent.startsWith('memory')")
    b.click("#theme")
    b.wait(f"{shown} === {json.dumps(light if dark else night)}")
    assert b.problems == []
    assert [r for r in b.requests if not r.startswith(("file:", "data:", "blob:"))] == []


def test_the_page_of_a_run_and_of_a_timing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "out"
    run.mkdir()
    (run / "fewbits_events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in tensors(0.1)))
    (run / "fewbits_plan.yaml").write_text("method: gptq\n")
    assert main(["report", str(run), "--html", str(tmp_path / "r.html"), "--json"]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert json.loads(capsys.readouterr().out)["size_bytes"] == (tmp_path / "r.html").stat().st_size
    inside = data(page)
    assert inside["figures"]["errors"]["traces"][0]["z"][2] == pytest.approx([0.12, 0.22, 0.32])
    worst = [e["name"] for e in events.worst(events.read(run))]
    assert worst[0] == "model.layers.2.mlp.down_proj" and worst[0] in page and "method: gptq" in page
    assert page == checkpoint.page({"path": run, "events": events.read(run), "plan": "method: gptq\n"})

    rate = {
        "batch": 1,
        "prompt_tokens_per_s": 9.0,
        "prompt_spread": 0.1,
        "decode_tokens_per_s": 3.0,
        "decode_spread": 0.2,
    }
    one = {"model": "m", "load_seconds": 1.0, "memory_bytes": 1e6, "peak_rss_bytes": 2e6, "batches": [rate]}
    how = {"prompt": 8, "tokens": 4, "threads": 2, "dtype": "float32"}
    timed = data(speed.page(one | how | {"reference": one | {"model": "other"}}))
    assert [t["y"] for t in timed["figures"]["decode"]["traces"]] == [[3.0], [3.0]]


def test_a_run_keeps_a_log_that_its_page_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, out, log = tiny_model("llama", tmp_path / "src"), tmp_path / "out", tmp_path / "logs" / "run.jsonl"
    quantize = ["quantize", str(src), str(out), "--method", "rtn", "--group-size", "32", "--log", str(log)]
    assert main([*quantize, "--dry-run"]) == 0 and not log.parent.exists()
    assert main(quantize) == 0 and main([*quantize, "--overwrite"]) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["event"] for e in lines] == ["start", "block", "block", "done"] * 2
    assert [e["run"] for e in lines] == [1] * 4 + [2] * 4
    times = [e["t"] for e in lines[:4]]
    assert times == sorted(times) and all(e["rss"] > 1e7 for e in lines)
    assert log.name not in {f.name for f in out.iterdir()}

    page = tmp_path / "r.html"
    assert main(["report", str(out), "--html", str(page), "--log", str(log)]) == 0
    drawn = data(page.read_text(encoding="utf-8"))["figures"]
    assert [t["y"] for t in drawn["seconds"]["traces"]] == [[1, 2], [1, 2]]
    assert drawn["memory"]["traces"][1]["x"] == [e["t"] for e in lines[5:7]]
    with log.open("a") as f:
        f.write('null\n{"event": "block"}\n{"run": 2, "t": 9.')  # a kill in the middle of a line
    assert main([*quantize, "--overwrite"]) == 0
    assert [e["run"] for e in read(log)] == [1] * 4 + [2] * 4 + [3] * 4
    assert main(["report", str(out), "--html", str(page), "--log", str(log)]) == 0
    capsys.readouterr()
    assert main(["report", str(out), "--log", str(tmp_path / "none")]) == 2
    assert "fewbits quantize --log FILE" in capsys.readouterr().err


def test_what_has_no_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "fewbits_plan.yaml" in capsys.readouterr().err
    (tmp_path / "fewbits_plan.yaml").write_text("x")
    (tmp_path / "fewbits_events.jsonl").write_text('{"event": "tensor"}\n{"eve')
    assert main(["report", str(tmp_path)]) == 1
    assert "line 2 is not an event" in capsys.readouterr().err
