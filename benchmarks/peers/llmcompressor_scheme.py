"""Quantize with one of llm-compressor's named schemes, in its own environment: round to nearest, no solver.

    python benchmarks/peers/llmcompressor_scheme.py MODEL OUT --scheme FP8_DYNAMIC [--smoothquant --ids FILE]

Only what the request names is set: everything else is llm-compressor's default. The model is loaded in float32, as ours
is. Schemes with dynamic inputs need no data; SmoothQuant and static inputs take the token rows.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_job import as_samples, read_ids, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", required=True, help="W8A8, FP8_DYNAMIC, FP8_BLOCK, NVFP4A16, MXFP4A16, ...")
    parser.add_argument("--smoothquant", action="store_true", help="smooth with its defaults before")
    parser.add_argument("--ids", type=Path, help='safetensors file with an int64 tensor "ids" [rows, seq]')
    args = parser.parse_args()
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    recipe: list[Any] = [SmoothQuantModifier()] if args.smoothquant else []
    recipe.append(QuantizationModifier(targets="Linear", scheme=args.scheme, ignore=["lm_head"]))
    data: dict[str, Any] = {}
    if args.ids is not None and args.smoothquant:
        from datasets import Dataset

        ids = read_ids(args.ids)
        data = {"dataset": Dataset.from_list(as_samples(ids)), "max_seq_length": ids.shape[1]}
        data |= {"num_calibration_samples": ids.shape[0], "shuffle_calibration_samples": False}
        data |= {"tokenizer": AutoTokenizer.from_pretrained(args.model)}
    started = time.perf_counter()
    oneshot(model=model, recipe=recipe, **data)
    seconds = time.perf_counter() - started
    model.save_pretrained(args.out, save_compressed=True)
    report(tool="llmcompressor", version=version("llmcompressor"), scheme=args.scheme, seconds=seconds)


if __name__ == "__main__":
    main()
