"""Quantized inputs during the walk: the stream must see what a reader will see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fewbits.activations import Activations, Inputs
from fewbits.errors import FewbitsError
from fewbits.plan import Recipe


def quantize_inputs(block: nn.Module, find: Callable[[str], Inputs | None], names: Iterable[str]) -> None:
    """Make each layer of ``names`` quantize its input by ``find(name)``, asked at every call: None until it is solved.

    The turnstile's hooks run before these, so what it hands to the statistics is not yet quantized.
    """
    for name in names:

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> tuple[Tensor, ...] | None:
            inputs = find(name)
            return None if inputs is None else (inputs(args[0]), *args[1:])

        block.get_submodule(name).register_forward_pre_hook(hook)


def common_scheme(recipes: Sequence[Recipe]) -> Activations | None:
    """The scheme that all readers of one input share; None when they differ."""
    found = {r.activations for r in recipes}
    return found.pop() if len(found) == 1 else None


def require_finite(x: Tensor, layer: str, before: int) -> None:
    """Raise FewbitsError naming the layer and the calibration row when ``x [rows, tokens, in]`` is not finite.

    ``before`` tokens of this input were seen already. Inputs of experts ``[tokens, in]`` have no rows: the token is
    named.
    """
    if bool(torch.isfinite(x.sum())):
        return
    bad = ~torch.isfinite(x).all(-1)
    if not bool(bad.any()):
        return
    at = int(bad.reshape(-1).int().argmax())
    where = f"row {(before + at) // x.shape[1]}, token {at % x.shape[1]}" if x.dim() == 3 else f"token {before + at}"
    raise FewbitsError(
        f"{layer}: activations are not finite in calibration {where}; try --compute fp32, or check the model"
    )
