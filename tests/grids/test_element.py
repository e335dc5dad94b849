"""Every code point of every format up to 8 bits, against torch, ml_dtypes and gfloat, and against the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.grids.element import E8M0, ELEMENTS, cast, cast_error, seed_of

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ML = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e3m2": "float6_e3m2fn", "e2m3": "float6_e2m3fn"}
ML |= {"e2m1": "float4_e2m1fn", "e8m0": "float8_e8m0fnu"}
GF = {"e4m3": "format_info_ocp_e4m3", "e5m2": "format_info_ocp_e5m2", "e3m2": "format_info_ocp_e3m2"}
GF |= {"e2m3": "format_info_ocp_e2m3", "e2m1": "format_info_ocp_e2m1", "e8m0": "format_info_ocp_e8m0"}
EVERY = ELEMENTS | {"e8m0": E8M0}

# Largest, smallest normal, smallest positive: the table of the OCP specifications.
FACTS = {
    "e4m3": (448, 2**-6, 2**-9),
    "e5m2": (57344, 2**-14, 2**-16),
    "e3m2": (28, 0.25, 0.0625),
    "e2m3": (7.5, 1, 0.125),
    "e2m1": (6, 1, 0.5),
    "e3m0": (16, 0.25, 0.25),
    "e8m0": (2.0**127, 2.0**-127, 2.0**-127),
}


def codes(name: str) -> torch.Tensor:
    return torch.arange(EVERY[name].levels).to(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, all NaN being one."""
    a, b = (torch.where(torch.isnan(t), torch.nan, t).double().view(torch.int64) for t in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_largest_and_smallest(name: str) -> None:
    e = EVERY[name]
    assert (e.max, e.normal, e.smallest) == FACTS[name]
    values = e.decode(codes(name)).double()
    finite = values[torch.isfinite(values) & (values > 0)]
    assert float(finite.max()) == e.max and float(finite.min()) == e.smallest


@pytest.mark.parametrize("name", TORCH)
def test_every_code_is_torchs(name: str) -> None:
    assert same(ELEMENTS[name].decode(codes(name)), codes(name).view(TORCH[name]).float())


@pytest.mark.parametrize("name", ML)
def test_every_code_is_ml_dtypes(name: str) -> None:
    ml = pytest.importorskip("ml_dtypes")
    theirs = codes(name).numpy().view(getattr(ml, ML[name])).astype(np.float32)
    assert same(EVERY[name].decode(codes(name)), torch.from_numpy(theirs))


@pytest.mark.parametrize("name", GF)
def test_every_code_is_gfloats(name: str) -> None:
    pytest.importorskip("gfloat")
    from gfloat import decode_float, formats

    info = getattr(formats, GF[name])
    theirs = torch.tensor([decode_float(info, int(c)).fval for c in codes(name)], dtype=torch.float64)
    assert same(EVERY[name].decode(codes(name), torch.float64), theirs)
    assert EVERY[name].max == info.max and EVERY[name].bits == info.bits


def test_e2m1_and_e3m0_by_hand() -> None:
    assert ELEMENTS["e2m1"].decode(torch.arange(8).byte()).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert ELEMENTS["e3m0"].decode(torch.arange(8).byte()).tolist() == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert E8M0.decode(torch.tensor([0, 127, 254]).byte()).tolist() == [2.0**-127, 1, 2.0**127]


def probes(name: str) -> torch.Tensor:
    """Every value, every midpoint of neighbours, and both neighbours of each in float32."""
    e = ELEMENTS[name]
    values = torch.tensor(sorted({e.value(c) for c in range(e.top + 1)}))
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles])
    x = torch.cat([x, torch.nextafter(x, torch.tensor(math.inf)), torch.nextafter(x, torch.tensor(0.0))])
    return torch.cat([x, -x]).clamp(-e.max, e.max)


@pytest.mark.parametrize("name", ELEMENTS)
def test_encode_at_every_boundary(name: str) -> None:
    """Codes, midpoints and their neighbours: as torch and ml_dtypes cast them, and as gfloat rounds them."""
    e, x = ELEMENTS[name], probes(name)
    found = e.encode(x)
    assert torch.equal(e.encode(x.double()), found)
    if name in TORCH:
        assert torch.equal(found, x.to(TORCH[name]).view(torch.uint8))
    if name in ML:
        ml = pytest.importorskip("ml_dtypes")
        assert found.tolist() == x.numpy().astype(getattr(ml, ML[name])).view(np.uint8).tolist()
    if name in GF:
        pytest.importorskip("gfloat")
        from gfloat import RoundMode, encode_float, formats, round_float

        info = getattr(formats, GF[name])
        theirs = [encode_float(info, round_float(info, v, RoundMode.TiesToEven, True)) for v in x.tolist()]
        assert found.tolist() == theirs


def test_ties_of_e3m0_go_to_the_even_multiple_of_the_step() -> None:
    x = torch.tensor([0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0])
    assert ELEMENTS["e3m0"].nearest(x).tolist() == [0, 0.5, 1, 2, 4, 8, 16]


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_comes_back(name: str) -> None:
    e = ELEMENTS[name]
    values = e.decode(codes(name))
    finite = torch.isfinite(values)
    assert torch.equal(e.encode(values)[finite], codes(name)[finite])


@pytest.mark.parametrize("name", ELEMENTS)
def test_overflow_saturates(name: str) -> None:
    e = ELEMENTS[name]
    x = torch.tensor([e.max * 1.01, 464.0 * e.max / 448, 465.0 * e.max / 448, 1e6, math.inf])
    for sign in (1, -1):
        assert e.decode(e.encode(sign * x)).tolist() == [sign * e.max] * 5
    nan = e.decode(e.encode(torch.tensor([math.nan])))
    assert bool(torch.isnan(nan)) if e.nan is not None else float(nan) == 0


def test_ties_by_hand() -> None:
    """E4M3: 1.0625 → 1, 1.1875 → 1.25, 17 → 16, 19 → 20; half of the smallest → 0, a little more → the smallest."""
    e, s = ELEMENTS["e4m3"], 2.0**-9
    x = torch.tensor([1.0625, 1.1875, 17, 19, 0.5 * s, 0.50005 * s, 1.5 * s])
    assert e.nearest(x).tolist() == [1, 1.25, 16, 20, 0, s, 2 * s]
    assert e.encode(torch.tensor([1.0, 448.0, -0.0])).tolist() == [0x38, 0x7E, 0x80]
    assert ELEMENTS["e5m2"].encode(torch.tensor([1.0])).tolist() == [0x3C]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(sorted(ELEMENTS)))
@settings(deadline=None, max_examples=300)
def test_rounding_is_monotone_odd_and_nearest(x: float, name: str) -> None:
    e = ELEMENTS[name]
    values = [e.value(c) for c in range(e.top + 1)]
    q = float(e.nearest(torch.tensor([x])))
    assert abs(q) in values and q == -float(e.nearest(torch.tensor([-x])))
    clamped = max(-e.max, min(e.max, x))
    assert abs(q - clamped) == min(abs(math.copysign(v, clamped) - clamped) for v in values)
    down = float(e.round(torch.tensor([x]), "floor"))
    assert abs(down) in values and (down <= clamped) and q in (down, q) and down <= q


def test_stochastic_rounding_is_right_on_average_and_repeats() -> None:
    e, x = ELEMENTS["e2m1"], torch.full((100_000,), 2.3)
    a, b = (e.decode(e.encode(x, "stochastic", seed_of("layer", 1))) for _ in range(2))
    assert torch.equal(a, b) and set(a.tolist()) == {2.0, 3.0}
    assert float(a.mean()) == pytest.approx(2.3, abs=5 * (0.3 * 0.7 / 1e5) ** 0.5)
    assert not torch.equal(a, e.decode(e.encode(x, "stochastic", seed_of("layer", 2))))
    assert torch.equal(e.round(-x, "stochastic", 1).unique(), torch.tensor([-3.0, -2.0]))


def test_wide_casts() -> None:
    """fp16: 65519 → 65504, 65520 → inf, 2**-25 → 0. bf16: 1 + 2**-8 → 1, 1 + 3 * 2**-8 → 1.015625. tf32: 10 bits."""
    assert cast(torch.tensor([65519.0, 65520.0, 2.0**-25]), "fp16").tolist() == [65504, math.inf, 0]
    assert cast(torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8]), "bf16").tolist() == [1, 1.015625]
    x = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-10, 3e38, math.inf])
    assert cast(x, "tf32").tolist() == [
        1,
        1 + 2.0**-9,
        -1 - 2.0**-10,
        float(cast(torch.tensor([3e38]), "tf32")),
        math.inf,
    ]
    w = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for name, digits in (("fp16", 10), ("bf16", 7), ("tf32", 10)):
        error = cast_error(w, name)
        assert 0.9 * 2.0 ** -(digits + 1) < error["relative"] <= 2.0 ** -(digits + 1)
        assert 0 < error["rms"] < error["relative"] and error["infinite"] == error["zero"] == 0
    assert cast_error(torch.tensor([1e5, 1e-9, 1.0, 0.0]), "fp16") == {
        "relative": 0,
        "rms": pytest.approx(0),
        "infinite": 0.25,
        "zero": 0.25,
    }
