"""The quantized KV cache against plain quantize-dequantize of the dense one, its sizes, and generation with it."""

import pytest
import torch
from transformers import DynamicCache

from fewbits import load, quantize
from fewbits.errors import CheckpointError, RequestError
from fewbits.runtime.decode import generate
from fewbits.runtime.kvcache import SCHEMES, QuantizedCache, Scheme, bytes_per_token, chosen, scheme
from tests.tiny import config, tiny_model


def data(tokens=200, size=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, tokens, size, generator=g)
    keys[..., 5] *= 20  # an outlier channel
    return keys, torch.randn(2, 3, tokens, size, generator=g)


def plain(x, bits, group, dim):
    """float16 minimum and step for each ``group`` along ``dim``; written element by element, on purpose."""
    out = x.clone()
    for part in out.split(group, dim):
        low, high = part.amin(dim, keepdim=True).half().float(), part.amax(dim, keepdim=True).half().float()
        step = ((high - low) / (2**bits - 1)).half().float()
        part.copy_(((part - low) / step).round().clamp(0, 2**bits - 1) * step + low)
    return out


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("pieces", [(200,), (100, 1, 1, 63, 35)])
def test_reads_what_direct_quantization_gives(kind, pieces):
    keys, values = data()
    cache, s = QuantizedCache(config("llama", num_hidden_layers=1), kind), scheme(kind)
    for k, v in zip(keys.split(pieces, 2), values.split(pieces, 2), strict=True):
        found_keys, found_values = cache.update(k, v, 0)
    old = (200 - s.window) // s.group * s.group
    if s.float8:
        a = [(t.abs().amax(-1, keepdim=True) / 448).half().float() for t in (keys, values)]
        old_keys, old_values = ((t / u).clamp(-448, 448).to(torch.float8_e4m3fn).float() * u for t, u in
                                zip((keys, values), a, strict=True))  # fmt: skip
    else:
        old_keys, old_values = plain(keys[:, :, :old], s.bits, s.group, 2), plain(values, s.bits, s.group, 3)
    assert torch.equal(found_keys[:, :, :old], old_keys[:, :, :old])
    assert torch.equal(found_values[:, :, :old], old_values[:, :, :old])
    assert torch.equal(found_keys[:, :, old:], keys[:, :, old:]) and torch.equal(
        found_values[:, :, old:], values[:, :, old:]
    )
    assert cache.get_seq_length() == 200 and found_keys.shape == keys.shape


def test_error_is_half_a_step_and_outlier_channels_do_not_spoil_the_others():
    keys, values = data()
    cache = QuantizedCache(config("llama", num_hidden_layers=1), "int4")
    k, v = cache.update(keys, values, 0)
    others = [i for i in range(64) if i != 5]
    assert float((k - keys)[..., others].abs().max()) < 8 / 15 / 2 * 1.05
    assert float((v - values).abs().max()) < 9 / 15 / 2 * 1.05


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("int4", 5.0), ("int2", 3.0), ("fp8", 8.25)])
def test_bytes_are_what_is_held(kind, bits):
    """64 tokens or channels share 32 bits at int8, 32 do at int4 and int2; a token's 64 numbers share 16 at FP8."""
    made = config("llama", num_hidden_layers=3, hidden_size=256, num_key_value_heads=2, head_dim=64)
    expected = 3 * 2 * 2 * 64 * bits / 8
    assert bytes_per_token(made, kind) == expected and bytes_per_token(made, None) == 3 * 2 * 2 * 64 * 2
    cache, (keys, values) = QuantizedCache(made, kind), data(32 + 128)
    for layer in range(3):
        cache.update(keys[:1, :2], values[:1, :2], layer)
    window = 3 * 2 * 2 * 64 * 4 * 32
    assert cache.nbytes - window == expected * 128


def test_cache_operations():
    keys, values = data()
    made = config("llama", num_hidden_layers=1)
    cache = QuantizedCache(made, "int4")
    k, v = cache.update(keys, values, 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    new = torch.zeros(2, 3, 1, 64)
    swapped, _ = cache.update(new, new, 0)
    assert torch.equal(swapped[:, :, :160], k[[1, 0]][:, :, :160])
    cache.crop(-1)
    assert cache.get_seq_length() == 200
    with pytest.raises(RequestError, match="cannot be taken back"):
        cache.layers[0].crop(-150)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.layers[0].update(new[:1], new[:1])[0].shape == (1, 3, 201, 64)
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].update(new, new)[0].shape == (2, 3, 202, 64)
    cache.reset()
    assert cache.get_seq_length() == 0 and v is not None


def test_unknown_kinds_are_refused():
    with pytest.raises(RequestError, match="allowed: int8, int4, int2, fp8"):
        scheme("int3")


def test_short_prompts_are_exact_and_long_ones_nearly(tmp_path):
    model, _ = load(tiny_model("llama", tmp_path / "m", max_position_embeddings=256))
    ids = torch.randint(3, 120, (1, 20), generator=torch.Generator().manual_seed(0))
    usual = generate(model, ids, 8)
    assert generate(model, ids, 8, cache=QuantizedCache(model.config, "int2")) == usual  # all inside the window
    long = torch.randint(3, 120, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(long, past_key_values=DynamicCache(config=model.config)).logits[0, -1]
        gaps = []
        for kind in ("int8", "fp8", "int4", "int2"):
            cache = QuantizedCache(model.config, kind)
            gaps.append(float((model(long, past_key_values=cache).logits[0, -1] - dense).norm() / dense.norm()))
    assert gaps[0] < 0.01 and gaps[0] < gaps[1] < gaps[2] < gaps[3]


def test_sliding_layers_keep_their_own_cache(caplog):
    cache = QuantizedCache(config("gemma3_text"), "int8")
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "QuantizedLayer"]
    assert "1 of 2 layers" in caplog.text and Scheme(8).window == 32


@pytest.mark.parametrize(
    ("stated", "kind"),
    [
        ({"kv_cache": "int4"}, "int4"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}}, "fp8"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "int8"),
        ({"kv_cache_scheme": None}, None),
        ({}, None),
    ],
)
def test_what_a_checkpoint_states_holds_unless_another_is_asked_for(stated, kind):
    made = config("llama")
    made.quantization_config = {"quant_method": "compressed-tensors"} | stated
    assert chosen(made, None) == kind
    assert chosen(made, "int2") == "int2" and chosen(made, "none") is None
    assert chosen(config("llama"), None) is None


def test_a_stated_kind_that_is_not_known_is_named():
    made = config("llama")
    made.quantization_config = {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}
    with pytest.raises(CheckpointError, match=r"num_bits.*known: int8, int4, int2, fp8; --kv-cache none"):
        chosen(made, None)
    assert chosen(made, "none") is None


@pytest.mark.parametrize(("kind", "format"), [("int4", "fewbits"), ("fp8", "compressed-tensors")])
def test_a_quantized_checkpoint_is_read_with_its_cache(tmp_path, kind, format):
    """Through the files: what ``quantize`` wrote is what a loaded model's configuration states."""
    source = tiny_model("llama", tmp_path / "m")
    quantize(source, tmp_path / "out", method="rtn", group_size=16, format=format, kv_cache=kind)
    assert chosen(load(tmp_path / "out")[0].config, None) == kind
