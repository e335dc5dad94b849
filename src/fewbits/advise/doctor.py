"""The doctor: is a checkpoint whole and sound, and who will load it? One tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits import formats
from fewbits.advise.container import check_files
from fewbits.advise.contents import look, look_dense
from fewbits.advise.finding import Finding
from fewbits.advise.loaders import Verdict, verdicts
from fewbits.advise.structure import check_names, check_tokenizer
from fewbits.errors import CheckpointError, FewbitsError, RequestError
from fewbits.formats import Entry, gguf, gguf_import, gguf_names
from fewbits.grids import BLOCK_TYPES
from fewbits.model import locate
from fewbits.storage import Checkpoint


@dataclass
class Report:
    """``findings`` are damage; ``notes`` are not. ``loads`` says what each loader will make of it."""

    path: str
    format: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not self.findings

    @property
    def loads(self) -> dict[str, Verdict]:
        return verdicts(self.format, self.entries, len(self.findings))

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "format": self.format,
            "healthy": self.healthy,
            "findings": [f.to_json() for f in self.findings],
            "notes": self.notes,
            "loads": {k: v.to_json() for k, v in self.loads.items()},
        }


def check(path: str | Path) -> Report:
    """Examine a directory, a .safetensors or a .gguf file. Raises RequestError when there is nothing to examine."""
    path = Path(path)
    if not path.exists():
        raise RequestError(f"no such file or directory: {path}; give a checkpoint")
    file = _gguf_file(path)
    if file is not None:
        return _check_gguf(file, path)
    if path.is_dir() and not any(path.glob("*.safetensors")) and not (path / "model.safetensors.index.json").is_file():
        Checkpoint.open(path)  # says what there is instead
    if path.is_file() and path.suffix != ".safetensors":
        Checkpoint.open(path)
    report = Report(str(path), "dense")
    report.findings += check_files(path)
    raw = _config(path, report)
    if report.findings:
        report.format = str((raw.get("quantization_config") or {}).get("quant_method", "dense"))
        return report
    return _check_tensors(path, raw, report)


def _config(path: Path, report: Report) -> dict[str, Any]:
    if path.is_file():
        return {}
    try:
        return locate.read_config(path)
    except FewbitsError as e:
        report.findings.append(Finding("config", "config.json", str(e)))
        return {}


def _check_tensors(path: Path, raw: dict[str, Any], report: Report) -> Report:
    checkpoint = Checkpoint.open(path)
    described = raw.get("quantization_config")
    shapes: dict[str, tuple[int, ...]] = {n: checkpoint.shape(n) for n in checkpoint.names()}
    packed: set[str] = set()
    unread: set[str] = set()
    if described:
        try:
            layout = formats.detect(described)
        except FewbitsError as e:
            report.findings.append(Finding("config mismatch", "quantization_config", str(e)))
            return report
        report.format = layout.name
        for module, suffixes in formats.modules(checkpoint.names(), layout).items():
            names = {s: f"{module}.{s}" for s in suffixes}
            seen = look(module, layout, {s: checkpoint.tensor(n) for s, n in names.items()}, described)
            report.findings += seen.findings
            for n in names.values():
                shapes.pop(n, None)
            packed.add(module)
            if seen.entry is None:
                unread.add(module)
            else:
                report.entries.append(seen.entry)
                shapes[f"{module}.weight"] = seen.entry.shape
            checkpoint.release()
        listed = {name for name, _, _ in getattr(layout, "modules", ())}
        for module in sorted(listed - packed):
            report.findings.append(
                Finding("missing tensor", module, "quantization_config lists it, but it has no tensors")
            )
    for name in set(shapes) & set(checkpoint.names()):
        report.findings += look_dense(name, checkpoint.tensor(name))
        checkpoint.release()
    if raw:
        found = check_names(path, raw, shapes, packed)
        hurt = {f"{m}.weight" for m in unread}  # the module is there, only unreadable: that was said
        report.findings += [f for f in found if f.tensor not in hurt and f.tensor.removesuffix(".weight") not in unread]
        _tied(raw, checkpoint, report)
        _vocabulary(path, shapes, report)
    return report


def _tied(raw: dict[str, Any], checkpoint: Checkpoint, report: Report) -> None:
    """A head that is tied to the embedding but stored beside it: readers use one of the two, and which is not said."""
    names = checkpoint.names()
    head = next((n for n in names if n.rpartition(".weight")[0].split(".")[-1] == "lm_head"), None)
    table = next((n for n in names if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if not gguf_names.text(raw).get("tie_word_embeddings") or head is None or table is None:
        return
    if checkpoint.shape(head) == checkpoint.shape(table) and _equal(checkpoint.tensor(head), checkpoint.tensor(table)):
        report.notes.append(f"{head} is stored a second time although it is tied to {table}")
    else:
        report.findings.append(Finding("broken tie", head, f"config.json ties it to {table}, but their numbers differ"))


def _equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.split(rows), b.split(rows), strict=True))


def _vocabulary(path: Path, shapes: dict[str, tuple[int, ...]], report: Report) -> None:
    table = next((n for n in shapes if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if table is not None and path.is_dir():
        report.findings += check_tokenizer(path, shapes[table][0], table)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _gguf_file(path: Path) -> Path | None:
    if path.suffix == ".gguf":
        return path
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return next(iter(sorted(path.glob("*.gguf"))), None)
    return None


def _check_gguf(file: Path, path: Path) -> Report:
    report = Report(str(path), "gguf")
    try:
        opened = gguf.read(file)
        config = gguf_import.config_of(opened)
    except RequestError as e:
        report.notes.append(str(e))
        return report
    except CheckpointError as e:
        parts = str(e).split("'")
        report.findings.append(Finding("file", parts[1] if len(parts) > 2 else file.name, str(e)))
        return report
    family = gguf_names.FAMILIES[config["model_type"]]
    shapes: dict[str, tuple[int, ...]] = {}
    for info in opened.infos.values():
        try:
            plain = gguf_import.plain_name(info.name, family)
        except CheckpointError as e:
            report.findings.append(Finding("unexpected tensor", info.name, str(e)))
            continue
        if plain is not None and len(info.shape) < 3:
            shapes[plain] = info.shape
        elif plain is not None:
            shapes |= {gguf_import.expert_name(plain, i): info.shape[1:] for i in range(info.shape[0])}
        report.findings += _look_gguf(opened, info)
        opened.release()
    tokens = opened.metadata.get("tokenizer.ggml.tokens")
    rows = opened.infos["token_embd.weight"].shape[0]
    if not isinstance(tokens, list) or len(tokens) > rows:
        held = len(tokens) if isinstance(tokens, list) else "no"
        report.findings.append(Finding("vocabulary", "token_embd.weight", f"it has {rows} rows for {held} tokens"))
    names = {plain: info for info in opened.infos for plain in [_plain(info, family)] if plain}
    for f in check_names(path, config, shapes, set()):
        report.findings.append(Finding(f.kind, names.get(f.tensor, f.tensor), f.message))
    return report


def _plain(name: str, family: gguf_names.Family) -> str | None:
    try:
        return gguf_import.plain_name(name, family)
    except CheckpointError:
        return None


def _look_gguf(opened: gguf.File, info: gguf.Info) -> Iterator[Finding]:
    if info.kind in BLOCK_TYPES:
        rows = opened.raw(info.name).view(info.shape[0], -1)
        seen = look(info.name, formats.get("gguf"), {f"ggml_{info.kind}": rows}, {})
        yield from (Finding(f.kind, info.name, f.message) for f in seen.findings)
    elif info.kind in gguf.DENSE:
        yield from look_dense(info.name, opened.tensor(info.name))
