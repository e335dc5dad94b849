"""Number formats, quantized inputs and caches on one model: KL from the original, every cell on the same tokens.

    python benchmarks/formats.py MODEL CALIBRATION.txt EVALUATION.txt WORKDIR [--rows 128] [--windows 5]
        [--only int4:rtn smoothquant ...] [--bnb-python P] [--llmcompressor-python P] [--out results/formats.json]

One cell after the other; cells already in the JSON file are kept, so an interrupted run goes on, and several runs may
share the file. A cell that cannot be is recorded with the reason. Peers work in their own environments and are scored
there, in their own software, on the same tokens against the same hidden states of the original. Prints markdown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbits
from fewbits.errors import Refused, RequestError
from fewbits.evaluate import hidden, interval, score
from fewbits.evaluate import text as texts
from fewbits.model import rows as calibration_rows

HERE = Path(__file__).parent
SOLVERS = ("rtn", "gptq", "awq")


@dataclass(frozen=True)
class Cell:
    """``make``: options of fewbits.quantize, None for the model as it is; ``kv``: the cache that is read from.

    ``peer``: whose environment it needs, and the arguments of its script; None there means that it quantizes while
    loading.
    """

    make: dict[str, Any] | None = None
    kv: str | None = None
    peer: str | None = None
    how: tuple[str, ...] | None = None
    load: tuple[str, ...] = field(default=())


# Integers in groups of 64, as the blocks of NF4.
GRIDS: dict[str, dict[str, Any]] = {
    "int4": {"grid": "int4", "group_size": 64},
    "nf4": {"grid": "nf4"},
    "mxfp4": {"grid": "mxfp4"},
    "nvfp4": {"grid": "nvfp4"},
    "fp8": {"grid": "fp8"},
}
# As peers load the model in float32, what stays dense is stored in it here too.
CELLS: dict[str, Cell] = {
    **{f"{g}:rtn": Cell(o | {"method": "rtn", "format": "fewbits"}) for g, o in GRIDS.items()},
    "w8a8": Cell({"method": "w8a8", "dtype": "float32"}),
    "w8a8-static": Cell({"method": "w8a8", "activations": "int8-static", "dtype": "float32"}),
    "smoothquant": Cell({"method": "smoothquant", "dtype": "float32"}),
    "smoothquant-static": Cell({"method": "smoothquant-static", "dtype": "float32"}),
    "llm.int8": Cell({"method": "llm.int8", "dtype": "float32"}),
    "kv-int8": Cell(kv="int8"),
    "kv-int4": Cell(kv="int4"),
    "bitsandbytes llm.int8": Cell(peer="bnb", load=("--load-in-8bit",)),
    "llm-compressor w8a8": Cell(peer="llmcompressor", how=("--scheme", "W8A8")),
    "llm-compressor smoothquant": Cell(peer="llmcompressor", how=("--scheme", "W8A8", "--smoothquant")),
    **{f"{g}:{s}": Cell(o | {"method": s, "format": "fewbits"}) for s in SOLVERS[1:] for g, o in GRIDS.items()},
}


class Judge:
    """Scores against one original, whose hidden states are computed once and kept in WORKDIR."""

    def __init__(self, args: argparse.Namespace):
        self.work, self.model = args.workdir, args.model
        model, tokenizer = fewbits.load(args.model, dtype=torch.float32)
        self.ids = texts.windows(tokenizer, texts.read(args.evaluation), args.ctx, args.windows)
        self.file = args.workdir / f"reference-{args.windows}x{args.ctx}.safetensors"
        body, self.head = hidden.split(model, self.ids[0])
        if not self.file.exists():
            states = torch.stack([hidden.states(body, row[None])[0] for row in self.ids])
            save_file({"ids": self.ids, "states": states}, self.file)
        self.states = load_file(self.file)["states"]

    def score(self, path: Path, kv: str | None) -> dict[str, Any]:
        """Of the checkpoint at ``path``, in our own runtime."""
        model, _ = fewbits.load(path, dtype=torch.float32)
        body, head = hidden.split(model.eval(), self.ids[0])
        found = []
        for row, p in zip(self.ids, self.states, strict=True):
            q = hidden.states(body, row[None], kv)[0]
            found.append(score.compare((p[:-1], self.head), (q[:-1], head), row[1:]))
        return self.summary(torch.cat(found, 1))

    def summary(self, per: Tensor) -> dict[str, Any]:
        """``per`` float64 ``[4, n]``: NLL of the original, NLL, KL, agreement; the keys of ``fewbits eval``."""
        nll_p, nll_q, kl, same = per.numpy()
        block = interval.blocks(len(self.ids), self.ids.shape[1] - 1)
        return {
            "perplexity": float(np.exp(nll_q.mean())),
            "reference_perplexity": float(np.exp(nll_p.mean())),
            "kl_mean": float(kl.mean()),
            "kl_mean_ci95": interval.mean_interval(kl, block),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "top1": float(same.mean()),
        }


def ours(cell: Cell, args: argparse.Namespace, judge: Judge, out: Path) -> dict[str, Any]:
    """Quantize and score; the checkpoint is removed by the caller."""
    if cell.make is None:
        return judge.score(args.model, cell.kv)
    try:
        how: dict[str, Any] = {"calibration": args.calibration, "samples": args.rows, "seq_len": args.seq_len}
        made: Any = fewbits.quantize(args.model, out, overwrite=True, **how, **cell.make)
    except (RequestError, Refused) as e:
        return {"refused": str(e).splitlines()[0]}
    gc.collect()
    facts = {k: getattr(made, k) for k in ("bits_per_weight", "size_bytes", "seconds")}
    return facts | judge.score(out, cell.kv)


def theirs(cell: Cell, args: argparse.Namespace, judge: Judge, out: Path) -> dict[str, Any]:
    """The same by a peer's own quantizer and runtime."""
    python, facts, source = getattr(args, f"{cell.peer}_python"), {}, args.model
    scores, rows = args.workdir / "scores.safetensors", args.workdir / "rows.safetensors"
    if cell.how is not None:
        tokenizer = fewbits.load(args.model)[1]
        save_file({"ids": calibration_rows(tokenizer, args.calibration, args.rows, args.seq_len)}, rows)
        script = HERE / "peers" / "llmcompressor_scheme.py"
        made = peer(python, script, args.model, out, "--ids", rows, *cell.how)
        facts, source = {"seconds": made["seconds"], "version": made["version"]}, out
    command = (HERE / "peers" / "kl.py", source, args.model, "--reference-states", judge.file, "--out", scores)
    facts |= {"loader": peer(python, *command, *cell.load)["loader"]}
    return facts | judge.summary(load_file(scores)["scores"])


def peer(python: str, *command: Any) -> dict[str, Any]:
    """The JSON line of a script in another environment."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, *map(str, command)], stdout=subprocess.PIPE, text=True, env=env, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def keep(file: Path, name: str, found: dict[str, Any]) -> None:
    """Add a cell to the JSON file, which another run may have written meanwhile."""
    cells = json.loads(file.read_text()) if file.exists() else {}
    cells[name] = found
    new = file.with_suffix(".new")
    new.write_text(json.dumps({k: cells[k] for k in CELLS if k in cells}, indent=1) + "\n")
    new.replace(file)


def table(cells: dict[str, Any]) -> str:
    """Markdown: grids by solvers, then everything else; mean KL in nats per token with its 95 % interval."""
    lines = ["| grid | bits per weight | RTN | GPTQ | AWQ |", "| --- | ---: | ---: | ---: | ---: |"]
    for grid in GRIDS:
        found = [cells.get(f"{grid}:{s}", {}) for s in SOLVERS]
        bits = next((f"{c['bits_per_weight']:.2f}" for c in found if "kl_mean" in c), "")
        lines.append(f"| {grid} | {bits} | {' | '.join(map(shown, found))} |")
    lines += ["", "| what | KL | 99th percentile | top-1 | perplexity |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, c in cells.items():
        if ":" not in name and "kl_mean" in c:
            lines.append(f"| {name} | {shown(c, 5)} | {c['kl_p99']:.4f} | {c['top1']:.4f} | {c['perplexity']:.3f} |")
    return "\n".join(lines) + "\n"


def shown(c: dict[str, Any], digits: int = 4) -> str:
    """One figure of the table."""
    if "kl_mean" not in c:
        return c.get("refused", "")
    low, high = c["kl_mean_ci95"]
    return f"{c['kl_mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "calibration", "evaluation", "workdir"):
        parser.add_argument(name, type=Path)
    for name, default in (("rows", 128), ("seq-len", 512), ("windows", 5), ("ctx", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="*", choices=list(CELLS), default=list(CELLS), metavar="CELL")
    for name in ("bnb", "llmcompressor"):
        parser.add_argument(f"--{name}-python", help="without it the cells of that peer are left out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "formats.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    for folder in (args.workdir, args.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    judge: Judge | None = None
    for name in args.only:
        cell = CELLS[name]
        done = json.loads(args.out.read_text()) if args.out.exists() else {}
        if name in done or (cell.peer and not getattr(args, f"{cell.peer}_python")):
            continue
        judge, started = judge or Judge(args), time.perf_counter()
        out = args.workdir / name.replace(":", "-").replace(" ", "-")
        found = (theirs if cell.peer else ours)(cell, args, judge, out)
        keep(args.out, name, found)
        shutil.rmtree(out, ignore_errors=True)
        print(f"{name}: {shown(found, 5)}  {time.perf_counter() - started:.0f} s", flush=True)
    print(table(json.loads(args.out.read_text()) if args.out.exists() else {}))


if __name__ == "__main__":
    main()
