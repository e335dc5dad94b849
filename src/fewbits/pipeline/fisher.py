"""The diagonal of the Fisher information of every quantized weight: the mean over rows of squared gradients.

arXiv 2306.07629, section 4.1: ``F = 1/|D| Σ_d g_d²``, ``g_d`` the gradient of row ``d``'s loss (the mean over its
tokens) in the original model; squares of single rows, not of their mean. One block is in memory at a time: rows go
forward in portions whose hidden states between all blocks fit a budget, then backward, each block run again for its
gradients. Sums are kept in mapped files of the work directory, float32, and only read again when their block is
quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.model import Source, is_transposed, routed
from fewbits.pipeline.precision import PRECISIONS, Precision

BUDGET = 256 << 20
"""Bytes of hidden states that one portion of rows may take."""
TOKENS = 256
"""Of every row: the estimate's noise falls with the number of rows, its cost grows with their length."""
BATCH = 1024
"""Tokens that go through a block at once."""
DONE = "fisher.done"


class Fisher:
    """The sums of one model, by block and local name; ``folder`` is where they lie."""

    def __init__(self, source: Source, locals_: Sequence[Sequence[str]], folder: Path):
        self.source, self.locals, self.folder = source, locals_, folder

    def of(self, i: int) -> dict[str, Tensor]:
        """``F [out, in]`` of each weight of block ``i``, by local name; views of a mapped file."""
        block, found, at = self.source.skeleton(i), {}, 0
        sizes = {n: _weight(block.get_submodule(n)) for n in self.locals[i]}
        total = sum(w.numel() for w in sizes.values())
        if not total:
            return {}
        every = torch.from_file(str(self.folder / f"fisher-{i:05d}.bin"), shared=True, size=total, dtype=torch.float32)
        for name, w in sizes.items():
            stored = every[at : at + w.numel()].view(w.shape)
            found[name] = stored.t() if is_transposed(block.get_submodule(name)) else stored
            at += w.numel()
        return found

    def gather(self, rows: Tensor, compute: str, tell: Callable[[int, int], None]) -> None:
        """Sum over the beginnings of ``rows`` int64 ``[samples, tokens]``, unless an earlier run has finished that.
        ``tell(done, all)`` counts rows.
        """
        rows = rows[:, :TOKENS]
        if (self.folder / DONE).exists():
            return
        for old in self.folder.glob("fisher-*.bin"):
            old.unlink()
        width = int(self.source.text_config.hidden_size)
        per_row = rows.shape[1] * width * 4 * (self.source.n_blocks + 1)
        portion = max(1, BUDGET // per_row)
        for a in range(0, len(rows), portion):
            self._portion(rows[a : a + portion], len(rows), PRECISIONS[compute])
            tell(min(a + portion, len(rows)), len(rows))
        (self.folder / DONE).touch()

    def _portion(self, rows: Tensor, count: int, precision: Precision) -> None:
        source, n, context = self.source, self.source.n_blocks, precision.differentiable
        kwargs = source.block_kwargs(rows.shape[1])
        hidden = [source.embed(rows)]
        with torch.no_grad(), context():
            for i in range(n):
                block = source.block(i)
                parts = hidden[-1].split(_at_once(block, rows))
                hidden.append(torch.cat([_first(block(x, **kwargs[i])).float() for x in parts]))
        tail = source.tail(grad=True)
        back = []
        with torch.enable_grad(), context():
            for x, ids in zip(hidden.pop().split(1), rows, strict=True):
                x = x.clone().requires_grad_()
                loss = F.cross_entropy(tail(x)[0, :-1].float(), ids[1:])
                back.append(torch.autograd.grad(loss, x)[0])
        gradient = torch.cat(back)
        for i in reversed(range(n)):
            block, sums = source.block(i).requires_grad_(False), self.of(i)
            parts = zip(*(t.split(_at_once(block, rows)) for t in (hidden.pop(), gradient)), strict=True)
            for name, total in sums.items():
                watched = partial(_watch, total, count, rows.shape[1], precision)
                block.get_submodule(name).register_forward_hook(watched)
            with torch.enable_grad(), context():
                for x, g in parts:
                    x = x.clone().requires_grad_()
                    g.copy_(torch.autograd.grad(_first(block(x, **kwargs[i])).float(), x, g)[0])
            if not all(bool(torch.isfinite(total.amax())) for total in sums.values()):
                raise FewbitsError("gradients are not finite; try --compute fp32, or check the model's weights")


def _watch(
    total: Tensor, count: int, tokens: int, precision: Precision, _: nn.Module, inputs: tuple[Tensor], output: Tensor
) -> None:
    """When the gradient of a layer's output is known, add to ``total [out, in]`` the squared gradients of its weight,
    ``gᵀ x`` of each row.
    """

    def add(g: Tensor) -> None:
        rows = max(1, g[..., 0].numel() // tokens)
        pairs = (t.reshape(rows, -1, t.shape[-1]).to(precision.observed) for t in (g, inputs[0].detach()))
        for of_output, of_input in zip(*pairs, strict=True):
            of_weight = torch.zeros(total.shape)
            precision.sums.cross_(of_weight, of_output, of_input)
            total.addcmul_(of_weight, of_weight, value=1 / count)

    output.register_hook(add)


def _at_once(block: nn.Module, rows: Tensor) -> int:
    """Rows; one where experts take tokens out of their rows."""
    return 1 if routed(block) else max(1, BATCH // rows.shape[1])


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
