"""model.py against transformers, float64 and autograd twins; its files against every way in which they may be broken.

Ladder: the shape and its initialisation -> the fused head and loss -> bits=32, tying, quantizers and where they sit ->
training, generation -> checkpoints -> Hugging Face's layout -> the command line.
"""

import copy
import errno
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_py
from model import (
    GPT,
    GPTConfig,
    export_hf,
    linear_cross_entropy,
    load_checkpoint,
    load_hf,
    load_weights,
    model_from,
    quant_linears,
    save_checkpoint,
)
from quant import QuantConfig, Quantizer, QuantLinear, Recipe, restore
from support.config import flatten

ROOT = Path(__file__).resolve().parent.parent
W8A8 = dict(wbits=8, abits=8)
RECIPES = {  # every shape a recipe can take on its way through the model
    "plain": {}, "w8a8": W8A8, "head": dict(W8A8, quant_head=True),
    "head_fp": dict(W8A8, quant_head=True, backward="fp"),
    "head_asym_block": dict(W8A8, quant_head=True, asym=True, agran="per_block", wgran="per_block", wblock=16),
    "head_w8a8g8": dict(W8A8, quant_head=True, gbits=8, ggemm="both", split_qkv=True),
    "head_fp8": dict(W8A8, wfmt="e4m3", afmt="e4m3", gbits=8, gfmt="e5m2", ggran="per_row", ggemm="both",
                     quant_head=True),
}
recipes = pytest.mark.parametrize("quant", [pytest.param(q, id=name) for name, q in RECIPES.items()])


def gpt(quant=None, vocab=50, seed=0, dtype=torch.float32, linear=None, wide=False, **shape):
    """Build a tiny GPT (V=64, of which 14 padding); `wide` weights make logits of size 1, biases and all."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, **shape}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape), vocab, linear or quant_linears(QuantConfig(**(quant or {}))), dtype)
    with torch.no_grad():
        for p in model.parameters() if wide else ():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def tokens(*shape, vocab=50, seed=1):
    """Draw random tokens."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def plain_linear(name, in_features, out_features, bias):
    """Make the layer that bits=32 must equal."""
    return nn.Linear(in_features, out_features, bias)


def grads(model, loss):
    """Return {name: gradient} of the loss."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def same(a, b):
    """Compare two dicts of tensors bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -----------------------------------------------------------------------------
# the shape

@pytest.mark.parametrize("n_layer, n_head, n_embd, published", [
    (12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080),
    (48, 25, 1600, 1_557_611_200)])
def test_parameter_counts_are_the_published_ones(n_layer, n_head, n_embd, published):
    """GPT-2 small to XL have as many parameters as released, lm_head not counted twice, 47 padding rows apart."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer, n_head, n_embd), 50257, quant_linears(QuantConfig(**W8A8, quant_head=True)))
    assert model.wte.weight.shape == (50304, n_embd)
    assert sum(p.numel() for p in model.parameters()) - 47 * n_embd == published


@pytest.mark.parametrize("bias", [True, False])
def test_flops_per_token_by_hand(bias):
    """6 FLOPs per weight and token, 12 L C T for attention: the sum written out by hand for L=3, C=64, T=32, V=128."""
    L, C, T, V = 3, 64, 32, 128
    per_block = 12 * C * C + 2 * C + (9 * C + 2 * C if bias else 0)  # GEMMs, LayerNorms, biases of linears and norms
    expected = 6 * (L * per_block + C + (C if bias else 0) + V * C) + 12 * L * C * T
    assert gpt(n_layer=L, n_head=2, n_embd=C, block_size=T, vocab=100, bias=bias).flops_per_token() == expected


@pytest.mark.parametrize("quant", [{}, W8A8])
def test_initialisation(quant):
    """Weights are normal(0, 0.02), projections into the residual stream 0.02/sqrt(2 L): mean and std within 5 sigma."""
    model = gpt(quant, n_layer=8, n_embd=64, vocab=300, block_size=128)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item() / std) < 5 / math.sqrt(p.numel()), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_initialisation_is_a_function_of_the_seed():
    """Equal seeds give equal weights, quantized or not; another seed gives others."""
    assert same(gpt().state_dict(), gpt(W8A8).state_dict())
    assert not torch.equal(gpt().wte.weight, gpt(seed=1).wte.weight)


@pytest.mark.parametrize("shape, flag", [
    (dict(n_layer=0), "--n_layer=0"), (dict(n_head=0), "--n_head=0"), (dict(n_embd=-8), "--n_embd=-8"),
    (dict(block_size=0), "--block_size=0"), (dict(n_head=5, n_embd=32), "--n_head=5 must divide --n_embd=32"),
    (dict(dropout=1.0), "--dropout=1.0"), (dict(dropout=-0.1), "--dropout=-0.1")])
def test_impossible_shapes(shape, flag):
    """A shape that cannot be is refused by the name of its flag."""
    with pytest.raises(ValueError, match=flag):
        GPTConfig(**shape)


# -----------------------------------------------------------------------------
# the head and the loss

def head(M, V=128, C=16, vocab=100, seed=0, valid=0.8):
    """Draw x (M, C), w (V, C) with logits of size 2 and targets (M,), a fifth of them ignored (-1 or -100)."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(M, C, generator=g), torch.randn(V, C, generator=g) * 0.5
    t = torch.randint(vocab, (M,), generator=g)
    ignored = torch.where(torch.rand(M, generator=g) < 0.5, -1, -100)
    return x, w, torch.where(torch.rand(M, generator=g) < valid, t, ignored), vocab


def fused(x, w, t, vocab, recipe=None, factor=1.0):
    """Return loss, dx, dw of linear_cross_entropy."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = linear_cross_entropy(x, w, t, vocab, recipe)
    (loss * factor).backward()
    return loss.detach(), x.grad, w.grad


def oracle(x, w, t, vocab, backward_x=None, backward_w=None):
    """Return loss, dx, dw of F.cross_entropy in float64; backward may use other operands than forward."""
    logits = (x.double() @ w[:vocab].double().T).requires_grad_()  # (M, vocab)
    loss = F.cross_entropy(logits, t.where(t >= 0, -100), ignore_index=-100) if (t >= 0).any() else logits.sum() * 0
    loss.backward()
    g = logits.grad  # (M, vocab)
    x, w = (x if backward_x is None else backward_x).double(), (w if backward_w is None else backward_w).double()
    return loss.detach(), g @ w[:vocab], F.pad(g.T @ x, (0, 0, 0, len(w) - vocab))


def close(ours, reference, tolerance=1e-5):
    """Compare within `tolerance` of the largest entry: fp32 sums over up to 128 terms are good to 1e-6."""
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape and (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


@given(M=st.integers(1, 40), vocab=st.integers(1, 128), rows=st.integers(1, 45), seed=st.integers(0, 999),
       valid=st.sampled_from([0.0, 0.5, 1.0]))
@example(M=37, vocab=100, rows=5, seed=0, valid=0.5)  # 8 chunks, the last of 2 rows
@example(M=37, vocab=100, rows=45, seed=0, valid=0.5)  # one chunk
@example(M=1, vocab=1, rows=1, seed=0, valid=1.0)  # a loss of 0, one token to choose from
@example(M=9, vocab=100, rows=2, seed=0, valid=0.0)  # nothing to learn from
def test_cross_entropy_equals_torch_in_float64(M, vocab, rows, seed, valid):
    """Loss, dx and dw are F.cross_entropy's, with ignored targets and padding rows, however cut into chunks."""
    x, w, t, _ = head(M, vocab=vocab, seed=seed, valid=valid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_py, "MAX_LOGITS", rows * len(w))
        loss, dx, dw = fused(x, w, t, vocab)
    expected, ex, ew = oracle(x, w, t, vocab)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    # a row of g sums |p - one_hot| <= 2 and is divided by the number of targets: entries reach |w|, |x| ~ 3, fp32 1e-6
    torch.testing.assert_close(dx.double(), ex, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dw.double(), ew, rtol=1e-5, atol=1e-6)


def test_cross_entropy_against_finite_differences():
    """The directional derivatives in x and w are (f(+e) - f(-e)) / 2e; the loss is fp32, hence e = 0.02 and 1e-3."""
    x, w, t, vocab = head(37)
    _, dx, dw = fused(x, w, t, vocab)
    x, w, e = x.double(), w.double(), 0.02
    for i in range(3):
        vx, vw = head(37, seed=i + 10)[:2]
        with torch.no_grad():
            in_x = [linear_cross_entropy(x + s * vx, w, t, vocab) for s in (e, -e)]
            in_w = [linear_cross_entropy(x, w + s * vw, t, vocab) for s in (e, -e)]
        assert (in_x[0] - in_x[1]).item() / (2 * e) == pytest.approx((vx * dx).sum().item(), abs=1e-3)
        assert (in_w[0] - in_w[1]).item() / (2 * e) == pytest.approx((vw * dw).sum().item(), abs=1e-3)


def test_cross_entropy_scales_with_the_incoming_gradient():
    """backward of 3 loss is 3 times that of loss, as gradient accumulation needs it; twice is as once."""
    once, thrice = fused(*head(37)), fused(*head(37), factor=3.0)
    assert all(torch.equal(a * b, c) for a, b, c in zip(once, (1, 3, 3), thrice, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once, fused(*head(37)), strict=True))


def test_incoming_gradient_is_not_rounded_to_bfloat16():
    """1/3, from accumulating over 3 micro-batches, scales dx in fp32: in bf16 all of it would be 0.2 % too large."""
    x, w, t, vocab = head(400)
    once, third = (fused(x.bfloat16(), w, t, vocab, factor=f)[1].double() for f in (1, 1 / 3))
    # 6400 entries, each rounded by at most 2^-8 of itself at random: their projection is good to 5 / sqrt(6400) / 2^8
    assert abs((third * once).sum() / (once * once).sum() * 3 - 1) < 2.5e-4


def test_cross_entropy_without_gradient_computes_none(monkeypatch):
    """Under no_grad the loss is the same bits, without a graph and without a single backward GEMM."""
    x, w, t, vocab = head(37)
    expected = fused(x, w, t, vocab)[0]
    monkeypatch.setattr(model_py, "linear_backward", lambda *_: pytest.fail("a backward GEMM"))
    with torch.no_grad():
        loss = linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), t, vocab)
    assert torch.equal(loss, expected) and not loss.requires_grad


def test_padding_has_no_probability_and_no_gradient():
    """Padding rows may hold anything: loss and dx keep their bits, and their own gradient is exactly zero."""
    x, w, t, vocab = head(37)
    loss, dx, dw = fused(x, w, t, vocab)
    loud = w.clone()
    loud[vocab:] = 1e4
    for a, b in zip((loss, dx, dw), fused(x, loud, t, vocab), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    for recipe in (None, Recipe(grad_weight_grad_output=Quantizer(8, (None, 1), rounding="stochastic"))):
        assert (fused(x, loud, t, vocab, recipe)[2][vocab:] == 0).all()
    dead = fused(x, w, torch.full_like(t, -1), vocab)
    assert all((a == 0).all() for a in dead)


ROW, ALL, COLUMN, BLOCK = (1, None), (None, None), (None, 1), (1, 8)


@pytest.mark.parametrize("backward", ["ste", "fp"])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("tile", [ROW, ALL, COLUMN, BLOCK])
def test_quantized_head_equals_its_twin(tile, asym, backward, monkeypatch):
    """The rounded operands in F.cross_entropy, float64: backward sees the rounded x and w (ste) or the given ones (fp).

    x is rounded as a whole before it is cut: every granularity is independent of the number of chunks.
    """
    x, w, t, vocab = head(37)
    a, b = Quantizer(8, tile, asym), Quantizer(4, ROW)
    recipe = Recipe(output_input=a, output_weight=b, backward=backward)
    qx, qw = restore(a.quantize(x)), restore(b.quantize(w))
    expected = oracle(qx, qw, t, vocab) if backward == "ste" else oracle(qx, qw, t, vocab, x, w)
    for rows in (1, 5, 37):
        monkeypatch.setattr(model_py, "MAX_LOGITS", rows * len(w))
        close(fused(x, w, t, vocab, recipe), expected)


@pytest.mark.parametrize("foreign", [False, True])
def test_quantized_gradient_of_the_head(foreign):
    """Each GEMM of the head sees its own quantized gradient: per token in one, untouched in the other.

    Rounding may flip where fp32 and float64 straddle a tie, so: 20 times nearer to the twin than to no rounding.
    """
    x, w, t, vocab = head(37)
    logits = (x.double() @ w[:vocab].double().T).requires_grad_()
    F.cross_entropy(logits, t.where(t >= 0, -100)).backward()
    g = F.pad(logits.grad, (0, len(w) - vocab)).float()  # (M, V)
    columns = Quantizer(4, (None, 1))
    for slot in ("grad_input_grad_output", "grad_weight_grad_output"):
        quantizer = Quantizer(4, ROW) if slot == "grad_input_grad_output" else columns
        _, dx, dw = fused(x, w, t, vocab, Recipe(**{slot: quantizer.__call__ if foreign else quantizer}))
        _, ex, ew = fused(x, w, t, vocab)
        twin, plain, ours, other, untouched = (
            (quantizer(g) @ w, ex, dx, dw, ew) if slot == "grad_input_grad_output" else
            (quantizer(g.T) @ x, ew, dw, dx, ex))
        assert torch.equal(other, untouched)
        assert (ours - twin).norm() < 0.05 * (twin - plain).norm()


def test_chunks_change_nothing_but_the_order_of_sums(monkeypatch):
    """W8A8G8 per token, 1 to 37 chunks: equal to fp32 rounding (each token's scale lies within its chunk)."""
    x, w, t, vocab = head(37)
    recipe = Recipe(Quantizer(8, ROW), Quantizer(8, ROW), Quantizer(8, ROW), None, Quantizer(8, COLUMN))
    whole = fused(x, w, t, vocab, recipe)
    for rows in (1, 2, 5, 36):
        monkeypatch.setattr(model_py, "MAX_LOGITS", rows * len(w))
        close(fused(x, w, t, vocab, recipe), whole)


def test_chunks_hold_whole_blocks(monkeypatch):
    """With per_block gradients along the tokens, a batch that fits without chunks fits with them."""
    quant, idx = dict(gbits=8, ggran="per_block", wblock=32, quant_head=True), tokens(6, 16)  # 96 = 3 x 32 tokens
    loss = gpt(quant)(idx, idx)
    monkeypatch.setattr(model_py, "MAX_LOGITS", 50 * 64)
    torch.testing.assert_close(gpt(quant)(idx, idx), loss)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest floating tensor that any operation returns."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.elements = max(self.elements, t.numel())
        return out


@recipes
@pytest.mark.parametrize("train", [True, False])
def test_full_logits_never_exist(quant, train, monkeypatch):
    """No operation of forward or backward returns more than MAX_LOGITS numbers, in any dtype; M V is 4 times that."""
    model, idx = gpt(quant, vocab=1050, n_embd=16, n_layer=1), tokens(4, 16)
    budget = 16 * 1088  # a quarter of the M = 64 rows; as many as w (V, C) has
    monkeypatch.setattr(model_py, "MAX_LOGITS", budget)
    with Largest() as largest, torch.set_grad_enabled(train):
        loss = model(idx, idx)
        if train:
            loss.backward()
    assert largest.elements == budget  # seen, and nothing above it


# -----------------------------------------------------------------------------
# bits=32, tying, and which layer gets which recipe

def test_32_bits_are_plain_linear_for_a_whole_run():
    """A GPT of QuantLinear at 32 bits is a GPT of nn.Linear: 20 AdamW steps, losses, gradients, weights bitwise."""
    runs, idx = [], tokens(20, 4, 17)
    for linear in (None, plain_linear):
        model, losses = gpt(linear=linear), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for batch in idx:
            loss = model(batch[:, :-1], batch[:, 1:])
            losses.append((loss.item(), grads(model, loss)))
            optimizer.step()
        runs.append((losses, model))
    for (a, ga), (b, gb) in zip(runs[0][0], runs[1][0], strict=True):
        assert a == b and same(ga, gb)
    assert same(runs[0][1].state_dict(), runs[1][1].state_dict())
    assert torch.equal(runs[0][1](idx[0, :, :-1]), runs[1][1](idx[0, :, :-1]))
    assert not torch.equal(runs[0][1].wte.weight, gpt().wte.weight)  # it was a run


@recipes
def test_head_is_the_embedding(quant):
    """lm_head.weight is wte.weight, the same Parameter: built, copied, compiled, loaded, trained."""
    model = gpt(quant)
    built = model.wte.weight
    load_weights(model, gpt(seed=5).state_dict(), "test")
    assert model.wte.weight is built and torch.equal(built, gpt(seed=5).wte.weight)
    before = built.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens(2, 8), tokens(2, 8, seed=2)).backward()
    optimizer.step()
    assert model.wte.weight is built and not torch.equal(built, before)
    for m in (model, copy.deepcopy(model), torch.compile(model), model_from(checkpoint(model, quant))):
        assert m.lm_head.weight is m.wte.weight
        assert sum(p is m.wte.weight for p in m.parameters()) == 1


@pytest.mark.parametrize("quant", [{}, dict(W8A8, quant_head=True), dict(W8A8, quant_head=True, backward="fp")])
def test_both_uses_of_the_head_agree(quant):
    """The fused loss, and cross-entropy of the logits that forward returns: same loss, same gradient by autograd."""
    model, idx, t = gpt(quant, wide=True), tokens(3, 9), tokens(3, 9, seed=2)
    t[0, :3] = -1
    loss, logits = model(idx, t), model(idx)
    reference = F.cross_entropy(logits[..., :50].flatten(0, 1), t.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    ours, theirs = grads(model, loss), grads(model, reference)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def unquantized(model):
    """Return the names of the linears without a recipe."""
    return {n for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.recipe is None}


LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize("quant_head", [False, True])
@pytest.mark.parametrize("skip", [(), (1,), (0, 11)])
def test_skip_blocks_and_quant_head(skip, quant_head):
    """Exactly the named blocks (1, not 10 or 11), and lm_head unless asked for, stay in high precision."""
    with torch.device("meta"):
        model = gpt(dict(W8A8, skip_blocks=skip, quant_head=quant_head), n_layer=12)
    expected = {f"h.{i}.{name}" for i in skip for name in LINEARS} | (set() if quant_head else {"lm_head"})
    assert unquantized(model) == expected
    assert len([m for m in model.modules() if isinstance(m, QuantLinear)]) == 4 * 12 + 1


def test_a_skipped_block_computes_as_unquantized():
    """With every block skipped, W8A8 is the unquantized model, bit for bit."""
    idx, quant = tokens(2, 16), dict(W8A8, skip_blocks=(0, 1))
    assert torch.equal(gpt(quant)(idx, idx), gpt()(idx, idx))
    assert not torch.equal(gpt(W8A8)(idx, idx), gpt()(idx, idx))


@pytest.mark.parametrize("skip", [(2,), (0, 12), (-1,)])
def test_skip_blocks_out_of_range(skip):
    """A block that the model does not have is an error: the flag could not take effect."""
    with pytest.raises(ValueError, match="--skip_blocks"):
        model_from(checkpoint(gpt(), dict(W8A8, skip_blocks=skip)))


def test_split_qkv_reaches_c_attn_alone():
    """The thirds are those of c_attn's 3 C outputs; other layers keep one scale."""
    model = gpt(dict(wbits=8, wgran="per_tensor", split_qkv=True))
    tiles = {n: m.recipe.output_weight.tile for n, m in model.named_modules() if getattr(m, "recipe", None)}
    assert tiles == {f"h.{i}.{n}": (32 if n == "attn.c_attn" else None, None) for i in (0, 1) for n in LINEARS}


@pytest.mark.parametrize("quant, message", [
    (dict(wbits=8, wgran="per_block", wblock=24), "--wblock=24 must divide in_features=32 of h.0.attn.c_attn"),
    (dict(abits=8, agran="per_block", wblock=64), "--wblock=64 must divide in_features=32 of h.0.attn.c_attn"),
    (dict(gbits=8, ggran="per_block", ggemm="both", wblock=64),
     "--wblock=64 must divide out_features=96 of h.0.attn.c_attn"),
    (dict(gbits=8, ggran="per_block", ggemm="grad_input", wblock=48),
     "--wblock=48 must divide out_features=32 of h.0.attn.c_proj"),
    (dict(gbits=8, ggran="per_block", ggemm="grad_input", wblock=96, skip_blocks=(0, 1), quant_head=True),
     "--wblock=96 must divide out_features=64 of lm_head")])
def test_blocks_that_do_not_divide(quant, message):
    """A block that does not fit names flag, layer and size when the model is built."""
    with pytest.raises(ValueError, match=message):
        gpt(quant)


@pytest.mark.parametrize("quant", [
    dict(wbits=8, wgran="per_block", wblock=32),
    dict(gbits=8, ggran="per_block", ggemm="both", wblock=32, quant_head=True),
    dict(gbits=8, ggran="per_block", wblock=24),  # along the tokens, of which a batch may have 24
    dict(wbits=8, wgran="per_block", wblock=24, skip_blocks=(0, 1)),  # no layer that it would apply to
    dict(gbits=8, ggran="per_block", ggemm="grad_input", wblock=96, skip_blocks=(0, 1))])  # V=64, but lm_head is not in
def test_blocks_that_divide(quant):
    """A block that fits every layer that it applies to builds, and trains on 96 tokens."""
    gpt(quant)(tokens(6, 16), tokens(6, 16)).backward()


# -----------------------------------------------------------------------------
# training and sampling

@pytest.mark.parametrize("agran, leaks", [
    (None, False), ("per_token", False), ("per_block", False), ("per_tensor", True), ("per_channel", True)])
def test_causality(agran, leaks):
    """A later token changes no earlier logit, if tokens share no scale; per_tensor, per_channel do see the future."""
    quant = dict(abits=4, agran=agran) if agran else {}
    model, idx = gpt({**quant, "wblock": 16} if agran == "per_block" else quant, wide=True), tokens(2, 12)
    later = idx.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 50
    a, b = model(idx), model(later)
    if leaks:
        assert not torch.allclose(a[:, :7], b[:, :7], rtol=0, atol=1e-3)
    else:
        torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-6)
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-2


def test_tokens_know_their_order():
    """Position enters: the last logits change when two earlier tokens swap places."""
    model, idx = gpt(wide=True), tokens(1, 8)
    assert (model(idx)[0, -1] - model(idx[:, [1, 0, 2, 3, 4, 5, 6, 7]])[0, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("quant", [W8A8, dict(W8A8, quant_head=True, gbits=8)])
def test_one_batch_overfits(quant):
    """A tiny W8A8 (G8) model learns one batch of random tokens by heart: from log V = 3.9 to below 0.1."""
    model, batch = gpt(quant, n_embd=64), tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    losses = []
    for _ in range(80):
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(50)) < 0.1 and losses[-1] < 0.1
    assert (model.wte.weight.grad[50:] == 0).all()


@recipes
def test_bfloat16_is_near_fp32(quant):
    """bf16 activations, fp32 parameters and gradients: loss within 1 %, gradients within 10 % of their norm.

    FP8 within 20 %: bf16 moves numbers across its rounding edges, as far apart as e5m2's numbers (an eighth to a
    quarter of themselves), so two runs differ by as much as either does from the unquantized one, 14 % here.
    """
    idx, t = tokens(4, 16), tokens(4, 16, seed=2)
    full, half = gpt(quant, wide=True), gpt(quant, wide=True, dtype=torch.bfloat16)
    assert half(idx).dtype == torch.bfloat16 and half(idx, t).dtype == torch.float32
    a, b = full(idx, t), half(idx, t)
    assert abs(a.item() / b.item() - 1) < 0.01 and a.item() != b.item()
    a, b = grads(full, a), grads(half, b)
    for name in a:
        assert b[name].dtype == torch.float32
        assert (a[name] - b[name]).norm() < (0.2 if "gfmt" in quant else 0.1) * a[name].norm() + 1e-6, name


def test_compiled_equals_eager():
    """torch.compile takes W8A8 with its head as one graph, forward and backward (aot_eager: inductor is slow)."""
    model, idx, t = gpt(RECIPES["head"], n_layer=1), tokens(2, 8), tokens(2, 8, seed=2)
    loss = model(idx, t)
    expected = grads(model, loss)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(idx, t)
    torch.testing.assert_close(compiled, loss)
    for name, g in grads(model, compiled).items():
        torch.testing.assert_close(g, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_in_training_only(monkeypatch):
    """Dropout draws at all 1 + 3 L places in training; in eval the model is the one without, bitwise."""
    model, idx = gpt(dropout=0.3), tokens(2, 16)
    assert not torch.equal(model(idx), model(idx))
    assert torch.equal(model.eval()(idx), gpt()(idx)) and torch.equal(gpt()(idx), gpt().eval()(idx))
    seen, dropout, sdpa = [], F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append(p * training) or dropout(x, p, training))
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *a, dropout_p, **kw: seen.append(dropout_p) or sdpa(*a, dropout_p=dropout_p, **kw))
    model.train()(idx)
    assert seen == [0.3] * (1 + 3 * 2)  # the embedding; attention, its projection and the MLP of each block


def test_generate_is_a_function_of_its_seed():
    """The same seed gives the same text whatever torch's own generator did; another seed another; the prompt stays."""
    model, idx = gpt(wide=True), tokens(2, 3)
    torch.manual_seed(1)
    a = model.generate(idx, 12, seed=7)
    torch.manual_seed(2)
    assert torch.equal(a, model.generate(idx, 12, seed=7)) and not torch.equal(a, model.generate(idx, 12, seed=8))
    assert a.shape == (2, 15) and torch.equal(a[:, :3], idx) and a.dtype == idx.dtype


def test_generate_without_dropout():
    """A model in training is sampled without dropout, else the seed would not decide; it stays in training."""
    model, idx = gpt(wide=True, dropout=0.5), tokens(2, 3)
    assert torch.equal(model.generate(idx, 12), gpt(wide=True).generate(idx, 12)) and model.training


def test_generate_never_emits_padding():
    """Though the padding rows' logits tower above all others, only real tokens come out."""
    model = gpt(wide=True)
    with torch.no_grad():
        model.wte.weight[50:] = 10 * model(tokens(1, 1))[0, 0].sign().sum() * model.hidden(tokens(1, 1))[0, 0]
    assert model.generate(tokens(8, 1), 20, temperature=5.0, top_k=64).max() < 50


def test_generate_beyond_the_context():
    """Past block_size the window slides: a long prompt continues as its own last block_size tokens do."""
    model, idx = gpt(wide=True), tokens(2, 40)
    assert torch.equal(model.generate(idx, 20)[:, 40:], model.generate(idx[:, -16:], 20)[:, 16:])


def test_generate_samples_the_distribution():
    """Of 20000 draws, shares are softmax(logits / temperature) over the top k within 5 sigma; k=1 is argmax."""
    model, n, k, temperature = gpt(wide=True), 20_000, 6, 0.7
    idx = tokens(1, 5)
    logits = model(idx)[0, -1, :50].double()
    top = logits.topk(k)
    p = torch.zeros(50).double().scatter(0, top.indices, (top.values / temperature).softmax(0)).detach()
    drawn = model.generate(idx.expand(n, -1), 1, temperature=temperature, top_k=k)[:, -1].bincount(minlength=50) / n
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all() and p.max() < 0.9
    assert model.generate(idx, 1, top_k=1)[0, -1] == logits.argmax()


@recipes
def test_evaluation_twice_is_the_same(quant):
    """A second call gives the same bits: no state hides in the quantizers or the loss."""
    model, idx = gpt(quant), tokens(2, 16)
    assert torch.equal(model(idx, idx), model(idx, idx)) and torch.equal(model(idx), model(idx))


# -----------------------------------------------------------------------------
# checkpoints

def checkpoint(model, quant=None):
    """Return what train.py saves of a model."""
    flat = {**flatten(model.config), **flatten(QuantConfig()), **(quant or {}), "learning_rate": 1e-3}
    return {"config": flat, "vocab_size": model.vocab_size, "model": model.state_dict()}


@recipes
def test_checkpoint_round_trip(quant, tmp_path):
    """Saved, read and rebuilt: the same weights, config and loss, bit for bit; by file or by folder."""
    model, idx = gpt(quant, seed=3), tokens(2, 16)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint(model, quant))
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        again = model_from(load_checkpoint(path))
        assert same(again.state_dict(), model.state_dict()) and again.config == model.config
        assert torch.equal(again(idx, idx), model(idx, idx))
    plain = model_from(load_checkpoint(tmp_path), QuantConfig())
    assert len(unquantized(plain)) == 9 and plain(idx).dtype == torch.float32
    assert model_from(load_checkpoint(tmp_path), dtype=torch.bfloat16)(idx).dtype == torch.bfloat16
    assert os.listdir(tmp_path) == ["ckpt.pt"]


@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on disk"), RuntimeError("No space left: zip")])
def test_a_failing_write_keeps_the_old_checkpoint(where, error, tmp_path, monkeypatch):
    """Whatever fails after some bytes are out: one line, the old file whole, no .tmp beside it."""
    def fail(*args):
        if where == "save":
            args[1].write(b"half a checkpoint")
        raise error

    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, checkpoint(gpt()))
    old = path.read_bytes()
    monkeypatch.setattr(*{"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[where], fail)
    with pytest.raises(OSError, match="could not write .*ckpt.pt: .*No space left.*untouched") as caught:
        save_checkpoint(path, checkpoint(gpt(seed=1)))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["ckpt.pt"]


def test_checkpoint_is_whole_before_it_gets_its_name(tmp_path, monkeypatch):
    """At the rename, the last thing done, a complete and flushed checkpoint lies under the temporary name."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))

    def rename(a, b):
        assert a != b and not Path(b).exists() and calls == ["fsync"]
        assert same(load_checkpoint(Path(a))["model"], gpt().state_dict())
        calls.append("replace")
        replace(a, b)

    monkeypatch.setattr(os, "replace", rename)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint(gpt()))
    assert calls == ["fsync", "replace"]


@pytest.fixture
def full_disk(tmp_path):
    """Mount a disk of 64 KiB; only root can."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a tiny disk needs root")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(full_disk):
    """On a disk that is really full, the checkpoint before stays and loads, and its space is not taken by a .tmp."""
    small = {"config": {}, "vocab_size": 1, "model": {}}
    save_checkpoint(full_disk / "ckpt.pt", small)
    with pytest.raises(OSError, match="could not write .*untouched") as error:
        save_checkpoint(full_disk / "ckpt.pt", checkpoint(gpt(n_embd=64)))
    assert "\n" not in str(error.value)
    assert load_checkpoint(full_disk) == small and os.listdir(full_disk) == ["ckpt.pt"]


def test_truncated_checkpoints(tmp_path):
    """Cut anywhere, a checkpoint is refused in one line that names it."""
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, checkpoint(gpt(n_layer=1)))
    whole = path.read_bytes()
    for size in (30, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="ckpt.pt (is truncated or not|holds something else)") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)


def test_a_full_disk_is_called_so(full_disk):
    """The line says that the disk is full, not what torch's zip writer stumbled over thereafter."""
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(full_disk / "ckpt.pt", checkpoint(gpt(n_embd=64)))  # large enough to fail within a tensor


class Bomb:
    """Unpickled by an unguarded torch.load, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        """Say what pickle is to call."""
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o)),
                                   lambda o, p: torch.save(o, p, _use_new_zipfile_serialization=False)],
                         ids=["zip", "pickle", "legacy"])
def test_code_in_a_checkpoint_never_runs(write, tmp_path):
    """A pickle that would create a file is refused and the file is not there; unguarded, the same pickle does it."""
    mark, path = tmp_path / "ran", tmp_path / "ckpt.pt"
    write({**checkpoint(gpt()), "bomb": Bomb(mark)} if write is torch.save else {"bomb": Bomb(mark)}, path)
    mark.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="ckpt.pt holds something else than tensors .* might run code"):
        load_checkpoint(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark))).close()
    assert mark.exists()


@pytest.mark.parametrize("content", [
    {"model": {}}, [1, 2], torch.zeros(3), {"config": {}, "vocab_size": 3}, {"config": {}, "model": {}},
    {"vocab_size": 3, "model": {}}], ids=str)
def test_not_a_checkpoint_of_ours(content, tmp_path):
    """A torch file of something else is refused, whichever of the three entries it lacks."""
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="not a checkpoint of nanoQPT: it lacks"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b'{"a": 1}', b"PK\x03\x04 zip?", b"\x93NUMPY", b"\0" * 99, pickle.dumps(3, 2)])
def test_not_a_torch_file(content, tmp_path):
    """Bytes of other formats are refused as well."""
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ValueError, match="ckpt.pt"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"}q", b"hello world", b"\x80\x02}q\x01X", b"c\xff\n"])
def test_garbage_that_breaks_the_unpickler(content, tmp_path):
    """Garbage on which torch's unpickler itself stumbles is a ValueError that names the file."""
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ValueError, match="ckpt.pt"):
        load_checkpoint(tmp_path)


def test_missing_checkpoint(tmp_path):
    """A checkpoint that is not there names the command that makes one, for a file and for a folder."""
    for path in (tmp_path, tmp_path / "ckpt.pt", tmp_path / "no" / "ckpt.pt"):
        with pytest.raises(FileNotFoundError, match="no checkpoint .*ckpt.pt; python train.py --out_dir="):
            load_checkpoint(path)


@pytest.mark.parametrize("other, message", [
    (dict(n_layer=1), "tensor h.1.attn.c_attn.bias is missing"),
    (dict(n_layer=3), "tensor h.2.attn.c_attn.bias is unknown"),
    (dict(bias=False), "tensor h.0.attn.c_attn.bias is missing"),
    (dict(n_embd=64), r"has shape \(.*64.*\), the model \(.*32"),
    (dict(block_size=8), r"wpe.weight has shape \(8, 32\), the model \(16, 32\)"),
    (dict(vocab=65), r"wte.weight has shape \(128, 32\), the model \(64, 32\)")])
def test_weights_of_another_shape(other, message):
    """Weights that do not fit are refused by the name of the first tensor at fault and its two shapes."""
    with pytest.raises(ValueError, match="somewhere: .*" + message):
        load_weights(gpt(), gpt(**other).state_dict(), "somewhere")
    bad = checkpoint(gpt())
    bad["model"] = gpt(**other).state_dict()
    with pytest.raises(ValueError, match="checkpoint: .*" + message):
        model_from(bad)


def test_load_weights_copies():
    """Weights without padding rows fill the others and leave the padding; the source is neither aliased nor changed."""
    model, source = gpt(), {k: v.clone() for k, v in gpt(seed=4).state_dict().items() if k != "lm_head.weight"}
    source["wte.weight"] = source["wte.weight"][:50].clone()
    load_weights(model, source, "test")
    assert torch.equal(model.wte.weight[:50], source["wte.weight"])
    assert torch.equal(model.wte.weight[50:], gpt().wte.weight[50:])
    assert same({k: v for k, v in model.state_dict().items() if "wte" not in k and "lm_head" not in k},
                {k: v for k, v in source.items() if k != "wte.weight"})
    source["ln_f.weight"].zero_()
    assert (model.ln_f.weight == 1).all()
    for rows in (49, 51, 63):
        with pytest.raises(ValueError, match=rf"wte.weight has shape \({rows}, 32\)"):
            load_weights(model, {**source, "wte.weight": torch.zeros(rows, 32)}, "test")


# -----------------------------------------------------------------------------
# Hugging Face's layout

@pytest.fixture(scope="module")
def hf():
    """Import transformers, or skip: it is an oracle, not a dependency."""
    pytest.importorskip("safetensors", reason="Hugging Face's files need safetensors")
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers", reason="the oracle of this test: pip install transformers")


@pytest.fixture
def safetensors():
    """Import safetensors.torch, or skip."""
    return pytest.importorskip("safetensors.torch", reason="Hugging Face's files need safetensors")


def hf_config(**change):
    """Return the config.json of a tiny GPT-2, as released."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 50}
    return {"model_type": "gpt2", **shape, **change}


def assert_same_model(ours, theirs):
    """Compare logits in float64 to 1e-9: any other epsilon, GELU, mask or transpose is 1e-7 off at least."""
    idx = tokens(3, 16)
    with torch.no_grad():
        a, b = ours.double()(idx), theirs.eval().double()(idx).logits
    assert b.shape == (3, 16, 50) and b.std() > 0.5
    torch.testing.assert_close(a[..., :50], b, rtol=0, atol=1e-9)


def test_transformers_reads_our_export(hf, tmp_path):
    """Our random weights, exported: GPT2LMHeadModel loads all of them and none else, and gives our logits."""
    model = gpt(wide=True, dtype=torch.float64)
    export_hf(model, tmp_path / "a" / "b")
    theirs, info = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "a" / "b", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert theirs.config.activation_function == "gelu_new" and theirs.config.eos_token_id == 49
    assert_same_model(model, theirs)


def test_we_read_what_transformers_saves(hf, tmp_path):
    """transformers' random weights, saved: we give its logits, its loss and its gradient."""
    torch.manual_seed(0)
    theirs = hf.GPT2LMHeadModel(hf.GPT2Config(**hf_config(initializer_range=0.2)))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # biases and LayerNorms too
    theirs.save_pretrained(tmp_path)
    config, vocab_size, weights = load_hf(tmp_path)
    assert (config, vocab_size) == (GPTConfig(2, 2, 32, 16), 50)
    model = gpt(vocab=vocab_size, dtype=torch.float64)
    load_weights(model, weights, "hf")
    assert_same_model(model, theirs)
    idx, t = tokens(3, 16), tokens(3, 16, seed=2)
    loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), t.flatten())
    loss.backward()
    ours = model(idx, t)
    torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=1e-6)  # the loss itself is fp32
    found = grads(model, ours)
    for name, p in theirs.transformer.named_parameters():
        g = found[name][:50] if name == "wte.weight" else found[name]
        g = g.T if name.endswith(model_py.TRANSPOSED) else g
        assert (g - p.grad).norm() < 1e-4 * p.grad.norm() + 1e-7, name


def test_safetensors_round_trip(safetensors, tmp_path):
    """Exported and read back: config, vocabulary and every weight bitwise, without the padding rows."""
    model = gpt(wide=True)
    export_hf(model, tmp_path)
    config, vocab_size, weights = load_hf(tmp_path)
    assert (config, vocab_size) == (model.config, 50) and weights["wte.weight"].shape == (50, 32)
    again = gpt(seed=9, vocab=vocab_size)
    load_weights(again, weights, "hf")
    for name, value in model.state_dict().items():
        rows = 50 if name in ("wte.weight", "lm_head.weight") else len(value)
        assert torch.equal(again.state_dict()[name][:rows], value[:rows]), name
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (32, 96) and "lm_head.weight" not in stored
    assert {v.dtype for v in stored.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_released_files_have_quirks(safetensors, dtype, tmp_path):
    """No "transformer." prefix, mask buffers, a copy of lm_head, half precision: all as in files found in the wild."""
    model = gpt(wide=True)
    export_hf(model, tmp_path)
    weights = {k.removeprefix("transformer."): v.to(dtype) for k, v in
               safetensors.load_file(tmp_path / "model.safetensors").items()}
    for i in (0, 1):
        weights[f"h.{i}.attn.bias"] = torch.ones(16, 16, dtype=dtype).tril().view(1, 1, 16, 16)
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4, dtype=dtype)
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    config, vocab_size, read = load_hf(tmp_path)
    again = gpt(vocab=vocab_size)
    load_weights(again, read, "hf")
    assert {v.dtype for v in read.values()} == {torch.float32} and "lm_head.weight" not in read
    for name, value in model.state_dict().items():
        rows = 50 if name in ("wte.weight", "lm_head.weight") else len(value)
        assert torch.equal(again.state_dict()[name][:rows], value[:rows].to(dtype).float()), name


def test_a_shorter_context(safetensors, tmp_path):
    """block_size cuts the position embedding, and nothing changes within it; a longer wish keeps the file's own."""
    model = gpt(wide=True)
    export_hf(model, tmp_path)
    config, vocab_size, weights = load_hf(tmp_path, block_size=5)
    assert config.block_size == 5 and weights["wpe.weight"].shape == (5, 32)
    short = GPT(config, vocab_size, plain_linear)
    load_weights(short, weights, "hf")
    torch.testing.assert_close(short(tokens(2, 5))[..., :50], model(tokens(2, 5))[..., :50], rtol=1e-5, atol=1e-6)
    for wish in (None, 16, 99):
        config, _, weights = load_hf(tmp_path, block_size=wish)
        assert config.block_size == 16 and weights["wpe.weight"].shape == (16, 32)


def test_folders_that_are_not_gpt2(safetensors, tmp_path):
    """A missing, broken or foreign file is one line that names --init_from; without biases there is no export."""
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"--init_from=.*there is no {name}"):
            load_hf(tmp_path)
        export_hf(gpt(), tmp_path)
        (tmp_path / ("model.safetensors" if name == "config.json" else "config.json")).unlink()
    export_hf(gpt(), tmp_path)
    for text in ("{", "{}", json.dumps({"model_type": "llama", "hidden_size": 32})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="--init_from=.*not a GPT-2"):
            load_hf(tmp_path)
    export_hf(gpt(), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for part in (b"", whole[:100], whole[:-1]):
        (tmp_path / "model.safetensors").write_bytes(part)
        with pytest.raises(ValueError, match="--init_from=.*not a GPT-2"):
            load_hf(tmp_path)
    with pytest.raises(ValueError, match="--bias=False"):
        export_hf(gpt(bias=False), tmp_path)


@pytest.mark.parametrize("change", [
    dict(vocab_size=None), dict(activation_function="relu"), dict(layer_norm_epsilon=1e-3), dict(n_layer="2"),
    dict(tie_word_embeddings=False), dict(scale_attn_by_inverse_layer_idx=True), dict(n_inner=64)], ids=str)
def test_a_gpt2_that_computes_something_else(change, safetensors, tmp_path):
    """A config.json whose model is not the one of this file is refused, instead of other logits or a traceback."""
    export_hf(gpt(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in hf_config(**change).items() if v is not None}))
    with pytest.raises(ValueError, match="--init_from"):
        load_hf(tmp_path)


def test_export_to_a_full_disk(safetensors, full_disk):
    """An export onto a full disk is an OSError, which the command line shows as one line."""
    with pytest.raises(OSError, match="could not write"):
        export_hf(gpt(), full_disk / "hf")


def test_without_safetensors(tmp_path, monkeypatch):
    """Where safetensors is not installed, the error says how to get it."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        export_hf(gpt(), tmp_path)


# -----------------------------------------------------------------------------
# python model.py

def command(*flags):
    """Run the real command line."""
    return subprocess.run([sys.executable, str(ROOT / "model.py"), *map(str, flags)], capture_output=True, text=True,
                          cwd=ROOT, timeout=120)


def test_export_command(safetensors, tmp_path):
    """`python model.py --ckpt= --export=` writes the two files of a W8A8 run, and load_hf reads its weights back."""
    model = gpt(W8A8, seed=3)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint(model, W8A8))
    done = command(f"--ckpt={tmp_path}", f"--export={tmp_path / 'hf'}")
    assert (done.returncode, done.stderr) == (0, "") and "wrote" in done.stdout
    assert sorted(os.listdir(tmp_path / "hf")) == ["config.json", "model.safetensors"]
    _, vocab_size, weights = load_hf(tmp_path / "hf")
    assert vocab_size == 50 and torch.equal(weights["wpe.weight"], model.wpe.weight)


def test_export_command_refuses_a_broken_checkpoint(tmp_path):
    """The real command on a truncated checkpoint: one line on stderr, exit code 2, no traceback, nothing written."""
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint(gpt()))
    os.truncate(tmp_path / "ckpt.pt", 5000)
    done = command(f"--ckpt={tmp_path}", f"--export={tmp_path / 'hf'}")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "hf").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "truncated" in done.stderr


@pytest.mark.parametrize("flags, message", [
    (["--ckpt={0}"], "error: --export= names the folder"),
    (["--ckpt={0}/no", "--export={0}/hf"], "error: no checkpoint"),
    (["--ckpt={0}", "--export={0}/ckpt.pt"], "File exists"), (["--ckp={0}"], "unknown argument --ckp"),
    (["--ckpt={0}/bomb.pt", "--export={0}/hf"], "might run code")])
def test_bad_export_commands(flags, message, tmp_path, monkeypatch, capsys):
    """Every other bad command ends with its line and exit code 2 (run in this process: each start costs seconds)."""
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint(gpt()))
    torch.save({"bomb": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    monkeypatch.setattr(sys, "argv", ["model.py", *(f.format(tmp_path) for f in flags)])
    with pytest.raises(SystemExit) as end:
        model_py.main()
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == ["bomb.pt", "ckpt.pt"]


def test_stable_embedding(tmp_path):
    """Xavier-uniform rows, a LayerNorm before the positions are added; no layout of Hugging Face's has it."""
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, stable_embedding=True)
    model = GPT(config, 100, quant_linears(QuantConfig()))
    bound = (6 / (model.wte.num_embeddings + 32)) ** 0.5
    assert 0.98 * bound < model.wte.weight.abs().max() <= bound
    x, seen = torch.randint(100, (2, 16)), []
    model.h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x, x).backward()
    rows = model.wte(x)
    normal = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(seen[0], normal + model.wpe.weight, atol=1e-5) and model.ln_e.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="stable_embedding"):
        export_hf(model, tmp_path)


def gradients(keep, compiled=False):
    """Return the loss and all gradients, flat, of one batch through a small GPT."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, keep8=keep), 60, quant_linears(QuantConfig()))
    idx = torch.randint(60, (4, 17), generator=torch.Generator().manual_seed(1))
    loss = (torch.compile(model, dynamic=False) if compiled else model)(idx[:, :-1], idx[:, 1:])
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_keep8_in_the_model():
    """The loss does not change by a bit, the gradient by less than a hundredth; compiled is eager, to rounding."""
    loss, exact = gradients("none")
    for keep in ("gelu", "attn", "both"):
        ours, rounded = gradients(keep)
        assert torch.equal(ours, loss) and 0 < (rounded - exact).norm() < 0.01 * exact.norm()
    torch.testing.assert_close(gradients("both", compiled=True), (loss, rounded), rtol=1e-4, atol=1e-6)


def test_keep8_refuses_dropout_in_what_runs_again():
    with pytest.raises(ValueError, match="--keep8=both runs attention again"):
        GPTConfig(dropout=0.1, keep8="both")
    GPTConfig(dropout=0.1, keep8="gelu")
