"""Decode with transformers and bitsandbytes on the CPU; runs in bitsandbytes' own environment.

    python bitsandbytes_decode.py CHECKPOINT --dtype bfloat16

Prints a JSON line when the model is there, then one for every line of stdin, a number of tokens: the tokens per second
after the first two, by the clock and by processor time. The other side of ``benchmarks/decode_nf4.py``.
"""

import argparse
import json
import sys
import time

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("model")
    args.add_argument("--dtype", default="bfloat16")
    args.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = args.parse_args()
    torch.set_num_threads(a.threads)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype), device_map="cpu").eval()
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)}
    ids = torch.randint(3, model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))

    def seconds(count: int) -> tuple[float, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, **options
            )
        return time.perf_counter() - begin, time.process_time() - cpu

    seconds(2)
    print(json.dumps({"version": bitsandbytes.__version__, "layers": sorted(kinds)}), flush=True)
    for line in sys.stdin:
        tokens = int(line)
        short, long = seconds(2), seconds(2 + tokens)
        print(json.dumps({"wall": tokens / (long[0] - short[0]), "cpu": tokens / (long[1] - short[1])}), flush=True)


if __name__ == "__main__":
    main()
