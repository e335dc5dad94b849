"""What a model loses when its largest activations are set to zero, against as many chosen at random.

The experiment of LLM.int8() (Dettmers et al., 2022, section 4), value by value: in the input of every linear layer, for
each window, the share of values with the largest magnitude becomes zero; then as many at random positions. Few values
carry much of the function when the first costs far more than the second.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import RequestError
from fewbits.evaluate import hidden as hiddens
from fewbits.evaluate import interval, score
from fewbits.evaluate.base import OnEvent
from fewbits.model import find_family, rows, unstack_experts
from fewbits.model.families import stages
from fewbits.model.locate import find_blocks

LARGEST, RANDOM = "largest", "random"


@dataclass(frozen=True)
class Zeroed:
    """The model with ``share`` of each layer input set to zero, ``which`` being the largest or random ones.

    ``values`` were set to zero in all. KL is KL(original || zeroed) in nats per token, with a 95 % interval.
    """

    share: float
    which: str
    values: int
    kl_mean: float
    kl_mean_ci95: tuple[float, float]
    perplexity: float
    reference_perplexity: float
    top1: float

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self) | {"kl_mean_ci95": list(self.kl_mean_ci95)}


def zeroing(
    path: str | Path,
    shares: Sequence[float],
    text: str | Path | None = None,
    samples: int = 4,
    seq_len: int = 512,
    seed: int = 0,
    on_event: OnEvent | None = None,
) -> list[Zeroed]:
    """For each share the loss of zeroing the largest and of zeroing as many at random, in float32.

    ``path`` is a dense or a quantized checkpoint, ``text`` as for :func:`fewbits.evaluate.outliers.study`. Raises
    RequestError for shares outside (0, 1) and for a model without linear layers that are known.
    """
    from fewbits.runtime import load

    wrong = [s for s in shares if not 0 < s < 1]
    if wrong:
        raise RequestError(f"a share of {wrong[0]:g} cannot be set to zero; give numbers between 0 and 1, as in 0.001")
    model, tokenizer = load(path, dtype=torch.float32)
    if tokenizer is None:
        raise RequestError(f"{path} has no tokenizer; copy the tokenizer files of the original model into it")
    ids = rows(tokenizer, text, samples, seq_len)
    inputs = _inputs(model)
    body, head = hiddens.split(model, ids[0])
    kept = [hiddens.states(body, row[None])[0] for row in ids]
    cases = [(share, which) for share in shares for which in (LARGEST, RANDOM)]
    found = []
    for share, which in cases:
        with _Zero(share, which, seed).installed(inputs) as zero:
            parts = []
            for w, row in enumerate(ids):
                zero.window = w
                h = hiddens.states(body, row[None])[0]
                parts.append(score.compare((kept[w][:-1], head), (h[:-1], head), row[1:]))
        found.append(_summary(share, which, zero.values, torch.cat(parts, 1), samples))
        if on_event is not None:
            on_event({"event": "case", "case": len(found), "cases": len(cases)})
    return found


def largest(x: Tensor, count: int) -> Tensor:
    """Positions int64 ``[count]`` in ``x.flatten()`` of the values with the largest magnitude."""
    return x.flatten().abs().topk(count, sorted=False).indices


def random(x: Tensor, count: int, seed: int) -> Tensor:
    """``count`` different positions in ``x.flatten()``, int64; every choice is equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(x.numel(), generator=generator)[:count].to(x.device)


class _Zero:
    """Hooks that set part of each layer's input to zero. Layers that read one input get one and the same."""

    def __init__(self, share: float, which: str, seed: int):
        self.share, self.which, self.seed = share, which, seed
        self.window = self.values = 0
        self._last: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def installed(self, inputs: dict[str, list[nn.Module]]) -> Iterator[_Zero]:
        hooks = [m.register_forward_pre_hook(self._hook(name)) for name, ms in inputs.items() for m in ms]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()
            self._last = None

    def _hook(self, name: str) -> Any:
        def zero(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if self._last is None or self._last[0] is not args[0]:
                self._last = (args[0], self._zeroed(args[0], name))
            return (self._last[1], *args[1:])

        return zero

    def _zeroed(self, x: Tensor, name: str) -> Tensor:
        count = max(1, round(self.share * x.numel()))
        seed = zlib.crc32(f"{self.seed} {self.window} {name}".encode())
        where = largest(x, count) if self.which == LARGEST else random(x, count, seed)
        self.values += count
        return x.flatten().index_fill(0, where, 0.0).view_as(x)


def _inputs(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Linear layers of the blocks that share an input, by the first one's name."""
    unstack_experts(model)
    config: Any = model.config
    family, path = find_family(config.get_text_config().model_type), find_blocks(model)
    found: dict[str, list[nn.Module]] = {}
    for i, block in enumerate(model.get_submodule(path).children()):
        for stage in stages(family, block):
            found[f"{path}.{i}.{stage[0]}"] = [block.get_submodule(name) for name in stage]
    if not found:
        raise RequestError(f"{type(model).__name__} has no linear layers that are known; give the original model")
    return found


def _summary(share: float, which: str, values: int, scores: Tensor, windows: int) -> Zeroed:
    """``scores`` as :func:`fewbits.evaluate.score.compare` gives them, window after window."""
    nll_p, nll_q, kl, same = scores.numpy()
    return Zeroed(
        share,
        which,
        values,
        float(kl.mean()),
        interval.mean_interval(kl, interval.blocks(windows, kl.size // windows)),
        math.exp(min(float(nll_q.mean()), 700.0)),
        math.exp(min(float(nll_p.mean()), 700.0)),
        float(same.mean()),
    )
