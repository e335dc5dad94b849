"""What `fewbits plan` says of a run against the run itself: bytes of the tensors, peak memory, time.

    python benchmarks/plan_reality.py CALIBRATION WORKDIR --models MODEL ... [--jobs "gptq --bits 4" ...] [--samples 32]

Every model with every job, each planned and carried out in processes of their own, one after another. Prints a table
and writes JSON. Bytes are those of all tensors in the output's safetensors or GGUF files, by their headers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

JOBS = [
    "rtn --bits 4 --group-size 64",
    "gptq --bits 4 --group-size 64",
    "awq --bits 3 --group-size 64",
    "q4_k_m+imatrix",
]
RESULTS = Path(__file__).parent / "results" / "plan_reality.json"


def run(*args: str) -> dict[str, Any]:
    """One fewbits command; its JSON."""
    command = [sys.executable, "-m", "fewbits", *args, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def tensor_bytes(folder: Path) -> int:
    """Bytes of every tensor under ``folder``."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                total += f.get_tensor(name).nbytes
    for file in folder.glob("*.gguf"):
        from gguf import GGUFReader

        total += sum(int(t.n_bytes) for t in GGUFReader(file).tensors)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("calibration")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--jobs", nargs="+", default=JOBS)
    parser.add_argument("--samples", default="32")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in args.models:
        for job in args.jobs:
            method, *rest = shlex.split(job)
            options = ["--method", method, *rest, "--samples", args.samples]
            planned = run("plan", model, *options)
            out = args.workdir / "out"
            made = run("quantize", model, str(out), *options, "--calibration", args.calibration, "--overwrite")
            rows.append(
                {
                    "model": Path(model).name,
                    "job": job,
                    "bytes": [planned["size_bytes"], tensor_bytes(out)],
                    "peak": [planned["peak_rss_bytes"], made["peak_rss_bytes"]],
                    "seconds": [planned["seconds"], made["seconds"]],
                }
            )
            shutil.rmtree(out)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print("| model | job | bytes, planned | made | peak, MB | made | ratio | seconds | made | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        cells = [r["model"], f"`{r['job']}`", *map(str, r["bytes"])]
        for (said, was), scale in ((r["peak"], 1e6), (r["seconds"], 1)):
            cells += [f"{said / scale:.0f}", f"{was / scale:.0f}", f"{said / was:.2f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
