"""Quantize with auto-round, in its own environment; the result is written dense, each weight as its code has it.

    python benchmarks/peers/autoround_quantize.py MODEL OUT --ids rows.safetensors --bits 3 --group-size 128 --affine

Its defaults but for what the request names, the rows, and float32 in place of bfloat16 (``--amp`` for the latter).
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path

from peer_job import read_ids, report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantize with auto-round; prints one JSON line.")
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--affine", action="store_true")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--layers", type=int, help="only that many blocks, to see how long one takes")
    parser.add_argument("--amp", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = read_ids(args.ids)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.layers:
        model.model.layers = model.model.layers[: args.layers]
        model.config.num_hidden_layers = args.layers
    rows = torch.utils.data.DataLoader(ids, batch_size=args.batch)
    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.affine,
        iters=args.iters,
        dataset=rows,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=args.batch,
        device_map="cpu",
        enable_torch_compile=False,
        amp=args.amp,
    )
    started = time.perf_counter()
    tool.quantize()
    seconds = time.perf_counter() - started
    tool.save_quantized(str(args.out), format="fake")
    report(tool="auto-round", version=version("auto-round"), seconds=seconds)


if __name__ == "__main__":
    main()
