"""The table of the README: methods and bits on one model, with one calibration and one evaluation. Writes JSON.

    python benchmarks/quality.py MODEL CALIBRATION.txt EVALUATION.txt WORKDIR [--only gptq:4:64 ...]

MODEL should be off its grid (``offgrid.py``). Cells already in the JSON file are kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CELLS = ["rtn:4:64", "awq:4:64", "gptq:4:64", "awq+gptq:4:64", "rtn:3:64", "awq:3:64", "gptq:3:64", "awq+gptq:3:64"]
RESULTS = Path(__file__).parent / "results" / "quality.json"


def run(*args: str) -> dict[str, Any]:
    """One fewbits command; its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "fewbits", *args, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "calibration", "evaluation", "workdir"):
        parser.add_argument(name)
    parser.add_argument("--windows", default="5")
    parser.add_argument("--only", nargs="*", default=CELLS)
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    Path(args.workdir).mkdir(parents=True, exist_ok=True)
    cells: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for cell in args.only:
        if cell in cells:
            continue
        method, bits, group = cell.split(":")
        out = Path(args.workdir) / cell.replace(":", "-")
        options = ["--method", method, "--bits", bits, "--group-size", group, "--calibration", args.calibration]
        made = run("quantize", args.model, str(out), "--overwrite", *options)
        scored = run("eval", str(out), "--text", args.evaluation, "--windows", args.windows, "--reference", args.model)
        keep = ("perplexity", "kl_mean", "kl_mean_ci95", "kl_p99", "top1", "reference_perplexity")
        cells[cell] = {k: made[k] for k in ("bits_per_weight", "size_bytes", "seconds", "peak_rss_bytes", "kl")}
        cells[cell] |= {k: scored[k] for k in keep}
        RESULTS.write_text(json.dumps(cells, indent=1) + "\n")
        shutil.rmtree(out)
    print("| method | bits, group | bits per weight | size, MB | perplexity | KL mean | KL 99 % | top-1 | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for cell, c in cells.items():
        method, bits, group = cell.split(":")
        row = [method, f"{bits}, {group}", f"{c['bits_per_weight']:.2f}", f"{c['size_bytes'] / 1e6:.0f}"]
        row += [f"{c['perplexity']:.2f}", f"{c['kl_mean']:.3f}", f"{c['kl_p99']:.2f}", f"{c['top1']:.3f}"]
        print("| " + " | ".join([*row, f"{c.get('seconds', 0):.0f}"]) + " |")


if __name__ == "__main__":
    main()
