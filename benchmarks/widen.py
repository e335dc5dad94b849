"""Copy a Llama-like checkpoint whose width is no multiple of 256 so that it is, and its function stays.

Blocks of 256 columns (GGUF's K types) do not divide rows of 576, and llama.cpp then falls back to other types. To see
what the K types do to real weights, zero channels are put between the real ones: in every 256 columns 192 are
SmolLM2's and 64, whole sub-blocks of 16 and 32, are zero. An RMS norm now averages over more channels: its weights
and its epsilon are multiplied to make up for that. Each key-value head gets one more query head, which is zero.

    python benchmarks/widen.py MODEL_DIR OUT_DIR
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

REAL, WIDE = 192, 256
PROBE = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2."
TOLERANCE = 1e-3  # of the largest logit


def spread(t: Tensor, axis: int) -> Tensor:
    """``t`` with ``WIDE - REAL`` zeros after every ``REAL`` entries of ``axis``."""
    parts = t.split(REAL, axis)
    size = list(parts[0].shape)
    size[axis] = WIDE - REAL
    return torch.cat([piece for part in parts for piece in (part, t.new_zeros(size))], axis)


def widened(model: Any) -> Any:
    """A model of 4/3 the width that computes the same. Raises SystemExit for one that it does not fit."""
    old = model.config
    heads, shared = old.num_attention_heads, old.num_key_value_heads
    size = old.hidden_size // heads
    if old.hidden_size % REAL or heads // shared * size != REAL:
        raise SystemExit(f"hidden size {old.hidden_size} with {heads} heads on {shared}: no groups of {REAL} columns")
    c = copy.deepcopy(old)
    c.hidden_size, c.num_attention_heads, c.head_dim = old.hidden_size * WIDE // REAL, shared * (WIDE // size), size
    c.rms_norm_eps = old.rms_norm_eps * REAL / WIDE
    wide = type(model)(c)
    rows_too = ("self_attn.o_proj", "mlp.down_proj")  # they write into the stream of hidden states
    state = {}
    for name, w in model.state_dict().items():
        if "norm" in name:
            state[name] = spread(w * math.sqrt(REAL / WIDE), 0)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            state[name] = spread(w, 1)
        elif any(r in name for r in rows_too):
            columns = spread(w, 1) if "o_proj" in name else w
            state[name] = spread(columns, 0)
        else:  # a query group is REAL rows
            state[name] = spread(spread(w, 1), 0) if "q_proj" in name else spread(w, 1)
    wide.load_state_dict(state)
    return wide.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    probe = tokenizer(PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        wide = widened(model)
        before, after = model(probe).logits, wide(probe).logits
    change, largest = float((after - before).abs().max()), float(before.abs().max())
    print(f"largest logit change {change:.2e} (largest logit {largest:.1f})")
    if change > TOLERANCE * largest:
        raise SystemExit(f"{args.model}: the function changed; nothing was written")
    wide.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
