"""The quality gate of ``fewbits quantize``: limits on the distance from the original, and who is to blame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.cli.base import stderr
from fewbits.cli.progress import Progress
from fewbits.errors import QualityError, RequestError


@dataclass(frozen=True)
class Gate:
    """``max_kl`` in nats per token, ``max_ratio`` of the perplexities (result over original); None sets no limit.

    Both are measured on the first ``windows`` windows of ``ctx`` tokens of ``text`` (None: wikitext2).
    """

    max_kl: float | None
    max_ratio: float | None
    text: str | None
    ctx: int
    windows: int

    def __bool__(self) -> bool:
        return self.max_kl is not None or self.max_ratio is not None

    def check(self) -> None:
        """RequestError before hours of work for limits that are none and texts that cannot be read."""
        if not self:
            if self.text is not None:
                raise RequestError(
                    "--eval-text is the text for --max-kl and --max-ppl-ratio, and neither was given; "
                    "give --max-kl X, or use `fewbits eval`"
                )
            return
        if self.max_kl is not None and not self.max_kl >= 0:
            raise RequestError(f"--max-kl {self.max_kl} is not a limit; give a number of nats, 0 or more")
        if self.max_ratio is not None and not self.max_ratio > 0:
            raise RequestError(f"--max-ppl-ratio {self.max_ratio} is not a limit; give a number above 0, as in 1.05")
        from fewbits.evaluate import text as texts

        texts.read(self.text or "wikitext2")

    def measure(self, src: str, out: Path) -> dict[str, Any]:
        """What joins the JSON of ``quantize``: the limits, the figures, and the layers with the largest errors."""
        from fewbits.evaluate import evaluate
        from fewbits.report import events

        with Progress("evaluating", "window", "windows") as progress:
            found = evaluate(
                out, text=self.text, ctx=self.ctx, windows=self.windows, reference=src, on_event=progress
            ).to_json()
        ratio = found["perplexity"] / found["reference_perplexity"]
        limits = {"max_kl": self.max_kl, "max_ppl_ratio": self.max_ratio}
        return {k: v for k, v in limits.items() if v is not None} | {
            "kl_mean": found["kl_mean"],
            "perplexity": found["perplexity"],
            "ppl_ratio": ratio,
            "worst": events.worst(events.read(out)),
            "eval": found,
        }

    def require(self, result: dict[str, Any], out: Path) -> None:
        """QualityError when a limit is exceeded (not finite counts as exceeded). The output stays, to be looked at."""
        figures = (
            (f"KL {result['kl_mean']:.4f}", result["kl_mean"], "--max-kl", self.max_kl),
            (f"perplexity ratio {result['ppl_ratio']:.4f}", result["ppl_ratio"], "--max-ppl-ratio", self.max_ratio),
        )
        missed = [
            f"{said} is above {flag} {x:g}" for said, value, flag, x in figures if x is not None and not value <= x
        ]
        if not missed:
            return
        self._blame(result["worst"])
        names = ", ".join(e["name"] for e in result["worst"])
        raise QualityError(
            f"{' and '.join(missed)}; {out} is kept; largest output errors: {names}; "
            "give these more bits in a recipe, a smaller --group-size or a higher limit"
        )

    @staticmethod
    def _blame(worst: Sequence[dict[str, Any]]) -> None:
        for e in worst:
            stderr(f"  {e['name']:<56} {e['bits_per_weight']:6.3f} bits, relative output error {e['error']:.4f}")
