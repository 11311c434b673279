"""int8.py: the integer GEMMs give the simulated numbers, and what they keep is int8."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from int8 import int8_gemm
from model import GPT, GPTConfig, quant_linears
from quant import (
    QuantConfig,
    Quantized,
    Quantizer,
    QuantLinear,
    fold,
    gemm,
    linear_backward,
    linear_forward,
    make_recipe,
    restore,
)

SIZES = st.integers(1, 70)
CONFIGS = [dict(wgran=w, agran=a, **g)
           for w in ("per_channel", "per_tensor") for a in ("per_token", "per_tensor")
           for g in (dict(), dict(gbits=8, ggran="per_row", ggemm="both"), dict(gbits=8, ggran="per_row"),
                     dict(gbits=5, ggran="per_row", ggemm="grad_input"))]


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def recipes(flags):
    """Return the recipe of the flags, simulated and on integers."""
    simulated = make_recipe(QuantConfig(wbits=8, abits=8, gemm="int8", **flags))
    return simulated, replace(simulated, engine=int8_gemm)


def close(a, b, steps):
    """Both are sums of the same products; they differ by `steps` roundings to fp32 of the largest result."""
    return (a.double() - b.double()).abs().max() <= steps * 2.0**-24 * max(b.abs().max().item(), 1e-30)


@given(SIZES, st.sampled_from([1, 2, 15, 64, 769, 4096]), SIZES, st.integers(0, 9), st.booleans())
@example(1, 4096, 1, 0, False)  # one row, the longest contraction
@example(17, 1, 33, 0, True)
def test_exact_in_integers(m, k, n, seed, per_tensor):
    """The int32 sum is exact: int64 and float64 give the same result up to three fp32 roundings per element."""
    tile = (None, None) if per_tensor else (1, None)
    a, b = (Quantizer(8, tile).quantize(normal(r, k, seed=seed + i)) for i, r in enumerate((m, n)))
    scales = a.scale.reshape(-1, 1).double() * b.scale.reshape(1, -1).double()
    exact = (a.codes.long() @ b.codes.long().T).double() * scales
    y = int8_gemm(a, b, torch.float32)
    assert y.dtype == torch.float32 and ((y.double() - exact).abs() <= 3.01 * 2.0**-24 * exact.abs()).all()


def test_largest_sum():
    """127 x 127 summed over K = 4096: beyond what fp32 holds exactly, but not int32."""
    ones = Quantized(torch.full((2, 4096), 127, dtype=torch.int8), torch.ones(1, 1, 1, 1), None)
    assert int8_gemm(ones, ones, torch.float64)[0, 0] == 127 * 127 * 4096


@pytest.mark.parametrize("flags", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 7, 3), (33, 64, 20), (40, 3072, 9)])
def test_equals_simulated(flags, shape):
    """All three GEMMs agree with --gemm=simulate under every supported combination."""
    m, k, n = shape
    x, w, g = normal(m, k), normal(n, k, seed=1, scale=0.02), normal(m, n, seed=2, scale=1e-4)
    out = []
    for recipe in recipes(flags):
        y, qx, qw = linear_forward(x, w, recipe)
        out.append((y, *linear_backward(g, qx, qw, recipe)))
    for ours, simulated in zip(out[1], out[0], strict=True):
        assert ours.dtype == simulated.dtype and close(ours, simulated, 2 * math.sqrt(k) + 4)


@pytest.mark.parametrize("flags", [{}, dict(gbits=8, ggran="per_row", ggemm="both")], ids=str)
def test_really_on_integers(flags, monkeypatch):
    """W8A8 sends one GEMM to the integer units, with folded gradients all three: none falls back unseen."""
    calls = []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: calls.append(a.dtype) or (a.int() @ b.int()))
    layer = QuantLinear(16, 8, recipe=recipes(flags)[1])
    layer(normal(5, 16).requires_grad_()).sum().backward()
    assert calls == [torch.int8] * (3 if flags else 1)


def test_fold_moves_the_scales():
    """A @ (codes * s).T = (A * s) @ codes.T: without rounding of A, folding changes nothing (float64)."""
    b = Quantizer(8, (1, None)).quantize(normal(6, 10)).T  # (10, 6), scales along its columns
    a = normal(4, 6, seed=3)
    folded, codes = fold(Quantizer(8, (1, None), fold=True), a, b)
    scales = b.scale.reshape(1, -1)
    assert torch.equal(restore(folded), Quantizer(8, (1, None))(a * scales))
    assert codes.scale.numel() == 1 and torch.equal(codes.codes, b.codes)
    exact = a.double() @ restore(b).double().T
    assert torch.allclose((a.double() * scales.double()) @ codes.codes.double().T, exact, rtol=1e-6, atol=1e-9)
    plain, same = fold(Quantizer(8, (1, None)), a, b)  # other granularities are left as they are
    assert same is b and torch.equal(plain.codes, Quantizer(8, (1, None)).quantize(a).codes)


def test_folded_gradient_is_close():
    """Eight bits per row leave about one percent of error in both gradients, against float64 of the rounded x and w."""
    recipe = recipes(dict(gbits=8, ggran="per_row", ggemm="both"))[1]
    x, w, g = normal(64, 48), normal(32, 48, seed=1), normal(64, 32, seed=2)
    _, qx, qw = linear_forward(x, w, recipe)
    dx, dw = linear_backward(g, qx, qw, recipe)
    for ours, exact in ((dx, g.double() @ restore(qw).double()), (dw, g.T.double() @ restore(qx).double())):
        assert 1e-4 < (ours - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_equals_simulated(dtype):
    """A whole GPT: loss and every gradient of --gemm=int8 equal those of --gemm=simulate, quantized head included."""
    results = []
    for engine in ("simulate", "int8"):
        torch.manual_seed(0)
        config = QuantConfig(wbits=8, abits=8, gbits=8, ggran="per_row", ggemm="both", gemm=engine, quant_head=True)
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=24), 65, quant_linears(config), dtype)
        tokens = torch.randint(65, (3, 25))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, simulated in zip(*results, strict=True):
        error = (ours - simulated).norm() / simulated.norm().clamp_min(1e-12)
        assert error < (1e-4 if dtype == torch.float32 else 0.05)  # a last bit moves a gradient across a rounding edge


def test_compiled_equals_eager():
    """torch.compile changes nothing but the rounding of sums."""
    recipe = recipes(dict(gbits=8, ggran="per_row", ggemm="both"))[1]
    out = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = QuantLinear(33, 20, recipe=recipe)
        x = normal(17, 33).requires_grad_()
        y = (torch.compile(layer) if compiled else layer)(x)
        (y * normal(17, 20, seed=1)).sum().backward()
        out.append((y.detach(), x.grad, layer.weight.grad))
    assert all(close(a, b, 8) for a, b in zip(*out, strict=True))


def test_survives_activation_checkpointing():
    """Recomputed in backward, the codes and so the gradients are bitwise the same."""
    layer, grads = QuantLinear(16, 8, recipe=recipes({})[1]), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        x = normal(9, 16).requires_grad_()
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append((x.grad, layer.weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("gemm_flag", ["simulate", "int8"])
def test_bytes_kept_for_backward(gemm_flag):
    """W8A8 keeps a quarter of the fp32 input, and scales: int8 codes, shared by nobody in floating point."""
    kept = []
    recipe = recipes({})[gemm_flag == "int8"]
    layer, x = QuantLinear(256, 256, recipe=recipe), normal(512, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    activations = sum(t.nbytes for t in kept if t.shape[0] == 512)
    assert activations <= 0.28 * x.nbytes and all(t.dtype == torch.int8 or t.numel() <= 512 for t in kept)


@pytest.mark.parametrize("flags, named", [
    (dict(wbits=8), "gemm"), (dict(abits=8), "gemm"), (dict(), "gemm"),
    (dict(wbits=8, abits=8, wgran="per_block"), "wgran"), (dict(wbits=8, abits=8, agran="per_block"), "agran"),
    (dict(wbits=8, abits=8, agran="per_channel"), "agran"), (dict(wbits=8, abits=8, asym=True), "asym"),
    (dict(wbits=8, abits=8, gbits=8), "ggran"), (dict(wbits=8, abits=8, gbits=8, ggran="per_tensor"), "ggran"),
    (dict(wbits=8, abits=8, gbits=8, ggran="per_row", backward="fp"), "backward"),
    (dict(wbits=8, wfmt="e4m3", abits=8), "wfmt"), (dict(wbits=8, abits=8, afmt="e5m2"), "afmt"),
    (dict(wbits=8, abits=8, gbits=8, gfmt="e5m2", ggran="per_row"), "gfmt")])
def test_what_does_not_factor_out_is_refused(flags, named):
    """Each combination without an integer GEMM is an error that names the flag to change."""
    with pytest.raises(ValueError, match=f"--{named}="):
        QuantConfig(gemm="int8", **flags)


def test_one_operand_in_floating_point():
    """Where the gradient is not quantized, the GEMM is quant.gemm itself."""
    b, a = Quantizer(8, (1, None)).quantize(normal(6, 10)), normal(4, 10)
    assert torch.equal(int8_gemm(a, b, torch.float32), gemm(a, b, torch.float32))


@pytest.mark.parametrize("m, k, n", [(1, 5, 3), (3, 1, 4), (3, 5, 1), (1, 1, 1), (2, 3, 4)])
def test_transposed_operands_with_an_axis_of_one(m, k, n):
    """torch._int_mm reads some such views wrongly (K = 1; one row of a transposed A); int8_gemm does not."""
    def quantized(codes):
        return Quantized(codes, torch.ones(1, 1, 1, 1), None)
    a, b = torch.randint(-127, 128, (k, m), dtype=torch.int8).T, torch.randint(-127, 128, (k, n), dtype=torch.int8).T
    for left in (a, a.contiguous().clone()):
        for right in (b, b.contiguous().clone()):
            y = int8_gemm(quantized(left), quantized(right), torch.float64)
            assert torch.equal(y.long(), a.long() @ b.long().T)


def test_a_sum_that_int32_cannot_hold():
    """From 133,145 products of 127 x 127 on the sum could wrap: refused, with the remedy."""
    row = Quantized(torch.ones(1, 133_145, dtype=torch.int8), torch.ones(1, 1, 1, 1), None)
    with pytest.raises(ValueError, match="133145 products.*smaller --batch_size"):
        int8_gemm(row, row, torch.float32)
    short = Quantized(torch.full((1, 133_144), 127, dtype=torch.int8), torch.ones(1, 1, 1, 1), None)
    assert int8_gemm(short, short, torch.float64).item() == pytest.approx(127 * 127 * 133_144, rel=1e-7)


@pytest.mark.parametrize("flags", [dict(abits=8, agran="per_block"), dict(wbits=8, wgran="per_block"),
                                   dict(abits=8, asym=True)])
def test_per_row_refuses_what_it_cannot_fold(flags):
    """Scales of blocks and zero points do not move into the gradient."""
    with pytest.raises(ValueError, match="--ggran=per_row"):
        QuantConfig(gbits=8, ggran="per_row", **flags)
