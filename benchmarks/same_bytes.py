"""Our checkpoints against those of bitsandbytes and llm-compressor for the same model: bytes, and logits.

    python benchmarks/same_bytes.py MODEL TEXT WORKDIR [--bnb-python P] [--llmcompressor-python P]
        [--only nf4 FP8_DYNAMIC ...] [--out results/same_bytes.json]

Each peer quantizes MODEL in its own environment, from float32 weights; so do we. Then the peer reads our checkpoint,
and the logits that it computes for the first 256 tokens of TEXT are compared with those of our runtime: the largest
difference as a share of the logits' range. Prints a table and adds to the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbits
from fewbits.errors import FewbitsError
from fewbits.model import rows
from fewbits.storage import Checkpoint

HERE = Path(__file__).parent
BNB = {name: {"method": name} for name in ("nf4", "nf4-dq", "fp4", "fp4-dq", "llm.int8")}
# llm-compressor's name of a scheme, and ours.
SCHEMES: dict[str, dict[str, Any]] = {
    "FP8_DYNAMIC": {"method": "fp8", "activations": "fp8"},
    "FP8_BLOCK": {"method": "fp8-block", "activations": "fp8-block"},
    "W8A8": {"method": "w8a8"},
    "NVFP4A16": {"method": "nvfp4"},
    "MXFP4A16": {"method": "mxfp4"},
    "MXFP8A16": {"method": "mxfp8"},
}
HEAD = """| peer | scheme | equal tensors | equal bytes | names on one side only | logits, largest difference / range |
| --- | --- | ---: | ---: | ---: | ---: |"""


def peer(python: str, script: str, *command: object) -> None:
    """Run a script of ``peers`` in the peer's environment."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = (python, HERE / "peers" / script, *command)
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL, env=env)


def ours(case: str, model: Path, out: Path) -> None:
    """Write ours, float32 where it is dense."""
    options = BNB[case] if case in BNB else SCHEMES[case] | {"format": "compressed-tensors"}
    fewbits.quantize(model, out, overwrite=True, dtype="float32", **options)


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """Counts of tensors and bytes that are the same, names that only one side has, and the first differences."""
    a, b = Checkpoint.open(ours), Checkpoint.open(theirs)
    both = sorted(set(a.names()) & set(b.names()))
    found: dict[str, Any] = {
        "tensors": len(both),
        "equal": 0,
        "bytes": 0,
        "bytes_equal": 0,
        "only_ours": sorted(set(a.names()) - set(b.names())),
        "only_theirs": sorted(set(b.names()) - set(a.names())),
        "different": {},
    }
    for name in both:
        x, y = a.tensor(name), b.tensor(name)
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            found["different"][name] = f"{x.dtype} {tuple(x.shape)} against {y.dtype} {tuple(y.shape)}"
            continue
        same = raw(x) == raw(y)
        found["bytes"] += same.numel()
        found["bytes_equal"] += int(same.sum())
        found["equal"] += bool(same.all())
        if not same.all():
            found["different"][name] = f"{int((~same).sum())} of {same.numel()} bytes"
    return found


def logits(path: Path, python: str, work: Path, ids: Tensor) -> dict[str, float | None]:
    """Of our checkpoint at ``path`` in the peer's software and in ours: the largest and the root mean square
    difference, as shares of the range; None when the peer cannot run it in float32."""
    save_file({"ids": ids}, work / "ids.safetensors")
    try:
        peer(python, "logits.py", path, "--ids", work / "ids.safetensors", "--out", work / "logits.safetensors")
    except subprocess.CalledProcessError:
        return {"logits_max": None, "logits_rms": None}
    theirs = load_file(work / "logits.safetensors")["logits"]
    model, _ = fewbits.load(path, dtype=torch.float32)
    with torch.inference_mode():
        difference = model.eval()(input_ids=ids).logits - theirs
    spread = float(theirs.max() - theirs.min())
    return {"logits_max": float(difference.abs().max()) / spread, "logits_rms": float(difference.std()) / spread}


def raw(t: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return t.contiguous().reshape(-1).view(torch.uint8)


def row(case: str, c: dict[str, Any]) -> str:
    """A row of the table."""
    tool = "bitsandbytes" if case in BNB else "llm-compressor"
    if "refused" in c:
        return f"| {tool} | {case} | {c['refused']} | | | |"
    odd = len(c["only_ours"]) + len(c["only_theirs"])
    counts = f"{c['equal']} of {c['tensors']} | {c['bytes_equal']:,} of {c['bytes']:,} | {odd}"
    gap = "not run in float32" if c["logits_max"] is None else f"{c['logits_max']:.1e}"
    return f"| {tool} | {case} | {counts} | {gap} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "text", "workdir"):
        parser.add_argument(name, type=Path)
    for name in ("bnb", "llmcompressor"):
        parser.add_argument(f"--{name}-python", help="without it the cases of that peer are left out")
    parser.add_argument("--only", nargs="*", choices=[*BNB, *SCHEMES], default=[*BNB, *SCHEMES], metavar="CASE")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "same_bytes.json")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pythons = {"bitsandbytes": args.bnb_python, "llmcompressor": args.llmcompressor_python}
    ids = rows(fewbits.load(args.model)[1], args.text, 1, 256)
    cells: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for case in args.only:
        tool, option = ("bitsandbytes", "--method") if case in BNB else ("llmcompressor", "--scheme")
        script = "bitsandbytes_quantize.py" if case in BNB else "llmcompressor_scheme.py"
        if not (python := pythons[tool]):
            continue
        a, b = args.workdir / f"{case}-ours", args.workdir / f"{case}-theirs"
        try:
            ours(case, args.model, a)
            peer(python, script, args.model, b, option, case)
            cells[case] = compare(a, b) | logits(a, python, args.workdir, ids)
        except FewbitsError as e:
            cells[case] = {"refused": str(e).splitlines()[0]}
        args.out.write_text(json.dumps(cells, indent=1) + "\n")
        print(row(case, cells[case]), flush=True)
        for path in (a, b):
            shutil.rmtree(path, ignore_errors=True)
    print(HEAD)
    print("\n".join(row(case, c) for case, c in cells.items()))


if __name__ == "__main__":
    main()
