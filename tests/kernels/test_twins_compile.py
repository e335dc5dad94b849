"""Every twin compiles to machine code for NVIDIA GPUs, which needs no GPU: what the interpreter cannot show.

Also that products of many rows use the tensor cores, that tiles fit the shared memory, and that nothing spills.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from fewbits.kernels.triton import interpreting

pytest.importorskip("triton", reason="Triton is not installed: no wheel for this platform")
if interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl
from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbits.kernels.triton import byte, ints, product, rows, scaled, table, tune

pytestmark = pytest.mark.slow
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a block may have, by compute capability."""
TYPES: dict[str, Any] = dict.fromkeys(("M", "N", "K", "stride", "xg", "wg"), "i32")
TYPES |= {"x": "*bf16", "y": "*bf16", "bias": "*bf16", "order": "*i32", "sx": "*fp32", "sw": "*fp32"}
ALIGNED = ("K", "N", "stride")
# Decoder, types of the weight's tensors, constants, and columns that share parameters (0: all).
WEIGHTS: dict[str, tuple[Any, tuple[str | None, ...], tuple[int, ...], int]] = {
    "int4": (ints.decode, ("*i32", "*fp16", "*u8"), (128, 4, 0, 0), 128),
    "int3 symmetric": (ints.decode, ("*i32", "*bf16", None), (64, 2, 1, 0), 64),
    "int2, ragged groups": (ints.decode, ("*i32", "*fp32", "*u8"), (20, 2, 0, 0), 20),
    "nf4": (table.decode, ("*i32", "*fp32", "*fp32", None, None, None), (64, False), 64),
    "nf4, double": (table.decode, ("*i32", "*u8", "*fp32", "*fp32", "*fp32", "*fp32"), (64, False), 64),
    "fp8": (byte.decode, ("*u8", "*fp32"), (1, 4096, 1), 0),
    "fp8 as bits": (byte.decode, ("*u8", "*fp32"), (128, 128, 2), 128),
    "int8": (byte.decode, ("*i8", "*fp32"), (1, 4096, 0), 0),
}


def compiled(kernel: Any, types: dict[str, Any], constants: dict[str, Any], capability: int, t: tune.Tiles) -> Any:
    """The kernel for a GPU, its pointers and sizes multiples of 16."""
    signature: dict[str, Any] = {}
    fixed, attributes = dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        kind = signature[name] = "constexpr" if name in constants else types[name]
        parts = kind if isinstance(kind, tuple) else (kind,)
        if isinstance(kind, tuple):
            signature[name] = tuple("constexpr" if p is None else p for p in kind)
            fixed |= {(i, j): None for j, p in enumerate(kind) if p is None}
        for j, p in enumerate(parts):
            if p is not None and (p.startswith("*") or name in ALIGNED) and name not in constants:
                attributes[(i, j) if isinstance(kind, tuple) else (i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    options = {"num_warps": t.warps, "num_stages": t.stages}
    result = build(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(result.asm["cubin"]) > 0 and result.metadata.shared <= SHARED[capability]
    assert not re.search(r"\.local\s", result.asm["ptx"])
    return result


def uses_tensor_cores(result: Any) -> bool:
    return re.search(r"\bw?g?mma\.", result.asm["ptx"]) is not None


def linear(name: str, t: tune.Tiles) -> tuple[dict[str, Any], dict[str, Any]]:
    decoder, tensors, spec, run = WEIGHTS[name]
    constants = {"DECODE": decoder, "SPEC": spec, "SPAN": product.span_of(run, t.k), "BN": t.n, "BK": t.k}
    return TYPES | {"W": tensors}, constants


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", WEIGHTS)
def test_linear(name: str, capability: int) -> None:
    if name == "fp8" and capability < 89:
        pytest.skip("this generation has no fp8")
    for height in (1, 4):
        t = tune.FEW[height][0]
        types, constants = linear(name, t)
        compiled(product.few_rows, types, constants | {"BM": height, "order": None, "bias": None}, capability, t)
    for height in (16, 128):
        t = tune.MANY[height][0]
        types, constants = linear(name, t)
        more = {"DOT": tl.bfloat16, "SPLIT": 1, "BM": t.m}
        assert uses_tensor_cores(compiled(product.many_rows, types, constants | more, capability, t))


@pytest.mark.parametrize("height", tune.MANY)
def test_every_tile_fits_the_smallest_shared_memory(height: int) -> None:
    for t in tune.MANY[height]:
        types, constants = linear("int4", t)
        compiled(product.many_rows, types, constants | {"DOT": tl.bfloat16, "SPLIT": 2, "BM": t.m}, 89, t)


@pytest.mark.parametrize("capability", [80, 90])
def test_scaled(capability: int) -> None:
    t, types = tune.FEW[1][0], TYPES | {"x": "*i8", "w": "*i8"}
    shared = {"XROWS": 1, "WROWS": 1}
    compiled(scaled.few_integers, types, shared | {"BM": 1, "BN": t.n, "BK": t.k}, capability, t)
    for height in tune.MANY:
        t = tune.MANY[height][0]
        sizes = shared | {"BM": t.m, "BN": t.n, "BK": scaled.COLUMNS, "SPLIT": 1}
        assert uses_tensor_cores(compiled(scaled.dot, types, sizes | {"GROUP": 0, "ACC": tl.int32}, capability, t))
        if capability < 89:
            continue
        for group in (0, 128):
            bits = types | {"x": "*u8", "w": "*u8"}
            found = compiled(scaled.dot, bits, sizes | {"GROUP": group, "ACC": tl.float32}, capability, t)
            assert uses_tensor_cores(found)


@pytest.mark.parametrize("capability", [80, 90])
def test_rows(capability: int) -> None:
    for floating in (False, True):
        constants = {"TOP": 448.0 if floating else 127.0, "FLOAT": floating, "BK": 2048}
        types = TYPES | {"codes": "*u8", "scale": "*fp32"}
        compiled(rows.codes_of_rows, types, constants, capability, tune.Tiles(1, 1, 1))
