"""Tokens per second of a 1.1B-shaped Llama through transformers' generate: int4 layers against bf16 ones, in one run.

    python benchmarks/decode.py [--layers 22] [--tokens 24] [--rounds 3] [--json FILE]

Weights are random and made here; each linear layer of the blocks is rounded to nearest, 4 bits, groups of 64.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.grids import Int
from fewbits.runtime import QuantLinear
from fewbits.tensor import Quantized

GRID = Int(4, 64)


def make(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def quantize(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy whose blocks' linear layers are int4; embeddings and head are shared."""
    shared = [model.model.embed_tokens, model.lm_head]
    memo = {id(m): m for m in shared}
    for block in model.model.layers:  # weights are not copied: they are replaced below
        memo |= {id(p): p for p in block.parameters()}
    out = copy.deepcopy(model, memo)
    for block in out.model.layers:
        for name, m in list(block.named_modules()):
            if isinstance(m, torch.nn.Linear):
                w = m.weight.detach().float()
                p = GRID.fit(w)
                parent, _, leaf = name.rpartition(".")
                setattr(
                    block.get_submodule(parent), leaf, QuantLinear.from_quantized(Quantized(GRID, GRID.encode(w, p), p))
                )
    return out


def rate(model: LlamaForCausalLM, ids: torch.Tensor, tokens: int) -> float:
    """Tokens per second after the first two, so that the prompt does not count."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}

    def run(count: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, **options
            )
        return time.perf_counter() - begin

    short = run(2)
    return tokens / (run(2 + tokens) - short)


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--layers", type=int, default=22)
    args.add_argument("--tokens", type=int, default=24)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--json", type=Path)
    a = args.parse_args()
    torch.manual_seed(0)
    dense = make(a.layers)
    models = {"bf16": dense, "int4": quantize(dense)}
    ids = torch.randint(3, 32000, (1, 16))
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(a.rounds):
        for name, model in models.items():
            rates[name].append(rate(model, ids, a.tokens))
    found = {name: statistics.median(r) for name, r in rates.items()}
    for name, r in found.items():
        print(f"{name}: {r:.2f} tokens/s   {1e3 / r:.1f} ms a token")
    print(f"int4 / bf16: {found['int4'] / found['bf16']:.2f}")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(found | {"ratio": found["int4"] / found["bf16"]}, indent=1))


if __name__ == "__main__":
    main()
