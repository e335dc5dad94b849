"""Adapters of peft on QuantLinear, through peft's own mechanism for layers that it does not know.

The files are peft's: an adapter trained here loads with plain peft on the dense model, and the other way round.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbits.errors import CheckpointError, RequestError
from fewbits.finetune import replay
from fewbits.finetune.base import Adapter
from fewbits.model import is_linear, locate
from fewbits.runtime import QuantLinear


class _Adapted(torch.autograd.Function):
    """``y = x W^T + scale (z A^T) B^T`` with the codes of ``W`` in ``layer``, and ``z`` the input after dropout.

    One pass over ``y`` where separate operations make four: at rank 16 those cost more than the products with A and B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, A: Tensor, B: Tensor, scale: float, layer: QuantLinear) -> Tensor:
        ctx.layer, ctx.scale, ctx.shape, ctx.same = layer, scale, x.shape, z is x
        z = z.reshape(-1, z.shape[-1])
        u = z @ A.t()
        ctx.save_for_backward(z, u, A, B)

        def product() -> Tensor:
            y = layer.product(x)
            y.view(-1, y.shape[-1]).addmm_(u, B.t(), alpha=scale)
            return y

        return replay.once(product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        z, u, A, B = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        du = (flat @ B).mul_(ctx.scale)
        dA, dB = du.t() @ z, (flat.t() @ u).mul_(ctx.scale)
        dx = dz = None
        if ctx.needs_input_grad[0]:
            dx = ctx.layer.product_transposed(dy)
            if ctx.same:
                dx.view(-1, dx.shape[-1]).addmm_(du, A)
        if ctx.needs_input_grad[1] and not ctx.same:
            dz = (du @ A).view(ctx.shape)
        return dx, dz, dA, dB, None, None


class QuantLora(LoraLinear):
    """peft's LoRA (and DoRA) beside a QuantLinear: the same function; the codes cannot take the adapter up."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As peft has it; plain LoRA in training by one function of autograd."""
        layer, names = self.get_base_layer(), self.active_adapters
        plain = len(names) == 1 and names[0] in self.lora_A and names[0] not in self.lora_variant
        if (
            self.disable_adapters
            or not (plain and torch.is_grad_enabled())
            or args
            or kwargs
            or layer.inputs is not None
        ):
            return super().forward(x, *args, **kwargs)
        A, B = self.lora_A[names[0]].weight, self.lora_B[names[0]]
        if x.dtype != A.dtype or B.bias is not None or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        dropout = self.lora_dropout[names[0]]
        z = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else x
        y: Tensor = _Adapted.apply(x, z, A, B.weight, self.scaling[names[0]], layer)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises RequestError."""
        raise RequestError("codes cannot be changed in place; `fewbits merge` dequantizes, merges and quantizes again")

    def unmerge(self) -> None:
        """Nothing was merged."""


def attach(model: Any, adapter: Adapter, source: str, seed: int) -> Any:
    """``model`` with new adapters as a PeftModel, everything else frozen. ``source`` is written down as the base."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=source,
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        bias="none",
        target_modules=targets(model, adapter.targets),
    )
    config._register_custom_module({QuantLinear: QuantLora})
    torch.manual_seed(seed)
    with _quiet():
        found = get_peft_model(model, config)
    found.peft_config["default"].base_model_name_or_path = source
    return found


def load_adapter(model: Any, path: str | Path) -> Any:
    """``model``, dense or quantized, with the adapter in directory ``path`` (peft's files), in eval mode.

    Raises RequestError when there is no adapter, CheckpointError when it does not fit the model.
    """
    config = read_config(path)
    config._register_custom_module({QuantLinear: QuantLora})
    try:
        with _quiet():
            return PeftModel.from_pretrained(model, str(path), config=config).eval()
    except (RuntimeError, ValueError, KeyError) as e:
        raise CheckpointError(f"the adapter {path} does not fit the model: {locate.first_line(e)}") from e


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings about a layer that it does not know and a base of another name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def read_config(path: str | Path) -> Any:
    """peft's configuration of an adapter directory. Raises RequestError, CheckpointError."""
    if not (Path(path) / "adapter_config.json").is_file():
        raise RequestError(f"{path} holds no adapter_config.json; give the directory of an adapter")
    try:
        config = LoraConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError) as e:
        raise CheckpointError(f"{path}/adapter_config.json cannot be read: {locate.first_line(e)}") from e
    if not isinstance(config, LoraConfig):
        raise RequestError(f"{path} is an adapter of kind {type(config).__name__}; only LoRA and DoRA are known here")
    return config


def targets(model: Any, names: tuple[str, ...]) -> list[str]:
    """What ``all-linear`` means, or ``names`` if layers have them: last names where these mean linear layers of the
    blocks and nothing else, else whole paths. Raises RequestError.
    """
    head = model.get_output_embeddings()
    linear = {n for n, m in model.named_modules() if m is not head and (isinstance(m, QuantLinear) or is_linear(m))}
    leaves = {n.rpartition(".")[2] for n in linear}
    if names != ("all-linear",):
        if unknown := sorted(set(names) - leaves):
            raise RequestError(
                f"--targets {unknown[0]!r} is no linear layer; allowed: all-linear, {', '.join(sorted(leaves))}"
            )
        return sorted(names)
    ambiguous = any(n.rpartition(".")[2] in leaves and n not in linear for n, _ in model.named_modules())
    return sorted(linear if ambiguous else leaves)
