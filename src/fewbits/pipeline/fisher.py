"""The diagonal of the Fisher information of every quantized weight: the mean over rows of squared gradients.

arXiv 2306.07629, section 4.1: ``F = 1/|D| Σ_d g_d²``, ``g_d`` the gradient of row ``d``'s loss (the mean over its
tokens) in the original model; squares of single rows, not of their mean. One block is in memory at a time: rows go
forward in portions whose hidden states between all blocks fit a budget, then backward, each block run again for its
gradients. Sums are kept in mapped files of the work directory, float32, and only read again when their block is
quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.model import Source, is_transposed
from fewbits.pipeline.precision import PRECISIONS

BUDGET = 256 << 20
"""Bytes of hidden states that one portion of rows may take."""
TOKENS = 256
"""Of every row: the estimate's noise falls with the number of rows, its cost grows with their length."""
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
        context = PRECISIONS[compute].differentiable
        for a in range(0, len(rows), portion):
            self._portion(rows[a : a + portion], len(rows), context)
            tell(min(a + portion, len(rows)), len(rows))
        (self.folder / DONE).touch()

    def _portion(self, rows: Tensor, count: int, context: Callable[[], AbstractContextManager[object]]) -> None:
        source, n = self.source, self.source.n_blocks
        kwargs = source.block_kwargs(rows.shape[1])
        hidden = [source.embed(rows)]
        with torch.no_grad(), context():
            for i in range(n):
                block = source.block(i)
                hidden.append(torch.cat([_first(block(x, **kwargs[i])).float() for x in hidden[-1].split(1)]))
        tail = source.tail(grad=True)
        back = []
        with torch.enable_grad(), context():
            for x, ids in zip(hidden.pop().split(1), rows, strict=True):
                x = x.clone().requires_grad_()
                loss = F.cross_entropy(tail(x)[0, :-1].float(), ids[1:])
                back.append(torch.autograd.grad(loss, x)[0])
        for i in reversed(range(n)):
            block, sums = source.block(i), self.of(i)
            weights = [_weight(block.get_submodule(name)).requires_grad_() for name in sums]
            with torch.enable_grad(), context():
                for r, x in enumerate(hidden.pop().split(1)):
                    x = x.clone().requires_grad_()
                    out = _first(block(x, **kwargs[i])).float()
                    gradients = torch.autograd.grad(out, [x, *weights], back[r], allow_unused=True)
                    back[r] = gradients[0]
                    for (name, total), g in zip(sums.items(), gradients[1:], strict=True):
                        if g is not None:
                            g = (g.t() if is_transposed(block.get_submodule(name)) else g).float()
                            total.addcmul_(g, g, value=1 / count)
            if not all(bool(torch.isfinite(total.amax())) for total in sums.values()):
                raise FewbitsError("gradients are not finite; try --compute fp32, or check the model's weights")


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
