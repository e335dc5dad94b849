"""Quantize with bitsandbytes through transformers, in its own environment, and save what it holds.

    python benchmarks/peers/bitsandbytes_quantize.py MODEL OUT --method nf4

The model is loaded in float32, as ours is; everything else is the default.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_job import report

METHODS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "llm.int8")


def config(method: str) -> dict[str, Any]:
    """Arguments of BitsAndBytesConfig."""
    if method == "llm.int8":
        return {"load_in_8bit": True}
    kind, _, nested = method.partition("-")
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": bool(nested)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=METHODS, required=True)
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    started = time.perf_counter()
    how = BitsAndBytesConfig(**config(args.method))
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, device_map="cpu", quantization_config=how
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(args.out)
    report(tool="bitsandbytes", version=version("bitsandbytes"), method=args.method, seconds=seconds)


if __name__ == "__main__":
    main()
