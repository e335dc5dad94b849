"""Tokens per second of an NF4 checkpoint: our layers against transformers with bitsandbytes, on the CPU, in one run.

    fewbits quantize MODEL nf4 --method rtn --grid nf4 --format bitsandbytes
    python benchmarks/decode_nf4.py nf4 --bitsandbytes-python peer/bin/python [--dtype bfloat16] [--json FILE]

Both read the same files, hold the same dtype, use as many threads, and take turns; figures are medians over the rounds.
"ours, generate" goes through the same ``generate`` of transformers, "ours, lean" through the loop of ``fewbits
generate``. ``cpu`` counts processor time instead of the clock's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from decode import ours, rate, through_transformers

import fewbits

PEER = Path(__file__).parent / "peers" / "bitsandbytes_decode.py"


class Peer:
    """The other process, which waits between its turns."""

    def __init__(self, python: str, model: str, dtype: str):
        command = [python, str(PEER), model, "--dtype", dtype, "--threads", str(torch.get_num_threads())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{PEER.name} ended with code {self._process.wait()}")

    def rate(self, tokens: int) -> tuple[float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        found = self._read()
        return found["wall"], found["cpu"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("model")
    args.add_argument("--bitsandbytes-python", required=True)
    args.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args.add_argument("--tokens", type=int, default=24)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--json", type=Path)
    a = args.parse_args()
    model, _ = fewbits.load(a.model, dtype=getattr(torch, a.dtype))
    ids = torch.randint(3, model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    runs = {"ours, generate": through_transformers(model), "ours, lean": ours(model)}
    for run in runs.values():
        rate(run, ids, 2)
    peer = Peer(a.bitsandbytes_python, a.model, a.dtype)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ("bitsandbytes", *runs)}
    for _ in range(a.rounds):
        rates["bitsandbytes"].append(peer.rate(a.tokens))
        for name, run in runs.items():
            rates[name].append(rate(run, ids, a.tokens))
    peer.close()
    theirs, found = rates["bitsandbytes"], {}
    for name, turns in rates.items():
        wall, cpu = ([turn[i] for turn in turns] for i in (0, 1))
        times = statistics.median(w / t[0] for w, t in zip(wall, theirs, strict=True))
        found[name] = {"wall": statistics.median(wall), "cpu": statistics.median(cpu), "times_bitsandbytes": times}
        r = found[name]
        print(f"{name:15} {r['wall']:6.1f} tokens/s by the clock, {r['cpu']:6.1f} by processor time, {times:.2f} x")
    if a.json:
        facts = {"dtype": a.dtype, "threads": torch.get_num_threads(), "bitsandbytes": peer.about}
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(facts | {"tokens_per_s": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
