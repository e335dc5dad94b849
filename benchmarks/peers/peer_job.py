"""What the scripts that run inside a peer's environment share: their arguments, the token rows, the line they print.

Nothing here, and nothing beside it, imports our package: these environments do not have it.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

STARTED = time.perf_counter()


def quantize_arguments(tool: str, methods: tuple[str, ...]) -> argparse.Namespace:
    """MODEL OUT --ids FILE --method --bits --group-size --symmetric|--affine, the same for every peer."""
    parser = argparse.ArgumentParser(description=f"Quantize with {tool}; prints one JSON line.")
    parser.add_argument("model", help="dense checkpoint, a transformers directory")
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument(
        "--ids", type=Path, required=True, help='safetensors file with an int64 tensor "ids" [rows, seq]'
    )
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64, help="-1 is a whole row")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--affine", dest="symmetric", action="store_false")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists: give a directory that does not, or remove it")
    return args


def read_ids(path: Path) -> Tensor:
    """Token rows, int64 [rows, seq]."""
    tensors = load_file(path)
    if "ids" not in tensors or tensors["ids"].dim() != 2:
        sys.exit(
            f'{path}: has {sorted(tensors)}; give a file with one tensor "ids" [rows, seq] (token_rows.py makes it)'
        )
    return tensors["ids"].long()


def as_samples(ids: Tensor) -> list[dict[str, list[int]]]:
    """Rows in the shape that both peers take: no padding, so the mask is all ones."""
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far; compilers that it started are not counted."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(**facts: Any) -> None:
    """One JSON object as the last line of stdout: whatever the peer prints comes before it."""
    sys.stderr.flush()
    facts = {**facts, "total_seconds": time.perf_counter() - STARTED, "peak_rss_bytes": peak_rss_bytes()}
    print("\n" + json.dumps(facts), flush=True)
