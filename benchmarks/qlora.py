"""QLoRA: ours beside peft + bitsandbytes on this machine: losses, step time, peak memory, perplexity of held-out text.

    python benchmarks/qlora.py MODEL DATA WORKDIR --peer PEER_PYTHON [--steps 5] [--batch 4] [--seq-len 512]
        [--arms ours peer lora gptq residual] [--held-out 0.05] [--json FILE]

MODEL is dense, DATA a text, of which the last ``--held-out`` is not trained on. Arms ``ours`` and ``peer`` round MODEL
to NF4 with double quantization, ``gptq`` is ``ours`` with ``--base-method gptq``: codes of the same format that learned
from the training data; ``residual`` adds ``--init residual``; ``lora`` is peft's LoRA on the unquantized model. All but
``residual`` start from the same adapters (same seed); all see the same rows in the same order, in float32. PEER_PYTHON
is an interpreter with bitsandbytes, peft and transformers. Each arm is a process of its own, one after the other; peak
memory is that of the whole process, loading included. On a busy machine compare the processor's seconds with one
thread.

What was run is kept in WORKDIR: a run that was stopped goes on from its last checkpoint, a finished arm is not run
again. Perplexities are computed in our runtime: adapters of ``ours`` and ``peer`` beside the NF4 base, whose bytes are
the same, those of ``lora`` beside the dense model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fewbits
from fewbits.finetune import Adapter, Rows, Training, finetune
from fewbits.finetune.adapter import load_adapter
from fewbits.finetune.data import read
from fewbits.finetune.model import tokenizer_of
from fewbits.storage import save

HERE = Path(__file__).resolve().parent
OURS = {"ours": ("rtn", "zero"), "gptq": ("gptq", "zero"), "residual": ("gptq", "residual")}
"""Arms that are runs of ours: how their base is rounded, how their adapters begin."""
ARMS = ("ours", "peer", "lora", *(arm for arm in OURS if arm != "ours"))
SAVE_STEPS = 10


def same_run(args: argparse.Namespace) -> None:
    """What is in WORKDIR must be of the run that is asked for."""
    file = args.work / "request.json"
    free = ("work", "peer", "arms", "json", "only")
    asked = {k: str(v) for k, v in vars(args).items() if k not in free}
    if file.exists() and (before := json.loads(file.read_text())) != asked:
        changed = ", ".join(f"{k} was {before.get(k)}, now {v}" for k, v in asked.items() if before.get(k) != v)
        sys.exit(f"{args.work} holds another run ({changed}); repeat its settings, or give another WORKDIR")
    file.write_text(json.dumps(asked, indent=1) + "\n")


def texts(args: argparse.Namespace) -> tuple[Path, Path]:
    """What is trained on and what is held out, as files in WORKDIR."""
    files = args.work / "train.txt", args.work / "held-out.txt"
    text = args.data.read_text(encoding="utf-8")
    cut = round(len(text) * (1 - args.held_out))
    for file, part in zip(files, (text[:cut], text[cut:]), strict=True):
        if not file.exists() or file.read_text(encoding="utf-8") != part:
            file.write_text(part, encoding="utf-8")
    return files


def ours(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One run of ours, in this process."""
    out = args.work / name
    training = Training(
        steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed, checkpointing=args.checkpointing,
        save_steps=SAVE_STEPS, keep_products=args.keep_products,
    )  # fmt: skip
    base_method, init = OURS[name]
    adapter, rows = Adapter(r=args.r, alpha=args.r, dropout=0.0, init=init), Rows(args.seq_len)
    finetune(
        args.model, out, texts(args)[0], base_method=base_method, training=training, adapter=adapter, rows=rows,
        dtype="float32", resume=(out / "finetune.json").exists(),
    )  # fmt: skip
    return {"tool": "fewbits", "threads": torch.get_num_threads()} | summary(out / "log.jsonl")


def peers(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One run of theirs, in their environment."""
    rows = read(texts(args)[0], tokenizer_of(args.model), Rows(args.seq_len))
    ids, how = args.work / "ids.safetensors", Training()
    save(ids, {"ids": torch.stack([r.ids for r in rows])})
    request = {
        "model": args.model, "ids": str(ids), "out": str(args.work / name), "dense": name == "lora",
        "steps": args.steps, "batch": args.batch, "r": args.r, "alpha": args.r, "lr": args.lr, "warmup": how.warmup,
        "max_grad_norm": how.max_grad_norm, "seed": args.seed, "checkpointing": args.checkpointing,
        "save_steps": SAVE_STEPS,
    }  # fmt: skip
    file = args.work / f"{name}-request.json"
    file.write_text(json.dumps(request))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    facts = last_line([args.peer, str(HERE / "peers" / "qlora_peer.py"), str(file)], env)
    return facts | summary(args.work / name / "log.jsonl")


def summary(log: Path) -> dict[str, Any]:
    """Of every step of a run, those before it was last resumed included."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "losses": [x["loss"] for x in lines],
        "step_seconds": statistics.median(x["seconds"] for x in lines),
        "step_cpu_seconds": statistics.median(x["cpu_seconds"] for x in lines),
        "peak_rss_bytes": max(x["peak_rss_bytes"] for x in lines),
    }


def perplexity(args: argparse.Namespace, arm: str | None) -> float:
    """Of the held-out rows; None is the dense model without an adapter."""
    base = args.model if arm in (None, "lora") else str(args.work / (arm if arm in OURS else "ours") / "base")
    model, tokenizer = fewbits.load(base, dtype=torch.float32)
    if arm is not None:
        model = load_adapter(model, args.work / arm)
    rows = read(texts(args)[1], tokenizer, Rows(args.seq_len))
    with torch.inference_mode():
        losses = [float(model.eval()(input_ids=r.ids[None], labels=r.ids[None]).loss) for r in rows]
    return math.exp(statistics.fmean(losses))


def last_line(command: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON that a process prints last."""
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """``found`` with what it says about ours against the others, as far as these were run."""
    if "ours" not in found:
        return found
    mine = found["ours"]
    if "peer" in found:
        theirs = found["peer"]
        found["ratio"] = {k: mine[k] / theirs[k] for k in ("step_seconds", "step_cpu_seconds", "peak_rss_bytes")}
        pairs = zip(mine["losses"], theirs["losses"], strict=True)
        found["ratio"] |= {"loss": max(abs(a / b - 1) for a, b in pairs)}
    if "lora" in found:
        dense = found["lora"]["held_out_perplexity"]
        found["held_out_over_lora"] = {arm: found[arm]["held_out_perplexity"] / dense for arm in OURS if arm in found}
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer", help="interpreter of the peer's environment; arms peer and lora need it")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS[:2]))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--held-out", type=float, default=0.05, help="share of DATA, at its end")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--keep-products", action=argparse.BooleanOptionalAction, help="ours: see fewbits finetune")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=OURS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.peer:
        args.arms = [arm for arm in args.arms if arm in OURS]
    return args


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.only:
        print("\n" + json.dumps(ours(args, args.only)))
        return
    same_run(args)
    for arm in args.arms:
        file = args.work / f"{arm}.json"
        if file.exists():
            continue
        # In a process of its own, so that its peak memory is its own.
        mine = [sys.executable, __file__, *sys.argv[1:], "--only", arm]
        file.write_text(json.dumps(last_line(mine) if arm in OURS else peers(args, arm)))
    done = {arm: json.loads(f.read_text()) for arm in ARMS if (f := args.work / f"{arm}.json").exists()}
    for arm, facts in done.items():
        if arm != "peer" or "ours" in done:  # whose base it needs
            facts["held_out_perplexity"] = perplexity(args, arm)
    found = compared(done | {"original": {"held_out_perplexity": perplexity(args, None)}})
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
