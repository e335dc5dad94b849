"""Number formats under solvers on one model: KL from the original for RTN, GPTQ and AWQ on INT4, NF4, FP4 and FP8.

    python benchmarks/formats.py MODEL CALIBRATION.txt EVALUATION.txt WORKDIR [--rows 128] [--windows 5]
        [--grids int4 mxfp4 ...] [--methods rtn gptq awq] [--out results/formats.json]

One cell after the other; cells already in the JSON file are kept, so an interrupted run goes on. A cell that cannot be
is recorded with the reason. The table in markdown lies beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# Grid and group size, None for the grid's own. Integers in groups of 64, as the blocks of NF4.
GRIDS: dict[str, int | None] = {"int4": 64, "nf4": None, "mxfp4": None, "nvfp4": None, "fp8": None}
METHODS = ("rtn", "gptq", "awq")
KEEP = ("perplexity", "kl_mean", "kl_mean_ci95", "kl_p99", "top1", "reference_perplexity")


def run(*args: str) -> dict[str, Any]:
    """One fewbits command; its JSON, or ``{"refused": why}`` when the request cannot be (exit code 2)."""
    done = subprocess.run([sys.executable, "-m", "fewbits", *args, "--json"], capture_output=True, text=True)
    if done.returncode == 2:
        return {"refused": done.stderr.strip().splitlines()[-1]}
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cell(args: argparse.Namespace, grid: str, method: str) -> dict[str, Any]:
    """Quantize and evaluate; the checkpoint is removed afterwards."""
    out = Path(args.workdir) / f"{method}-{grid}"
    options = ["--method", method, "--grid", grid, "--format", "fewbits", "--calibration", args.calibration]
    options += ["--samples", str(args.rows), "--seq-len", str(args.seq_len)]
    options += ["--group-size", str(GRIDS[grid])] if GRIDS.get(grid) else []
    made = run("quantize", args.model, str(out), "--overwrite", *options)
    if "refused" in made:
        return made
    how = ["--text", args.evaluation, "--windows", str(args.windows), "--ctx", str(args.ctx)]
    scored = run("eval", str(out), *how, "--reference", args.model)
    shutil.rmtree(out)
    return {k: made[k] for k in ("bits_per_weight", "size_bytes", "seconds")} | {k: scored[k] for k in KEEP}


def table(cells: dict[str, Any]) -> str:
    """Markdown: a row for each grid, a column for each method; mean KL in nats per token with its 95% interval."""
    grids = list(dict.fromkeys(k.split(":")[0] for k in cells))
    methods = list(dict.fromkeys(k.split(":")[1] for k in cells))
    lines = [f"| grid | bits per weight | {' | '.join(methods)} |", "| --- " * (len(methods) + 2) + "|"]
    for grid in grids:
        found = [cells.get(f"{grid}:{m}", {}) for m in methods]
        bits = next((f"{c['bits_per_weight']:.3f}" for c in found if "kl_mean" in c), "")
        lines.append(f"| {grid} | {bits} | {' | '.join(map(shown, found))} |")
    return "\n".join(lines) + "\n"


def shown(c: dict[str, Any]) -> str:
    """One cell of the table."""
    if "kl_mean" not in c:
        return c.get("refused", "")
    low, high = c["kl_mean_ci95"]
    return f"{c['kl_mean']:.4f} ({low:.4f} to {high:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "calibration", "evaluation", "workdir"):
        parser.add_argument(name)
    for name, default in (("rows", 128), ("seq-len", 512), ("windows", 5), ("ctx", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--grids", nargs="*", default=list(GRIDS))
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "formats.json")
    args = parser.parse_args()
    for folder in (Path(args.workdir), args.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    cells: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for grid in args.grids:
        for method in args.methods:
            if (key := f"{grid}:{method}") not in cells:
                cells[key] = cell(args, grid, method)
                args.out.write_text(json.dumps(cells, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
