"""One dense model on some texts, run once, and any number of models measured against it.

Of the reference only its hidden states and its output embedding are kept; a window's logits are made again, a few
tokens at a time, for each model that is compared with it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.evaluate import hidden as hiddens
from fewbits.evaluate import score
from fewbits.evaluate import text as texts
from fewbits.evaluate.base import OnEvent
from fewbits.runtime import engines

SAMPLE = 20_000  # characters on which two tokenizers must agree


@dataclass(frozen=True)
class Settings:
    """What both models of a comparison share: ``windows`` windows of ``ctx`` tokens, ``batch`` at a time."""

    ctx: int
    windows: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    tell: OnEvent = lambda event: None

    def load(self, path: str | Path, engine: str = "fewbits") -> tuple[Any, Any]:
        """Model, run by ``engine``, and tokenizer. Raises RequestError without a tokenizer, or for windows beyond the
        model's positions.
        """
        model, tokenizer = engines.load(path, self.dtype, engine)
        if tokenizer is None:
            raise RequestError(f"{path} has no tokenizer; copy the tokenizer files of the original model into it")
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.ctx > limit:
            raise RequestError(
                f"--ctx {self.ctx} is more than the {limit} positions of {path}; give --ctx {limit} or less"
            )
        return model.eval(), tokenizer

    def walk(self, ids: Tensor, which: str) -> Iterator[tuple[int, Tensor]]:
        """``(first window, ids [<= batch, ctx])``, with an event after each."""
        for first, some in hiddens.batches(ids, self.batch):
            yield first, some
            done = first + len(some)
            self.tell({"event": "window", "which": which, "window": done, "windows": self.windows})


class Reference:
    """The model at ``path`` on ``contents`` (texts by name). A context manager: leaving it frees what it keeps.

    ``ids`` are the windows of each text, int64 ``[windows, ctx]``; ``tokenizer`` is the reference's.
    """

    def __init__(self, path: str | Path, contents: Mapping[str, str], settings: Settings):
        self.path, self.contents, self.settings = path, contents, settings
        self.ids: dict[str, Tensor] = {}
        self.tokenizer: Any = None
        self._kept: dict[str, hiddens.Store] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reference:
        s = self.settings
        model, self.tokenizer = s.load(self.path)
        self.ids = {k: texts.windows(self.tokenizer, c, s.ctx, s.windows) for k, c in self.contents.items()}
        first = next(iter(self.ids.values()))
        body, self.head = hiddens.split(model, first[0])
        width = hiddens.states(body, first[:1, :2]).shape[-1]
        for name, ids in self.ids.items():
            kept = self._kept[name] = self._stack.enter_context(hiddens.Store(s.windows, s.ctx, width))
            for at, some in s.walk(ids, self._called("reference", name)):
                kept.put(at, hiddens.states(body, some))
        return self

    def __exit__(self, *exc: object) -> None:
        self._kept.clear()
        self._stack.close()

    def losses(self) -> dict[str, Tensor]:
        """The reference's own NLL for each text, float64 ``[1, windows * (ctx - 1)]``."""
        return {
            name: torch.cat([score.losses(kept[i][:-1], self.head, row[1:]) for i, row in enumerate(self.ids[name])])[
                None
            ]
            for name, kept in self._kept.items()
        }

    def compare(
        self,
        path: str | Path,
        kv_cache: str | None = None,
        seen: Any = None,
        engine: str = "fewbits",
        title: str = "model",
    ) -> dict[str, Tensor]:
        """float64 ``[4, windows * (ctx - 1)]`` for each text, as :func:`fewbits.evaluate.score.compare`.

        ``kv_cache`` is that of :func:`fewbits.runtime.kvcache.chosen`. ``seen(model)`` is called once the model is
        loaded; events call it ``title``. Raises RequestError when its tokenizer is another one.
        """
        gc.collect()
        model, tokenizer = self.settings.load(path, engine)
        for content in self.contents.values():
            sample = content[:SAMPLE]
            if not torch.equal(texts.encode(tokenizer, sample), texts.encode(self.tokenizer, sample)):
                raise RequestError(
                    f"{path} and its reference tokenize the text differently; give the model that it was made from"
                )
        body, head = hiddens.split(model, next(iter(self.ids.values()))[0])
        if seen is not None:
            seen(model)
        kind = hiddens.cache_of(model, kv_cache)
        return {name: self._one(name, body, head, kind, title) for name in self.ids}

    def _one(self, name: str, body: Any, head: hiddens.Head, kv_cache: str | None, title: str) -> Tensor:
        kept, found = self._kept[name], []
        for first, some in self.settings.walk(self.ids[name], self._called(title, name)):
            for i, (row, h) in enumerate(zip(some, hiddens.states(body, some, kv_cache), strict=True)):
                found.append(score.compare((kept[first + i][:-1], self.head), (h[:-1], head), row[1:]))
        return torch.cat(found, 1)

    def _called(self, which: str, name: str) -> str:
        return which if len(self.contents) == 1 else f"{which}, {name}"
