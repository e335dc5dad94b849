"""The walk on tiny models of every family: laws of the stored result, reproducibility, resumption, refusals."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fewbits import api, formats
from fewbits.errors import FewbitsError, RequestError
from fewbits.kernels import fixed
from fewbits.model import Source
from fewbits.storage import Checkpoint
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

TEXT = " ".join(f"the quick brown fox number {i} jumps over {i * 7 % 13} lazy dogs" for i in range(400))
SMALL = {"samples": 12, "seq_len": 16, "group_size": 16, "compute": "fp32", "calibration": [TEXT]}


def make(family, folder, **changes):
    tiny_model(family, folder, vocab_size=320, **changes) if family != "gemma3" else tiny_model(family, folder)
    tiny_tokenizer(folder, TEXT)
    return folder


def tree(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())}


class Stop(BaseException):
    """A run is interrupted."""


def stop_after(blocks):
    """Interrupts a run when so many blocks are finished."""

    def on_event(event):
        if event["event"] == "block" and event["block"] + 1 == blocks:
            raise Stop

    return on_event


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3"])
def test_every_family(family, tmp_path):
    """Every quantized weight in the file is what the codes say and close to the original; the rest is the original in
    float16.
    """
    source = make(family, tmp_path / "model")
    out = tmp_path / "out"
    result = api.quantize(source, out, format="fewbits", bits=8, **SMALL)
    original, stored = Source.open(source), Checkpoint.open(out)
    config = json.loads((out / "config.json").read_text())
    layout = formats.detect(config["quantization_config"])
    names = {original.disk_name(i, n) for i in range(original.n_blocks) for n in original.linears(original.skeleton(i))}
    assert result.tensors == len(names)
    for i in range(original.n_blocks):
        block = original.block(i)
        for local, module in original.linears(block).items():
            name = original.disk_name(i, local)
            parts = {k.rsplit(".", 1)[1]: stored.tensor(k) for k in stored.names() if k.rsplit(".", 1)[0] == name}
            q = layout.unpack(name, {k: t for k, t in parts.items() if k in layout.suffixes})
            w = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            assert float((q.dense() - w).norm() / w.norm()) < 0.02
    for name in original.outside():
        assert torch.equal(stored.tensor(name), original.checkpoint.tensor(name).half())
    assert result.size_bytes == sum(p.stat().st_size for p in out.iterdir())


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq", "gptq-paper", "obq"])
def test_methods_lower_the_output_error(method, llama, tmp_path):
    result = api.quantize(llama, tmp_path / "out", method=method, format="fewbits", bits=3, **SMALL)
    events = [json.loads(x) for x in (tmp_path / "out/fewbits_events.jsonl").read_text().splitlines()]
    assert len(events) == result.tensors == 21
    assert (result.kl is None) == (method == "rtn")


@pytest.mark.parametrize(
    ("method", "compute"),
    [*(("awq+gptq", c) for c in ("fp32", "bf16", "fixed")), ("gptaq", "fixed"), ("squeezellm", "fixed")],
)
def test_same_bytes_whatever_the_threads_when_the_last_batch_is_short(llama, tmp_path, method, compute):
    """7 rows of 48 tokens follow a full batch of 85."""
    before, trees, distances = torch.get_num_threads(), [], []
    settings = SMALL | {"samples": 92, "seq_len": 48, "compute": compute, "calibration": [TEXT * 2]}
    if method == "squeezellm":
        del settings["group_size"]  # its tables are of whole rows
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = tmp_path / f"{threads}"
            result = api.quantize(llama, out, method=method, format="fewbits", bits=4, **settings)
            trees.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
            distances.append(result.kl)
    finally:
        torch.set_num_threads(before)
    assert trees[0] == trees[1]
    assert distances[0] == distances[1] and distances[0] is not None  # the model card holds it


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_fixed_point_takes_every_product(llama, tmp_path, monkeypatch, method):
    """Layers, attention and statistics of each block; the weights come out near those of float32."""
    from fewbits.kernels import fixed

    counts = dict.fromkeys(("fixed_linear", "fixed_attention"), 0)

    def counted(name, plain):
        def call(*args, **rest):
            counts[name] += 1
            return plain(*args, **rest)

        return call

    for name in counts:
        monkeypatch.setattr(fixed, name, counted(name, getattr(fixed, name)))
    settings = SMALL | {"samples": 12, "seq_len": 48, "bits": 8, "format": "fewbits", "method": method}
    for compute in ("fp32", "fixed"):
        api.quantize(llama, tmp_path / compute, **(settings | {"compute": compute}))
        if compute == "fp32":
            assert not any(counts.values())
    assert counts["fixed_linear"] >= 21 and counts["fixed_attention"] >= 3  # 3 blocks of 7 layers, one batch
    module = "model.layers.2.mlp.down_proj"  # the last layer: everything before it has left its mark
    dense = []
    for compute in ("fp32", "fixed"):
        stored = Checkpoint.open(tmp_path / compute)
        layout = formats.detect(json.loads((tmp_path / compute / "config.json").read_text())["quantization_config"])
        suffixes = formats.modules(stored.names(), layout)[module]
        dense.append(layout.unpack(module, {x: stored.tensor(f"{module}.{x}") for x in suffixes}).dense())
    assert float((dense[0] - dense[1]).norm() / dense[0].norm()) < 0.01


def test_a_checked_job_without_its_text_does_not_run(llama, tmp_path):
    """A dry run reads no text that nobody named; running that job must not round everything to nearest."""
    settings = {k: v for k, v in SMALL.items() if k != "calibration"}
    job = api.quantize(llama, tmp_path / "out", method="gptq", format="fewbits", dry_run=True, **settings)
    with pytest.raises(RequestError, match="checked without a text"):
        job.run(tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("memory", [None, 20_000])
def test_padding_is_never_counted(family, memory, tmp_path, monkeypatch):
    """Every layer's statistics hold the tokens asked for, and batches of another size give the same statistics."""
    source = make(family, tmp_path / "model")
    seen = []
    for tokens in (4096, 5 * 16):
        monkeypatch.setattr("fewbits.pipeline.acts.TOKENS_PER_BATCH", tokens)
        out = tmp_path / f"{tokens}"
        api.quantize(source, out, method="gptq", format="fewbits", bits=8, max_memory=memory, **SMALL)
        events = [json.loads(x) for x in (out / "fewbits_events.jsonl").read_text().splitlines()]
        assert all(e["tokens"] == 12 * 16 for e in events if ".experts." not in e["name"])
        seen.append({e["name"]: (e["tokens"], e["error"]) for e in events if "fallback" not in e})
    assert seen[0].keys() == seen[1].keys()
    for name, (tokens, error) in seen[0].items():
        assert seen[1][name] == (tokens, pytest.approx(error, rel=1e-2, abs=1e-5))


def test_same_bytes_whatever_the_threads_and_the_memory(llama, tmp_path):
    before, trees = torch.get_num_threads(), []
    try:
        for k, (threads, memory) in enumerate([(1, None), (2, None), (3, 20_000)]):
            torch.set_num_threads(threads)
            api.quantize(
                llama, tmp_path / f"{k}", method="awq+gptq", format="fewbits", bits=4, max_memory=memory, **SMALL
            )
            trees.append(tree(tmp_path / f"{k}"))
    finally:
        torch.set_num_threads(before)
    assert trees[0] == trees[1] == trees[2]


def test_stopping_between_blocks_and_resuming_changes_no_byte(llama, tmp_path):
    api.quantize(llama, tmp_path / "whole", method="awq+gptq", format="fewbits", **SMALL)

    for blocks in (1, 2, 3):
        out = tmp_path / f"out{blocks}"
        with pytest.raises(Stop):
            api.quantize(llama, out, method="awq+gptq", format="fewbits", on_event=stop_after(blocks), **SMALL)
        assert not out.exists()
        with pytest.raises(RequestError, match="--resume"):
            api.quantize(llama, out, method="awq+gptq", format="fewbits", **SMALL)
        with pytest.raises(RequestError, match="differs in plan"):
            api.quantize(llama, out, method="gptq", format="fewbits", resume=True, **SMALL)
        api.quantize(llama, out, method="awq+gptq", format="fewbits", resume=True, **SMALL)
        assert tree(out) == tree(tmp_path / "whole")
        assert not Path(f"{out}.partial").exists()


@pytest.mark.parametrize("format", ["fewbits", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_bytes_are_the_same_after_resuming(llama, tmp_path, monkeypatch, format, symmetric):
    """Solved layers compute from their codes, read back ones too, whatever the format stores."""
    settings = SMALL | {"compute": "fixed", "group_size": 32, "samples": 40}  # 640 tokens
    settings |= {"method": "gptq", "bits": 4, "symmetric": symmetric, "format": format}
    calls = []
    real = fixed.few_linear
    monkeypatch.setattr(fixed, "few_linear", lambda x, w, bias: calls.append(len(x)) or real(x, w, bias))
    api.quantize(llama, tmp_path / "whole", **settings)
    assert len(calls) == 21  # one batch through every layer once
    out = tmp_path / "out"

    with pytest.raises(Stop):
        api.quantize(llama, out, on_event=stop_after(2), **settings)
    api.quantize(llama, out, resume=True, **settings)
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_moments(llama, tmp_path):
    """kill -9 three times, then --resume: byte for byte what an undisturbed run writes."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [sys.executable, "-m", "fewbits", "quantize", str(llama), "OUT", "--method", "gptq", "--group-size", "16"]
    command += ["--calibration", str(text), "--samples", "12", "--seq-len", "16", "--format", "fewbits"]
    at = command.index("OUT")

    def start(out, *more):
        return subprocess.Popen([*command[:at], str(out), *command[at + 1 :], *list(more)], stderr=subprocess.DEVNULL)

    whole, out = tmp_path / "whole", tmp_path / "out"
    began = time.perf_counter()
    assert start(whole).wait() == 0
    lasted = time.perf_counter() - began
    for share in (0.6, 0.8, 0.95):
        p = start(out, "--resume")
        time.sleep(lasted * share)
        os.kill(p.pid, signal.SIGKILL)
        p.wait()
        if out.exists():
            break
    if not out.exists():
        assert start(out, "--resume").wait() == 0
    assert tree(out) == tree(whole)


def test_refusals_leave_nothing_behind(llama, tmp_path):
    out = tmp_path / "out"
    cases = [
        ({"method": "gptx"}, "did you mean 'gptq'"),
        ({"format": "zip"}, "allowed: compressed-tensors"),
        ({"bits": 5, "format": "awq"}, "cannot store"),
        ({"bits": 1}, "allowed: 2 to 8"),
        ({"group_size": 24, "format": "awq"}, "self_attn.q_proj"),
        ({"samples": 100_000}, "--samples"),
        ({"calibration": [""]}, "empty"),
        ({"calibration": str(tmp_path / "nothing.txt")}, "no such calibration text"),
        ({"device": "tpu"}, "allowed: cpu"),
        ({"compute": "fp64"}, "allowed: bf16, fp32, fixed"),
    ]
    for change, message in cases:
        with pytest.raises(RequestError, match=message):
            api.quantize(llama, out, **(SMALL | change))
        assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(RequestError, match="exists"):
        api.quantize(llama, out, **SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="not a directory"):
        api.quantize(llama, tmp_path / "file" / "out", **SMALL)


def test_overwrite_replaces_at_the_end(llama, tmp_path):
    out = tmp_path / "out"
    api.quantize(llama, out, method="rtn", format="fewbits", **SMALL)
    before = tree(out)
    api.quantize(llama, out, method="gptq", format="fewbits", overwrite=True, **SMALL)
    assert tree(out) != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_damaged_weights_are_named_and_leave_nothing(tmp_path):
    from safetensors.torch import load_file, save_file

    source = make("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(FewbitsError, match=r"layers\.1\.mlp\.up_proj"):
        api.quantize(source, tmp_path / "out", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_dry_run_writes_nothing(llama, tmp_path):
    job = api.quantize(llama, tmp_path / "out", dry_run=True, **SMALL)
    assert len(job.entries) == 21
    assert list(tmp_path.iterdir()) == []


def test_awq_and_probe_report_quality(llama, tmp_path):
    """More bits, less divergence; at 8 bits the probe sees next to none."""
    kl = [api.quantize(llama, tmp_path / f"{b}", bits=b, format="fewbits", **SMALL).kl for b in (2, 4, 8)]
    assert kl[0] > kl[1] > kl[2] >= 0
    assert kl[2] < 1e-3
