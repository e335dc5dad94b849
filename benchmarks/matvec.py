"""Weight-only products against the machine's read bandwidth and torch, all in one run.

    python benchmarks/matvec.py [--size 4096] [--group 64] [--gigabytes 1.5] [--rounds 9] [--json FILE]

Every product takes the next of many copies of its weight, so that nothing is in a cache. What is compared is timed in
turns and the median is taken. The limit of a product is its bytes (codes, scales, zeros) over the read bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F

from fewbits.kernels import qlinear


def seconds(f: Callable[[], object], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        f()
    return (time.perf_counter() - begin) / times


def packed(size: int, bits: int, group: int, copies: int) -> list[qlinear.PackedWeight]:
    codes = torch.randint(0, 2**bits, (size, size), dtype=torch.uint8)
    scale = (torch.rand(size, size // group) * 0.01).half()
    zero = torch.full((size, size // group), 2 ** (bits - 1), dtype=torch.uint8)
    return [qlinear.pack_weight(codes, scale, zero, bits, group) for _ in range(copies)]


def torch_int4(size: int, group: int, copies: int) -> list[torch.Tensor]:
    codes = torch.randint(0, 16, (size, size), dtype=torch.int32)
    one = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    return [one.clone() for _ in range(copies)]


def candidates(size: int, group: int, gigabytes: float) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (one product of one row, bytes that it reads)."""
    x, found = torch.randn(1, size), {}
    xb = x.bfloat16()
    for bits in (4, 2, 3, 8):
        nbytes = packed(size, bits, group, 1)[0].nbytes
        weights = cycle(packed(size, bits, group, max(8, int(gigabytes / 4 * 1e9 / nbytes))))
        found[f"int{bits}, bf16 input"] = (lambda w=weights: qlinear.matmul(xb, next(w))), nbytes
        found[f"int{bits}, f32 input"] = (lambda w=weights: qlinear.matmul(x, next(w))), nbytes
    first = torch.randn(size, size).bfloat16()
    dense = cycle([first.clone() for _ in range(max(8, int(gigabytes / 4 * 1e9 / (2 * size * size))))])
    found["torch bf16"] = (lambda: F.linear(xb, next(dense))), 2 * size * size
    nbytes = size * size // 2 + size * size // group * 4
    others = cycle(torch_int4(size, group, max(8, int(gigabytes / 4 * 1e9 / nbytes))))
    params = torch.rand(size // group, size, 2).bfloat16()
    found["torch int4pack"] = (
        (lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(xb, next(others), group, params)),
        nbytes,
    )
    return found


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--size", type=int, default=4096)
    args.add_argument("--group", type=int, default=64)
    args.add_argument("--gigabytes", type=float, default=1.5, help="weights in rotation, all kinds together")
    args.add_argument("--rounds", type=int, default=9)
    args.add_argument("--json", type=Path)
    a = args.parse_args()
    big = torch.ones(int(1e8))
    products = candidates(a.size, a.group, a.gigabytes)
    times: dict[str, list[float]] = {name: [] for name in products}
    read: list[float] = []
    prompt: dict[str, list[float]] = {"torch bf16": [], "int4": []}
    weight, w = packed(a.size, 4, a.group, 1)[0], torch.randn(a.size, a.size).bfloat16()
    rows = torch.randn(512, a.size).bfloat16()
    for _ in range(a.rounds):
        read.append(big.nbytes / seconds(big.sum, 1))
        for name, (f, _) in products.items():
            times[name].append(seconds(f, 12))
        prompt["torch bf16"].append(seconds(lambda: F.linear(rows, w), 2))
        prompt["int4"].append(seconds(lambda: qlinear.matmul(rows, weight), 2))
    bandwidth = statistics.median(read)
    medians = {name: statistics.median(t) for name, t in times.items()}
    result = {
        "read_gb_per_s": bandwidth / 1e9,
        "isa": qlinear.isa(),
        "threads": torch.get_num_threads(),
        "products": {},
    }
    print(f"{a.size} x {a.size}, group {a.group}, {qlinear.isa()}, {torch.get_num_threads()} threads")
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    for name, t in medians.items():
        limit = products[name][1] / bandwidth
        result["products"][name] = {"ms": t * 1e3, "of_bandwidth": limit / t}
        print(f"{name:18} {t * 1e3:7.3f} ms   limit {limit * 1e3:6.3f} ms   {limit / t:5.0%} of it")
    ours, dense = statistics.median(prompt["int4"]), statistics.median(prompt["torch bf16"])
    result["prompt_512"] = {"int4_ms": ours * 1e3, "torch_bf16_ms": dense * 1e3, "ratio": ours / dense}
    print(f"512 rows: int4 {ours * 1e3:.1f} ms, torch bf16 {dense * 1e3:.1f} ms, ratio {ours / dense:.2f}")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
