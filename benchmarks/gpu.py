"""Products of quantized layers on a CUDA GPU: our Triton twins against torch (cuBLAS) and bitsandbytes, in one run.

    python benchmarks/gpu.py [--rows 1,8,64,512] [--shapes 4096x4096,4096x11008] [--rounds 30] [--out benchmarks/gpu.md]

Every product is first compared with the plain-torch reference. Times are CUDA events around one call, medians over the
rounds; the candidates take turns, and before each call a buffer larger than the L2 cache is written, so no weight is in
it. Shapes are ``out x in``. bitsandbytes is measured when it is installed, FP8 where the GPU multiplies it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import gpu, triton

Call = Callable[[], Tensor]
GROUP, BLOCK = 128, 64
TOLERANCE = 2.0**-6
"""Largest error over largest result, for bfloat16 operands."""


def weights(out: int, columns: int) -> dict[str, gpu.Weight]:
    """Random weights of every kind that is decoded on the way into the product."""
    found: dict[str, gpu.Weight] = {}
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
        scale = (torch.rand(out, columns // GROUP) * 0.01).half()
        zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8)
        found[f"W{bits}A16, groups of {GROUP}"] = gpu.pack_int(codes, scale, zero, bits, GROUP)
    codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8)
    absmax = torch.rand(out * columns // BLOCK) * 0.1
    found[f"4-bit table (NF4, FP4), blocks of {BLOCK}"] = gpu.pack_table(
        codes, absmax, torch.linspace(-1, 1, 16), BLOCK
    )
    three = torch.randint(0, 8, (out, columns), dtype=torch.uint8)
    found["3-bit table per row (SqueezeLLM)"] = gpu.pack_levels(three, torch.randn(out, 8).half())
    nibbles = [torch.randint(0, 8, (out, columns // 16), dtype=torch.uint8) for _ in range(2)]
    ranges = [torch.rand(out // 16, columns // 16).half() * top for top in (0.01, 0.002, 3.0, 0.3)]
    found["3 bits, nested scales (SpQR)"] = gpu.pack_nested(three, *nibbles, ranges, 3, 16, 16)
    fp8 = torch.randn(out, columns).to(gpu.E4M3)
    found["FP8 weight, scale per row"] = gpu.pack_bytes(fp8, torch.rand(out, 1) * 0.01)
    found["FP8 weight, 128 x 128 blocks"] = gpu.pack_bytes(
        fp8, torch.rand(out // 128, columns // 128) * 0.01, (128, 128)
    )
    return found


def scaled(x: Tensor, out: int, kind: torch.dtype) -> tuple[Call, Call]:
    """Rows quantized and multiplied in one byte, by the twins and by plain torch."""
    codes = torch.randint(-127, 128, (out, x.shape[1]), dtype=torch.int8)
    w = gpu.pack_bytes(codes if kind == torch.int8 else (codes.float() / 30).to(kind), torch.rand(out, 1) * 0.01)

    def reference() -> Tensor:
        return gpu.reference_scaled(*gpu.reference_rows(x, kind), w, None, x.dtype)

    return lambda: gpu.scaled_linear(*gpu.quantize_rows(x, kind), w, dtype=x.dtype), reference


def cublas(x: Tensor, out: int) -> dict[str, Call]:
    """torch's own products, which are cuBLAS."""
    dense = torch.randn(out, x.shape[1], dtype=x.dtype)
    found: dict[str, Call] = {"torch bf16 F.linear (cuBLAS)": lambda: F.linear(x, dense)}
    integers = torch.randint(-127, 128, dense.shape, dtype=torch.int8)
    xi, _ = gpu.reference_rows(x, torch.int8)
    if len(x) > 16:
        found["torch._int_mm (cuBLAS), product alone"] = lambda: torch._int_mm(xi, integers.t())
    if triton.native_fp8(x.device):
        x8, s = gpu.reference_rows(x, gpu.E4M3)
        w8, t = dense.to(gpu.E4M3), torch.ones(1, out)
        found["torch._scaled_mm fp8 (cuBLAS), product alone"] = lambda: torch._scaled_mm(
            x8, w8.t(), scale_a=s, scale_b=t, out_dtype=x.dtype
        )
    return found


def bitsandbytes(x: Tensor, out: int) -> dict[str, Call]:
    """Its 4-bit and 8-bit layers; none when it is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return {}
    found: dict[str, Call] = {}
    for kind in ("nf4", "fp4"):
        layer = bnb.nn.Linear4bit(x.shape[1], out, bias=False, compute_dtype=x.dtype, quant_type=kind, device="cpu")
        layer = layer.to("cuda")
        found[f"bitsandbytes {kind}"] = lambda m=layer: m(x)
    layer = bnb.nn.Linear8bitLt(x.shape[1], out, bias=False, has_fp16_weights=False, threshold=0.0, device="cpu")
    half, moved = x.half(), layer.half().to("cuda")
    found["bitsandbytes int8"] = lambda: moved(half)
    return found


def candidates(rows: int, out: int, columns: int) -> tuple[dict[str, Call], dict[str, float]]:
    """Name to call, and for ours the error against the reference."""
    x = torch.randn(rows, columns, dtype=torch.bfloat16)
    calls, errors = cublas(x, out) | bitsandbytes(x, out), {}
    pairs: dict[str, tuple[Call, Call]] = {
        name: (lambda w=w: gpu.linear(x, w), lambda w=w: gpu.reference_linear(x, w))
        for name, w in weights(out, columns).items()
    }
    pairs["W8A8 int8, rows quantized too"] = scaled(x, out, torch.int8)
    if triton.native_fp8(x.device):
        pairs["W8A8 FP8, rows quantized too"] = scaled(x, out, gpu.E4M3)
    for name, (ours, reference) in pairs.items():
        want = reference().float()
        errors[name] = float((ours().float() - want).abs().max() / want.abs().max())
        calls[name] = ours
    return calls, errors


def times(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median microseconds of each call, with a cold L2 cache."""
    flush = torch.empty(512 << 20, dtype=torch.uint8)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            found[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(t) for name, t in found.items()}


def section(out: int, columns: int, all_rows: list[int], rounds: int) -> list[str]:
    """The table of one shape."""
    table: dict[str, dict[int, float]] = {}
    worst: dict[str, float] = {}
    for rows in all_rows:
        calls, errors = candidates(rows, out, columns)
        for name, t in times(calls, rounds).items():
            table.setdefault(name, {})[rows] = t
        for name, e in errors.items():
            worst[name] = max(worst.get(name, 0.0), e)
            if e > TOLERANCE:
                raise SystemExit(f"{name}, {rows} rows of {out} x {columns}: error {e:.2e}; run the tests of the twins")
        torch.cuda.empty_cache()
        print(f"{out} x {columns}, {rows} rows: done", flush=True)
    lines = [f"## {out} x {columns}", "", f"| µs | {' | '.join(f'M = {r}' for r in all_rows)} | error |"]
    lines.append("| --- |" + " ---: |" * (len(all_rows) + 1))
    for name, row in table.items():
        cells = [f"{row[r]:.1f}" if r in row else "" for r in all_rows]
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{worst[name]:.1e}' if name in worst else ''} |")
    return [*lines, ""]


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--rows", default="1,8,64,512")
    args.add_argument("--shapes", default="4096x4096,4096x11008", help="out x in")
    args.add_argument("--rounds", type=int, default=30)
    args.add_argument("--out", type=Path, default=Path(__file__).parent / "gpu.md")
    a = args.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures on a CUDA GPU and torch sees none; nothing was measured or written")
    if triton.missing():
        raise SystemExit(f"the twins do not run: {triton.missing()}")
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    import triton as compiler

    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {compiler.__version__}"
    lines = ["# Products on a GPU", "", f"{torch.cuda.get_device_name()}; {versions}. `python benchmarks/gpu.py`", ""]
    lines += [" ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    rows = [int(r) for r in a.rows.split(",")]
    for shape in a.shapes.split(","):
        out, columns = (int(s) for s in shape.split("x"))
        lines += section(out, columns, rows, a.rounds)
    a.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
