"""Kill a run with SIGKILL at random moments, resume it, and compare every byte with an undisturbed run.

    python benchmarks/kill_resume.py MODEL CALIBRATION.txt WORKDIR [--kills 20] [--samples 2] [--seq-len 256]

Prints one JSON line; exits 1 when any resumed output differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file of a directory."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fewbits", "quantize", str(args.model), str(out), "--method", args.method]
        command += [
            "--group-size",
            "64",
            "--calibration",
            str(args.calibration),
            "--samples",
            str(args.samples),
            "--seq-len",
            str(args.seq_len),
            "--resume",
        ]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    whole = args.workdir / "whole"
    began = time.perf_counter()
    if start(whole).wait():
        raise SystemExit("the undisturbed run failed")
    lasted = time.perf_counter() - began
    expected, moments = tree(whole), random.Random(args.seed)
    equal, stages = 0, []
    out = args.workdir / "out"
    for _ in range(args.kills):
        run = start(out)
        try:
            run.wait(timeout=moments.uniform(0.02, 1.0) * lasted)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
        partial = args.workdir / "out.partial"
        stages.append(len(list(partial.glob("*.safetensors"))) if partial.exists() else None)
        if not out.exists() and start(out).wait():
            raise SystemExit("the resumed run failed")
        equal += tree(out) == expected
        shutil.rmtree(out)
    left = [p.name for p in args.workdir.iterdir() if p.name != "whole"]
    result = {"kills": args.kills, "identical": equal, "parts_when_killed": stages, "left_behind": left}
    result["seconds_per_run"] = round(lasted, 1)
    print(json.dumps(result))
    shutil.rmtree(args.workdir)
    return 0 if equal == args.kills and not left else 1


if __name__ == "__main__":
    raise SystemExit(main())
