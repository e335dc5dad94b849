"""Against llama-quantize itself: every tensor's type in every mixture, and every byte, with importance and without.

The types stand in ``data/llama_quantize.json``, as the program gave them (``python
tests/formats/test_gguf_quantize.py`` with FEWBITS_LLAMA_QUANTIZE writes it again), so that they are compared where
there is no program, too. Its files have real numbers of layers and columns, and two rows per matrix: types depend on
nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.formats import gguf, gguf_imatrix, gguf_mixtures, gguf_model, gguf_names

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ggml
import tiny

FROZEN = Path(__file__).resolve().parents[1] / "data" / "llama_quantize.json"
ROWS = 2


def sizes(layers: int, hidden: int, inner: int, heads: int, shared: int, tied: bool, **more: Any) -> dict[str, Any]:
    found = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    found |= {"num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": hidden // heads}
    return found | {"tie_word_embeddings": tied, "layer_types": None, "sliding_window": None} | more


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": ("llama", sizes(30, 576, 1536, 9, 3, True)),
    "llama-1024": ("llama", sizes(16, 1024, 3072, 16, 4, False)),
    "llama-70b": ("llama", sizes(80, 512, 1024, 8, 1, False)),
    "llama-mha": ("llama", sizes(9, 256, 704, 4, 4, False)),
    "qwen2-0.5b": ("qwen2", sizes(24, 896, 4864, 14, 2, True)),
    "gemma3-1b": ("gemma3_text", sizes(26, 1152, 6912, 4, 1, True, head_dim=256, query_pre_attn_scalar=256)),
    "phi3": ("phi3", sizes(12, 768, 2048, 12, 12, False)),
}
CASES = [(m, w) for m in MODELS for w in ("plain", "weighted")]


@cache
def model(name: str) -> tuple[dict[str, Any], gguf_names.Family, dict[str, tuple[int, ...]]]:
    """Its config, its family, and the shapes of its tensors by GGUF's name, matrices cut to :data:`ROWS` rows."""
    from transformers import AutoModelForCausalLM

    kind, changes = MODELS[name]
    config = tiny.config(kind, **changes)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    family, shapes = gguf_names.family(kind), {}
    for key, t in state.items():
        stored = gguf_names.stored_name(key, family)
        if stored and not (stored == "output.weight" and changes["tie_word_embeddings"]):
            shapes[stored] = (ROWS, t.shape[1]) if t.ndim == 2 else tuple(t.shape)
    return config.to_dict(), family, shapes


def own_types(name: str, mixture: str, weighted: bool) -> dict[str, str]:
    config, _, shapes = model(name)
    facts = gguf_model.facts_of(config, "output.weight" not in shapes, weighted)
    mix = gguf_mixtures.mixture(mixture)
    return {n: gguf_mixtures.kind_of(mix, n, shape, facts) for n, shape in shapes.items()}


def summary(types: dict[str, str]) -> dict[str, str]:
    """The kinds of matrices that have these types, layer by layer: ``{"q6_k 2, q4_k 14": "attn_v ffn_down"}``."""
    found: dict[str, list[str]] = {}
    for name, kind in types.items():
        if name.endswith(".weight") and "norm" not in name:
            found.setdefault(name.split(".")[2] if name.startswith("blk.") else name.split(".")[0], []).append(kind)
    runs: dict[str, list[str]] = {}
    for role, kinds in sorted(found.items()):
        runs.setdefault(", ".join(f"{k} {len(list(g))}" for k, g in groupby(kinds)), []).append(role)
    return {run: " ".join(roles) for run, roles in runs.items()}


def source(name: str, folder: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A float32 file of the model, an importance matrix, and the tensors."""
    config, family, shapes = model(name)
    torch.manual_seed(0)
    tensors = {n: torch.randn(shape) * 0.05 for n, shape in shapes.items()}
    metadata = {"general.architecture": family.name, "general.file_type": 0} | gguf_names.metadata(config, family)
    infos = [gguf.Info(n, "f32", tuple(t.shape)) for n, t in tensors.items()]
    gguf.write(folder / "f32.gguf", metadata, infos, lambda i: [tensors[i.name].numpy().tobytes()])
    sums = {n: torch.rand(t.shape[1]) ** 4 * 500 for n, t in tensors.items() if n.startswith("blk.") and t.ndim == 2}
    imatrix = gguf_imatrix.Imatrix(sums, dict.fromkeys(sums, 37.0), "text", 4)
    imatrix.write(folder / "imatrix.gguf")
    imatrix.write(folder / "imatrix.dat")
    return folder / "f32.gguf", folder / "imatrix.gguf", tensors


@pytest.mark.parametrize(("name", "weighted"), CASES)
def test_types_are_those_that_llama_quantize_gave(name, weighted):
    stored = json.loads(FROZEN.read_text())
    frozen = stored[f"{name} plain"] | (stored.get(f"{name} weighted", {}) if weighted == "weighted" else {})
    assert frozen.keys() == gguf_mixtures.MIXTURES.keys()
    for mixture, want in frozen.items():
        assert summary(own_types(name, mixture, weighted == "weighted")) == want, mixture


@pytest.mark.parametrize(("name", "weighted"), CASES)
def test_files_are_those_of_llama_quantize(name, weighted, tmp_path):
    """Types and bytes of all tensors, in all mixtures."""
    path, imatrix, tensors = source(name, tmp_path)
    given = imatrix if weighted == "weighted" else None
    importance = gguf_imatrix.read(given).mean_squares() if given else {}
    for mixture, mix in gguf_mixtures.MIXTURES.items():
        ggml.llama_quantize(path, tmp_path / "out.gguf", mixture, given)
        theirs, own = gguf.read(tmp_path / "out.gguf"), own_types(name, mixture, bool(given))
        assert {n: i.kind for n, i in theirs.infos.items()} == own, mixture
        assert theirs.metadata["general.file_type"] == mix.file_type
        for n, kind in own.items():
            made = gguf_model.encode(tensors[n], kind, importance.get(n))
            assert torch.equal(made.reshape(-1).view(torch.uint8), theirs.raw(n)), f"{mixture}: {n}, {kind}"


def test_llama_quantize_reads_both_of_our_importance_matrices(tmp_path):
    path, imatrix, _ = source("llama-mha", tmp_path)
    for k, file in enumerate((imatrix, imatrix.with_suffix(".dat"), None)):
        ggml.llama_quantize(path, tmp_path / f"{k}.gguf", "q4_k_m", file)
    new, old, none = (gguf.read(tmp_path / f"{k}.gguf") for k in range(3))
    assert all(torch.equal(new.raw(n), old.raw(n)) for n in new.infos)
    assert not all(torch.equal(new.raw(n), none.raw(n)) for n in new.infos)


def freeze() -> None:
    """Write :data:`FROZEN` from what llama-quantize does."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, weighted in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path, imatrix, _ = source(name, Path(folder))
            for mixture in gguf_mixtures.MIXTURES:
                out = Path(folder) / "out.gguf"
                ggml.llama_quantize(path, out, mixture, imatrix if weighted == "weighted" else None)
                infos = gguf.read(out).infos
                # In the order of the model's own tensors: the program sorts them.
                types = {n: infos[n].kind for n in model(name)[2]}
                case = summary(types)
                if found.get(f"{name} plain", {}).get(mixture) != case:  # the weighted ones are mostly the same
                    found.setdefault(f"{name} {weighted}", {})[mixture] = case
    FROZEN.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    freeze()
