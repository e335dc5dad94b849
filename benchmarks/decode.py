"""Tokens per second of int4 layers against bf16 ones, in one run, through transformers' generate and our own loop.

    python benchmarks/decode.py [--layers 22] [--tokens 24] [--rounds 3] [--json FILE]      a random 1.1B-shaped Llama
    python benchmarks/decode.py --model DIR [--tokens 64] ...                               a quantized checkpoint

Random weights are rounded to nearest, 4 bits, groups of 64; the bf16 model of a checkpoint is its dequantized twin.
``cpu`` counts processor time instead of the clock's: on a busy machine, with one thread, it is what a quiet one takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.grids import Int
from fewbits.runtime import QuantLinear, decode
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


def dense_twin(model: Any) -> Any:
    """A bf16 copy with plain linear layers; everything else is shared."""
    out = copy.deepcopy(model).to(torch.bfloat16)
    for name, m in list(out.named_modules()):
        if isinstance(m, QuantLinear):
            linear = torch.nn.Linear(m.in_features, m.out_features, bias=m.bias is not None, dtype=torch.bfloat16)
            linear.weight.data = m.dequantize(torch.bfloat16).contiguous()
            linear.bias = m.bias
            parent, _, leaf = name.rpartition(".")
            setattr(out.get_submodule(parent), leaf, linear)
    return out.eval()


def through_transformers(model: Any) -> Callable[[torch.Tensor, int], Any]:
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    return lambda ids, count: model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, **options
    )


def ours(model: Any) -> Callable[[torch.Tensor, int], Any]:
    model.generation_config.eos_token_id = None
    return decode.Decoder(model).run


def rate(run: Callable[[torch.Tensor, int], Any], ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Tokens per second of the clock and of processor time, after the first two: the prompt does not count."""

    def seconds(count: int) -> tuple[float, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            run(ids, count)
        return time.perf_counter() - begin, time.process_time() - cpu

    short, long = seconds(2), seconds(2 + tokens)
    return tokens / (long[0] - short[0]), tokens / (long[1] - short[1])


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--model")
    args.add_argument("--layers", type=int, default=22)
    args.add_argument("--tokens", type=int, default=24)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--json", type=Path)
    a = args.parse_args()
    torch.manual_seed(0)
    if a.model:
        quantized, _ = fewbits.load(a.model, dtype=torch.bfloat16)
        dense = dense_twin(quantized)
    else:
        dense = make(a.layers)
        quantized = quantize(dense)
    runs = {"bf16": through_transformers(dense), "int4": through_transformers(quantized), "int4 lean": ours(quantized)}
    ids = torch.randint(3, dense.config.vocab_size, (1, 16))
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(a.rounds):
        for name, run in runs.items():
            rates[name].append(rate(run, ids, a.tokens))
    found = {
        name: {"wall": statistics.median(w for w, _ in r), "cpu": statistics.median(c for _, c in r)}
        for name, r in rates.items()
    }
    for name, r in found.items():
        print(
            f"{name:10} {r['wall']:6.1f} tokens/s by the clock, {r['cpu']:6.1f} by processor time; "
            f"{r['cpu'] / found['bf16']['cpu']:.2f} times bf16"
        )
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(found | {"threads": torch.get_num_threads()}, indent=1))


if __name__ == "__main__":
    main()
