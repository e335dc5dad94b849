"""Time from nothing to the first token of a checkpoint, in fresh processes; prints medians as JSON.

    python benchmarks/load.py CHECKPOINT [--rounds 3] [--json FILE]

``imports`` is fewbits and torch; transformers' own imports are part of ``load``, which brings them in. ``process`` is
the whole process of that library call, ``command`` that of ``fewbits generate``, which spares some imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "The capital of France is"


def measure(checkpoint: str) -> dict[str, float]:
    """Seconds of each stage in this process, which must be fresh."""
    begin = time.perf_counter()
    import torch

    import fewbits

    imported = time.perf_counter()
    model, tokenizer = fewbits.load(checkpoint)
    loaded = time.perf_counter()
    from fewbits.runtime.decode import generate

    assert len(generate(model, tokenizer(PROMPT, return_tensors="pt")["input_ids"], 1)) == 1
    done = time.perf_counter()
    return {
        "imports": imported - begin,
        "load": loaded - imported,
        "first_token": done - loaded,
        "total": done - begin,
        "cpu": time.process_time(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("checkpoint")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--json", type=Path)
    args.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    a = args.parse_args()
    if a.here:
        print(json.dumps(measure(a.checkpoint)))
        return
    runs = []
    for _ in range(a.rounds):
        begin = time.perf_counter()
        argv = [sys.executable, __file__, a.checkpoint, "--here"]
        done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
        run = json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - begin}
        begin = time.perf_counter()
        argv = [sys.executable, "-m", "fewbits", "generate", a.checkpoint, PROMPT, "--max-tokens", "1"]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        runs.append(run | {"command": time.perf_counter() - begin})
    found = {name: round(statistics.median(r[name] for r in runs), 3) for name in runs[0]}
    print(json.dumps(found))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
