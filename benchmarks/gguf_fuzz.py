"""Mutated GGUF files: each must load, or be refused in one line, within a second and a gigabyte.

    python benchmarks/gguf_fuzz.py [--count 5000] [--seed 0] [--keep DIR]

Small sound files of several families (dense and in blocks, a split one, importance matrices of both formats) are
damaged in one to six places, mostly in their headers, and given to ``fewbits.load`` (an importance matrix to its
reader) in a worker process. Counted are crashes of the worker, exceptions that are not ours, messages of more than one
line, more than 1 s of processor time, and more than 1 GB above what the worker held before. ``--keep`` keeps the files
that failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECOND, GIGABYTE = 1.0, 10**9
NUMBERS = [0, 1, 2, 7, 63, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63, 2**64 - 1]


def seeds(folder: Path) -> list[Path]:
    """Sound files: a model is its first file."""
    import torch

    from fewbits.formats import gguf_imatrix, gguf_model
    from fewbits.storage import Checkpoint
    from tests.tiny import tiny_model, tiny_tokenizer

    found = []
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    blocks: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    gemma = {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 16}
    cases = [("llama", "f16", small), ("qwen2", "f32", small), ("qwen3", "bf16", small), ("phi3", "f16", small)]
    cases += [
        ("gemma3_text", "q8_0", small | gemma),
        ("mixtral", "f16", small),
        ("llama", "q4_k_m", blocks),
        ("mistral", "q2_k", blocks),
    ]
    for i, (family, mixture, sizes) in enumerate(cases):
        source = tiny_model(family, folder / f"{i}-{family}", vocab_size=300, **sizes)
        tiny_tokenizer(source)
        export = gguf_model.prepare(source, [Checkpoint.open(source)], mixture)
        found.append(export.write(folder / f"{i}-{family}.gguf", 40_000 if i == 1 else None)[0])
    sums = {f"blk.{i}.attn_q.weight": torch.rand(32) for i in range(4)}
    for suffix in ("gguf", "dat"):
        gguf_imatrix.Imatrix(sums, dict.fromkeys(sums, 3.0), "text", 3).write(folder / f"imatrix.{suffix}")
        found.append(folder / f"imatrix.{suffix}")
    return found


def mutate(raw: bytearray, r: random.Random) -> None:
    """Damage in place: bytes, numbers, cuts, insertions, copies; four times of five in the header."""
    for _ in range(r.randint(1, 6)):
        head = min(len(raw), 16_000 if r.random() < 0.5 else 1_500)
        at = r.randrange(head if r.random() < 0.8 else len(raw))
        kind = r.choice(["bit", "byte", "word", "half", "cut", "grow", "copy"])
        if kind == "bit":
            raw[at] ^= 1 << r.randrange(8)
        elif kind == "byte":
            raw[at] = r.randrange(256)
        elif kind == "word":
            raw[at : at + 8] = struct.pack("<Q", r.choice(NUMBERS))
        elif kind == "half":
            raw[at : at + 4] = struct.pack("<I", r.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == "cut" and len(raw) > 64:
            del raw[at : at + r.choice([1, 4, 8, 100])]
        elif kind == "grow":
            raw[at:at] = bytes(r.randrange(256) for _ in range(r.choice([1, 4, 8, 40])))
        else:
            raw[at:at] = raw[at : at + r.choice([4, 12, 60])]


def outcome(path: Path) -> str:
    """``loaded``, ``refused``, or what is wrong."""
    import fewbits
    from fewbits.errors import FewbitsError
    from fewbits.formats import gguf_imatrix

    try:
        if path.name.startswith("imatrix"):
            gguf_imatrix.read(path).mean_squares()
        else:
            fewbits.load(path)
        return "loaded"
    except FewbitsError as e:
        return "refused" if "\n" not in str(e) else f"more than one line: {e!r}"
    except BaseException as e:  # panics of extensions are no Exceptions
        return f"{type(e).__name__}: {str(e)[:200]!r}"


def worker(jobs: Any, results: Any) -> None:
    """Answer each path with (outcome, seconds of processor time, bytes above what was held)."""
    import torch

    torch.set_num_threads(1)
    for path in iter(jobs.get, None):
        Path("/proc/self/clear_refs").write_text("5")  # peak resident size from now on
        before, started = status("VmRSS"), time.process_time()
        found = outcome(path)
        results.put((found, time.process_time() - started, status("VmHWM") - before))


def status(key: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key + ":"))
    return int(line.split()[1]) * 1024


class Pool:
    """One worker, replaced when it dies."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.jobs, self.results = context.Queue(), context.Queue()
        self.process = context.Process(target=worker, args=(self.jobs, self.results), daemon=True)
        self.process.start()

    def __call__(self, path: Path) -> tuple[str, float, int]:
        self.jobs.put(path)
        while True:
            try:
                return self.results.get(timeout=1)
            except Exception:
                if not self.process.is_alive():
                    code = self.process.exitcode
                    self.start()
                    return f"crash: exit code {code}", 0.0, 0


def damaged(seed: Path, folder: Path, r: random.Random) -> Path:
    """A damaged copy of ``seed``; of a split model one file is damaged."""
    files = sorted(seed.parent.glob(seed.name.replace("-00001-of-", "-*-of-")))
    victim = r.choice(files)
    for file in files:
        raw = bytearray(file.read_bytes())
        if file == victim:
            mutate(raw, r)
        (folder / file.name).write_bytes(raw)
    return folder / seed.name


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutated GGUF files.")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    r, counts, failures = random.Random(given.seed), Counter[str](), []
    slowest, largest, pool = 0.0, 0, Pool()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "in").mkdir()
        originals = seeds(folder)
        for seed in originals:
            assert pool(seed)[0] == "loaded", (seed, pool(seed))
        for i in range(given.count):
            path = damaged(r.choice(originals), folder / "in", r)
            found, seconds, size = pool(path)
            slowest, largest = max(slowest, seconds), max(largest, size)
            if seconds > SECOND or size > GIGABYTE:
                found = f"{seconds:.2f} s, {size / 1e6:.0f} MB ({found})"
            counts[found if found in ("loaded", "refused") else "failed"] += 1
            if found not in ("loaded", "refused"):
                failures.append({"file": i, "what": found})
                print(i, path.name, found, file=sys.stderr, flush=True)
                if given.keep:
                    given.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, given.keep / f"{i}-{path.name}")
    print(json.dumps({"files": given.count, **counts, "slowest_s": round(slowest, 3), "largest_bytes": largest}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    raise SystemExit(main())
