"""What several methods cost together, against one of them alone: CPU seconds, which a busy machine does not change.

    python benchmarks/shared_pass.py MODEL TEXT [--blocks 3] [--samples 32]

Times ``gptq`` as `quantize` does it, then five methods on one calibration pass, on the first blocks of the model. The
bar: five methods cost at most twice one method, and their solvers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

time.perf_counter = time.process_time  # before fewbits looks at it: every figure below is CPU time

from fewbits import api  # noqa: E402
from fewbits.pipeline.job import Job  # noqa: E402
from fewbits.pipeline.together import together  # noqa: E402

METHODS = ("rtn", "gptq", "awq", "q4_k_m", "nf4")


def first_blocks(model: Path, folder: Path, blocks: int) -> Path:
    """The same files with a config that uses only the first blocks."""
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    given = parser.parse_args()
    how = {"calibration": given.text, "samples": given.samples, "seq_len": 512}
    group = dict.fromkeys(("rtn", "gptq", "awq"), 64)  # widths of small models are no multiples of 128
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "model").mkdir()
        model = first_blocks(given.model.resolve(), folder / "model", given.blocks)
        alone = {}
        for method in ("gptq", "awq"):
            began = time.process_time()
            api.quantize(model, folder / f"{method}-alone", method=method, group_size=group[method], **how)
            alone[method] = time.process_time() - began
            print(f"{method} alone, as quantize does it: {alone[method]:.1f} s", flush=True)
        began = time.process_time()
        ask = how | {"stream": "original", "dry_run": True}
        jobs = [api.quantize(model, "unused", method=m, group_size=group.get(m), **ask) for m in METHODS]
        calibrated = [j for j in jobs if isinstance(j, Job) and j.rows is not None]
        results, shared = together(calibrated, [folder / j.plan.method for j in calibrated])
        own = {r.method: r.seconds - shared for r in results}
        for job in jobs:
            if isinstance(job, Job) and job.rows is None:
                start = time.process_time()
                job.run(folder / job.plan.method)
                own[job.plan.method] = time.process_time() - start
        total = time.process_time() - began
    parts = ", ".join(f"{m} {s:.1f}" for m, s in own.items())
    print(f"five methods: {total:.1f} s, of which the shared pass {shared:.1f} s; own parts: {parts}")
    print(f"outside the methods' own parts: {(total - sum(own.values())) / alone['gptq']:.2f} x gptq alone")


if __name__ == "__main__":
    main()
