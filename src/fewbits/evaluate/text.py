"""The text that a model is scored on: tokens of one file, cut into windows.

Convention: the text is tokenized whole, without special tokens; window ``i`` is tokens ``[i * ctx, (i + 1) * ctx)``;
every next-token prediction inside a window is scored, which makes ``ctx - 1`` of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import RequestError

_WHOLE = 4_000_000  # characters below which a text is tokenized whole
_CHARS = (
    64  # characters read per token wanted of a larger text: far past the last window, so that no window sees the cut
)


def read(text: str | Path) -> str:
    """The text of a UTF-8 file, or of a fetched asset by its name (wikitext2, wiki, c4, code).

    Raises RequestError when there is no such file or it is not UTF-8, FetchError when the asset cannot be had.
    """
    from fewbits.model import assets

    path = Path(text)
    if not path.exists() and str(text) in assets.TEXTS:
        path = assets.find_text(str(text))
    if not path.is_file():
        known = ", ".join(assets.TEXTS)
        raise RequestError(f"no text at {str(text)!r}; give a UTF-8 text file or the name of a text to fetch ({known})")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RequestError(f"{path} is not UTF-8 text (byte {e.start}); convert it to UTF-8") from None


def windows(tokenizer: Any, text: str, ctx: int, count: int) -> Tensor:
    """int64 ``[count, ctx]``. Raises RequestError, with the counts, when the text holds fewer tokens."""
    if ctx < 2 or count < 1:
        raise RequestError(
            f"ctx {ctx} and windows {count} score nothing; give --ctx of at least 2 and --windows of at least 1"
        )
    ids = encode(tokenizer, text[: max(_WHOLE, _CHARS * ctx * count)])
    if len(ids) < ctx * count:
        raise RequestError(
            f"the text has {len(ids)} tokens, {count} windows of {ctx} need {ctx * count}; "
            + (
                f"give --windows {len(ids) // ctx} or a longer text"
                if len(ids) >= ctx
                else "give a longer text or a smaller --ctx"
            )
        )
    return ids[: ctx * count].reshape(count, ctx)


def encode(tokenizer: Any, text: str) -> Tensor:
    """int64 ``[tokens]``, no special tokens added."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return torch.tensor(ids, dtype=torch.int64)
