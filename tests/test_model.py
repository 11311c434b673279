"""model.py against float64, torch twins and counts by hand: shape -> head and loss -> recipes -> training."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_py
from eval import generate
from model import GPT, GPTConfig, linear_cross_entropy, quant_linears
from quant import QuantConfig, Quantizer, QuantLinear, Recipe, make_recipe, restore
from support.device import flops_per_token

W8A8 = dict(wbits=8, abits=8)
HEAD = dict(W8A8, quant_head=True)
RECIPES = {  # every shape a recipe can take on its way through the model
    "plain": {}, "w8a8": W8A8, "head": HEAD, "head_fp": dict(HEAD, backward="fp"),
    "head_asym_block": dict(HEAD, asym=True, agran="per_block", wgran="per_block", wblock=16),
    "head_w8a8g8": dict(HEAD, gbits=8, ggemm="both", split_qkv=True),
    "head_fp8": dict(HEAD, wfmt="e4m3", afmt="e4m3", gbits=8, gfmt="e5m2", ggran="per_row", ggemm="both")}
W, G = ({f"{x}bits": 8, f"{x}gran": "per_block"} for x in "wg")
ROW, ALL, COLUMN, BLOCK = (1, None), (None, None), (None, 1), (1, 8)
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
PRUNED = dict(n_head=4, heads=(1, 3), hidden=(45, 128))  # of 4 heads and 128 units
recipes = pytest.mark.parametrize("quant", RECIPES.values(), ids=list(RECIPES))


def gpt(quant=None, vocab=50, seed=0, dtype=torch.float32, linear=None, wide=False, **shape):
    """Build a tiny GPT (V=64, of which 14 padding); `wide` weights make logits of size 1, biases and all."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, **shape}
    torch.manual_seed(seed)
    linear = linear or quant_linears(QuantConfig(**(quant or {})), shape["n_layer"])
    model = GPT(GPTConfig(**shape), vocab, linear, dtype)
    with torch.no_grad():
        for p in model.parameters() if wide else ():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def tokens(*shape, vocab=50, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def grads(model, loss):
    """Return {name: gradient} of the loss."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def fit(model, batches, lr):
    """Take a step of AdamW for each batch (B, T+1); return the losses and gradients."""
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr, weight_decay=0), []
    for batch in batches:
        loss = model(batch[:, :-1], batch[:, 1:])
        seen.append((loss.item(), grads(model, loss)))
        optimizer.step()
    return seen


# -----------------------------------------------------------------------------
# the shape

@pytest.mark.parametrize("n_layer, n_head, n_embd, published", [
    (12, 12, 768, 124439808), (24, 16, 1024, 354823168), (36, 20, 1280, 774030080), (48, 25, 1600, 1557611200)])
def test_parameter_counts_are_the_published_ones(n_layer, n_head, n_embd, published):
    """GPT-2 small to XL have as many as released, lm_head not counted twice; FLOPs: 6 each, attention 12 T C."""
    with torch.device("meta"):
        model = gpt(HEAD, 50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=1024)
    weights = sum(p.numel() for p in model.parameters())
    assert weights - 47 * n_embd == published  # 47 rows of padding
    assert flops_per_token(model) == 6 * (weights - 1024 * n_embd) + 12 * n_layer * n_embd * 1024  # wpe is looked up


def test_initialisation():
    """Weights are normal(0, 0.02), c_proj 0.02/sqrt(2 L): mean and std within 5 sigma."""
    for name, p in gpt(W8A8, n_layer=8, n_embd=64, vocab=300, block_size=128).named_parameters():
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item() / std) < 5 / math.sqrt(p.numel()), name
        assert p.dim() == 2 or (p == (0 if name.endswith("bias") else 1)).all(), name
    assert same(gpt().state_dict(), gpt(W8A8).state_dict())  # a function of the seed


def test_untied_head():
    """It has a weight of its own, which no lookup of the embedding touches; all else begins as in the tied model."""
    tied, model = gpt(), gpt(untied_head=True)
    mine, theirs = model.state_dict(), tied.state_dict()
    assert same({**mine, "lm_head.weight": theirs["lm_head.weight"]}, theirs)
    assert not torch.equal(model.lm_head.weight, model.wte.weight)
    assert flops_per_token(model) == flops_per_token(tied)
    batch = tokens(2, 17)
    model(batch[:, :-1], batch[:, 1:]).backward()
    unseen = sorted(set(range(model.vocab_size)) - set(batch[:, :-1].flatten().tolist()))
    assert not model.wte.weight.grad[unseen].any() and model.lm_head.weight.grad[unseen].any()


def test_zero_points_behind_gelu_only():
    """--asym_gelu gives mlp.c_proj's input a zero point and leaves the other recipes as they are."""
    plain, some = (gpt(dict(abits=4, asym_gelu=flag)).h[0] for flag in (False, True))
    for name in LINEARS:
        before, after = (block.get_submodule(name).recipe for block in (plain, some))
        asym = name == "mlp.c_proj"
        assert after == replace(before, output_input=replace(before.output_input, asym=asym))


def test_stable_embedding():
    model, x, seen = gpt(vocab=100, n_layer=1, stable_embedding=True), tokens(2, 16, vocab=100), []
    assert 0.98 < model.wte.weight.abs().max() / (6 / (128 + 32)) ** 0.5 <= 1
    model.h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    torch.testing.assert_close(seen[0], F.layer_norm(model.wte(x), (32,)) + model.wpe.weight)


@pytest.mark.parametrize("message, shape", [
    ("--n_layer=0", dict(n_layer=0)), ("--block_size=0", dict(block_size=0)), ("--dropout=1.0", dict(dropout=1.0)),
    ("--n_head=5 must divide --n_embd=32", dict(n_head=5, n_embd=32)),
    ("--keep8=attn runs attention again", dict(dropout=0.1, keep8="attn")),
    *((r"--heads=[\d,]+ must be 2 numbers \(n_layer\) from 1 to 12, or empty", {"heads": bad, "n_layer": 2})
      for bad in ((3,), (0, 3), (3, 13))),
    ("--hidden=3,3073 must be", dict(hidden=(3, 3073), n_layer=2))])
def test_impossible_shapes(message, shape):
    with pytest.raises(ValueError, match=rf"\A{message}.*\Z"):
        GPTConfig(**shape)
    GPTConfig(dropout=0.1, keep8="gelu"), GPTConfig(n_layer=2, heads=(1, 12), hidden=(1, 3072))  # their neighbours


def test_a_pruned_model_is_the_dense_one_with_zeros():
    """Without heads and units whose rows are zero in the dense model: its logits in float64, and gradients as there."""
    small, dense = gpt(wide=True, dtype=torch.float64, **PRUNED), gpt(dtype=torch.float64, n_head=4)
    rows, columns, idx, t = {}, {}, tokens(3, 16), tokens(3, 16, seed=2)
    for i, (heads, units) in enumerate((([2], 45), ([0, 1, 3], 128))):
        channels = torch.arange(32).view(4, 8)[heads].flatten()
        units = torch.randperm(128, generator=torch.Generator().manual_seed(i))[:units]
        rows |= {f"h.{i}.attn.c_attn": torch.cat((channels, channels + 32, channels + 64)), f"h.{i}.mlp.c_fc": units}
        columns |= {f"h.{i}.attn.c_proj.weight": channels, f"h.{i}.mlp.c_proj.weight": units}
    for name, theirs in dense.state_dict().items():  # the state's tensors are the model's own
        mine, layer = small.state_dict()[name], name.rpartition(".")[0]
        if layer in rows:
            theirs.zero_()[rows[layer]] = mine
        else:
            theirs[(slice(None), columns[name]) if name in columns else ...] = mine
    torch.testing.assert_close(small(idx), dense(idx), rtol=0, atol=1e-12)
    weights = sum(p.numel() for name, p in small.named_parameters() if name != "wpe.weight")
    assert flops_per_token(small) == 6 * weights + 12 * (1 + 3) * 8 * 16  # heads, channels in each, T
    ours, theirs = (grads(m, m(idx, t)) for m in (small, dense))
    for name in ("wte.weight", "h.0.ln_1.weight", "h.1.ln_2.bias", "h.1.mlp.c_proj.bias"):  # fp32, as the loss is
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


# -----------------------------------------------------------------------------
# the head and the loss, recipes, training, sampling

def head(M=37, V=128, C=16, vocab=100, seed=0, valid=0.8):
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
    """Return loss, dx, dw, dlogits of F.cross_entropy in float64; backward may use other operands than forward."""
    logits = (x.double() @ w[:vocab].double().T).requires_grad_()  # (M, vocab)
    loss = F.cross_entropy(logits, t.where(t >= 0, -100), ignore_index=-100) if (t >= 0).any() else logits.sum() * 0
    loss.backward()
    g = F.pad(logits.grad, (0, len(w) - vocab))  # (M, V)
    x, w = (x if backward_x is None else backward_x).double(), (w if backward_w is None else backward_w).double()
    return loss.detach(), g @ w, g.T @ x, g


@given(M=st.integers(1, 40), vocab=st.integers(1, 128), rows=st.integers(1, 45), seed=st.integers(0, 999),
       valid=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=60)
@example(M=37, vocab=100, rows=5, seed=0, valid=0.5)  # 8 chunks, the last of 2 rows
@example(M=1, vocab=1, rows=1, seed=0, valid=1.0)  # a loss of 0, one token to choose from
def test_cross_entropy_equals_torch_in_float64(M, vocab, rows, seed, valid):
    """Loss, dx and dw are F.cross_entropy's, with ignored targets and padding rows, however cut into chunks."""
    x, w, t, _ = head(M, vocab=vocab, seed=seed, valid=valid)
    loud, noise = torch.cat((w[:vocab], w[vocab:] * 0 + 1e4)), Quantizer(8, (None, 1), rounding="stochastic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_py, "MAX_LOGITS", rows * len(w))
        ours, thrice, padded = fused(x, w, t, vocab), fused(x, w, t, vocab, factor=3.0), fused(x, loud, t, vocab)
        noisy = fused(x, loud, t, vocab, Recipe(grad_weight_grad_output=noise))
    for a, b, c, d, factor in zip(ours, oracle(x, w, t, vocab)[:3], padded, thrice, (1, 3, 3), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-8)  # padding rows may hold anything
        assert torch.equal(a * factor, d)  # backward of 3 loss, as gradient accumulation needs it
    assert not padded[2][vocab:].any() and not noisy[2][vocab:].any()  # and get no gradient, however it is rounded


@pytest.mark.parametrize("backward", ["ste", "fp"])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("tile", [ROW, ALL, COLUMN, BLOCK])
def test_quantized_head_equals_its_twin(tile, asym, backward, monkeypatch):
    """The rounded x and w in F.cross_entropy, float64; backward sees them too (ste), or the given ones (fp)."""
    (x, w, t, vocab), a, b = head(), Quantizer(8, tile, asym), Quantizer(4, ROW)
    qx, qw = restore(a.quantize(x)), restore(b.quantize(w))
    expected = oracle(qx, qw, t, vocab, *((x, w) if backward == "fp" else ()))[:3]
    for rows in (1, 5, 37):  # x is rounded before it is cut: no granularity knows of chunks
        monkeypatch.setattr(model_py, "MAX_LOGITS", rows * len(w))
        ours = fused(x, w, t, vocab, Recipe(output_input=a, output_weight=b, backward=backward))
        assert all((i - j).abs().max() <= 1e-5 * j.abs().max() for i, j in zip(ours, expected, strict=True))


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("gemm, tile", [("grad_input", ROW), ("grad_weight", COLUMN), ("grad_weight", BLOCK)])
def test_quantized_gradient_of_the_head(gemm, tile, foreign, monkeypatch):
    """One GEMM sees a quantized gradient, the other the untouched one; chunks of tokens cut no block of scales."""
    (x, w, t, vocab), q, mine = head(M=40), Quantizer(4, tile), 1 if gemm == "grad_input" else 2
    exact, g = fused(x, w, t, vocab), oracle(x, w, t, vocab)[3].float()
    twin = q(g) @ w if mine == 1 else q(g.T) @ x  # near ties fp32 and float64 differ: so, 20 times nearer
    recipe = Recipe(**{f"{gemm}_grad_output": q.__call__ if foreign and tile != BLOCK else q})
    whole = fused(x, w, t, vocab, recipe)
    assert torch.equal(whole[3 - mine], exact[3 - mine])
    assert (whole[mine] - twin).norm() < 0.05 * (twin - exact[mine]).norm()
    for rows in (1, 2, 5, 39, 25):
        monkeypatch.setattr(model_py, "MAX_LOGITS", rows * len(w))
        ours = fused(x, w, t, vocab, recipe)
        assert all((i - j).abs().max() <= 1e-5 * j.abs().max() for i, j in zip(ours, whole, strict=True))


class Largest(TorchDispatchMode):
    elements = 0  # of the largest floating tensor that any operation returns

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves(out) if torch.is_tensor(t) and t.is_floating_point())
        self.elements = max(self.elements, *(t.numel() for t in tensors), 0)
        return out


@recipes
def test_full_logits_never_exist(quant, monkeypatch):
    model, idx, budget = gpt(quant, vocab=1050, n_embd=16, n_layer=1), tokens(4, 16), 16 * 1088  # a quarter; as w has
    monkeypatch.setattr(model_py, "MAX_LOGITS", budget)
    with Largest() as training:
        loss = model(idx, idx)
        loss.backward()
    monkeypatch.setattr(model_py, "linear_backward", lambda *_: pytest.fail("a backward GEMM"))
    with Largest() as evaluating, torch.no_grad():
        again = model(idx, idx)
    assert training.elements == evaluating.elements == budget  # seen, and nothing above it
    assert torch.equal(loss, again) and not again.requires_grad


@pytest.mark.parametrize("reparam", [False, True])
@pytest.mark.parametrize("quant", [{}, HEAD, RECIPES["head_fp"]], ids=str)
def test_both_uses_of_the_head_agree(quant, reparam):
    """The fused loss, and cross-entropy of the logits hidden @ reparam(w).T: the same loss, the same gradient."""
    model, idx, t = gpt(quant, wide=True), tokens(3, 9), tokens(3, 9, seed=2)
    model.lm_head.reparam, t[0, :3] = nn.PReLU() if reparam else None, -1  # a trained slope of 1/4 below 0
    loss, logits = model(idx, t), model(idx)
    reference = F.cross_entropy(logits[..., :50].flatten(0, 1), t.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    ours, theirs = grads(model, loss), grads(model, reference)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not reparam or ours["lm_head.reparam.weight"] != 0


def test_32_bits_are_plain_linear_for_a_whole_run():
    """QuantLinear at 32 bits, and W8A8 with every block skipped, are nn.Linear: 20 steps of AdamW, bitwise."""
    idx, runs = tokens(20, 4, 17), []
    for model in (gpt(linear=lambda _, *shape: nn.Linear(*shape)), gpt(), gpt(dict(W8A8, skip_blocks=(0, -1)))):
        runs.append((fit(model, idx, 1e-2), model.state_dict(), model(idx[0, :, :-1])))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    assert not torch.equal(model.wte.weight, gpt().wte.weight)  # it was a run


@pytest.mark.parametrize("quant_head", [False, True])
@pytest.mark.parametrize("skip", [(), (1,), (0, 11), (-1,), (-12, 3)])
def test_skip_blocks_and_quant_head(skip, quant_head):
    """Exactly the named blocks (1, not 10 or 11; -1 is 11), and lm_head unless asked for, stay in fp32."""
    config = QuantConfig(**W8A8, skip_blocks=skip, quant_head=quant_head)
    with torch.device("meta"):
        model = gpt(n_layer=12, linear=quant_linears(config, 12))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    spared = {f"h.{i % 12}.{name}" for i in skip for name in LINEARS} | (set() if quant_head else {"lm_head"})
    assert len(layers) == 4 * 12 + 1 and {n for n, m in layers.items() if m.recipe is None} == spared


def test_split_qkv_reaches_c_attn_alone():
    model = gpt(dict(wbits=8, wgran="per_tensor", split_qkv=True), **PRUNED)  # heads of 8 channels
    found = {n: m.recipe.output_weight.tile for n, m in model.named_modules() if getattr(m, "recipe", None)}
    thirds = {"h.0.attn.c_attn": 8, "h.1.attn.c_attn": 24}
    assert found == {n: (thirds.get(n), None) for n in (f"h.{i}.{name}" for i in (0, 1) for name in LINEARS)}


@pytest.mark.parametrize("quant, message", [
    (dict(W, wblock=24), "--wblock=24 must divide in_features=32 of h.0.attn.c_attn; try 8"),
    (dict(G, ggemm="both", wblock=64), "--wblock=64 must divide out_features=96 of h.0.attn.c_attn"),
    (dict(G, ggemm="grad_input", wblock=96, skip_blocks=(0, 1), quant_head=True), "out_features=64 of lm_head"),
    *((dict(W8A8, skip_blocks=skip), f"--skip_blocks={skip[-1]} names no block") for skip in ((2,), (0, 12), (-3,))),
    *((dict(skip_blocks=skip), f"--skip_blocks={skip[0]} has no effect without --wbits") for skip in ((1,), (-1,))),
    (dict(G, wblock=24), None), (dict(W, wblock=24, skip_blocks=(0, 1)), None)], ids=str)  # the tokens; no layer
def test_recipes_and_the_shape_of_the_model(quant, message):
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        gpt(quant)(tokens(6, 16), tokens(6, 16)).backward()


@pytest.mark.parametrize("quant, leaks", [
    ({}, False), (dict(abits=4), False), (dict(abits=4, agran="per_block", wblock=16), False),
    (dict(abits=4, agran="per_tensor"), True), (dict(abits=4, agran="per_channel"), True)], ids=str)
def test_causality(quant, leaks):
    """A later token changes no earlier logit, if tokens share no scale; per_tensor, per_channel do see the future."""
    model, idx = gpt(quant, wide=True), tokens(2, 12)
    later, swapped = torch.cat((idx[:, :7], (idx[:, 7:] + 1) % 50), 1), idx[:, [1, 0, *range(2, 12)]]
    change = (model(idx) - model(later)).abs()
    assert change[:, :7].max() > 1e-3 if leaks else change[:, :7].max() <= 1e-6
    assert change[:, 7:].amax(-1).min() > 1e-2
    assert (model(idx) - model(swapped))[:, -1].abs().amax(-1).min() > 1e-2  # tokens know their order


@pytest.mark.parametrize("quant, shape", [(W8A8, PRUNED), (dict(HEAD, gbits=8), {})], ids=str)
def test_one_batch_overfits(quant, shape):
    """A tiny W8A8 (pruned, or G8) model learns one batch of random tokens by heart: from log V = 3.9 to below 0.1."""
    model = gpt(quant, n_embd=64, **shape)
    losses = [loss for loss, _ in fit(model, [tokens(4, 17)] * 80, 5e-3)]
    assert abs(losses[0] - math.log(50)) < 0.1 and losses[-1] < 0.1


@recipes
def test_bfloat16_is_near_fp32(quant):
    idx, t, most = tokens(4, 16), tokens(4, 16, seed=2), 0.2 if "gfmt" in quant else 0.1  # e5m2's steps: to a quarter
    full, half = gpt(quant, wide=True), gpt(quant, wide=True, dtype=torch.bfloat16)
    a, b = full(idx, t), half(idx, t)
    assert half(idx).dtype == torch.bfloat16 and b.dtype == torch.float32 and 0 < abs(a.item() / b.item() - 1) < 0.01
    a, b = grads(full, a), grads(half, b)
    for name in a:
        assert b[name].dtype == torch.float32 and (a[name] - b[name]).norm() < most * a[name].norm() + 1e-6, name


def test_compiled_equals_eager():
    """One graph (aot_eager: inductor is slow) of int8 and fp8 codes, all kinds of backward, keep8 and head."""
    kinds = {"h.0.attn.c_attn": "head_fp8", "h.0.attn.c_proj": "head_fp", "h.0.mlp.c_fc": "head_asym_block"}
    early = Recipe(Quantizer(8, ROW), grad_weight_input=Quantizer(8, ROW), backward="early")
    recipes = {"h.0.mlp.c_proj": early, **{name: make_recipe(QuantConfig(**RECIPES[k])) for name, k in kinds.items()}}
    linear = quant_linears(QuantConfig(**HEAD), 1, lambda name, *_: recipes.get(name, make_recipe(QuantConfig(**HEAD))))
    idx, t, model = tokens(2, 8), tokens(2, 8, seed=2), gpt(n_layer=1, keep8="both", linear=linear)
    loss, compiled = model(idx, t), torch.compile(model, fullgraph=True, backend="aot_eager")(idx, t)
    torch.testing.assert_close(compiled, loss)
    expected, found = grads(model, loss), grads(model, compiled)
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_keep8_in_the_model():
    """The loss does not change by a bit, the gradient by less than a hundredth."""
    runs = [fit(gpt(keep8=keep), [tokens(4, 17)], 0)[0] for keep in ("none", "gelu", "attn", "both")]
    exact, *rounded = (torch.cat([g.flatten() for g in run[1].values()]) for run in runs)
    assert len({loss for loss, _ in runs}) == 1
    assert all(0 < (g - exact).norm() < 0.01 * exact.norm() for g in rounded)


def test_dropout_in_training_only(monkeypatch):
    """Dropout draws at all 1 + 3 L places in training; in eval the model is the one without, bitwise."""
    model, idx, seen, sdpa = gpt(dropout=0.3), tokens(2, 16), [], F.scaled_dot_product_attention
    assert not torch.equal(model(idx), model(idx))
    assert torch.equal(model.eval()(idx), gpt()(idx)) and torch.equal(gpt()(idx), gpt().eval()(idx))
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append(p * training) or x)
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *a, dropout_p, **kw: seen.append(dropout_p) or sdpa(*a, **kw))
    model.train()(idx)
    assert seen == [0.3] * (1 + 3 * 2)  # the embedding; attention, its projection and the MLP of each block


def test_generate_is_a_function_of_its_seed():
    """The same seed gives the same text, whatever torch's own generator did and dropout would do; the prompt stays."""
    model, idx, long = gpt(wide=True, dropout=0.5), tokens(2, 3), tokens(2, 40)
    a = generate(model, idx, 12, seed=7)
    torch.manual_seed(2)
    assert torch.equal(a, generate(model, idx, 12, seed=7)) and not torch.equal(a, generate(model, idx, 12, seed=8))
    assert torch.equal(a, generate(gpt(wide=True), idx, 12, seed=7)) and model.training
    assert a.shape == (2, 15) and torch.equal(a[:, :3], idx)
    assert torch.equal(generate(model, long, 20)[:, 40:], generate(model, long[:, -16:], 20)[:, 16:])  # a window slides


@pytest.mark.parametrize("temperature, top_k", [(0.7, 6), (0.7, 0), (0.7, None), (5, 99), (0.7, 1), (0, 50), (0, 0)])
def test_generate_samples_the_distribution(temperature, top_k):
    """Of 20000 draws, shares are softmax(logits / temperature) of the top k (0: all; T=0: greedy) within 5 sigma."""
    model, n, idx = gpt(wide=True), 20_000, tokens(1, 3)
    with torch.no_grad():
        model.wte.weight[50:] = 10 * model.hidden(idx)[0, -1]  # padding is never drawn, though it towers above all
    logits = model(idx)[0, -1].detach().double()
    top = logits[:50].topk(min(top_k or 50, 50) if temperature else 1)
    p = torch.zeros(50).double().scatter(0, top.indices, (top.values / (temperature or 1)).softmax(0))
    drawn = generate(model, idx.expand(n, -1), 1, temperature, top_k)[:, -1].bincount(minlength=50) / n
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all() and logits[50:].min() > logits[:50].max() + 5
    assert p.max() == 1 if top_k == 1 or not temperature else p.max() < 0.9
