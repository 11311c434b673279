"""int8.py: the integer GEMMs give the simulated numbers, and what is kept for backward is int8."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from test_model import gpt, grads, tokens
from test_quant import U, bitwise, both_dtypes, kept, normal, run
from torch.utils.checkpoint import checkpoint

import quant
from int8 import int8_gemm, keep8
from quant import QuantConfig, Quantized, Quantizer, QuantLinear, make_recipe, restore

PER_ROW = dict(gbits=8, ggran="per_row", ggemm="both")
FP8 = dict(PER_ROW, wfmt="e4m3", afmt="e4m3", gfmt="e5m2")
SIZES, ROW = st.integers(1, 70), Quantizer(8, (1, None))


def recipes(flags):
    """Return the recipe of the flags, simulated and on integers."""
    simulated = make_recipe(QuantConfig(wbits=8, abits=8, gemm="int8", **flags))
    return simulated, replace(simulated, engine=int8_gemm)


def close(a, b, steps):
    """Both are sums of the same products; they differ by `steps` roundings to fp32 of the largest result."""
    return (a.double() - b.double()).abs().max() <= steps * U * max(b.abs().max().item(), 1e-30)


# -----------------------------------------------------------------------------
# the GEMM

@given(SIZES, st.sampled_from([1, 2, 15, 64, 769, 4096]), SIZES, st.integers(0, 9), st.booleans())
@example(1, 4096, 1, 0, False)  # one row, the longest contraction
def test_exact_in_integers(m, k, n, seed, per_tensor):
    """The int32 sum is exact: int64 and float64 give the same result up to three fp32 roundings per element."""
    quantizer = Quantizer(8, (None, None) if per_tensor else (1, None))
    a, b = (quantizer.quantize(normal(r, k, seed=seed + i)) for i, r in enumerate((m, n)))
    scales = a.scale.reshape(-1, 1).double() * b.scale.reshape(1, -1).double()
    exact = (a.codes.long() @ b.codes.long().T).double() * scales
    y = int8_gemm(a, b, torch.float32)
    assert y.dtype == torch.float32 and ((y.double() - exact).abs() <= 3.01 * U * exact.abs()).all()


def test_largest_sums():
    """127 x 127 summed beyond what fp32 holds exactly; from 133,145 products on int32 could wrap: refused."""
    def square(rows, length):
        q = Quantized(torch.full((rows, length), 127, dtype=torch.int8), torch.ones(1, 1, 1, 1), None)
        return int8_gemm(q, q, torch.float64)[0, 0].item()
    assert square(2, 4096) == 127 * 127 * 4096
    assert square(1, 133_144) == pytest.approx(127 * 127 * 133_144, rel=1e-7)
    with pytest.raises(ValueError, match="133145 products.*smaller --batch_size"):
        square(1, 133_145)


@pytest.mark.parametrize("m, k, n", [(1, 5, 3), (3, 1, 4), (3, 5, 1), (1, 1, 1), (2, 3, 4)])
def test_transposed_operands_with_an_axis_of_one(m, k, n):
    """torch._int_mm reads some such views wrongly (K = 1; one row of a transposed A); int8_gemm does not."""
    torch.manual_seed(0)
    a, b = (torch.randint(-127, 128, (k, rows), dtype=torch.int8).T for rows in (m, n))
    for pair in product((a, a.contiguous().clone()), (b, b.contiguous().clone())):
        y = int8_gemm(*(Quantized(codes, torch.ones(1, 1, 1, 1), None) for codes in pair), torch.float64)
        assert torch.equal(y.long(), a.long() @ b.long().T)


# -----------------------------------------------------------------------------
# the scales that a gradient takes up, and the layer

@both_dtypes
@pytest.mark.parametrize("flags, least, most", [(PER_ROW, 1e-4, 0.02), (FP8, 0.01, 0.08)], ids=["int8", "float8"])
def test_folded_gradients(flags, least, most, dtype):
    """dx and dw are GEMMs of the rounded g times a scale, and codes; with little error against the untouched g's."""
    recipe, slack = make_recipe(QuantConfig(wbits=8, abits=8, **flags)), {torch.float32: 1e-6}.get(dtype, 2.0**-7)
    x, w, g = (normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate([(64, 48), (32, 48), (64, 32)]))
    _, qx, qw = quant.linear_forward(x, w, recipe)
    slots, fmt = (recipe.grad_input_grad_output, recipe.grad_weight_grad_output), flags.get("gfmt", "int")
    for engine in [quant.gemm] + [int8_gemm] * (flags is PER_ROW):
        results = quant.linear_backward(g, qx, qw, replace(recipe, engine=engine))
        for ours, slot, left, right in zip(results, slots, (g, g.T), (qw.T, qx.T), strict=True):
            folded, codes = quant.fold(slot, left, right)
            assert folded.codes.dtype == quant.FLOAT8.get(fmt, torch.int8) and codes.scale.numel() == 1
            rounded = replace(ROW, fmt=fmt)(left.float() * right.scale.reshape(1, -1))  # a scale per element of L
            expected, exact = rounded.double() @ codes.codes.double().T, left.double() @ restore(right).double().T
            assert ours.dtype == dtype and (ours - expected).norm() / expected.norm() < slack
            assert least < (ours - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("flags", [{}, PER_ROW, dict(PER_ROW, ggemm="grad_weight"),
                                   dict(PER_ROW, gbits=5, ggemm="grad_input")], ids=["", "both", "dw", "dx"])
def test_equals_simulated(flags):
    """All three GEMMs agree with --gemm=simulate under every supported combination; one on a float is quant.gemm."""
    sizes = (1, 7, 3), (33, 64, 20), (40, 3072, 9)
    grans = product(("per_channel", "per_tensor"), ("per_token", "per_tensor"))
    for (m, k, n), (wgran, agran) in product(sizes, grans):
        x, w, g = normal(m, k), normal(n, k, seed=1) * 0.02, normal(m, n, seed=2) * 1e-4
        out = []
        for recipe in recipes(dict(flags, wgran=wgran, agran=agran)):
            y, qx, qw = quant.linear_forward(x, w, recipe)
            out.append((y, *quant.linear_backward(g, qx, qw, recipe)))
        for simulated, ours in zip(*out, strict=True):
            assert ours.dtype == simulated.dtype and close(ours, simulated, 2 * math.sqrt(k) + 4)


@both_dtypes
def test_model_equals_simulated(dtype):
    """A whole GPT, its head quantized: a last bit moves a gradient across a rounding edge, more does not change."""
    results, bound = [], 1e-4 if dtype == torch.float32 else 0.05
    for engine in ("simulate", "int8"):
        model = gpt(dict(PER_ROW, wbits=8, abits=8, gemm=engine, quant_head=True), dtype=dtype)
        loss = model(tokens(3, 16), tokens(3, 16, seed=2))
        results.append([loss.detach(), *grads(model, loss).values()])
    for simulated, ours in zip(*results, strict=True):
        assert (ours - simulated).norm() / simulated.norm().clamp_min(1e-12) < bound


def test_compiled_and_checkpointed_equal_eager(monkeypatch):
    """torch.compile changes nothing but the rounding of sums; recomputed in backward, every bit is the same."""
    layer, x, g = QuantLinear(33, 20, False, recipes(PER_ROW)[1]), normal(17, 33), normal(17, 20, seed=1)
    calls, int_mm = [], torch._int_mm
    with monkeypatch.context() as patch:  # all three GEMMs go to the integer units; x and w are kept in a byte
        patch.setattr(torch, "_int_mm", lambda a, b: calls.append(a.dtype) or int_mm(a, b))
        eager = run(layer, x, g)
    assert calls == [torch.int8] * 3 and kept(layer, x) == 17 * 33 + 20 * 33 + 4 * (17 + 20)
    assert all(close(a, b, 8) for a, b in zip(eager, run(torch.compile(layer), x, g), strict=True))
    y = checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    assert all(map(bitwise, eager, [y.detach(), *torch.autograd.grad(y, [x, layer.weight], g)]))


@both_dtypes
@pytest.mark.parametrize("block", [None, 8])
def test_keep8_is_exact_forward_and_rounded_backward(block, dtype):
    """The output is f(x) bit for bit; the gradient is autograd's, at fake-quantized x; one byte an element is kept."""
    def f(x):
        return F.gelu(x.roll(1, -1), approximate="tanh") * x
    x, g = normal(3, 5, 24).to(dtype).requires_grad_(), normal(3, 5, 24, seed=1).to(dtype)
    y = keep8(f, x, block)
    assert bitwise(y, f(x)) and kept(lambda x: keep8(f, x, block), x) == x.numel() + 4 * x.numel() // (block or 24)
    rounded = Quantizer(8, (1, block))(x.detach().view(15, 24)).view(3, 5, 24).requires_grad_()
    dx, = torch.autograd.grad(y, x, g)
    assert bitwise(dx, *torch.autograd.grad(f(rounded), rounded, g))
    dx, = torch.autograd.grad(keep8(f, x, block).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # a second derivative is an error, not a zero
        dx.sum().backward()
