"""QLoRA: ours beside peft + bitsandbytes on this machine: losses, step time, peak memory; prints JSON.

    python benchmarks/qlora.py MODEL DATA WORKDIR --peer PEER_PYTHON [--steps 5] [--batch 4] [--seq-len 512]

MODEL is dense, DATA a text. Both round it to NF4 with double quantization, start from the same adapters (same seed) and
see the same rows in the same order, in float32. PEER_PYTHON is an interpreter with bitsandbytes, peft and transformers.
``--dense`` adds peft's LoRA on the unquantized model. Runs are separate processes, one after the other; peak memory is
that of the whole process, loading included. On a busy machine compare the processor's seconds with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fewbits.finetune import Adapter, Rows, Training, finetune
from fewbits.finetune.data import read
from fewbits.finetune.model import tokenizer_of
from fewbits.storage import save

HERE = Path(__file__).resolve().parent


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """One run of ours, in this process."""
    out = args.work / "ours"
    shutil.rmtree(out, ignore_errors=True)
    training = Training(
        steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed, checkpointing=args.checkpointing,
        save_steps=10**9, keep_products=args.keep_products,
    )  # fmt: skip
    adapter, rows = Adapter(r=args.r, alpha=args.r, dropout=0.0), Rows(args.seq_len)
    found = finetune(args.model, out, args.data, training=training, adapter=adapter, rows=rows, dtype="float32")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses, cpu = [x["loss"] for x in lines], statistics.median(x["cpu_seconds"] for x in lines)
    facts = {
        "tool": "fewbits",
        "losses": losses,
        "step_seconds": found.step_seconds,
        "threads": torch.get_num_threads(),
    }
    return facts | {"step_cpu_seconds": cpu, "peak_rss_bytes": found.peak_rss_bytes, "total_seconds": found.seconds}


def peers(args: argparse.Namespace, dense: bool) -> dict[str, Any]:
    """One run of theirs, in their environment."""
    args.work.mkdir(parents=True, exist_ok=True)
    name = "lora" if dense else "peer"
    rows = read(args.data, tokenizer_of(args.model), Rows(args.seq_len))
    save(args.work / "ids.safetensors", {"ids": torch.stack([r.ids for r in rows])})
    how = Training()
    request = {
        "model": args.model, "ids": str(args.work / "ids.safetensors"), "out": str(args.work / name), "dense": dense,
        "steps": args.steps, "batch": args.batch, "r": args.r, "alpha": args.r, "lr": args.lr, "warmup": how.warmup,
        "max_grad_norm": how.max_grad_norm, "seed": args.seed, "checkpointing": args.checkpointing,
    }  # fmt: skip
    file = args.work / f"{name}.json"
    file.write_text(json.dumps(request))
    script = str(HERE / "peers" / "qlora_peer.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run([args.peer, script, str(file)], stdout=subprocess.PIPE, text=True, check=True, env=env)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def alone(arguments: list[str]) -> dict[str, Any]:
    """Ours in a process of its own, so that its peak memory is its own."""
    run = subprocess.run(
        [sys.executable, __file__, *arguments, "--only-ours"], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer", help="interpreter of the peer's environment")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--keep-products", action=argparse.BooleanOptionalAction, help="ours: see fewbits finetune")
    parser.add_argument("--dense", action="store_true", help="peft's LoRA on the unquantized model too")
    parser.add_argument("--only-ours", action="store_true")
    args = parser.parse_args()
    if args.only_ours:
        print("\n" + json.dumps(ours(args)))
        return
    found = {"ours": alone(sys.argv[1:])}
    if args.peer:
        theirs = found["peer"] = peers(args, dense=False)
        mine = found["ours"]
        found["ratio"] = {
            "step_seconds": mine["step_seconds"] / theirs["step_seconds"],
            "step_cpu_seconds": mine["step_cpu_seconds"] / theirs["step_cpu_seconds"],
            "peak_rss_bytes": mine["peak_rss_bytes"] / theirs["peak_rss_bytes"],
            "loss": max(abs(a / b - 1) for a, b in zip(mine["losses"], theirs["losses"], strict=True)),
        }
        if args.dense:
            found["lora"] = peers(args, dense=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
