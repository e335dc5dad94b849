"""Weight-only products of one row against int4, the machine's read bandwidth and torch, all in one run.

    python benchmarks/matvec.py [--quick] [--size 4096] [--group 64] [--gigabytes 1.5] [--rounds 9] [--json FILE]

Every product takes the next of many copies of its weight, so that nothing is in a cache. What is compared is timed in
turns: figures are medians over the rounds, of times and of ratios within a round. "Of bandwidth" is the bytes of a
product (codes, scales, zeros) over the read bandwidth, as a share of its time; "per byte" is its time per byte over
that of int4 with the same input. 512 rows (a prompt) follow: int4 and W8A8 layers against torch.

``--quick`` leaves out other widths and torch's int4, and 512 rows in bfloat16 where one call takes over a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fewbits.activations import PRESETS, Inputs
from fewbits.grids import Int
from fewbits.grids.codebook import codebook
from fewbits.grids.element import ELEMENTS
from fewbits.kernels import qlinear, qrows, qtable
from fewbits.kernels.sparse import sparse_matmul
from fewbits.runtime import QuantLinear
from fewbits.tensor import Quantized

ROWS, SLOW = 512, 1.0
SHARES = (0.0045, 0.02)  # SqueezeLLM's, about SpQR's
INPUTS = {"bf16": torch.bfloat16, "f32": torch.float32}
E2M1 = torch.tensor([ELEMENTS["e2m1"].value(c) for c in range(16)])
TABLES: dict[str, tuple[torch.Tensor, int, torch.dtype]] = {  # values, columns that share a scale, how it is kept
    "nf4": (codebook("nf4").values, 64, torch.float32),
    "fp4-bnb": (codebook("fp4").values, 64, torch.float32),
    "fp8": (qtable.fp8_table(qtable.E4M3), -1, torch.float32),
    "mxfp4": (E2M1, 32, torch.bfloat16),
    "nvfp4": (E2M1, 16, torch.bfloat16),
}


@dataclass
class Product:
    """One product of one row, the bytes that it reads, and what it is measured against: int4 with the same input."""

    run: Callable[[], object]
    nbytes: int
    against: str | None = None


def seconds(f: Callable[[], object], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        f()
    return (time.perf_counter() - begin) / times


def ints(size: int, bits: int, group: int) -> qlinear.PackedWeight:
    codes = torch.randint(0, 2**bits, (size, size), dtype=torch.uint8)
    zero = torch.full((size, size // group), 2 ** (bits - 1), dtype=torch.uint8)
    return qlinear.pack_weight(codes, (torch.rand(zero.shape) * 0.01).half(), zero, bits, group)


def table(size: int, name: str) -> qlinear.PackedWeight:
    values, group, kept = TABLES[name]
    finite = values.isfinite().nonzero()[:, 0].to(torch.uint8)
    codes = finite[torch.randint(0, len(finite), (size, size))]
    groups = 1 if group == -1 else size // group
    return qtable.pack_table(codes, (torch.rand(size, groups) * 0.01).to(kept), values, group)


def rows(size: int, bits: int) -> qlinear.PackedWeight:
    """SqueezeLLM: a table for each row."""
    codes = torch.randint(0, 2**bits, (size, size), dtype=torch.uint8)
    return qrows.pack_rows(codes, (torch.randn(size, 2**bits) * 0.01).half())


def nested(size: int, bits: int) -> qlinear.PackedWeight:
    """SpQR without its single weights: scales and zero points of 3 bits in groups of 16."""
    codes = torch.randint(0, 2**bits, (size, size), dtype=torch.uint8)
    scale, zero = (torch.randint(0, 8, (size, size // 16), dtype=torch.uint8) for _ in range(2))
    ranges = torch.rand(-(-size // 16), size // 16, 4).half()
    return qlinear.pack_nested(codes, scale, zero, ranges, bits, 16)


def singles(size: int, share: float) -> tuple[torch.Tensor, ...]:
    """Offsets, columns and values of the weights that stay beside the codes, as :func:`sparse_matmul` takes them."""
    kept = torch.rand(size, size) < share
    offsets = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    columns = kept.nonzero()[:, 1].int()
    return offsets, columns, (torch.randn(len(columns)) * 0.01).half()


def w8a8(size: int) -> QuantLinear:
    """int8 weights with a scale per row, int8 inputs with a scale per token."""
    codes = torch.randint(1, 256, (size, size), dtype=torch.uint8)
    q = Quantized(Int(8, -1, symmetric=True), codes, {"scale": torch.rand(size, 1) * 0.01})
    return QuantLinear.from_quantized(Quantized(q.grid, q.codes, q.params, inputs=Inputs(PRESETS["int8"])))


def copies(one: qlinear.PackedWeight, gigabytes: float) -> Any:
    """Endlessly, weights like ``one`` that lie apart in memory."""
    count = max(8, int(gigabytes / 4 * 1e9 / one.nbytes))
    fixed, parts = (one.kind, one.shape, one.group), (one.codes, one.scale, one.zero)
    others = [qlinear.rebuild(*fixed, *(t.clone() for t in parts), one.order, one.table) for _ in range(count - 1)]
    return cycle([one, *others])


def ours(size: int, group: int, gigabytes: float, quick: bool) -> dict[str, Product]:
    found = {}
    made = {f"int{bits}": partial(ints, size, bits, group) for bits in ((4,) if quick else (4, 2, 3, 8))}
    made |= {name: partial(table, size, name) for name in TABLES if not quick or name != "fp4-bnb"}
    made |= {f"table per row, {bits} bits": partial(rows, size, bits) for bits in (3, 4)}
    made |= {"nested scales, 3 bits": partial(nested, size, 3)}
    for name, make in made.items():
        one = make()
        weights = copies(one, gigabytes)
        for kind, dtype in INPUTS.items():
            x = torch.randn(1, size).to(dtype)
            run = partial(lambda x, w: qlinear.matmul(x, next(w)), x, weights)
            found[f"{name}, {kind} input"] = Product(run, one.nbytes, f"int4, {kind} input")
    for share in SHARES:
        entries = singles(size, share)
        nbytes = sum(t.nbytes for t in entries)
        others = cycle([tuple(t.clone() for t in entries) for _ in range(max(8, int(gigabytes / 4 * 1e9 / nbytes)))])
        for kind, dtype in INPUTS.items():
            x = torch.randn(1, size).to(dtype)
            run = partial(lambda x, all_: sparse_matmul(x, *next(all_)), x, others)
            found[f"single weights, {share:.2%}, {kind} input"] = Product(run, nbytes, f"int4, {kind} input")
    layers = [w8a8(size) for _ in range(max(4, int(gigabytes / 4 * 1e9 / size**2)))]
    x, turns = torch.randn(1, size).bfloat16(), cycle(layers)
    found["w8a8, bf16 input"] = Product(lambda: next(turns)(x), layers[0].nbytes, "int4, bf16 input")
    return found


def torchs(size: int, group: int, gigabytes: float, quick: bool) -> dict[str, Product]:
    x, first = torch.randn(1, size).bfloat16(), torch.randn(size, size).bfloat16()
    dense = cycle([first.clone() for _ in range(max(8, int(gigabytes / 4 * 1e9 / first.nbytes)))])
    found = {"torch bf16": Product(lambda: F.linear(x, next(dense)), first.nbytes)}
    if not quick:
        nbytes = size * size // 2 + size * size // group * 4
        codes = torch.randint(0, 16, (size, size), dtype=torch.int32)
        one = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        others = cycle([one.clone() for _ in range(max(8, int(gigabytes / 4 * 1e9 / nbytes)))])
        params = torch.rand(size // group, size, 2).bfloat16()
        run = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(others), group, params)  # noqa: E731
        found["torch int4pack"] = Product(run, nbytes)
    return found


def prompt(size: int, group: int, rounds: int, quick: bool) -> dict[str, float]:
    """Median seconds of ``ROWS`` rows."""
    x, w = torch.randn(ROWS, size).bfloat16(), torch.randn(size, size).bfloat16()
    wide, weight, layer = w.float(), ints(size, 4, group), w8a8(size)
    runs: dict[str, Callable[[], object]] = {
        "torch bf16": lambda: F.linear(x, w),
        "torch f32": lambda: F.linear(x.float(), wide),
        "int4": lambda: qlinear.matmul(x, weight),
        "w8a8": lambda: layer(x),
    }
    some = x[: ROWS // 16]
    if quick and 16 * seconds(lambda: F.linear(some, w), 1) > SLOW:
        del runs["torch bf16"]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, 1))
    return {name: statistics.median(t) for name, t in times.items()}


def measure(products: dict[str, Product], rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Read bandwidth in bytes per second, and seconds of each product in every round."""
    big, read = torch.ones(int(1e8)), []
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds):
        read.append(big.nbytes / seconds(big.sum, 1))
        for name, p in products.items():
            p.run()  # what was before is not this one's fault
            times[name].append(seconds(p.run, 12))
    return statistics.median(read), times


def report(
    products: dict[str, Product], bandwidth: float, times: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    found = {}
    for name, p in products.items():
        t = statistics.median(times[name])
        found[name] = {"ms": t * 1e3, "bytes": p.nbytes, "gb_per_s": p.nbytes / t / 1e9}
        found[name]["of_bandwidth"] = p.nbytes / bandwidth / t
        beside = ""
        if p.against is not None:
            share = products[p.against].nbytes / p.nbytes
            ratios = (a / b * share for a, b in zip(times[name], times[p.against], strict=True))
            found[name]["per_byte_against_int4"] = statistics.median(ratios)
            beside = f"   {found[name]['per_byte_against_int4']:5.2f} x int4 per byte"
        print(f"{name:34} {t * 1e3:7.3f} ms  {p.nbytes / t / 1e9:5.1f} GB/s  {p.nbytes / bandwidth / t:4.0%}{beside}")
    return found


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--quick", action="store_true", help="a minute: the grids that matter most, few rounds")
    args.add_argument("--size", type=int, default=4096)
    args.add_argument("--group", type=int, default=64, help="of integers")
    args.add_argument("--gigabytes", type=float, help="weights in rotation; default 1.5, quick 0.3")
    args.add_argument("--rounds", type=int, help="default 9, quick 7")
    args.add_argument("--json", type=Path)
    a = args.parse_args()
    gigabytes, rounds = a.gigabytes or (0.3 if a.quick else 1.5), a.rounds or (7 if a.quick else 9)
    products = ours(a.size, a.group, gigabytes, a.quick) | torchs(a.size, a.group, gigabytes, a.quick)
    bandwidth, times = measure(products, rounds)
    threads = torch.get_num_threads()
    print(f"{a.size} x {a.size}, {qlinear.isa()}, {threads} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    result: dict[str, Any] = {
        "size": a.size,
        "read_gb_per_s": bandwidth / 1e9,
        "isa": qlinear.isa(),
        "threads": threads,
    }
    result["products"] = report(products, bandwidth, times)
    many = prompt(a.size, a.group, 3 if a.quick else rounds, a.quick)
    result["prompt_512_ms"] = {name: t * 1e3 for name, t in many.items()}
    print(f"{ROWS} rows:", ", ".join(f"{name} {t * 1e3:.0f} ms" for name, t in many.items()))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
