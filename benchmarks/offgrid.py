"""Copy a Llama-like checkpoint so that its function stays and its weights lie on no quantization grid.

Some checkpoints exist only as the dequantization of a low-bit file. Their weights then take few values per block, and a
format whose blocks happen to line up with those of the file looks lossless. The cure is a change of basis that no grid
survives: wherever a producer and its consumers share a channel axis, multiply the producer by random factors and divide
the consumers by them. A Llama block has four such axes:

    attention norm -> q, k, v        v -> o (each key-value head feeds a group of query heads)
    MLP norm       -> gate, up       up -> down

Factors are exp(0.15 z) with z ~ N(0, 1), drawn in the order above, block after block, from seed 0: the same model comes
out everywhere. They are small enough to leave the distribution of the weights alone.

    python benchmarks/offgrid.py MODEL_DIR OUT_DIR
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SPREAD = 0.15
PROBE = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2."
TOLERANCE = 1e-3  # of the largest logit: far above float32 rounding, far below any wrong factor

Draw = Callable[[int], Tensor]


def rescale(producer: Any, factors: Tensor, consumers: Sequence[nn.Linear], shared: Tensor | None = None) -> None:
    """Multiply the output channels of `producer` by `factors` and divide the input channels of `consumers` by them.

    `producer` is a norm (weight [channels]) or a linear layer (weight [channels, in]). `shared` replaces `factors` on
    the consumers' side where one producer channel feeds several of their input channels.
    """
    producer.weight.mul_(factors if producer.weight.dim() == 1 else factors[:, None])
    if getattr(producer, "bias", None) is not None:
        producer.bias.mul_(factors)
    for consumer in consumers:
        consumer.weight.div_(factors if shared is None else shared)


def rescale_block(block: Any, draw: Draw, heads: int, kv_heads: int) -> None:
    """Move the four shared axes of one decoder block, in place."""
    attention, mlp = block.self_attn, block.mlp
    hidden, inner = mlp.gate_proj.in_features, mlp.up_proj.out_features
    rescale(block.input_layernorm, draw(hidden), [attention.q_proj, attention.k_proj, attention.v_proj])
    value = draw(attention.v_proj.out_features)
    per_query = value.view(kv_heads, -1).repeat_interleave(heads // kv_heads, dim=0).flatten()
    rescale(attention.v_proj, value, [attention.o_proj], per_query)
    rescale(block.post_attention_layernorm, draw(hidden), [mlp.gate_proj, mlp.up_proj])
    rescale(mlp.up_proj, draw(inner), [mlp.down_proj])


@torch.no_grad()
def take_off_grid(model: Any, seed: int = 0) -> None:
    """Rescale every block of a Llama-like causal LM (float32, on the CPU) in place; the function does not change."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    for block in model.model.layers:
        rescale_block(
            block,
            lambda n: torch.exp(SPREAD * torch.randn(n, generator=generator)),
            config.num_attention_heads,
            config.num_key_value_heads,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists: give a directory that does not, or remove it")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    probe = tokenizer(PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(probe).logits
        take_off_grid(model)
        change, largest = (model(probe).logits - before).abs().max().item(), before.abs().max().item()
    print(f"largest logit change {change:.2e} (largest logit {largest:.1f})")
    if change > TOLERANCE * largest:
        raise SystemExit(f"{args.model}: the function changed, so this is not a Llama-like model; nothing was written")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
