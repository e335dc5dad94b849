"""KL divergence of GGUF mixtures: llama-quantize with an importance matrix against ours, from one calibration.

    python benchmarks/gguf_quality.py MODEL CALIBRATION.txt EVALUATION.txt WORKDIR --llama-quantize PROGRAM
        [--mixtures q2_k,q3_k_m,q4_k_m] [--ways plain,imatrix,gptq]
        [--samples 128] [--seq-len 512] [--windows 5] [--ctx 2048]

The importance matrix is the mean square of the inputs of every linear layer of the original model over the
calibration rows, written in llama.cpp's format and read by llama-quantize and by ``fewbits convert --imatrix``; whose
files must be equal, tensor by tensor. Then every way of ours (``q2_k+gptq`` ...) from the same rows. KL and
perplexity are ours, on the decoded files in float32. Cells that the JSON file has are kept, so an interrupted run
goes on; it lies in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf_speed import differing
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbits
from fewbits.evaluate import hidden, score, text
from fewbits.formats import gguf_imatrix, gguf_names
from fewbits.model import rows

RESULTS = Path(__file__).parent / "results"


class Reference:
    """The original model's predictions on the evaluation text; calling it scores another model against them."""

    def __init__(self, model: Path, content: Path, ctx: int, windows: int):
        loaded, tokenizer = fewbits.load(model, dtype=torch.float32)
        self.ids = text.windows(tokenizer, text.read(content), ctx, windows)
        body, self.head = hidden.split(loaded.eval(), self.ids[0])
        self.states = [hidden.states(body, row[None])[0] for row in self.ids]

    def __call__(self, path: Path) -> dict[str, float]:
        model, _ = fewbits.load(path, dtype=torch.float32)
        body, head = hidden.split(model.eval(), self.ids[0])
        found = []
        for row, kept in zip(self.ids, self.states, strict=True):
            h = hidden.states(body, row[None])[0]
            found.append(score.compare((kept[:-1], self.head), (h[:-1], head), row[1:]))
        reference, nll, kl, same = torch.cat(found, 1).numpy()
        return {
            "kl_mean": float(kl.mean()),
            "perplexity": math.exp(float(nll.mean())),
            "reference_perplexity": math.exp(float(reference.mean())),
            "top1": float(same.mean()),
            "tokens": len(kl),
        }


@torch.no_grad()
def importance(folder: Path, calibration: Path, samples: int, length: int, out: Path) -> None:
    """Write the importance matrix of a model unless it is there."""
    if out.exists():
        return
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = rows(AutoTokenizer.from_pretrained(folder), str(calibration), samples, length)
    family, sums = gguf_names.family(model.config.model_type), {}

    def watch(name: str) -> Callable[[Any, Any], None]:
        def add(module: Any, inputs: Any) -> None:
            x = inputs[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.double().square().sum(0)

        return add

    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            stored = gguf_names.stored_name(f"model.{name}.weight", family)
            module.register_forward_pre_hook(watch(str(stored)))
    for row in ids:
        model.model(row[None])
    counts = {n: float(ids.numel()) for n in sums}
    made = {n: s.float() for n, s in sums.items()}
    gguf_imatrix.Imatrix(made, counts, calibration.name, samples, length).write(out)


def run(*command: object) -> None:
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def makers(args: argparse.Namespace, dense: Path, matrix: Path) -> dict[str, Callable[[str, Path], Path]]:
    """How each way makes a file: ``(mixture, folder) -> file``."""
    ours = [sys.executable, "-m", "fewbits"]
    calibration = ["--calibration", args.calibration, "--samples", args.samples, "--seq-len", args.seq_len]

    def plain(mixture: str, folder: Path) -> Path:
        run(args.llama_quantize, dense, folder / "m.gguf", mixture.upper(), 2)
        return folder / "m.gguf"

    def weighted(mixture: str, folder: Path) -> Path:
        run(args.llama_quantize, "--imatrix", matrix, dense, folder / "m.gguf", mixture.upper(), 2)
        run(*ours, "convert", args.model, folder / "ours.gguf", "--type", mixture, "--imatrix", matrix)
        if differ := differing(folder / "ours.gguf", folder / "m.gguf"):
            raise SystemExit(f"{mixture}: {len(differ)} tensors are not those of llama-quantize: {differ[:3]}")
        return folder / "m.gguf"

    def own(way: str) -> Callable[[str, Path], Path]:
        def make(mixture: str, folder: Path) -> Path:
            method = f"{mixture}+{way}"
            run(*ours, "quantize", args.model, folder / "out", "--method", method, *calibration, "--overwrite")
            return folder / "out" / "model.gguf"

        return make

    foreign = {"plain": plain, "imatrix": weighted}
    return {way: foreign.get(way) or own(way) for way in args.ways.split(",")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model", "calibration", "evaluation", "workdir"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--mixtures", default="q2_k,q3_k_m,q4_k_m")
    parser.add_argument("--ways", default="plain,imatrix,gptq")
    for name, default in (("samples", 128), ("seq-len", 512), ("windows", 5), ("ctx", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    dense, matrix = args.workdir / "f32.gguf", args.workdir / "imatrix.gguf"
    if not dense.exists():
        run(sys.executable, "-m", "fewbits", "convert", args.model, dense, "--type", "f32")
    importance(args.model, args.calibration, args.samples, args.seq_len, matrix)
    file = RESULTS / f"gguf_quality_{args.model.name}.json"
    RESULTS.mkdir(exist_ok=True)
    cells: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    reference = None
    for mixture in args.mixtures.split(","):
        for way, make in makers(args, dense, matrix).items():
            cell = f"{mixture} {way}"
            if cell in cells:
                continue
            folder, started = args.workdir / cell.replace(" ", "-"), time.perf_counter()
            folder.mkdir(exist_ok=True)
            made = make(mixture, folder)
            seconds = time.perf_counter() - started
            reference = reference or Reference(args.model, args.evaluation, args.ctx, args.windows)
            settings = {k: getattr(args, k) for k in ("samples", "seq_len", "windows", "ctx")}
            scored = reference(made) | {"size_bytes": made.stat().st_size, "seconds": seconds} | settings
            cells = (json.loads(file.read_text()) if file.exists() else {}) | {cell: scored}
            file.write_text(json.dumps(cells, indent=1) + "\n")
            print(cell, cells[cell], file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    table(cells)


def table(cells: dict[str, Any]) -> None:
    print("| mixture, way | size, MB | perplexity | KL | KL / imatrix | top-1 |\n| --- | --- | --- | --- | --- | --- |")
    for cell, c in cells.items():
        base = cells.get(f"{cell.split()[0]} imatrix", c)["kl_mean"]
        print(
            f"| {cell} | {c['size_bytes'] / 1e6:.1f} | {c['perplexity']:.2f} | {c['kl_mean']:.4f} "
            f"| {c['kl_mean'] / base:.3f} | {c['top1']:.3f} |"
        )


if __name__ == "__main__":
    main()
