"""Methods on one model, with one calibration and one evaluation: perplexity, KL, bits. Writes JSON, prints markdown.

    python benchmarks/quality.py MODEL CALIBRATION.txt EVALUATION.txt WORKDIR [--only gptq:4:64 ...] [--samples 128]
    python benchmarks/quality.py MODEL CALIBRATION.txt EVALUATION.txt WORKDIR --table second_order

Tables: ``quality``, the README's; ``second_order``, SpQR, SqueezeLLM, GPTAQ and pruning beside what they must beat.
MODEL should be off its grid (``offgrid.py``). Cells already in the table's JSON file are kept, so an interrupted run
goes on, and several runs may share it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = [(method, bits, 64) for bits in (4, 3) for method in ("rtn", "awq", "gptq", "awq+gptq")]
HALF = ["--sparsity", "0.5"]


def integers(method: str, bits: int, group: int) -> dict[str, list[str]]:
    """A cell ``method:bits:group`` and its options."""
    return {f"{method}:{bits}:{group}": ["--method", method, "--bits", str(bits), "--group-size", str(group)]}


def table(*cells: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: options for cell in cells for name, options in cell.items()}


TABLES = {
    "quality": table(*(integers(*m) for m in METHODS)),
    "second_order": table(
        *(integers(*m) for m in (("rtn", 4, 64), ("gptq", 4, 64))),
        {"spqr": ["--method", "spqr"]},
        *(integers(*m) for m in (("gptq", 3, -1), ("gptaq", 3, -1), ("gptq", 3, 64), ("gptaq", 3, 64))),
        {name: ["--method", name, "--bits", "3"] for name in ("squeezellm", "squeezellm-sparse")},
        {f"{name} 50 %": ["--method", name, *HALF] for name in ("magnitude", "obd", "sparsegpt")},
        {"sparsegpt 2:4": ["--method", "sparsegpt", "--sparsity", "2:4"]},
        {"sparsegpt 50 %, int4": ["--method", "sparsegpt", *HALF, "--grid", "int4", "--group-size", "64"]},
    ),
}
RESULTS = Path(__file__).parent / "results"


def run(*args: str) -> dict[str, Any]:
    """One fewbits command; its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "fewbits", *args, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def found(file: Path) -> dict[str, Any]:
    """The cells that this run and others have written so far."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "calibration", "evaluation", "workdir"):
        parser.add_argument(name)
    parser.add_argument("--windows", default="5")
    parser.add_argument("--samples", default="128")
    parser.add_argument("--table", choices=list(TABLES), default="quality")
    parser.add_argument("--only", nargs="*", metavar="CELL")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    Path(args.workdir).mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{args.table}.json"
    for cell in args.only or TABLES[args.table]:
        if cell in found(file):
            continue
        out = Path(args.workdir) / "".join(c if c.isalnum() else "-" for c in cell)
        options = [*TABLES[args.table][cell], "--calibration", args.calibration, "--samples", args.samples]
        made = run("quantize", args.model, str(out), "--overwrite", *options)
        scored = run("eval", str(out), "--text", args.evaluation, "--windows", args.windows, "--reference", args.model)
        keep = ("perplexity", "kl_mean", "kl_mean_ci95", "kl_p99", "top1", "reference_perplexity")
        facts = {k: made[k] for k in ("bits_per_weight", "size_bytes", "seconds", "peak_rss_bytes", "kl")}
        facts |= {k: scored[k] for k in keep} | {"samples": int(args.samples)}
        cells = found(file) | {cell: facts}
        file.write_text(json.dumps({c: cells[c] for c in TABLES[args.table] if c in cells}, indent=1) + "\n")
        shutil.rmtree(out)
    print("| method:bits:group | bits per weight | size, MB | perplexity | KL mean | KL 99 % | top-1 | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for cell, c in found(file).items():
        row = [cell, f"{c['bits_per_weight']:.2f}", f"{c['size_bytes'] / 1e6:.0f}"]
        row += [f"{c['perplexity']:.2f}", f"{c['kl_mean']:.3f}", f"{c['kl_p99']:.2f}", f"{c['top1']:.3f}"]
        print("| " + " | ".join([*row, f"{c.get('seconds', 0):.0f}"]) + " |")


if __name__ == "__main__":
    main()
