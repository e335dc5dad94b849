"""The logits of a checkpoint in foreign software, without our package.

    python benchmarks/peers/logits.py CHECKPOINT --ids rows.safetensors --out logits.safetensors

``logits`` is float32 [rows, seq, V] for the token rows ``ids``; the model computes in float32.
"""

import argparse
from pathlib import Path

import torch
from peer_job import read_ids, report
from safetensors.torch import save_file


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32, device_map="cpu").eval()
    save_file({"logits": model(input_ids=read_ids(args.ids)).logits.float().contiguous()}, args.out)
    kinds = {type(m).__module__.split(".")[0] for m in model.modules()} - {"torch", "transformers"}
    report(loader=", ".join(sorted(kinds)) or "transformers")


if __name__ == "__main__":
    main()
