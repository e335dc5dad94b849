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
        "layers": [f.to_json() for f in found],
        "zeroing": [z.to_json() for z in zeroed],
    }


def main() -> None:
    if len(sys.argv) == 3:
        RESULTS.write_text(json.dumps(measure(*sys.argv[1:]), indent=1) + "\n")


if __name__ == "__main__":
    main()
