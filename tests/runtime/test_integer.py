"""Integer products: exact at any depth, equal to the dequantized operands; LLM.int8 as its paper and bitsandbytes."""

import pytest
import torch

from fewbits.activations import PRESETS, Activations, Inputs
from fewbits.errors import RequestError
from fewbits.grids import Int, Vectorwise
from fewbits.kernels import int8, w8a8
from fewbits.runtime.linear import QuantLinear
from fewbits.tensor import Quantized

NARROW = Int(8, -1, symmetric=True, narrow=True, scale="float32")
LLM = Activations(outliers=6.0)


def quantized(w, scheme, grid=NARROW, scale=None):
    p = grid.fit(w)
    return Quantized(grid, grid.encode(w, p), p, inputs=Inputs(scheme, scale))


@pytest.mark.parametrize("k", [1, 64, 1024, 1025, 1040, 1041, 4096, 11008])
@pytest.mark.parametrize("value", [127, -128])
def test_product_is_exact_at_any_depth(k, value):
    """All codes at the ends: the sums where float32 accumulation would first go wrong."""
    x, w = torch.full((3, k), value, dtype=torch.int8), torch.full((2, k), value, dtype=torch.int8)
    w[1] = -127
    for product in (lambda x, w: int8.matmul(x, w8a8.pack(w)), int8.reference):
        found = product(x, w)
        assert found.dtype == torch.int32
        assert torch.equal(found, torch.tensor([[k * value**2, k * value * -127]] * 3, dtype=torch.int32))


def test_product_is_the_integer_product():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-128, 128, s, generator=g).to(torch.int8) for s in ((33, 1500), (17, 1500)))
    assert torch.equal(int8.matmul(x, w8a8.pack(w)).long(), x.long() @ w.long().T)
    assert int8.matmul(x[:0], w8a8.pack(w)).shape == (0, 17)
    with pytest.raises(RequestError, match="needs x int8"):
        int8.matmul(x.float(), w8a8.pack(w))


@pytest.mark.parametrize("scheme", [PRESETS["int8"], PRESETS["int4"], LLM, PRESETS["int8-static"]], ids=str)
@pytest.mark.parametrize("columns", [64, 16384])
def test_layer_equals_dequantized_operands_in_float64(scheme, columns):
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 3, columns, generator=g).double(), torch.randn(8, columns, generator=g)
    x[0, 1, 5], x[1, 2, 9] = 9.0, -6.0
    q = quantized(w, scheme, scale=None if scheme.dynamic else torch.tensor([0.03]))
    bias = torch.randn(8, generator=g).double()
    y = QuantLinear.from_quantized(q, bias)(x)
    params = {k: t.double() for k, t in q.params.items()}
    exact = q.inputs(x) @ q.grid.decode(q.codes, params).T + bias
    assert torch.allclose(y, exact, rtol=1e-12, atol=1e-12 * float(exact.abs().max()))


def test_worked_example_of_llm_int8():
    """Threshold 6: the outlier column is multiplied by the dequantized weights, as bitsandbytes does."""
    x, w = torch.tensor([[1.0, 2, 8], [0.5, -1, 0]]), torch.tensor([[1.0, -2, 3], [4, 0.5, -1]])
    q = quantized(w, LLM)
    assert torch.equal(q.codes.int() - 128, torch.tensor([[42, -85, 127], [127, 16, -32]]))
    assert torch.equal(q.inputs.encode(x)[0], torch.tensor([[64.0, 127, 0], [64, -127, 0]]))
    y = QuantLinear.from_quantized(q)(x)
    assert torch.allclose(y, torch.tensor([[20.9842, -3.0236], [2.5078, 1.5118]]), atol=1e-3)


def planted(loud):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=g)
    x[:, ::100] *= loud
    return x, torch.randn(256, 512, generator=g) * 0.02


@pytest.mark.parametrize("loud", [20.0, 100.0])
def test_planted_outliers(loud):
    x, w = planted(loud)
    exact = x.double() @ w.double().T

    def error(scheme):
        y = QuantLinear.from_quantized(quantized(w, scheme))(x)
        return float((y - exact).norm() / exact.norm())

    assert 0.030 < error(Activations()) < 0.040  # plain rows: .034-.038
    assert 0.0070 < error(LLM) < 0.0090  # decomposition: .0073-.0086


def test_thresholds():
    """None: plain W8A8; above everything: the same up to ties; tiny: 16-bit inputs times dequantized weights."""
    x, w = planted(20.0)
    x = x.half().float()
    plain, never, always = (
        QuantLinear.from_quantized(quantized(w, s))
        for s in (Activations(), Activations(outliers=1e9), Activations(outliers=1e-9))
    )
    difference = plain.inputs.encode(x)[0] - never.inputs.encode(x)[0]  # they round ties in another order
    assert float(difference.abs().max()) <= 1 and int((difference != 0).sum()) < 1e-3 * x.numel()
    assert torch.allclose(always(x), x @ always.dequantize().T, atol=1e-4)


def test_depends_on_companions_only_through_their_outlier_columns():
    x, w = planted(1.0)
    layer = QuantLinear.from_quantized(quantized(w, LLM))
    a = x[:4].clamp(-5, 5)
    quiet, loud = x[4:8].clamp(-5, 5), x[4:8].clamp(-5, 5)
    loud[0, 7] = 60.0
    alone = layer(a)
    assert torch.equal(layer(torch.cat([a, quiet]))[:4], alone)
    changed = layer(torch.cat([a, loud]))[:4]
    assert not torch.equal(changed, alone) and float((changed - alone).norm() / alone.norm()) < 0.02


def test_silence_zero_rows_odd_shapes_and_half():
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    bias = torch.randn(8, generator=torch.Generator().manual_seed(1))
    layer = QuantLinear.from_quantized(quantized(w, LLM), bias)
    y = layer(torch.zeros(2, 5, 32))
    assert torch.allclose(y, bias.expand(2, 5, 8)) and torch.isfinite(y).all()
    x = torch.randn(32, 6).T
    assert layer(x).shape == (6, 8) and layer(x[:0]).shape == (0, 8) and layer(x[0]).shape == (8,)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.isfinite(layer(torch.full((1, 32), 1e30))).all()


def test_inputs_get_a_gradient():
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    layer = QuantLinear.from_quantized(quantized(w, PRESETS["int8"]))
    x = torch.randn(4, 32, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(4, 32), rtol=1e-4, atol=1e-5)


def test_slower_ways_are_said_once(caplog):
    from fewbits.runtime import integer

    integer._said.clear()
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    layer = QuantLinear.from_quantized(quantized(w, PRESETS["fp8"]))
    layer(w), layer(w)
    assert caplog.text.count("operands are dequantized") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("loud", [20.0, 1.0])
def test_every_rounding_is_that_of_bitsandbytes(dtype, tokens, loud):
    """Not one bit differs: the constant of its CPU code, the order of products, the columns left in 16 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    x, w = planted(loud)
    x, w = (x[:tokens] if loud > 1 else x[:tokens].clamp(-5, 5)).to(dtype), w.to(dtype)
    bias = torch.randn(256, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = bnb.nn.Linear8bitLt(512, 256, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bnb.nn.Int8Params(w.half(), requires_grad=False, has_fp16_weights=False)
    theirs.bias = torch.nn.Parameter(bias, requires_grad=False)
    theirs = theirs.to("cpu").eval()  # while training it multiplies the inputs as they are
    grid = Vectorwise()
    p = grid.fit(w.float())
    q = Quantized(grid, grid.encode(w.float(), p), p, inputs=Inputs(LLM))
    codes, absmax, columns = bnb.functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    found = Inputs(LLM).vectorwise(x)
    assert torch.equal(found[0], codes.float()) and torch.equal(found[1][:, 0], absmax)
    assert torch.equal(found[2].nonzero()[:, 0], columns)
    assert torch.equal(QuantLinear.from_quantized(q, bias)(x), theirs(x))
