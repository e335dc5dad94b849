"""Small floating-point numbers: a format is a few facts, everything else about it is derived.

With exponent field ``E`` and mantissa field ``M`` of ``m`` bits a code stands for ``(-1)**S * 2**(E - bias) * (1 + M /
2**m)``; where ``E = 0`` it is ``2**(1 - bias) * M / 2**m``, which holds zero and the subnormals (OCP Microscaling 1.0,
section 5.3; IEEE 754). Rounding is to nearest with ties to the even mantissa and *saturates*: libraries differ beyond
the largest number (NaN, infinity or the largest itself), so everything is clamped first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "floor", "stochastic")


@dataclass(frozen=True)
class Element:
    """One format: fields of ``exponent`` and ``mantissa`` bits, the ``bias``, and what is unusual about it.

    ``specials`` codes at the top of each sign are no finite numbers; the first is an infinity if ``infinite``.
    ``signed``: there is a sign bit. ``zero``: ``E = 0`` means zero and subnormals. ``carry`` is the significand from
    which the rule "even" gives a block the next power of two: by default where rounding to ``mantissa`` bits gives 2.
    """

    exponent: int
    mantissa: int
    bias: int
    specials: int = 0
    infinite: bool = False
    signed: bool = True
    zero: bool = True
    carry: float | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.signed + self.exponent + self.mantissa

    @property
    def levels(self) -> int:
        """Number of codes, specials included."""
        return 2**self.bits

    @property
    def top(self) -> int:
        """Code of the largest number."""
        return 2 ** (self.exponent + self.mantissa) - 1 - self.specials

    @property
    def nan(self) -> int | None:
        """A code that is no number."""
        return self.top + self.specials if self.specials > self.infinite else None

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number."""
        return self.zero - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest number."""
        return (self.top >> self.mantissa) - self.bias

    @cached_property
    def max(self) -> float:
        """The largest number."""
        return self.value(self.top)

    @property
    def normal(self) -> float:
        """The smallest normal number."""
        return 2.0**self.emin

    @property
    def smallest(self) -> float:
        """The smallest positive number, and the distance of subnormals."""
        return 2.0 ** (self.emin - self.mantissa * self.zero)

    @property
    def significand(self) -> float:
        """Of the largest number, in [1, 2)."""
        return float(self.max / 2.0**self.emax)

    @property
    def even(self) -> float:
        """See ``carry``."""
        return 2 - 2.0 ** -(self.mantissa + 1) if self.carry is None else self.carry

    def value(self, code: int) -> float:
        """The number of a code, by the definition."""
        sign, code = divmod(code, 2 ** (self.exponent + self.mantissa))
        if code > self.top:
            number = float("inf") if self.infinite and code == self.top + 1 else float("nan")
        else:
            E, M = divmod(code, 2**self.mantissa)
            normal = E > 0 or not self.zero
            number = 2.0 ** (max(E, self.zero) - self.bias) * (normal + M / 2**self.mantissa)
        return -number if sign else number

    def nearest(self, x: Tensor) -> Tensor:
        """``x`` (float32 or float64) rounded to this format; zeros lose their sign, NaN stays.

        Adding and subtracting ``c`` with a unit in the last place as large as the format's at ``x`` makes the
        processor's own rounding do the work: exact, ties to even, subnormals included.
        """
        x = x.clamp(-self.max, self.max)
        c = self._binade(x).mul_(1.5 * 2.0 ** (_DIGITS[x.dtype] - self.mantissa))
        return x.add_(c).sub_(c)

    def round(self, x: Tensor, rounding: str = "nearest", seed: int = 0) -> Tensor:
        """``x`` to a neighbouring number: the nearest, the one below ("floor"), or one of both with the probability
        that makes it right on average ("stochastic"; the same ``seed`` gives the same result). Saturates.
        """
        if rounding == "nearest":
            return self.nearest(x)
        x = x.clamp(-self.max, self.max)
        step = self._binade(x).mul_(2.0**-self.mantissa)
        if rounding == "stochastic":
            x = x + step * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        return torch.floor(x / step).mul_(step).clamp_(-self.max, self.max)

    def encode(self, x: Tensor, rounding: str = "nearest", seed: int = 0) -> Tensor:
        """Bit patterns of ``x`` (any floating dtype) rounded, uint8. NaN becomes NaN, or zero where there is none."""
        wide = x if x.dtype == torch.float64 else x.float()
        a = self.round(wide, rounding, seed).float()
        sign = torch.signbit(wide if rounding == "nearest" else a)
        a = a.abs_()
        m = self.mantissa
        code = (a.view(torch.int32) >> (23 - m)) - ((127 - self.bias) << m)
        below = (a * (1 / self.smallest)).to(torch.int32)
        code = torch.where(a < self.normal, below, code)
        code |= sign.to(torch.int32) << (self.bits - 1)
        return torch.where(torch.isnan(a), self.nan or 0, code).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers of bit patterns uint8."""
        table = _table(self, dtype).to(codes.device)
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def _binade(self, x: Tensor) -> Tensor:
        """The power of two at or below ``|x|``, at least the smallest normal number."""
        kind, mask = _EXPONENTS[x.dtype]
        return (x.view(kind) & mask).view(x.dtype).clamp_(min=self.normal)


_DIGITS = {torch.float32: 23, torch.float64: 52}
_EXPONENTS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}


@cache
def _table(element: Element, dtype: torch.dtype) -> Tensor:
    return torch.tensor([element.value(c) for c in range(element.levels)], dtype=dtype)


ELEMENTS: dict[str, Element] = {
    "e4m3": Element(4, 3, 7, specials=1, carry=1.75),  # compressed-tensors' threshold: no block exceeds 448
    "e5m2": Element(5, 2, 15, specials=4, infinite=True),
    "e3m2": Element(3, 2, 3),
    "e2m3": Element(2, 3, 1),
    "e2m1": Element(2, 1, 1),
    "e3m0": Element(3, 0, 3),
}
E8M0 = Element(8, 0, 127, specials=1, signed=False, zero=False)
"""Scales of MX formats: powers of two from 2**-127 to 2**127, and NaN."""

CASTS: dict[str, tuple[torch.dtype, int]] = {
    "fp16": (torch.float16, 10),
    "bf16": (torch.bfloat16, 7),
    "tf32": (torch.float32, 10),
}
"""Wide formats: the dtype that holds them, and their mantissa bits."""


def cast(x: Tensor, name: str) -> Tensor:
    """``x`` float32 rounded to fp16, bf16 or tf32 (ties to even), float32. tf32 keeps 10 bits of float32's mantissa."""
    dtype, mantissa = CASTS[name]
    if dtype != torch.float32:
        return x.to(dtype).float()
    drop = 23 - mantissa
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + ((bits >> drop) & 1) + (1 << (drop - 1)) - 1) & -(1 << drop)
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


def cast_error(x: Tensor, name: str) -> dict[str, float]:
    """What a cast costs: ``relative`` (largest, over normal numbers; at most ``2**-(mantissa + 1)``), ``rms`` relative
    to the root mean square of ``x``, the share that becomes ``infinite``, and the share that becomes ``zero``.
    """
    y, live = cast(x, name), x != 0
    finite = torch.isfinite(y)
    tiny = torch.finfo(CASTS[name][0]).tiny
    normal = live & finite & (x.abs() >= tiny)
    error = (y - x).double()
    relative = (error[normal] / x[normal].double()).abs()
    squares = x.double().square().mean().clamp(min=1e-300)
    return {
        "relative": float(relative.max()) if len(relative) else 0.0,
        "rms": float((torch.where(finite, error, 0).square().mean() / squares).sqrt()),
        "infinite": float((~finite & torch.isfinite(x)).double().mean()),
        "zero": float((live & (y == 0)).double().mean()),
    }


def seed_of(*parts: object) -> int:
    """A seed for stochastic rounding from what is rounded (a plan, a name): the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")
