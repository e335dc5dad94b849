"""Timing with a clock that the test turns; processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbits import load
from fewbits.cli import main
from fewbits.errors import FewbitsError, RequestError
from fewbits.evaluate import speed
from fewbits.evaluate.fresh import fresh


class Ticking:
    """A model that takes a second per token of a prompt and a tenth per step, on the clock ``self.now``."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=11))

    def forward(self, input_ids: torch.Tensor, use_cache: bool, past_key_values: Any = None) -> Any:
        self.calls.append(tuple(input_ids.shape))
        self.now += input_ids.shape[1] if past_key_values is None else 0.1
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11), past_key_values="held")

    __call__ = forward


def test_rates_are_tokens_over_the_median_of_the_rounds() -> None:
    model = Ticking()
    reader = speed.Reader(model, lambda: model.now)
    rate = reader.rate(batch=4, prompt=8, tokens=5, repeats=3)
    assert rate["prompt_tokens_per_s"] == pytest.approx(4 * 8 / 8)
    assert rate["decode_tokens_per_s"] == pytest.approx(4 / 0.1)
    assert rate["prompt_spread"] == pytest.approx(0, abs=1e-9)
    # a warm-up of three tokens that does not count, then three rounds of a prompt and four steps
    assert model.calls == [(4, 8), (4, 1), (4, 1)] + 3 * ([(4, 8)] + 4 * [(4, 1)])


def test_the_median_and_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([(9.0, [9.0]), (2.0, [1.0, 4.0, 1.0]), (8.0, [2.0, 2.0]), (1.0, [0.5])])
    reader = speed.Reader(Ticking())
    monkeypatch.setattr(reader, "steps", lambda ids, tokens: next(rounds))
    rate = reader.rate(batch=1, prompt=10, tokens=4, repeats=3)
    assert rate["prompt_tokens_per_s"] == 10 / 2.0 and rate["prompt_spread"] == (8 - 1) / 2
    assert rate["decode_tokens_per_s"] == 1 / 1.0 and rate["decode_spread"] == (2 - 0.5) / 1


def test_batch_one_is_decoded_as_generate_does(reference: Path) -> None:
    model, _ = load(reference)
    model.generation_config.eos_token_id = None  # as bench does, so that no token ends it
    reader = speed.Reader(model)
    ids = reader.ids(1, 6)
    fast, plain = list(reader._tokens(ids, 8)), [int(t) for t in reader._plain(ids, 8)]
    assert reader._decoder is not None and fast == plain and len(fast) == 8


def test_the_json_of_bench(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", str(reference), "--reference", str(reference), "--batch", "1,2", "--prompt", "8", "--tokens", "4"]
    assert main([*argv, "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for m in (found, found["reference"]):
        assert {"load_seconds", "decode_tokens_per_s", "prompt_tokens_per_s", "size_bytes", "threads"} <= m.keys()
        assert [b["batch"] for b in m["batches"]] == [1, 2]
        assert 0 <= m["memory_bytes"] < m["peak_rss_bytes"]
        assert m["decode_tokens_per_s"] == m["batches"][0]["decode_tokens_per_s"] > 0
    ratio = found["decode_tokens_per_s"] / found["reference"]["decode_tokens_per_s"]
    assert found["speedup"]["decode"] == pytest.approx(ratio)


def test_requests_that_time_nothing(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, expected in (
        ({"tokens": 1}, "times no step"),
        ({"batches": [0]}, "--batch 0"),
        ({"repeats": 0}, "--repeats 0"),
    ):
        with pytest.raises(RequestError, match=expected):
            speed.bench(reference, **given)  # type: ignore[arg-type]
    assert main(["bench", str(reference), "--batch", "one"]) == 2
    assert "--batch 'one' is not a list" in capsys.readouterr().err


def test_errors_and_memory_of_another_process(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="gone"):
        fresh(
            "fewbits.evaluate.speed:measure",
            path=str(tmp_path / "gone"),
            batches=[1],
            prompt=2,
            tokens=2,
            repeats=1,
            dtype=None,
        )
    with pytest.raises(FewbitsError, match=r"exit code 1.*no_such_name"):
        fresh("fewbits.evaluate.speed:no_such_name")
    held = torch.zeros(80 << 20)  # 320 MB that a new process must not count as its own
    held.fill_(1.0)
    here, there = speed.peak(), fresh("fewbits.evaluate.speed:peak")
    assert here > held.nbytes and there < here - held.nbytes // 2
