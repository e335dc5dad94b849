"""Quantized inputs: every code point of the elements, scales by hand, laws of rows and blocks, LLM.int8's columns."""

import pytest
import torch

from fewbits.activations import BINS, ELEMENTS, FP4, PRESETS, Activations, Inputs, histogram, magnitudes, static_scale
from fewbits.errors import RequestError
from fewbits.plan import Plan

DYNAMIC = [name for name, s in PRESETS.items() if s.dynamic]


def data(rows=6, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_e4m3_on_all_code_points_and_between():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[torch.isfinite(codes)]
    nearest = ELEMENTS["fp8"].nearest
    assert torch.equal(nearest(codes), codes) and float(codes.max()) == 448
    between = (codes[1:127] + codes[:126]) / 2 * 1.001
    assert torch.equal(nearest(between), codes[1:127])
    assert torch.equal(nearest(torch.tensor([449.0, 1e6, -1e6])), torch.tensor([448.0, 448.0, -448.0]))


def test_e2m1_nearest_ties_to_even():
    x = torch.arange(-2048, 2049, dtype=torch.float64) / 256
    grid = torch.tensor([*FP4, *(-v for v in FP4)], dtype=torch.float64)
    even = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1] * 2)  # last bit of the code
    gap = (x[:, None] - grid).abs()
    best = gap.min(1, keepdim=True).values
    expected = grid[torch.where(gap <= best + 1e-12, even, 9).argmin(1)]
    assert torch.equal(ELEMENTS["nvfp4"].nearest(x).abs(), expected.abs())


def test_worked_examples():
    x = torch.tensor([[1.0, -0.5, 0.26, 0.0], [0, 0, 0, 0]])
    codes, scale = Inputs(PRESETS["int8"]).encode(x)
    assert torch.equal(codes, torch.tensor([[127.0, -64, 33, 0], [0, 0, 0, 0]]))  # 63.5 goes to the even 64
    assert torch.allclose(scale, torch.tensor([[1 / 127], [1.0]]))
    codes, scale = Inputs(Activations(narrow=False)).encode(x)
    assert torch.equal(codes[0], torch.tensor([127.0, -64, 33, 0])) and float(scale[0]) == pytest.approx(1 / 127.5)
    block = torch.zeros(32)
    block[:3] = torch.tensor([5.0, 1.3, -0.2])  # 2^floor(log2 5) / 4 = 1: codes 4 (5 is a tie), 1.5, -0
    assert Inputs(PRESETS["mxfp4"])(block)[:3].tolist() == [4.0, 1.5, -0.0]


def test_nvfp4_by_hand():
    """One token, two blocks: global 12 / (6 * 448), block scales 12/6 and 3/6 in units of it, both E4M3 numbers."""
    x = torch.zeros(32)
    x[0], x[1], x[16], x[17] = 12.0, 3.9, 3.0, 0.7
    found = Inputs(PRESETS["nvfp4"])(x)
    assert found[[0, 1, 16, 17]].tolist() == pytest.approx([12.0, 4.0, 3.0, 0.75], rel=1e-6)


@pytest.mark.parametrize("name", DYNAMIC)
def test_error_within_half_a_step_and_silence_stays_silent(name):
    x = data()
    x[2] = 0
    inputs = Inputs(PRESETS[name])
    y = inputs(x)
    assert torch.equal(y[2], torch.zeros(256))
    top = {"int8": 1 / 254, "int4": 1 / 14, "fp8": 1 / 28}.get(inputs.scheme.element, 1 / 4)
    assert float(((y - x).abs() / x.abs().amax(-1, keepdim=True).clamp(min=1e-9)).max()) <= top * (1 + 1e-5)
    assert torch.equal(inputs(x.bfloat16()).dtype and inputs(-x), -y)
    assert torch.equal(inputs(x * 2.0**6), y * 2.0**6)


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_row_does_not_depend_on_its_neighbours(name):
    x = data()
    x[3] *= 1000
    together = Inputs(PRESETS[name])(x)
    assert torch.equal(together, torch.cat([Inputs(PRESETS[name])(row[None]) for row in x]))
    assert torch.equal(together.reshape(2, 3, -1), Inputs(PRESETS[name])(x.reshape(2, 3, -1)))


def test_llm_int8_keeps_columns_that_reach_the_threshold():
    scheme = Activations(outliers=6.0)
    x = data(4, 8).clamp(-5, 5)
    x[1, 3], x[2, 5], x[0, 6] = -6.0, 6.5, 5.99
    codes, _ = Inputs(scheme).encode(x)
    assert codes.abs().sum(0)[[3, 5]].tolist() == [0, 0] and int((codes.abs().sum(0) > 0).sum()) == 6
    y = Inputs(scheme)(x)
    assert torch.equal(y[:, [3, 5]], x[:, [3, 5]])  # as they came; only codes are chosen in float16
    assert torch.equal(Inputs(Activations(outliers=1e9))(x), Inputs(Activations())(x.half().float()))


def test_histogram_is_exact_and_adds_up():
    x = data(64, 64)
    a, b = histogram(x[:10]), histogram(x[10:])
    assert torch.equal(a + b, histogram(x)) and int(histogram(x).sum()) == 4096
    bins = torch.arange(1, 0x7F80)
    low = (bins.int() << 16).view(torch.float32)
    assert torch.equal(histogram(low).nonzero()[:, 0], bins)
    middle = magnitudes()[bins]
    assert len(magnitudes()) == BINS and bool((middle[1:] > middle[:-1]).all())
    assert torch.equal(histogram(middle[200:-200].float()).nonzero()[:, 0], bins[200:-200])


def test_static_scales():
    """minmax: the maximum / 127; percentile: what that share of magnitudes stays under; mse: by trying every value."""
    x = data(256, 256)
    x[5, 5] = 80.0
    absmax, counts = x.abs().amax(0), histogram(x)

    def static(**rule):
        return static_scale(Activations("int8", False, "tensor", **rule), absmax, counts if rule else None)

    assert float(static() * 127) == pytest.approx(80)
    exact = float(torch.quantile(x.abs().flatten(), 0.999))
    assert float(static(rule="percentile", percentile=99.9) * 127) == pytest.approx(exact, rel=0.02)
    found = float(static(rule="mse"))
    tried = torch.linspace(0.5, 80, 1200) / 127

    def error(s):
        return float((((x / s).round().clamp(-127, 127) * s - x) ** 2).sum())

    assert error(found) < 1.02 * min(error(float(s)) for s in tried)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"element": "int3"}, "allowed: int8"),
        ({"element": "nvfp4"}, "blocks of 16"),
        ({"granularity": "block"}, "block 0"),
        ({"dynamic": False}, "one scale per tensor"),
        ({"percentile": 0}, "percentile 0"),
        ({"outliers": 6.0, "element": "int4"}, "int8 activations per token"),
    ],
)
def test_impossible_schemes_are_refused_in_one_line(options, message):
    with pytest.raises(RequestError, match=message) as e:
        Activations(**options)
    assert "\n" not in str(e.value)


def test_blocks_must_divide():
    assert "multiples of 32, not 48" in str(PRESETS["mxfp4"].refusal(48)) and PRESETS["mxfp4"].refusal(64) is None


def test_yaml_takes_a_preset_or_options():
    text = "rules: [{match: '*', recipe: {grid: {kind: int, bits: 8}, solver: {kind: nearest}, activations: %s}}]"
    for given, scheme in (("fp8-static", PRESETS["fp8-static"]), ("{outliers: 6.0}", Activations(outliers=6.0))):
        plan = Plan.from_yaml(text % given)
        assert plan.rules[0].recipe.activations == scheme and Plan.from_yaml(plan.to_yaml()) == plan
    with pytest.raises(RequestError, match="'activations' has no option 'bits'"):
        Plan.from_yaml(text % "{bits: 8}")
