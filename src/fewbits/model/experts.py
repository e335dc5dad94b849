"""Experts that lie in one 3-D tensor, as one linear layer per expert and projection.

Transformers stacks the experts of a layer in memory. Checkpoints, solvers and servers want one matrix each, and only
the tokens that a router sends to an expert say anything about its inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewbits.errors import RequestError


class Expert(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """A drop-in for the stacked module: same arguments, same result, only experts that were chosen run."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states [tokens, d]``, ``top_k_index`` and ``top_k_weights [tokens, k]`` -> ``[tokens, d]``."""
        out = torch.zeros_like(hidden_states)
        for e in torch.unique(top_k_index).tolist():
            if e >= len(self):  # transformers marks tokens of other devices' experts with the number of experts
                continue
            token, slot = torch.where(top_k_index == e)
            y = self[e](hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def unstack_experts(root: nn.Module) -> int:
    """Replace every stacked module of experts below ``root``, in place; returns how many there were.

    Weights become views of the stacked tensors, on whatever device they are (meta too). Raises RequestError for experts
    that are stacked in a way other than ``gate_up [experts, 2 inner, d]``, ``down [experts, d, inner]`` without bias.
    """
    stacked = [(name, m) for name, m in root.named_modules() if _is_stacked(m)]
    for name, module in stacked:
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, _split(name, module))
    return len(stacked)


def routed(block: nn.Module) -> bool:
    """Whether a router decides which tokens some layers of the block see."""
    return any(isinstance(m, Experts) for m in block.modules())


def _is_stacked(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


def _split(name: str, module: nn.Module) -> Experts:
    standard = {"is_transposed": False, "has_bias": False, "has_gate": True, "is_concatenated": True}
    standard["has_post_expert_norm"] = False
    own_gate = getattr(getattr(type(module), "_apply_gate", None), "__name__", "")
    if any(getattr(module, k, v) != v for k, v in standard.items()) or own_gate not in ("", "_default_apply_gate"):
        raise RequestError(
            f"experts of {name} ({type(module).__name__}) are stacked in a way that is not supported yet"
        )
    gate_up, down, act = module.gate_up_proj.detach(), module.down_proj.detach(), module.act_fn  # type: ignore[operator]
    halves = gate_up.chunk(2, dim=1)
    return Experts(Expert(g, u, d, act) for g, u, d in zip(*halves, down, strict=True))  # type: ignore[arg-type]


def _linear(w: Tensor) -> nn.Linear:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(w, requires_grad=False)
    return linear
