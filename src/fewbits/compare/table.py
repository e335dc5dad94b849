"""The table of a comparison, as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = (
    "method",
    "format",
    "bits/weight",
    "size, MB",
    "memory, MB",
    "tokens/s",
    "prompt tokens/s",
    "perplexity",
    "KL",
    "top-1",
    "quantize, s",
)


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The head, the original, then one row per cell, best KL first and refused ones last; a dash for what is unknown.

    ``found`` is what :meth:`fewbits.compare.Comparison.run` returns. Other texts add a KL column each.
    """
    domains = [d for d in found["texts"] if d != found["main"]]
    head = [*HEAD[:10], *(f"KL {d}" for d in domains), HEAD[10]]
    original = _row("original", found["reference"], found["main"], domains)
    ordered = sorted(found["cells"], key=lambda c: (_kl(c, found["main"]), c["name"]))
    return [head, original, *(_row(c["name"], c, found["main"], domains) for c in ordered)]


def markdown(found: Mapping[str, Any]) -> str:
    """The same as a table in Markdown, with what it was measured on and why cells were refused."""
    head, *body = rows(found)
    lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    lines += [f"| {' | '.join(row)} |" for row in body]
    refused = [f"- `{c['name']}`: {c['refused']}" for c in found["cells"] if c.get("refused")]
    return "\n".join([*lines, "", *notes(found), *(["", "Refused:", "", *refused] if refused else [])]) + "\n"


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the figures mean, in a few sentences."""
    i = found["identity"]
    said = [
        f"{i['windows']} windows of {i['ctx']} tokens of {found['texts'][found['main']]}; KL(original ‖ model) in nats "
        "per token; memory is what loading and one prompt add to a process; tokens/s at batch 1.",
    ]
    if any((c.get("quantize") or {}).get("format") == "gguf" for c in found["cells"]):
        said.append(
            "fewbits decodes GGUF to dense weights when it loads it: memory and tokens/s of these rows are of that, "
            "not of llama.cpp."
        )
    shared = found.get("shared")
    if shared:
        said.append(
            f"{len(shared['cells'])} calibrated methods shared one pass over the original model's activations "
            f"({shared['seconds']:.1f} s); their own part took "
            + ", ".join(f"{c} {s:.1f} s" for c, s in shared["cells"].items())
            + ". `--stream quantized` calibrates each on its own quantized blocks, as `fewbits quantize` does."
        )
    return said


def _kl(cell: Mapping[str, Any], main: str) -> float:
    kl = ((cell.get("eval") or {}).get(main) or {}).get("kl_mean")
    return float("inf") if kl is None else float(kl)


def _row(name: str, cell: Mapping[str, Any], main: str, domains: Sequence[str]) -> list[str]:
    if cell.get("refused"):
        return [name, "refused", *["–"] * (9 + len(domains))]
    made, speed, scores = cell.get("quantize") or {}, cell.get("speed") or {}, cell.get("eval") or {}
    own = scores.get(main) or {}
    return [
        name,
        str(cell.get("format") or made.get("format") or "–"),
        _number(made.get("bits_per_weight", cell.get("bits_per_weight")), 3),
        _mega(made.get("size_bytes", cell.get("size_bytes"))),
        _mega(speed.get("memory_bytes")),
        _number(speed.get("decode_tokens_per_s"), 1),
        _number(speed.get("prompt_tokens_per_s"), 0),
        _number(own.get("perplexity"), 3),
        _number(own.get("kl_mean"), 4),
        _number(own.get("top1"), 3),
        *(_number((scores.get(d) or {}).get("kl_mean"), 4) for d in domains),
        _number(made.get("seconds"), 1),
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _mega(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.1f}"
