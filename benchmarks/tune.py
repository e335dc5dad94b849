"""What ``--tune`` gains, beside auto-round on the same rows: KL, perplexity, time. Writes JSON, prints markdown.

    python benchmarks/tune.py MODEL CALIBRATION.txt EVALUATION.txt WORKDIR --peer PEER_PYTHON [--only CELL ...]

PEER_PYTHON is an interpreter with auto-round. Each cell has ``--samples`` rows (32) and ``--steps`` steps of 2 rows for
each block (200), weights of 3 bits in groups of 128 or of 2 bits in groups of 64, affine. Cells that are in the results
already are kept, and a cell of ours goes on after its last block (``resumed``: its seconds are those of the rest), so
an interrupted run goes on, and several runs may share them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from peers.token_rows import token_rows
from quality import RESULTS, found, run
from quantize_speed import run_json
from safetensors.torch import save_file

from fewbits import Tune

SHAPES = {"3 bits, g128": ["--bits", "3", "--group-size", "128"], "2 bits, g64": ["--bits", "2", "--group-size", "64"]}
TOOLS = ("rtn", "rtn, tuned", "gptq", "gptq, tuned", "auto-round")
CELLS = {f"{tool}, {shape}": (tool, shape) for shape in SHAPES for tool in TOOLS}
KEPT = ("perplexity", "kl_mean", "kl_mean_ci95", "top1", "reference_perplexity")


def quantized(args: argparse.Namespace, cell: str, out: Path) -> dict[str, Any]:
    """Make the checkpoint of a cell; what the tool says of it."""
    tool, shape = CELLS[cell]
    if tool == "auto-round":
        rows = out.parent / "rows.safetensors"
        save_file({"ids": token_rows(args.model, args.calibration, args.samples, 512)}, rows)
        script = Path(__file__).resolve().parent / "peers" / "autoround_quantize.py"
        command = [args.peer, str(script), args.model, str(out), "--ids", str(rows), "--affine"]
        command += ["--iters", str(args.steps), "--batch", str(Tune.rows), *SHAPES[shape]]
        return run_json(command, out.parent)
    options = [*SHAPES[shape], "--affine", "--method", tool.split(",")[0], "--format", "fewbits"]
    options += ["--calibration", str(args.calibration), "--samples", str(args.samples)]
    options += ["--tune-steps", str(args.steps)] if tool.endswith("tuned") else []
    begun = out.with_name(f"{out.name}.partial").exists()
    return run("quantize", args.model, str(out), *options, *(["--resume"] if begun else [])) | {"resumed": begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--peer", help="interpreter of auto-round's environment; without one its cells are left out")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--windows", default="5")
    parser.add_argument("--only", nargs="*", metavar="CELL", choices=CELLS)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "tune.json"
    for cell in args.only or CELLS:
        if cell in found(file) or (cell.startswith("auto-round") and not args.peer):
            continue
        out = args.workdir.resolve() / "".join(c if c.isalnum() else "-" for c in cell)
        shutil.rmtree(out, ignore_errors=True)
        made = quantized(args, cell, out)
        scored = run("eval", str(out), "--text", args.evaluation, "--windows", args.windows, "--reference", args.model)
        facts = {k: made.get(k) for k in ("version", "bits_per_weight", "seconds", "peak_rss_bytes", "resumed")}
        facts |= {k: scored[k] for k in KEPT} | {"samples": args.samples, "steps": args.steps}
        cells = found(file) | {cell: facts}
        file.write_text(json.dumps({c: cells[c] for c in CELLS if c in cells}, indent=1) + "\n")
        shutil.rmtree(out)
    print("| cell | perplexity | KL mean | top-1 | seconds | peak MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for cell, c in found(file).items():
        numbers = f"{c['perplexity']:.2f} | {c['kl_mean']:.3f} | {c['top1']:.3f} | {c['seconds']:.0f}"
        print(f"| {cell} | {numbers} | {c['peak_rss_bytes'] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
