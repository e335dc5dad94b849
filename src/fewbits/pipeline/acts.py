"""The activation store: hidden states of the calibration rows between two blocks, in memory or in a mapped file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

TOKENS_PER_BATCH = 4096
PER_INPUT, SPARSEST = 10, 4


def pairing(tokens: int, widest: int) -> int:
    """One batch in how many goes through the original model too, where a statistic compares the two: enough for ten
    tokens per input of the widest layer, and one in four at least.
    """
    return max(1, min(SPARSEST, tokens // (PER_INPUT * widest)))


class Acts:
    """Hidden states float32 ``[rows, tokens, width]``, read and replaced one batch at a time.

    A batch is about 4096 tokens whatever the machine, so that the order of every sum, hence every byte of the result,
    depends on the plan alone. Above ``budget`` bytes the store is a file in ``folder`` that the system pages in and
    out. ``original``, where a statistic wants it, holds the rows of every ``paired``-th batch, from the
    first, as the original model's blocks leave them.
    """

    def __init__(
        self,
        rows: int,
        tokens: int,
        width: int,
        budget: int | None = None,
        folder: Path | None = None,
        file: str = "acts.bin",
    ):
        self.rows, self.tokens, self.width = rows, tokens, width
        self.original: Acts | None = None
        self.paired = 1
        self.per_batch = max(1, TOKENS_PER_BATCH // tokens)
        self.spilled = budget is not None and folder is not None and self.nbytes > budget
        if self.spilled and folder is not None:
            n = rows * tokens * width
            store = torch.from_file(str(folder / file), shared=True, size=n, dtype=torch.float32)
            self._store = store.view(rows, tokens, width)
        else:
            self._store = torch.empty(rows, tokens, width)

    @property
    def nbytes(self) -> int:
        """Size of the store."""
        return self.rows * self.tokens * self.width * 4

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.rows // self.per_batch)

    def __getitem__(self, batch: int) -> Tensor:
        """A view of one batch ``[rows in batch, tokens, width]``."""
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        return self._store[batch * self.per_batch : (batch + 1) * self.per_batch]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self[batch].copy_(hidden)

    def take(self, rows: Tensor) -> Tensor:
        """A copy of some rows, int64 indices; float32 ``[len(rows), tokens, width]``."""
        return self._store[rows]

    def padded(self, batch: int) -> Tensor:
        """A batch filled up with its own rows until it is as long as the others. Libraries split short products
        among their threads in another way than long ones, and round them differently for each number of threads.
        """
        x = self[batch]
        return x if len(x) == self.per_batch else x[torch.arange(self.per_batch) % len(x)]

    def cut(self, batch: int, x: Tensor) -> Tensor:
        """What belongs to the rows of a batch in ``x``, computed from :meth:`padded`: ``[rows or tokens, ...]``."""
        return x[: len(x) * len(self[batch]) // self.per_batch]

    def pair(self, every: int, budget: int | None, folder: Path | None) -> None:
        """Make room for ``original``: one batch in ``every``."""
        self.paired = every
        rows = sum(len(self[b]) for b in range(0, len(self), every))
        self.original = Acts(rows, self.tokens, self.width, budget, folder, "original.bin")

    def partner(self, batch: int) -> int | None:
        """Which batch of ``original`` holds the same rows, if one does."""
        return None if self.original is None or batch % self.paired else batch // self.paired

    def batches(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """``ids [rows, tokens]`` cut as the store is."""
        yield from enumerate(ids.split(self.per_batch))
