"""The outlier study of the development model, with the zeroing experiment; writes ``results/outliers.json``, the table
``outliers.md`` and the picture ``docs/outliers.svg``.

    python benchmarks/outliers.py MODEL TEXT        measure, then write all three
    python benchmarks/outliers.py                   write table and picture from results/outliers.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "outliers.json"
SHARES = (0.0001, 0.001, 0.005, 0.01)


def measure(model: str, text: str) -> dict[str, Any]:
    """16 rows of 256 tokens for the statistics, 4 windows of 256 for each case of zeroing."""
    from fewbits.evaluate.outliers import study
    from fewbits.evaluate.zeroing import zeroing

    def tell(event: dict[str, Any]) -> None:
        print(event, file=sys.stderr, flush=True)

    zeroed = zeroing(model, SHARES, text, samples=4, seq_len=256, on_event=tell)
    found = study(model, text, samples=16, seq_len=256, on_event=tell)
    return {
        "model": Path(model).name,
        "text": Path(text).name,
        "samples": 16,
        "seq_len": 256,
        "sigmas": 6.0,
        "zeroing_rows": 4,
        "layers": [f.to_json() for f in found],
        "zeroing": [z.to_json() for z in zeroed],
    }


def markdown(rows: list[list[str]]) -> str:
    """A table, its head first."""
    head, *rest = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write(study: dict[str, Any]) -> None:
    """``outliers.md`` and the picture."""
    from fewbits.report import layers, picture, table

    largest = sorted(study["layers"], key=lambda x: -x["absmax"])[:10]
    parts = [
        f"# Activation outliers of {study['model']}\n",
        f"Made by `benchmarks/outliers.py` from `results/outliers.json`; text: {study['text']}; float32.\n",
        f"## Zeroing\n\n{study['zeroing_rows']} windows of {study['seq_len']} tokens. In the input of every linear "
        "layer of the blocks the values with the largest magnitude become zero, or as many at random places. KL is "
        f"KL(original || zeroed), nats per token; the original's perplexity is "
        f"{study['zeroing'][0]['reference_perplexity']:.2f}.\n\n{markdown(table(study))}",
        f"## The ten inputs with the largest values\n\n{study['samples']} rows of {study['seq_len']} tokens. "
        "`channels` hold at least one such value, `in first tokens` is their share in the first tokens of rows, "
        f"`heaviest channel` the channel that holds most and its share.\n\n"
        f"{markdown(layers(study | {'layers': largest}))}",
    ]
    (HERE / "outliers.md").write_text("\n".join(parts), encoding="utf-8")
    (HERE.parent / "docs" / "outliers.svg").write_text(picture(study), encoding="utf-8")


def main() -> None:
    if len(sys.argv) == 3:
        RESULTS.write_text(json.dumps(measure(*sys.argv[1:]), indent=1) + "\n", encoding="utf-8")
    write(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
