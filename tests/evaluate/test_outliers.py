"""The outlier study against planted values, and the zeroing experiment against laws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fewbits.errors import FewbitsError, RequestError
from fewbits.evaluate import outliers as study_file
from fewbits.evaluate import zeroing as zero_file
from fewbits.evaluate.outliers import describe, outliers, study
from fewbits.evaluate.zeroing import largest, random, zeroing


def planted() -> torch.Tensor:
    """Three rows of four tokens, eight channels: -7 in channel 2 at every first token, 6 once in channel 5."""
    x = torch.zeros(3, 4, 8)
    x[:, 0, 2] = -7.0
    x[1, 3, 5] = 6.0
    return x


def test_planted_outliers_are_found() -> None:
    found = outliers(planted().split(2), 6.0)
    assert (found.count, found.channels, found.tokens) == (4, 2, 4)
    assert found.share == 4 / 96
    assert found.heaviest == ((2, 0.75), (5, 0.25))
    assert found.first_token == 0.75
    assert outliers([planted()], 6.5).count == 3


def test_nothing_found_and_tokens_without_rows() -> None:
    empty = outliers([planted()], 8.0)
    assert empty == study_file.Outliers(8.0, 0, 0.0, 0, 0, (), None)
    assert outliers([planted().flatten(0, 1)], 6.0).first_token is None


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_moments_whatever_the_batches(cut: int) -> None:
    x = torch.randn(7, 300, 16, generator=torch.Generator().manual_seed(0)).exp() + 1
    got = describe(("a",), 0, x.split(cut), 3.0)
    v = x.double()
    sigma = v.std(correction=0)
    assert got.sigma == pytest.approx(float(sigma), rel=1e-12)
    assert got.kurtosis == pytest.approx(float(((v - v.mean()) ** 4).mean() / sigma**4), rel=1e-9)
    assert got.absmean == pytest.approx(float(v.abs().mean()), rel=1e-12)
    assert torch.equal(got.channel_absmax, x.flatten(0, 1).amax(0))
    assert got.relative.count == int((x.abs() >= 3 * got.sigma).sum())
    assert got.tokens == 2100


def test_a_normal_input_has_kurtosis_3_and_a_constant_one_none() -> None:
    x = torch.randn(1, 4096, 64, generator=torch.Generator().manual_seed(1))
    assert describe(("a",), 0, [x], 6.0).kurtosis == pytest.approx(3.0, abs=0.05)
    assert math.isnan(describe(("a",), 0, [torch.zeros(1, 4, 8)], 6.0).kurtosis)


def test_what_is_not_finite_is_named() -> None:
    x = torch.zeros(2, 4, 8)
    x[1, 2, 3] = math.nan
    with pytest.raises(FewbitsError, match=r"model\.layers\.0\.q is not finite at token 6"):
        describe(("model.layers.0.q",), 0, [x], 6.0)


def test_the_walk_sees_what_hooks_on_the_model_see(reference: Path, text: Path) -> None:
    from fewbits.model import rows
    from fewbits.runtime import load

    found = study(reference, text, samples=3, seq_len=16, sigmas=2.0)
    model, tokenizer = load(reference, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}) if args else None)
    with torch.no_grad():
        model(rows(tokenizer, text, 3, 16))
    assert [f.layers[0].rpartition(".")[2] for f in found] == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2
    for f in found:
        for name in f.layers:
            torch.testing.assert_close(f.channel_absmax, seen[name].abs().flatten(0, 1).amax(0), rtol=1e-4, atol=1e-6)
        assert f.sigma == pytest.approx(float(seen[f.layers[0]].double().std(correction=0)), rel=1e-4)
    json.dumps([f.to_json() for f in found])


def test_positions() -> None:
    x = torch.tensor([[0.0, -9.0, 2.0], [3.0, -1.0, 0.5]])
    assert sorted(largest(x, 3).tolist()) == [1, 2, 3]
    picked = random(x, 6, 0)
    assert sorted(picked.tolist()) == list(range(6))
    assert random(x, 3, 5).tolist() == random(x, 3, 5).tolist()
    counts = torch.bincount(torch.cat([random(torch.zeros(8), 2, seed) for seed in range(4000)]), minlength=8)
    assert counts.min() > 850 and counts.max() < 1150  # 1000 each, 5 standard deviations


def test_zeroing_equals_hooks_written_out(reference: Path, text: Path) -> None:
    """The loss of zeroing half of every input, against a second implementation through the whole model."""
    from fewbits.model import rows
    from fewbits.runtime import load

    got = zeroing(reference, [0.5], text, samples=2, seq_len=16)[0]
    model, tokenizer = load(reference, dtype=torch.float32)
    ids = rows(tokenizer, text, 2, 16)

    def zero(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = args[0]
        limit = x.abs().flatten().sort(descending=True).values[x.numel() // 2 - 1]
        return (torch.where(x.abs() >= limit, 0.0, x),)

    with torch.no_grad():
        p = torch.stack([model(row[None]).logits[0] for row in ids]).log_softmax(-1)
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(zero)
        q = torch.stack([model(row[None]).logits[0] for row in ids]).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1].mean()
    assert got.kl_mean == pytest.approx(float(kl), rel=1e-3)
    per_window = sum(16 * d // 2 for d in (64, 64, 64, 96)) * 2
    assert got.values == 2 * per_window


def test_the_same_count_the_same_seed(reference: Path, text: Path) -> None:
    a = zeroing(reference, [0.01, 0.2], text, samples=2, seq_len=16)
    assert [(z.share, z.which) for z in a] == [(s, w) for s in (0.01, 0.2) for w in ("largest", "random")]
    assert a[0].values == a[1].values and a[2].values == a[3].values
    assert [z.kl_mean for z in a] == [z.kl_mean for z in zeroing(reference, [0.01, 0.2], text, 2, 16)]
    assert zeroing(reference, [0.2], text, 2, 16, seed=1)[1].kl_mean != a[3].kl_mean
    assert a[2].kl_mean > a[0].kl_mean > 0 and a[2].kl_mean > a[3].kl_mean


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_shares_that_mean_nothing(reference: Path, share: float) -> None:
    with pytest.raises(RequestError, match="between 0 and 1"):
        zero_file.zeroing(reference, [share])


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "phi3", "gemma3"])
def test_other_families(tmp_path: Path, text: Path, family: str) -> None:
    from tests.tiny import tiny_model, tiny_tokenizer

    path = tiny_model(family, tmp_path, vocab_size=300)
    tiny_tokenizer(path)
    found = study(path, text, samples=2, seq_len=16)
    assert all(f.absmax > 0 for f in found) and {f.block for f in found} == {0, 1}
    assert zeroing(path, [0.1], text, 2, 16)[0].kl_mean > 0
