"""Quantize with GPTQModel, in its own environment.

    python benchmarks/peers/gptqmodel_quantize.py MODEL OUT --ids rows.safetensors --bits 4 --group-size 64 --symmetric

Only what the request names is set: everything else is GPTQModel's default. The model is loaded in float32, as ours is,
except for AWQ, whose layers it packs from half precision only.
"""

import os
import time
from importlib.metadata import version

# With two cores or fewer its thread pool leaves one worker, and loading asks for two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from peer_job import as_samples, quantize_arguments, read_ids, report

BATCH = 4
# The first GPTQ layout stores zero points minus one, which an affine zero of 0 does not survive; the second fixed it.
FORMATS = {("gptq", True): "gptq", ("gptq", False): "gptq_v2", ("awq", True): "gemm", ("awq", False): "gemm"}


def main() -> None:
    args = quantize_arguments("GPTQModel", ("gptq", "awq"))
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=args.bits,
        group_size=args.group_size,
        sym=args.symmetric,
        method=args.method,
        format=FORMATS[args.method, args.symmetric],
    )
    samples = as_samples(read_ids(args.ids))
    model = GPTQModel.load(args.model, config, dtype=torch.float16 if args.method == "awq" else torch.float32)
    started = time.perf_counter()
    model.quantize(samples, batch_size=BATCH)
    seconds = time.perf_counter() - started
    model.save(str(args.out))
    report(tool="gptqmodel", version=version("gptqmodel"), method=args.method, seconds=seconds)


if __name__ == "__main__":
    main()
