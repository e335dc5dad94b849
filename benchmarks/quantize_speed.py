"""Quantize one model with us and with each installed peer, on the same token rows, in one run; compare.

    python benchmarks/quantize_speed.py --model DIR --calibration c4.txt --text wikitext2-test.txt \\
        --gptqmodel-python PEER/bin/python --llmcompressor-python PEER/bin/python

A peer whose interpreter is not given, or does not work, is skipped with a message. Every tool runs alone, as a process
of its own; its wall time is that process from start to exit, imports and saving included. `other` is the CPU time that
the rest of the machine used meanwhile: a row where it is large has no valid speed. Quality is `fewbits eval` on the
result against the model; a checkpoint that we cannot read is first written out dense by the peer's own loader. Results
also go to benchmarks/results/quantize_speed.json.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.token_rows import token_rows
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
FEWBITS = [sys.executable, "-m", "fewbits"]
TICKS = os.sysconf("SC_CLK_TCK")
COLUMNS = (
    "tool",
    "method",
    "wall s",
    "quantize s",
    "CPU s",
    "other s",
    "peak MB",
    "KL",
    "ppl",
    "wall / ours",
    "KL / ours",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One tool: the command that quantizes into `out`, and the interpreter that can load what it wrote (None: ours)."""

    tool: str
    method: str
    out: Path
    command: list[str]
    python: str | None = None
    loader: str = "transformers"


class Failed(Exception):
    """A process exited with an error; the message is the end of what it said."""


def busy_seconds() -> float:
    """CPU seconds that this machine has worked since it started, all processes; 0 where /proc does not say."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    except OSError:
        return 0.0
    return sum(map(int, (user, nice, system, irq, softirq))) / TICKS


def child_seconds() -> float:
    """CPU seconds of all finished children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_json(command: list[str], folder: Path) -> Row:
    """The JSON object that ends a command's stdout. It runs in `folder`, as peers leave logs there. Raises Failed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise Failed(f"exit {done.returncode}: " + " | ".join(done.stderr.strip().splitlines()[-3:])[-600:])
    return json.loads(lines[-1])


def timed(job: Job) -> Row:
    """Quantize; wall and CPU seconds of the process, and of everybody else meanwhile."""
    wall, ours, all_ = time.perf_counter(), child_seconds(), busy_seconds()
    said = run_json(job.command, job.out.parent)
    wall, ours, all_ = time.perf_counter() - wall, child_seconds() - ours, busy_seconds() - all_
    return {
        "tool": job.tool,
        "version": said.get("version"),
        "method": job.method,
        "wall_seconds": wall,
        "quantize_seconds": said["seconds"],
        "cpu_seconds": ours,
        "other_cpu_seconds": max(0.0, all_ - ours),
        "peak_rss_bytes": said["peak_rss_bytes"],
        "bits_per_weight": said.get("bits_per_weight"),
    }


def fewbits_job(args: argparse.Namespace, method: str, work: Path) -> Job:
    out = work / f"fewbits-{method}"
    command = [*FEWBITS, "quantize", str(args.model), str(out), "--method", method, "--format", args.format, "--json"]
    command += ["--bits", str(args.bits), "--group-size", str(args.group_size)]
    command += ["--symmetric" if args.symmetric else "--affine", "--calibration", str(args.calibration)]
    command += ["--samples", str(args.samples), "--seq-len", str(args.seq_len)]
    return Job("fewbits", method, out, command)


def peer_job(args: argparse.Namespace, tool: str, method: str, work: Path) -> Job:
    out, python = work / f"{tool}-{method}", getattr(args, f"{tool}_python")
    script, rows = HERE / "peers" / f"{tool}_quantize.py", work / "rows.safetensors"
    command = [python, str(script), str(args.model), str(out), "--ids", str(rows)]
    command += ["--method", method, "--bits", str(args.bits), "--group-size", str(args.group_size)]
    command += ["--symmetric" if args.symmetric else "--affine"]
    return Job(tool, method, out, command, python, "gptqmodel" if tool == "gptqmodel" else "transformers")


def evaluate(args: argparse.Namespace, checkpoint: Path) -> Row:
    """Perplexity and KL against the model, by our evaluation."""
    command = [*FEWBITS, "eval", str(checkpoint), "--text", str(args.text), "--reference", str(args.model)]
    command += ["--ctx", str(args.ctx), "--windows", str(args.windows), "--json"]
    found = run_json(command, checkpoint.parent)
    return {
        key: found.get(key)
        for key in ("perplexity", "kl_mean", "kl_p99", "top1", "tokens", "size_bytes", "bits_per_weight")
    }


def score(args: argparse.Namespace, job: Job, work: Path) -> Row:
    """Quality of what a job wrote: read by us, or else as its own loader reads it."""
    try:
        return {**evaluate(args, job.out), "read_by": "fewbits"}
    except Failed as failure:
        if job.python is None:
            raise
        print(f"  {job.tool}: not readable by us ({failure}); its own loader writes it out dense", file=sys.stderr)
    dense = work / f"{job.out.name}-dense"
    command = [
        job.python,
        str(HERE / "peers" / "load_and_dump.py"),
        str(job.out),
        "--loader",
        job.loader,
        "--dump",
        str(dense),
    ]
    run_json([*command, "--ids", str(work / "rows.safetensors"), "--windows", "1"], work)
    # Size and bits per weight would be those of the dense copy.
    return {**evaluate(args, dense), "size_bytes": None, "bits_per_weight": None, "read_by": job.loader}


def usable(python: str | None, module: str) -> bool:
    """Whether that interpreter exists and has the module."""
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    try:
        return python is not None and subprocess.run([python, "-c", find], check=False).returncode == 0
    except OSError:
        return False


def jobs(args: argparse.Namespace, work: Path) -> list[Job]:
    """Ours first, then every peer that is there; rtn is ours alone, because for the peers it needs no calibration."""
    peers = []
    for tool in ("gptqmodel", "llmcompressor"):
        if usable(getattr(args, f"{tool}_python"), tool):
            peers.append(tool)
        else:
            print(
                f"skipped {tool}: give --{tool}-python, an interpreter that has it (see benchmarks/README.md)",
                file=sys.stderr,
            )
    found = []
    for method in args.methods.split(","):
        found.append(fewbits_job(args, method, work))
        found += [peer_job(args, tool, method, work) for tool in peers if method in ("gptq", "awq")]
    return found


def with_ratios(rows: list[Row]) -> list[Row]:
    """Each figure over ours for the same method; ratios of times count wall time."""
    ours = {row["method"]: row for row in rows if row["tool"] == "fewbits"}
    for row in rows:
        base = ours.get(row["method"], {})
        for name, key in (("wall_ratio", "wall_seconds"), ("peak_ratio", "peak_rss_bytes"), ("kl_ratio", "kl_mean")):
            row[name] = row[key] / base[key] if row.get(key) and base.get(key) else None
    return rows


def table(rows: list[Row]) -> str:
    """Aligned columns; a dash where there is no figure."""

    def cell(x: Any, form: str) -> str:
        return "-" if x is None else format(x, form)

    lines = [COLUMNS]
    for row in rows:
        figures = [
            cell(row[key], ".1f") for key in ("wall_seconds", "quantize_seconds", "cpu_seconds", "other_cpu_seconds")
        ]
        figures += [
            cell(row["peak_rss_bytes"] / 1e6, ".0f"),
            cell(row.get("kl_mean"), ".4f"),
            cell(row.get("perplexity"), ".3f"),
        ]
        figures += [cell(row["wall_ratio"], ".2f"), cell(row["kl_ratio"], ".3f")]
        lines.append((" ".join(filter(None, (row["tool"], row["version"]))), row["method"], *figures))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(x, widths, strict=True)))
        for x in lines
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="dense checkpoint, a transformers directory")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="text; its tokens from the start, cut into rows"
    )
    parser.add_argument("--text", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--gptqmodel-python", help="interpreter of an environment with GPTQModel")
    parser.add_argument("--llmcompressor-python", help="interpreter of an environment with llm-compressor")
    parser.add_argument("--methods", default="gptq", help="comma-separated: gptq, awq, rtn")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--affine", dest="symmetric", action="store_false")
    parser.add_argument("--format", default="compressed-tensors", help="what we write")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where checkpoints stay; default: a temporary directory, removed")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quantize_speed.json")
    args = parser.parse_args()
    for name in ("model", "calibration", "text", "work", "out", "gptqmodel_python", "llmcompressor_python"):
        if getattr(args, name) is not None:
            # Not resolve(): an environment's interpreter is a link, and it is the link that says which environment.
            setattr(args, name, type(getattr(args, name))(os.path.abspath(getattr(args, name))))
    return args


def measure(args: argparse.Namespace, work: Path) -> list[Row]:
    """Every job in turn. One that fails is reported: without a row, or without quality where only that failed."""
    save_file({"ids": token_rows(args.model, args.calibration, args.samples, args.seq_len)}, work / "rows.safetensors")
    rows = []
    for job in jobs(args, work):
        print(f"{job.tool} {job.method} ...", file=sys.stderr, flush=True)
        try:
            rows.append(timed(job))
            rows[-1] |= score(args, job, work)
        except Failed as failure:
            print(f"  {job.tool} {job.method} failed: {failure}", file=sys.stderr)
    return with_ratios(rows)


def main() -> None:
    args = arguments()
    work = args.work or Path(tempfile.mkdtemp(prefix="quantize-speed-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        rows = measure(args, work)
    finally:
        if args.work is None:
            shutil.rmtree(work)
    private = {"work", "out", "gptqmodel_python", "llmcompressor_python"}  # places on one machine
    kept = {key: value for key, value in vars(args).items() if key not in private}
    settings = {key: value.name if isinstance(value, Path) else value for key, value in kept.items()}
    settings |= {"cpus": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
