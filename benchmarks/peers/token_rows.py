"""Cut a text into token rows, so that every tool calibrates on, and is scored on, the same tokens.

The text is tokenized whole, without special tokens, and cut from its start into consecutive rows.

    python benchmarks/peers/token_rows.py MODEL TEXT OUT.safetensors --rows 128 --seq-len 512
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def token_rows(model: str | Path, text: Path, rows: int, seq_len: int) -> Tensor:
    """The first rows x seq_len tokens of `text`, int64 [rows, seq_len]; exits when the text is too short."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    if len(ids) < rows * seq_len:
        sys.exit(f"{text}: {len(ids)} tokens, {rows} rows of {seq_len} need {rows * seq_len}; give a longer text")
    return torch.tensor(ids[: rows * seq_len]).view(rows, seq_len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    save_file({"ids": token_rows(args.model, args.text, args.rows, args.seq_len)}, args.out)


if __name__ == "__main__":
    main()
