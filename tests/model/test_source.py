"""Source against transformers: the blocks in sequence are the model, and what is written is what was read."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.errors import CheckpointError, FetchError, RequestError
from fewbits.model import Source
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

IDS = torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(0))


def reference(path: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@torch.no_grad()
def through_blocks(source: Source, ids: torch.Tensor, batch: int) -> torch.Tensor:
    hidden, kwargs = source.prelude(ids, batch=2)
    for i in range(source.n_blocks):
        block = source.block(i)
        out = [block(h, **kwargs[i]) for h in hidden.split(batch)]
        hidden = torch.cat([o[0] if isinstance(o, tuple) else o for o in out])
    return source.tail()(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_sequence_are_the_model(family, checkpoint, source):
    got = through_blocks(source(family), IDS, batch=3)
    torch.testing.assert_close(got, reference(checkpoint(family), IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_sharded_is_the_same_model(family, checkpoint, tmp_path):
    sharded = Source.open(tiny_model(family, tmp_path, sharded=True))
    assert len(sharded.checkpoint.files) > 1
    got = through_blocks(sharded, IDS, batch=5)
    torch.testing.assert_close(got, reference(checkpoint(family), IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_is_the_checkpoint_bit_for_bit(family, checkpoint, source):
    files = load_file(checkpoint(family) / "model.safetensors")
    s = source(family)
    written = {}
    for i in range(s.n_blocks):
        state = s.state(s.block(i), i)
        assert sorted(state) == s.block_tensors(i)
        written |= state
    assert sorted(written) + sorted(s.outside()) == sorted(written) + sorted(set(files) - set(written))
    for name, t in written.items():
        assert t.dtype == files[name].dtype and torch.equal(t, files[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_round_trip(dtype, tmp_path):
    s = Source.open(tiny_model("qwen3", tmp_path, dtype=dtype))
    files = load_file(tmp_path / "model.safetensors")
    assert s.dtype == dtype
    block = s.block(0)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in block.parameters())
    assert all(torch.equal(t, files[n]) for n, t in s.state(block, 0).items())
    assert all(p.dtype == dtype for p in s.block(0, dtype).parameters())


def test_state_without_quantized_weights_keeps_their_bias(source):
    s = source("qwen2")
    state = s.state(s.block(0), 0, without={"self_attn.q_proj"}, dtype=torch.float16)
    assert "model.layers.0.self_attn.q_proj.weight" not in state
    assert state["model.layers.0.self_attn.q_proj.bias"].dtype == torch.float16


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_load_state_is_the_inverse_of_state(family, source):
    s = source(family)
    block, other = s.block(0), s.block(1)
    s.load_state(other, 0, s.state(block, 0))
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True))


def test_mixtral_is_written_with_one_matrix_per_expert_under_its_own_names(source):
    s = source("mixtral")
    assert s.disk_name(1, "mlp.experts.3.up_proj") == "model.layers.1.block_sparse_moe.experts.3.w3"
    assert s.disk_name(1, "mlp.experts.3.gate_proj") == "model.layers.1.block_sparse_moe.experts.3.w1"
    assert "model.layers.0.block_sparse_moe.gate.weight" in s.state(s.block(0), 0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_stacked_on_disk_are_read_too(family, checkpoint, source, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert any(k.endswith("experts.gate_up_proj") for k in state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint(family) / "config.json").read_text())
    s, plain = Source.open(tmp_path), source(family)
    got, expected = s.state(s.block(0), 0), plain.state(plain.block(0), 0)
    attention = {k for k in got if "self_attn" in k or "layernorm" in k}
    assert len(attention) > 4 and {k for k in expected if "experts" in k} == {k for k in got if "experts" in k}
    assert all(torch.equal(got[k], expected[k]) for k in got if k in expected)


def test_names_without_the_base_prefix(checkpoint, tmp_path):
    """The oldest GPT-2 checkpoints carry no prefix and hold masks that nobody reads."""
    files = load_file(checkpoint("gpt2") / "model.safetensors")
    bare = {k.removeprefix("transformer."): v for k, v in files.items()} | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint("gpt2") / "config.json").read_text())
    s = Source.open(tmp_path)
    assert s.disk_name(0, "attn.c_attn") == "h.0.attn.c_attn"
    assert "h.0.attn.bias" in s.outside()
    torch.testing.assert_close(through_blocks(s, IDS, 5), reference(tmp_path, IDS), rtol=0, atol=1e-5)


def test_blocks_are_private_and_freed(source):
    s = source("llama")
    first = s.block(0)
    first.self_attn.q_proj.weight.zero_()
    assert s.block(0).self_attn.q_proj.weight.any()
    assert all(p.is_meta for p in s.skeleton(0).parameters())
    alive = weakref.ref(first)
    del first
    gc.collect()
    assert alive() is None


def test_kwargs_hold_for_any_batch(source):
    s = source("gemma3_text")
    kwargs = s.block_kwargs(24)
    assert not torch.equal(kwargs[0]["position_embeddings"][0], kwargs[1]["position_embeddings"][0])
    hidden = s.prelude(IDS)[0]
    block = s.block(0)
    with torch.no_grad():
        whole = block(hidden, **kwargs[0])
        single = torch.cat([block(h, **kwargs[0]) for h in hidden.split(1)])
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-5)


def test_prelude_reads_only_the_rows_that_occur(source, monkeypatch):
    s = source("gemma3_text")
    table = load_file(s.path / "model.safetensors")["model.embed_tokens.weight"]
    hidden, _ = s.prelude(IDS[:2])
    torch.testing.assert_close(hidden, table[IDS[:2]] * 8.0, rtol=0, atol=0)  # sqrt(64)


def test_a_decoder_in_no_table(tmp_path, checkpoint):
    """StarCoder2 has fused nothing and is in no table: one stage per linear, no sites."""
    from transformers import AutoModelForCausalLM, Starcoder2Config

    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    s = Source.open(tmp_path)
    block = s.block(0)
    assert s.sites(block) == () and s.ties(block) == ()
    assert [stage[0] for stage in s.stages(block)][-2:] == ["mlp.c_fc", "mlp.c_proj"] and len(s.stages(block)) == 6
    torch.testing.assert_close(through_blocks(s, IDS, 5), reference(tmp_path, IDS), rtol=0, atol=1e-5)


# ---- what is refused -----------------------------------------------------------------------------------------------


def edited(path: Path, out: Path, **changes) -> Path:
    config = json.loads((path / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
    (out / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    return out


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad, checkpoint, tmp_path):
    files = load_file(checkpoint("llama") / "model.safetensors")
    files["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(files, edited(checkpoint("llama"), tmp_path) / "model.safetensors")
    s = Source.open(tmp_path)
    s.block(0)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        s.block(1)


def test_missing_and_misshapen_tensors_are_named_at_once(checkpoint, tmp_path):
    files = load_file(checkpoint("llama") / "model.safetensors")
    edited(checkpoint("llama"), tmp_path)
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        save_file({k: v for k, v in files.items() if k != name}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            Source.open(tmp_path)
    save_file(files | {name: torch.zeros(96, 63)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is \(96, 63\), config.json wants \(96, 64\)"):
        Source.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantized \(gptq\)"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}}, "'mine' is not known .* code .* is not run"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"model_type": None}, "not known"),
    ],
)
def test_requests_that_are_refused(changes, message, checkpoint, tmp_path):
    with pytest.raises(RequestError, match=message):
        Source.open(edited(checkpoint("llama"), tmp_path, **changes))


def test_damaged_config(checkpoint, tmp_path):
    edited(checkpoint("llama"), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Source.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    with pytest.raises(CheckpointError, match=r"config\.json is not valid"):
        Source.open(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(RequestError, match=r"no config\.json"):
        Source.open(tmp_path)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/no-such-model", "models/x.gguf"])
def test_what_looks_like_a_path_is_not_looked_up(path):
    with pytest.raises(RequestError, match="no such directory"):
        Source.open(path)


def test_offline_hub(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="nobody/nothing is not a directory here and the hub cannot be reached"):
        Source.open("nobody/nothing")


def test_rows_and_ids_out_of_range(source):
    with pytest.raises(RequestError, match="65 tokens, but the model has 64 positions"):
        source("opt").prelude(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(RequestError, match="ids from 0 to 128, but the model's vocabulary has 128"):
        source("llama").prelude(torch.tensor([[0, 128]]))


def test_side_files(checkpoint, tmp_path):
    edited(checkpoint("llama"), tmp_path)
    for name in ("special.bin", "modeling_x.py", "quantize_config.json", "LICENSE", "notes.md"):
        (tmp_path / name).write_text("x")
    tiny_tokenizer(tmp_path)
    s = Source.open(tmp_path)
    assert {p.name for p in s.copy_files()} == {"LICENSE", "tokenizer.json", "tokenizer_config.json"}
    assert s.tokenizer()("the fox").input_ids == s.tokenizer()("the fox").input_ids


def test_no_tokenizer(source):
    with pytest.raises(RequestError, match="no tokenizer"):
        source("llama").tokenizer()
