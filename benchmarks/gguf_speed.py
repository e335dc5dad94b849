"""Wall time and peak memory of writing GGUF files: ours against llama-quantize, alternating, in one run.

    python benchmarks/gguf_speed.py WORKDIR --llama-quantize PROGRAM [--types q4_k_m,q6_k,q2_k,iq4_xs] [--rounds 2]

The model is Llama-shaped with 1.1 billion random float16 weights, as a transformers directory for us and as an F16
GGUF file for llama-quantize. Times are those of whole processes, imports and writing included; the least of the
rounds counts. ``other s`` is the CPU time that the rest of the machine used meanwhile: where it is large, compare
``CPU s``. Every tensor of the two files must be equal, byte for byte. Results go to
benchmarks/results/gguf_speed.json. Needs 7 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fewbits.formats import gguf
from fewbits.storage import save

RESULTS = Path(__file__).parent / "results" / "gguf_speed.json"
CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    dtype="float16",
)
TICKS = os.sysconf("SC_CLK_TCK")

Row = dict[str, Any]


def make(folder: Path) -> None:
    """Write the model unless it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    c = CONFIG
    shared = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    inside = {"self_attn.q_proj": (c.hidden_size, c.hidden_size), "self_attn.k_proj": (shared, c.hidden_size)}
    inside |= {"self_attn.v_proj": (shared, c.hidden_size), "self_attn.o_proj": (c.hidden_size, c.hidden_size)}
    inside |= {f"mlp.{n}_proj": (c.intermediate_size, c.hidden_size) for n in ("gate", "up")}
    inside |= {"mlp.down_proj": (c.hidden_size, c.intermediate_size)}
    inside |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (c.hidden_size,))
    shapes = {f"model.layers.{i}.{n}.weight": s for i in range(c.num_hidden_layers) for n, s in inside.items()}
    shapes |= {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size), "model.norm.weight": (c.hidden_size,)}
    shapes |= {"lm_head.weight": (c.vocab_size, c.hidden_size)}
    g = torch.Generator().manual_seed(0)
    tensors = {
        n: torch.empty(s).normal_(0, 0.02, generator=g).half() if len(s) == 2 else torch.ones(s, dtype=torch.float16)
        for n, s in shapes.items()
    }
    save(folder / "model.safetensors", tensors)
    tokenizer(c.vocab_size).save_pretrained(folder)
    CONFIG.save_pretrained(folder)


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level one whose other tokens nobody needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *letters]
    words += [f"w{i}" for i in range(size - len(words))]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def busy_seconds() -> float:
    """CPU seconds that this machine has worked since it started; 0 where /proc does not say."""
    try:
        user, nice, system, _idle, _wait, irq, softirq, *_ = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    except OSError:
        return 0.0
    return sum(map(int, (user, nice, system, irq, softirq))) / TICKS


def timed(command: list[str], threads: int) -> Row:
    """Run to the end: wall and CPU seconds, seconds of everybody else, largest resident size."""
    wall, busy, peak = time.perf_counter(), busy_seconds(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL, stderr=said
        )
        while True:
            peak = max(peak, high_water(process.pid))
            done, status, used = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command[0]} failed: {said.read().decode(errors='replace')[-800:]}")
    wall, cpu = time.perf_counter() - wall, used.ru_utime + used.ru_stime
    other = max(0.0, busy_seconds() - busy - cpu)
    return {"wall_s": wall, "cpu_s": cpu, "other_cpu_s": other, "peak_rss_bytes": peak}


def high_water(pid: int) -> int:
    """Most that a process has held so far; getrusage would count what this one held when it forked."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def differing(ours: Path, theirs: Path) -> list[str]:
    """Tensors whose type or bytes differ."""
    a, b = gguf.read(ours), gguf.read(theirs)
    names = a.infos.keys() | b.infos.keys()
    return sorted(
        n
        for n in names
        if n not in a.infos
        or n not in b.infos
        or a.infos[n].kind != b.infos[n].kind
        or not torch.equal(a.raw(n), b.raw(n))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--types", default="q4_k_m,q6_k,q2_k,iq4_xs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    model, dense = args.workdir / "model", args.workdir / "f16.gguf"
    make(model)
    fewbits = [sys.executable, "-m", "fewbits", "convert", str(model)]
    if not dense.exists():
        subprocess.run([*fewbits, str(dense)], check=True)
    rows: list[Row] = []
    for kind in args.types.split(","):
        ours, theirs = args.workdir / "ours.gguf", args.workdir / "theirs.gguf"
        commands = {
            "fewbits": [*fewbits, str(ours), "--type", kind, "--overwrite"],
            "llama-quantize": [args.llama_quantize, str(dense), str(theirs), kind.upper(), str(args.threads)],
        }
        runs: dict[str, list[Row]] = {tool: [] for tool in commands}
        for _ in range(args.rounds):
            for tool, command in commands.items():
                runs[tool].append(timed(command, args.threads))
        differ = differing(ours, theirs)
        for tool, found in runs.items():
            rows.append({"type": kind, "tool": tool} | min(found, key=lambda r: r["wall_s"]))
            rows[-1] |= {"peak_rss_bytes": max(r["peak_rss_bytes"] for r in found), "differing_tensors": len(differ)}
            r = rows[-1]
            print(
                f"{kind:8} {tool:15} wall {r['wall_s']:7.1f} s  CPU {r['cpu_s']:7.1f} s"
                f"  other {r['other_cpu_s']:7.1f} s  peak {r['peak_rss_bytes'] / 1e6:6.0f} MB"
                f"  differing tensors {len(differ)} {differ[:2]}",
                flush=True,
            )
        ours.unlink()
        theirs.unlink()
    RESULTS.parent.mkdir(exist_ok=True)
    settings = {"threads": args.threads, "rounds": args.rounds, "cpus": os.cpu_count(), "date": time.strftime("%F")}
    RESULTS.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
