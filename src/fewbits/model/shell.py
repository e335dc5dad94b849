"""The model around its blocks: what happens before the first one, what each one is told, what happens after the last.

The model's own forward pass runs with every block replaced by a stub that records and passes on. So scaled embeddings,
learned positions, one rotary table per layer type, projections around the blocks and soft caps on logits all come from
transformers, and none of them is known here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.errors import CheckpointError, RequestError


class _Reached(Exception):
    """Ends the forward pass at the first block; carries that block's input."""


class _Stub(nn.Module):
    """Stands where block ``i`` was; whatever else the model asks of the block is answered by the block itself."""

    def __init__(self, block: nn.Module, i: int, visit: Callable[[int, Tensor, dict[str, Any]], Any]):
        super().__init__()
        self._behind = (block,)  # a tuple: the block must not become a submodule
        self._index, self._visit = i, visit
        self._signature = inspect.signature(type(block).forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(self._signature.bind(self, *args, **kwargs).arguments)
        given.pop(next(iter(given)))
        hidden = given.pop(next(iter(given)))
        for name, p in self._signature.parameters.items():
            if p.kind is inspect.Parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        return self._visit(self._index, hidden, given)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_behind")[0], name)


class Shell:
    """A model of transformers whose blocks are stubs.

    ``materialise(module, prefix, skip)`` gives a module below ``prefix`` its weights (float32) and buffers; ``table()``
    returns the embedding as a read-only view into the file, of which only the rows asked for are ever read.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        materialise: Callable[[nn.Module, str, Iterable[str]], None],
        table: Callable[[], Tensor],
    ):
        self.model, self._materialise, self._table = model, materialise, table
        self.decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        blocks = cast(nn.ModuleList, model.get_submodule(path))
        self.blocks = list(blocks)
        for i, block in enumerate(self.blocks):
            blocks[i] = _Stub(block, i, self._visit)
        self._ready = False
        self._as_tuple = False
        self._seen: list[dict[str, Any]] = []
        self._mode: Callable[[int, Tensor], Tensor] = lambda i, hidden: hidden

    def embed(self, ids: Tensor) -> Tensor:
        """The first block's input for ``ids`` int64 ``[rows, T]``: float32 ``[rows, T, d]``. Raises RequestError."""
        self._check(ids)
        self._mode = self._stop
        try:
            self.decoder(input_ids=ids, use_cache=False)
        except _Reached as reached:
            return reached.args[0]
        raise RequestError(f"{type(self.model).__name__} does not call its blocks one by one; it cannot be quantized")

    def kwargs(self, length: int) -> list[dict[str, Any]]:
        """Keyword arguments of every block for rows of ``length`` tokens without padding.

        Tensors have a batch dimension of 1 and broadcast over any batch. Raises RequestError for a model whose blocks
        are told something about the tokens themselves.
        """
        first = self._record(torch.zeros(1, length, dtype=torch.int64))
        second = self._record(torch.ones(1, length, dtype=torch.int64))
        if not _equal(first, second):
            raise RequestError(
                f"{type(self.model).__name__} passes token-dependent values to its blocks; that is not supported"
            )
        return first

    def logits(self, hidden: Tensor, name: str, head: nn.Module) -> Tensor:
        """What follows the last block, with ``head`` in place of the module ``name``.

        ``hidden [rows, T, d]`` -> logits ``[rows, T, vocabulary]``.
        """
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        self._check(ids)
        last = len(self.blocks) - 1
        self._mode = lambda i, h: hidden if i == last else h
        parent, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        empty = getattr(owner, leaf)
        setattr(owner, leaf, head)
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            setattr(owner, leaf, empty)

    def named(self, module: nn.Module) -> tuple[str, nn.Module]:
        """A module of the model with its path."""
        return next((n, m) for n, m in self.model.named_modules() if m is module)

    def _record(self, ids: Tensor) -> list[dict[str, Any]]:
        self._check(ids)
        for self._as_tuple in (False, True):
            self._seen = []
            shapes: list[torch.Size] = []

            def passing(i: int, hidden: Tensor, shapes: list[torch.Size] = shapes) -> Tensor:
                shapes.append(hidden.shape)
                return hidden

            self._mode = passing
            try:
                self.decoder(input_ids=ids, use_cache=False)
            except (RuntimeError, IndexError, ValueError):
                continue  # a model that unpacks its blocks' outputs gets a tuple in the second round
            if len(shapes) == len(self.blocks) and len(set(shapes)) == 1:
                return self._seen
        raise RequestError(f"{type(self.model).__name__} does not call its blocks one by one; it cannot be quantized")

    def _visit(self, i: int, hidden: Tensor, given: dict[str, Any]) -> Any:
        self._seen.append(given)
        out = self._mode(i, hidden)
        return (out,) if self._as_tuple else out

    @staticmethod
    def _stop(i: int, hidden: Tensor) -> Tensor:
        raise _Reached(hidden)

    def _check(self, ids: Tensor) -> None:
        config = self.model.config.get_text_config()  # type: ignore[union-attr,operator]
        longest = getattr(config, "max_position_embeddings", None)
        if longest and ids.shape[-1] > longest:
            raise RequestError(
                f"rows of {ids.shape[-1]} tokens, but the model has {longest} positions; "
                f"give at most --seq-len {longest}"
            )
        rows = self._table().shape[0]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise RequestError(
                f"token ids from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has {rows}; "
                "use the model's own tokenizer"
            )
        if not self._ready:
            self._prepare()

    def _prepare(self) -> None:
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        self._materialise(self.decoder, self.named(self.decoder)[0], {f"{self.named(embedding)[0]}.weight"})
        embedding.padding_idx = None
        embedding.register_forward_pre_hook(self._lookup)
        self._ready = True

    def _lookup(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        rows, index = torch.unique(args[0], return_inverse=True)
        table = self._table()[rows].float()
        if not bool(torch.isfinite(table).all()):
            raise CheckpointError("the embedding of a token that is used holds NaN or Inf; download the model again")
        embedding.weight = nn.Parameter(table, requires_grad=False)
        return (index,)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)
