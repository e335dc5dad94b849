"""Evaluation against direct computations with all logits in float64."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits import quantize, runtime
from fewbits.errors import CheckpointError, FewbitsError, RequestError
from fewbits.evaluate import evaluate, hidden
from tests.tiny import config, tiny_model, tiny_tokenizer

CTX, WINDOWS = 32, 6


def direct(path: Path, text: Path) -> tuple[Tensor, Tensor]:
    """float64 log-probabilities ``[n, V]`` of every scored position, and targets ``[n]``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(path)(text.read_text(), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: CTX * WINDOWS]).reshape(WINDOWS, CTX)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path)(rows).logits.double()
    return logits[:, :-1].log_softmax(-1).flatten(0, 1), rows[:, 1:].flatten()


def nll(logp: Tensor, targets: Tensor) -> Tensor:
    return -logp.gather(-1, targets[:, None])[:, 0]


def run(*args: Any, **kwargs: Any) -> Any:
    return evaluate(*args, **{"ctx": CTX, "windows": WINDOWS} | kwargs)


def test_perplexity_is_the_direct_one(changed: Path, text: Path) -> None:
    found = run(changed, text)
    assert found.perplexity == pytest.approx(math.exp(nll(*direct(changed, text)).mean()), rel=1e-5)
    assert found.tokens == WINDOWS * (CTX - 1)
    assert found.perplexity_ci95[0] < found.perplexity < found.perplexity_ci95[1]
    assert found.kl_mean is None and found.top1 is None


def test_divergence_is_the_direct_one(reference: Path, changed: Path, text: Path) -> None:
    found = run(changed, text, reference=reference)
    (p, targets), (q, _) = direct(reference, text), direct(changed, text)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-12)
    assert found.reference_perplexity == pytest.approx(math.exp(nll(p, targets).mean()), rel=1e-5)
    assert found.perplexity == pytest.approx(run(changed, text).perplexity, rel=1e-6)
    for key in ("kl_mean", "top1"):
        low, high = getattr(found, f"{key}_ci95")
        assert low < getattr(found, key) < high


def test_a_model_does_not_diverge_from_itself(reference: Path, text: Path) -> None:
    found = run(reference, text, reference=reference)
    assert (found.kl_mean, found.kl_p99, found.top1) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.reference_perplexity


def test_batches_and_spilling_change_nothing(
    reference: Path, changed: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = run(changed, text, reference=reference)
    monkeypatch.setattr(hidden, "_IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spilled = run(changed, text, reference=reference, batch=4)
    assert spilled.kl_mean == pytest.approx(plain.kl_mean, rel=1e-4)
    assert spilled.perplexity == pytest.approx(plain.perplexity, rel=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(
    reference: Path, changed: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(file: Path, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden, "_IN_MEMORY", 0)
    monkeypatch.setattr(hidden, "_reserve", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(FewbitsError, match=r"no room for .*No space left"):
        run(changed, text, reference=reference)
    assert list(tmp_path.iterdir()) == []


def test_the_models_are_never_in_memory_together(
    reference: Path, changed: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, blocks = runtime.load, []

    def load(path: Any, **rest: Any) -> Any:
        gc.collect()
        assert not [b for b in blocks if b() is not None], "the first model is still there"
        model, tokenizer = original(path, **rest)
        blocks.append(weakref.ref(model.model.layers[0].mlp.up_proj.weight))
        return model, tokenizer

    monkeypatch.setattr(runtime, "load", load)
    run(changed, text, reference=reference)
    assert len(blocks) == 2


def test_the_package_and_the_function_share_a_name(reference: Path, text: Path) -> None:
    import fewbits

    assert fewbits.evaluate.census is not None  # type: ignore[attr-defined]
    assert fewbits.evaluate(reference, text, ctx=8, windows=1).tokens == 7


def test_events_count_windows(reference: Path, changed: Path, text: Path) -> None:
    events: list[dict[str, Any]] = []
    run(changed, text, reference=reference, on_event=events.append)
    seen = [(e["which"], e["window"]) for e in events]
    assert seen == [(which, i + 1) for which in ("reference", "model") for i in range(WINDOWS)]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3_text", {"final_logit_softcapping": 0.5}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("opt", {}),
        ("gpt2", {}),
    ],
)
def test_heads_of_other_families(family: str, changes: dict[str, float]) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    wanted = config(family, **changes) if family in ("gemma3_text", "opt", "gpt2") else _config(family, changes)
    model = AutoModelForCausalLM.from_config(wanted).eval()
    ids = torch.randint(3, 128, (1, 20))
    with torch.no_grad():
        own = model(ids).logits
    body, head = hidden.split(model, ids[0])
    torch.testing.assert_close(head(hidden.states(body, ids))[0], own[0], rtol=1e-5, atol=1e-6)


def _config(family: str, changes: dict[str, float]) -> Any:
    from transformers import CONFIG_MAPPING

    from tests.tiny import COMMON

    return CONFIG_MAPPING[family](**COMMON | changes)


def test_an_unknown_head_is_refused(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reference).eval()
    own = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, *args, **kwargs)
        out.logits = out.logits * 2 + 1
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(RequestError, match="does not know"):
        hidden.split(model, torch.arange(3, 23))


def test_a_short_text_is_refused_with_counts(reference: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox " * 20)
    with pytest.raises(RequestError, match=r"the text has \d+ tokens, 6 windows of 32 need 192; give --windows \d"):
        run(reference, short)
    short.write_text("")
    with pytest.raises(RequestError, match=r"the text has 0 tokens, .* give a longer text"):
        run(reference, short)


def test_wrong_requests(reference: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no text at 'nowhere\.txt'"):
        run(reference, "nowhere.txt")
    with pytest.raises(RequestError, match="--ctx 128 is more than the 64 positions"):
        run(reference, text, ctx=128)
    with pytest.raises(RequestError, match="score nothing"):
        run(reference, text, ctx=1)
    with pytest.raises(RequestError, match="'int8' is not a floating-point type"):
        run(reference, text, dtype="int8")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8 text \\(byte 3\\)"):
        run(reference, binary)


def test_tokenizers_must_agree(reference: Path, text: Path, tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path / "other", vocab_size=300)
    tiny_tokenizer(other, "an entirely different text about ships")
    with pytest.raises(RequestError, match="tokenize the text differently"):
        run(other, text, reference=reference)


def test_a_broken_model_is_said(reference: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reference)
    model.model.norm.weight.data[3] = float("inf")
    model.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="not finite"):
        run(tmp_path, text)


def test_the_cache_that_a_checkpoint_states_is_evaluated(reference: Path, text: Path, tmp_path: Path) -> None:
    """Its figures are those of asking for it, and not those of a model without."""
    out = tmp_path / "out"
    quantize(reference, out, method="rtn", group_size=16, format="fewbits", kv_cache="int2")
    at = {kind: evaluate(out, text, 64, 2, kv_cache=kind) for kind in (None, "int2", "none")}
    assert [at[kind].kv_cache for kind in at] == ["int2", "int2", None]
    assert at[None].perplexity == at["int2"].perplexity
    against = evaluate(out, text, 64, 2, reference=reference)
    assert against.kv_cache == "int2" and against.perplexity == pytest.approx(at[None].perplexity)
