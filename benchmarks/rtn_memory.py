"""Peak memory of quantizing an 8 GB checkpoint with RTN: makes the checkpoint, runs ``fewbits quantize``, prints JSON.

    python benchmarks/rtn_memory.py WORKDIR [--gigabytes 8]

The model is Llama-shaped with random bfloat16 weights in 2 GB shards, written shard by shard.
Needs twice the size on disk.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fewbits.storage import save

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 4096, 11008, 32, 8, 32000


def block(i: int) -> dict[str, torch.Tensor]:
    """Random weights of one decoder block, bfloat16."""
    g = torch.Generator().manual_seed(i)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    tensors = {
        f"{n}.weight": torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02, generator=g) for n, s in shapes.items()
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return {f"model.layers.{i}.{n}": t for n, t in tensors.items()}


def make(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint unless it is there; returns its bytes."""
    size = sum(t.nbytes for t in block(0).values())
    blocks = math.ceil(gigabytes * 1e9 / size)
    per_shard = max(1, int(2e9 // size))
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for start in range(0, blocks, per_shard):
        name = f"model-{start // per_shard:05d}.safetensors"
        tensors = {n: t for i in range(start, min(blocks, start + per_shard)) for n, t in block(i).items()}
        if start == 0:
            g = torch.Generator().manual_seed(10**6)
            table = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16).normal_(0, 0.02, generator=g)
            tensors |= {
                "model.embed_tokens.weight": table,
                "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }
        where |= dict.fromkeys(tensors, name)
        save(folder / name, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(p.stat().st_size for p in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    args = parser.parse_args()
    source, out = args.workdir / "source", args.workdir / "out"
    # Made in a process of its own, so that its memory is not counted.
    code = (
        f"import pathlib, runpy; runpy.run_path({__file__!r})['make'](pathlib.Path({str(source)!r}), {args.gigabytes})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    size = sum(p.stat().st_size for p in source.iterdir())
    command = [sys.executable, "-m", "fewbits", "quantize", str(source), str(out), "--method", "rtn", "--json"]
    done = subprocess.run([*command, "--overwrite"], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    keys = ("seconds", "peak_rss_bytes", "size_bytes", "bits_per_weight")
    print(json.dumps({"source_bytes": size} | {k: result[k] for k in keys}))
    shutil.rmtree(args.workdir)


if __name__ == "__main__":
    main()
