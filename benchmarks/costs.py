"""What the second-order methods cost beside GPTQ: wall time and peak memory of whole runs, in turns.

    python benchmarks/costs.py MODEL CALIBRATION.txt WORKDIR [--samples 128] [--turns 1] [--only gptaq]

Every method runs as a process of its own; its time is that process from start to exit. All have 3 bits; GPTQ runs in
every turn, and ratios are to it. Medians over the turns go to ``results/costs.json``. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

METHODS = {
    "gptq": ["--method", "gptq", "--bits", "3", "--group-size", "-1"],
    "gptaq": ["--method", "gptaq", "--bits", "3", "--group-size", "-1"],
    "spqr": ["--method", "spqr"],
    "squeezellm": ["--method", "squeezellm", "--bits", "3"],
    "squeezellm-sparse": ["--method", "squeezellm-sparse", "--bits", "3"],
}
RESULTS = Path(__file__).parent / "results" / "costs.json"


def run(model: str, out: Path, calibration: str, samples: str, options: list[str]) -> dict[str, Any]:
    """Seconds and bytes of one ``fewbits quantize``."""
    command = [sys.executable, "-m", "fewbits", "quantize", model, str(out), "--overwrite", "--json", *options]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--calibration", calibration, "--samples", samples], check=True, stdout=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - began
    made = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(out)
    return {"seconds": seconds, "peak_rss_bytes": made["peak_rss_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "calibration", "workdir"):
        parser.add_argument(name)
    parser.add_argument("--samples", default="128")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    names = ["gptq", *(n for n in args.only if n != "gptq")]
    Path(args.workdir).mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(args.turns):
        for name in names:
            out = Path(args.workdir) / name
            found[name].append(run(args.model, out, args.calibration, args.samples, METHODS[name]))
            print(f"turn {turn + 1}: {name} {found[name][-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    base = {k: median(r[k] for r in found["gptq"]) for k in ("seconds", "peak_rss_bytes")}
    facts: dict[str, Any] = {"samples": int(args.samples), "turns": args.turns}
    print("| method | seconds | to GPTQ's | peak, MB | more than GPTQ's, MB |")
    print("| --- | --- | --- | --- | --- |")
    for name, runs in found.items():
        seconds, peak = (median(r[k] for r in runs) for k in ("seconds", "peak_rss_bytes"))
        facts[name] = {"seconds": seconds, "ratio": seconds / base["seconds"], "peak_rss_bytes": peak}
        more = (peak - base["peak_rss_bytes"]) / 1e6
        print(f"| {name} | {seconds:.0f} | {seconds / base['seconds']:.2f} | {peak / 1e6:.0f} | {more:.0f} |")
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
