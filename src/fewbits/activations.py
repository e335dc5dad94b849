"""How the inputs of a linear layer are quantized: which numbers, how many share a scale, and when the scale is chosen.

``x [..., in]`` becomes ``scale * code``. A *dynamic* scale is computed from ``x`` itself, for each token or block; a
*static* one was calibrated, one for the whole tensor. Integers are symmetric with the narrow range, ``scale =
absmax / 127`` and codes -127..127 (SmoothQuant, LLM.int8, vLLM); compressed-tensors' own Python code divides by 127.5
and uses -128 too: ``narrow=False``. FP8 is E4M3 (largest 448); NVFP4 is E2M1 in blocks of 16 with E4M3 scales and one
more scale for the token (dynamic) or the tensor (static); MXFP4 is E2M1 in blocks of 32 with power-of-two scales (OCP
Microscaling 1.0, section 6.3: ``2^(floor(log2 absmax) - 2)``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fewbits.errors import RequestError

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BINS = 1 << 15
"""Bins of :func:`histogram`: the magnitudes of bfloat16."""


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)  # the cast alone gives NaN beyond 464


def _e2m1(x: Tensor) -> Tensor:
    """Nearest of ±FP4, ties to the even code: a tie goes down from an odd code's upper neighbour and up to it else."""
    values = torch.tensor(FP4, dtype=x.dtype, device=x.device)
    middles, a = (values[1:] + values[:-1]) / 2, x.abs()
    code = torch.bucketize(a, middles)  # a tie takes the lower code
    tie = a == middles[code.clamp(max=len(FP4) - 2)]
    code = torch.where(tie & (code % 2 == 1), code + 1, code)
    return values[code].copysign(x)


@dataclass(frozen=True)
class Element:
    """Which numbers exist: the ``largest``, rounding to the nearest, bits, and the block when the format fixes one."""

    largest: float
    nearest: Callable[[Tensor], Tensor]
    bits: int
    block: int = 0


ELEMENTS = {
    "int8": Element(127, torch.round, 8),
    "int4": Element(7, torch.round, 4),
    "fp8": Element(448, _e4m3, 8),
    "nvfp4": Element(6, _e2m1, 4, 16),
    "mxfp4": Element(6, _e2m1, 4, 32),
}


@dataclass(frozen=True)
class Activations:
    """A scheme for the inputs of a layer.

    ``rule`` chooses a static scale: the largest magnitude seen, the ``percentile`` of magnitudes, or the least squared
    error. ``block`` counts with granularity "block". ``outliers`` above 0 is LLM.int8's threshold: columns in which
    any token reaches it are not quantized (arXiv 2208.07339, section 3.2).
    """

    element: Literal["int8", "int4", "fp8", "nvfp4", "mxfp4"] = "int8"
    dynamic: bool = True
    granularity: Literal["token", "tensor", "block"] = "token"
    block: int = 0
    rule: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = 99.99
    narrow: bool = True
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise RequestError(f"activations {self.element!r} are unknown; allowed: {', '.join(ELEMENTS)}")
        fixed = ELEMENTS[self.element].block
        if fixed and (self.granularity != "block" or self.block != fixed):
            raise RequestError(
                f"{self.element} activations have blocks of {fixed}; give granularity block, block {fixed}"
            )
        if (self.granularity == "block") != (self.block > 0):
            raise RequestError(
                f"granularity {self.granularity!r} and block {self.block} do not fit; a block is 1 or more"
            )
        if not self.dynamic and self.granularity != "tensor" and self.element != "nvfp4":
            raise RequestError(
                "static activations have one scale per tensor; give granularity tensor, or dynamic: true"
            )
        if not 0 < self.percentile <= 100:
            raise RequestError(f"percentile {self.percentile} is not possible; give more than 0, at most 100")
        if self.outliers < 0 or (self.outliers and (self.element, self.granularity) != ("int8", "token")):
            raise RequestError("outliers are kept from dynamic int8 activations per token only; threshold 0 or more")

    @property
    def needs(self) -> frozenset[str]:
        """Statistics from which the scale is taken."""
        if self.dynamic:
            return frozenset()
        return frozenset({"abs"} if self.rule == "minmax" else {"abs", "histogram"})

    @property
    def integer(self) -> bool:
        """Whether codes are integers that share a scale along the whole contraction, so that integer products apply."""
        return self.element in ("int8", "int4") and self.granularity != "block"

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest code."""
        top = ELEMENTS[self.element].largest
        return (-top if self.narrow or self.element not in ("int8", "int4") else -top - 1), top

    @property
    def largest(self) -> float:
        """The value that the largest magnitude becomes, in units of the scale: 127, or 127.5 with the full range."""
        return ELEMENTS[self.element].largest + (0.0 if self.narrow or self.element not in ("int8", "int4") else 0.5)

    def refusal(self, columns: int) -> str | None:
        """Why a layer of ``columns`` inputs cannot take them."""
        if self.granularity == "block" and columns % self.block:
            return f"{self.element} activations need inputs in multiples of {self.block}, not {columns}"
        return None


PRESETS = {
    "int8": Activations(),
    "int8-static": Activations("int8", False, "tensor"),
    "int4": Activations("int4"),
    "fp8": Activations("fp8"),
    "fp8-static": Activations("fp8", False, "tensor"),
    "fp8-block": Activations("fp8", True, "block", 128),
    "nvfp4": Activations("nvfp4", True, "block", 16),
    "mxfp4": Activations("mxfp4", True, "block", 32),
}
"""What ``--activations`` takes."""


def preset(name: str) -> Activations:
    """A scheme by name. Raises RequestError with the allowed names."""
    if name not in PRESETS:
        raise RequestError(f"activations {name!r} are unknown; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class Inputs:
    """The scheme of one layer with its static ``scale``, float32 ``[1]``; None when it is dynamic."""

    scheme: Activations
    scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What ``x [..., in]`` becomes, in its own dtype: the specification of every fast product."""
        if not self.scheme.outliers:
            codes, scale = self.encode(x)
            return _flat(codes * scale, x)
        codes, absmax, loud = self.vectorwise(x)
        return torch.where(loud, x, codes * (absmax / self.scheme.largest)).to(x.dtype)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(codes, scale)``: codes as floating-point numbers of the format, float32 (float64 for float64 ``x``).

        Shapes broadcast: ``[..., in]`` and ``[..., 1]`` per token, ``[1]`` per tensor; ``[..., blocks, block]`` and
        ``[..., blocks, 1]`` per block. Columns that are kept from quantization have code 0.
        """
        a, s = real(x), self.scheme
        if s.outliers:
            codes, absmax, _ = self.vectorwise(x)
            return codes, absmax / s.largest
        if s.granularity == "block":
            a = a.reshape(*a.shape[:-1], -1, s.block)
        scale = self._scale(a)
        return self._round(a / scale), scale

    def vectorwise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(codes [..., in], absmax [..., 1], loud [in])`` of LLM.int8(): ``loud`` columns are not quantized.

        As in bitsandbytes, to the bit: everything is decided on ``x`` in float16; a column is loud when any value in
        it reaches the threshold; such values, not such columns, are left out of a token's absmax; and codes are
        ``round(x * (127 / absmax))``, not ``round(x / (absmax / 127))``: ties are common.
        """
        a, s = half(x).to(real(x).dtype), self.scheme
        magnitude = a.abs()
        reach = magnitude >= s.outliers
        absmax = _positive(magnitude.masked_fill_(reach, 0).amax(-1, keepdim=True))
        loud = reach.reshape(-1, a.shape[-1]).any(0)
        return self._round(a.masked_fill(loud, 0).mul_(s.largest / absmax)), absmax, loud

    def _round(self, a: Tensor) -> Tensor:
        codes = ELEMENTS[self.scheme.element].nearest(a)
        return codes.clamp(*self.scheme.ends) if self.scheme.element in ("int8", "int4") else codes

    def _scale(self, a: Tensor) -> Tensor:
        s = self.scheme
        if s.element == "nvfp4":
            whole = self.scale.to(a) if self.scale is not None else _token_absmax(a) / (6 * 448)
            return _positive(_e4m3(a.abs().amax(-1, keepdim=True) / (6 * _positive(whole)))) * _positive(whole)
        if self.scale is not None:
            return self.scale.to(a)
        absmax = a.abs().amax() if s.granularity == "tensor" else a.abs().amax(-1, keepdim=True)
        if s.element == "mxfp4":
            return torch.exp2(torch.floor(torch.log2(_positive(absmax))).clamp(-125, 127) - 2)
        return _positive(absmax / s.largest)


def _token_absmax(blocks: Tensor) -> Tensor:
    return blocks.abs().amax((-1, -2), keepdim=True)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)  # a silent token: codes 0 whatever the scale


def _flat(a: Tensor, like: Tensor) -> Tensor:
    return a.reshape(like.shape).to(like.dtype)


def real(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def half(x: Tensor) -> Tensor:
    """As float16, what lies beyond its range at its ends: LLM.int8() chooses codes for 16-bit inputs."""
    return x.clamp(-65504, 65504).half()


def histogram(x: Tensor) -> Tensor:
    """int64 ``[BINS]``: how many magnitudes fall to each bfloat16 number, rounded down. Exact, so it adds up in any
    order; 128 bins in each octave."""
    bits = x.reshape(-1).float().abs().contiguous().view(torch.int32) >> 16
    return torch.bincount(bits, minlength=BINS)[:BINS]


def magnitudes() -> Tensor:
    """The middle of every bin, float64 ``[BINS]``."""
    low = (torch.arange(BINS, dtype=torch.int32) << 16).view(torch.float32).double()
    return low + torch.where(low > 0, 2.0 ** (torch.floor(torch.log2(low.clamp(min=1e-300))) - 8), 0.0)


def static_scale(scheme: Activations, absmax: Tensor, counts: Tensor | None) -> Tensor:
    """The scale float32 ``[1]`` of a tensor whose channels reach ``absmax [in]`` and whose magnitudes fell as
    ``counts`` (see :func:`histogram`), by the scheme's rule."""
    top = float(absmax.max())
    if counts is None or top == 0:
        limit = top
    elif scheme.rule == "percentile":
        reached = counts.cumsum(0) >= counts.sum() * (scheme.percentile / 100)
        limit = min(top, float(magnitudes()[int(reached.int().argmax())]))
    else:
        limit = _least_error(scheme, top, counts)
    unit = 6 * 448 if scheme.element == "nvfp4" else scheme.largest
    return _positive(torch.tensor([limit / unit], dtype=torch.float32))


def _least_error(scheme: Activations, top: float, counts: Tensor) -> float:
    used = counts.nonzero()[:, 0]
    used = used[used < 0x7F80]
    values, weight = magnitudes()[used], counts[used].double()
    best, limit = float("inf"), top
    for i in range(100):
        tried = top * 0.95**i
        inputs = Inputs(replace(scheme, rule="minmax"), torch.tensor([tried / scheme.largest]))
        error = float((weight * (inputs(values) - values).square()).sum())
        if error < best:
            best, limit = error, tried
    return limit
