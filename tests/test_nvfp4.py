"""extensions/nvfp4.py: the format by brute force, each ingredient by its own measure, and that it is a run like any other."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench import kept_for_backward
from conftest import column, same
from hypothesis import given, strategies as st

import eval as evaluation
import extensions
from extensions import nvfp4
from extensions.nvfp4 import NVFP4, Config, Packed, e2m1, make_recipe, pack, rotate, scales, swizzle, unpack
from model import GPT, GPTConfig
from quant import QuantLinear, Recipe, gemm, restore, tiles
from support.checkpoint import load_checkpoint

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # numbers of the codes 0 to 255
FLT_MAX = np.finfo(np.float32).max


def nearest(x, table):
    """Return the code of the nearest number of an ascending table, of two the even one, by looking at them all."""
    distance = np.abs(np.abs(np.asarray(x, np.float64))[..., None] - np.asarray(table, np.float64))
    low = distance.argmin(-1)
    tie = np.take_along_axis(distance, np.minimum(low + 1, len(table) - 1)[..., None], -1)[..., 0] == distance.min(-1)
    return low + (tie & (low % 2 == 1) & (low + 1 < len(table)))


def data(rows=64, columns=128, seed=0):
    """Gaussian numbers over six decades of columns."""
    torch.manual_seed(seed)
    return torch.randn(rows, columns) * torch.logspace(-3, 3, columns)


# -----------------------------------------------------------------------------
# the format

def test_every_byte():
    """Two codes a byte, the even column in the low half, the sign in bit 3."""
    codes = torch.arange(256, dtype=torch.uint8)[None]
    numbers = unpack(codes)
    assert numbers[0, 2:4].tolist() == [0.5, 0] and numbers[0, 0xf1 * 2:0xf1 * 2 + 2].tolist() == [0.5, -6]
    assert torch.equal(pack(e2m1(numbers.float())[1]), codes)  # -0, too


def test_ties_and_every_bfloat16():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    assert e2m1(ties)[0].tolist() == [0, 1, 1, 2, 2, 4, 4] and e2m1(-ties)[0].tolist() == [0, -1, -1, -2, -2, -4, -4]
    x = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    x = x[x.isfinite()]
    q, code = e2m1(x)
    expected = nearest(x.clamp(-6, 6), nvfp4.LEVELS)
    assert np.array_equal(code % 8, expected) and torch.equal(code >= 8, x.signbit())
    assert torch.equal(q, torch.tensor(nvfp4.LEVELS)[expected].copysign(x))


def test_products_fit_bfloat16():
    """All that a GEMM multiplies is exact in bf16: the simulation is the hardware's, but for the order of sums."""
    product = torch.tensor(nvfp4.LEVELS)[:, None].double() * E4M3[E4M3.isfinite()].double()
    assert torch.equal(product.to(torch.bfloat16).double(), product)


def by_hand(x, rows):
    """Return (q * scale, outer) of x as eq. B.1 to B.3 have it, in numpy, block by block."""
    x, f = x.numpy(), np.float32
    most = np.abs(x).max()
    with np.errstate(all="ignore"):
        enc = f(1) if most == 0 else min(f(6 * 448) / most, FLT_MAX)
        out = np.zeros_like(x)
        for i in range(0, x.shape[0], rows):
            for j in range(0, x.shape[1], 16):
                block = x[i:i + rows, j:j + 16]
                scale = E4M3[nearest(min(np.abs(block).max() * (enc * f(1 / 6)), f(448)), E4M3[:127])].numpy()
                y = np.clip(block * min(f(1) / (scale * (f(1) / enc)), FLT_MAX), f(-6), f(6))
                out[i:i + rows, j:j + 16] = np.sign(y) * np.array(nvfp4.LEVELS, f)[nearest(y, nvfp4.LEVELS)] * scale
        return torch.from_numpy(out), torch.tensor(f(1) / enc)


@given(st.integers(-30, 30), st.integers(0, 2**16), st.sampled_from([1, 16]),
       st.sampled_from(["plain", "zero", "outlier", "bf16"]), st.booleans())
def test_scales_by_hand(exponent, seed, rows, kind, keep):
    x = data(16, 48, seed) * 2.0**exponent
    x = {"zero": x * 0, "bf16": x.bfloat16().float()}.get(kind, x)
    x[:, 16:32] = 0  # a block of zeros
    if kind == "outlier":
        x[3, 5] = 1e5 * 2.0**exponent  # beside it other blocks get scale 0
    q = NVFP4(rows, keep=keep).quantize(x)
    q = q.unpack() if keep else q
    product, outer = by_hand(x, rows)
    assert torch.equal(q.codes.float(), product) and torch.equal(q.scale.flatten()[0], outer)
    assert torch.equal(NVFP4(rows)(-x), -NVFP4(rows)(x))
    assert torch.equal(NVFP4(rows)(x * 2.0**7), NVFP4(rows)(x) * 2.0**7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_not_finite_shows(bad, keep):
    """One nan or inf makes the whole matrix non-finite, as it does with the tiles of quant.py."""
    x = data()
    x[3, 5] = bad
    assert not NVFP4(keep=keep)(x).isfinite().any()


def test_square_blocks_are_transposed():
    """grad_input sees forward's own weights with 16 x 16, others with 1 x 16."""
    w = data(64, 96)
    for rows, keep in ((16, True), (16, False)):
        q, q_t = (NVFP4(rows, keep=keep)(m) for m in (w, w.T))
        assert torch.equal(q.T, q_t)
    assert not torch.equal(NVFP4(1)(w).T, NVFP4(1)(w.T))


# -----------------------------------------------------------------------------
# rotation and stochastic rounding

def test_rotation():
    sylvester = torch.ones(1, 1)
    while len(sylvester) < 16:
        sylvester = torch.kron(torch.tensor([[1.0, 1], [1, -1]]), sylvester)
    h = rotate(torch.eye(16), 16)
    assert torch.equal(h, torch.tensor(nvfp4.SIGNS)[:, None] * sylvester / 4) and torch.equal(h @ h.T, torch.eye(16))
    assert torch.equal(rotate(8 * torch.eye(16), 16).abs(), torch.full((16, 16), 2.0))  # a lone 8: sixteen +-2
    for d in (2, 4, 32, 128):
        assert torch.allclose(rotate(torch.eye(d), d) @ rotate(torch.eye(d), d).T, torch.eye(d), atol=1e-6)


@pytest.mark.parametrize("d", [2, 16, 64])
def test_rotation_alone_changes_nothing(d):
    """(g.T H)(x.T H).T is g.T x."""
    x, g, slot = data(64, 48), data(64, 32, 1), partial(rotate, d=d)
    recipe = Recipe(grad_weight_grad_output=slot, grad_weight_input=slot, backward="early")
    layer = QuantLinear(48, 32, recipe=recipe)
    layer(x).backward(g)
    assert (layer.weight.grad - g.T @ x).norm() <= 1e-5 * (g.T @ x).norm()


def test_stochastic_rounding_has_no_bias():
    torch.manual_seed(0)
    n, y = 2000, torch.linspace(-6, 6, 241)
    q = e2m1(y.expand(n, -1), torch.rand(n, len(y)))[0]
    step = torch.where(y.abs() < 2, 0.5, torch.where(y.abs() < 4, 1.0, 2.0))
    p = (y.abs() / step) % 1
    enough, sigma = n * p * (1 - p) >= 9, step * (p * (1 - p) / n).sqrt()
    assert ((q.mean(0) - y).abs() <= 6 * sigma)[enough].all() and enough.sum() > 150
    assert torch.equal(e2m1(torch.tensor([-9.0, 9]), torch.tensor([0.9, 0]))[0], torch.tensor([-6.0, 6]))  # clipped


def test_the_rounded_scale_clips():
    """As published 4 % of Gaussian numbers clip, and the slope falls to 0.995; 17/16 of headroom mends it."""
    torch.manual_seed(0)
    x = torch.randn(256, 512)
    t = tiles(x, (1, 16))
    clips = ((t * scales(t)[1]).abs() > 6).view(x.shape)
    assert 0.03 < clips.float().mean() < 0.05
    for room, slope in ((1.0, 0.995), (17 / 16, 1.0)):
        q = sum(NVFP4(stochastic=True, room=room)(x) for _ in range(16)) / 16
        assert (q * x).sum() / (x * x).sum() == pytest.approx(slope, abs=2e-3)
        assert (q * x)[~clips].sum() / (x * x)[~clips].sum() == pytest.approx(1, abs=1e-3)
    t = tiles(x, (1, 16))
    assert ((t * scales(t, 17 / 16)[1]).abs() <= 6 * (1 + 1e-6)).all()


# -----------------------------------------------------------------------------
# the layer

def step(recipe, tokens=64, compiled=False):
    """Return output, gradients and bytes kept of a layer 48 -> 32."""
    torch.manual_seed(0)
    layer, x = QuantLinear(48, 32, recipe=recipe), data(tokens, 48).requires_grad_()
    f = torch.compile(layer, backend="aot_eager") if compiled else layer
    y = f(x)
    y.backward(data(tokens, 32, 1))
    return y, x.grad, layer.weight.grad, kept_for_backward(lambda: layer(x), layer)[0]


@pytest.mark.parametrize("flags", ["nvfp4", "nvfp4-norht", "nvfp4-no2d"])
def test_early_is_fp(flags):
    """x.T rounded in forward is x.T rounded in backward, bit for bit, and is kept in 0.5625 bytes an element."""
    recipe = make_recipe(Config(**extensions.PRESETS[flags]))
    *early, kept = step(recipe)
    *fp, more = step(replace(recipe, backward="fp"))
    assert same(early, fp) and kept == 64 * 48 * 0.5625 + 4 and more == 4 * 64 * 48
    q = NVFP4(16, keep=True).quantize(data(64, 128))
    assert sum(t.nbytes for t in q) == 64 * 128 * (0.5 + 1 / 256) + 4


def test_compiled_it_is_one_operator(monkeypatch):
    """What torch.compile makes of a layer is the eager layer bit for bit; the rounding itself is not compiled here."""
    monkeypatch.setattr(nvfp4, "_compiled", lambda *how: lambda x: nvfp4._fp4(x, 0, *how))
    recipe = make_recipe(Config(nvfp4=True, sr="none"))
    assert same(step(recipe, compiled=True)[:3], step(recipe)[:3])


def test_ingredients():
    """Each ablation misses its own ingredient, and nothing else."""
    slots = ("output_input", "output_weight", "grad_input_grad_output", "grad_input_weight",
             "grad_weight_grad_output", "grad_weight_input")

    def table(name):
        recipe = make_recipe(Config(**extensions.PRESETS[name]))
        return [(q.rows, q.stochastic, q.rht) for q in (getattr(recipe, slot) for slot in slots)]
    full = [(1, False, 0), (16, False, 0), (1, True, 0), (16, False, 0), (1, True, 16), (1, False, 16)]
    assert table("nvfp4") == table("nvfp4-all") == full
    assert table("nvfp4-norht") == [(r, s, 0) for r, s, _ in full]
    assert table("nvfp4-nosr") == [(r, False, h) for r, _, h in full]
    assert table("nvfp4-srall") == [(r, True, h) for r, _, h in full]
    assert table("nvfp4-no2d") == [(1, s, h) for _, s, h in full]
    assert table("nvfp4-naive") == [(1, False, 0)] * 6


# -----------------------------------------------------------------------------
# FP4 units

def test_swizzle_is_a_plain_loop():
    """Against cuBLAS's layout, element by element; 16 x 16 scales repeat over their rows."""
    for rows, columns, n in ((16, 2, 1), (160, 9, 1), (256, 4, 16)):
        scale = torch.randint(1, 127, (rows // n, columns), dtype=torch.uint8)
        tiles_across = -(-columns // 4)
        expected = torch.zeros(-(-rows // 128) * tiles_across * 512, dtype=torch.uint8)
        for r in range(rows):
            for c in range(columns):
                tile = r // 128 * tiles_across + c // 4
                expected[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r // n, c]
        assert torch.equal(swizzle(scale.view(torch.float8_e4m3fn), rows).view(torch.uint8), expected)


def test_the_engine_gives_fp4_units_the_same_operands(monkeypatch):
    """A stand-in for F.scaled_mm, which undoes packing and swizzle, computes what the simulation does."""
    def scaled_mm(a, b_t, a_scales, kinds, b_scales, kinds_b, order, order_b, output_dtype):
        operands = []
        for codes, (scale, outer) in ((a, a_scales), (b_t.T, b_scales)):
            assert codes.dtype == torch.float4_e2m1fn_x2 and scale.dtype == torch.float8_e4m3fn
            codes = codes.view(torch.uint8)
            rows, columns = codes.shape[0], codes.shape[1] // 8
            place = swizzle(torch.arange(1, rows * columns + 1).view(rows, columns).to(torch.uint8)
                            .view(torch.float8_e4m3fn), rows).view(torch.uint8)  # where each scale lies
            plain = scale.view(torch.uint8)[place.argsort(stable=True)][-rows * columns:].view(rows, columns)
            operands.append(restore(Packed(codes, plain.view(torch.float8_e4m3fn), outer).unpack()))
        assert kinds == kinds_b == [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
        assert order == order_b == [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
        called.append(output_dtype)
        return (operands[0] @ operands[1].T).to(output_dtype)

    called, recipe = [], make_recipe(Config(nvfp4=True, sr="none"))
    simulated = step(recipe)
    monkeypatch.setattr(nvfp4, "fp4_units", lambda device: True)
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    for ours, theirs in zip(step(recipe)[:3], simulated[:3], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert called[:3] == [torch.float32] * 3
    a, b = NVFP4().quantize(data(32, 64)), NVFP4().quantize(data(48, 64, 1))
    assert nvfp4.nvfp4_gemm(a, b, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(nvfp4.nvfp4_gemm(data(32, 64), b, torch.float32), gemm(data(32, 64), b, torch.float32))


# -----------------------------------------------------------------------------
# a run

def model(flags, n_layer=4):
    """Return a small GPT of 16 x 16 tokens or so."""
    return GPT(GPTConfig(n_layer, 2, 32, 16), 50, extensions.linears({"n_layer": n_layer, "nvfp4": True, **flags}))


def test_spared_blocks(capsys):
    """The last 15 % of the blocks, rounded up, or those of --skip_blocks; the head always. It is said."""
    for flags, n, spared in (({}, 4, [3]), ({}, 20, [17, 18, 19]), ({"spare": 0.0}, 2, []), ({"skip_blocks": (0, -1)}, 3, [0, 2])):
        gpt = model(flags, n)
        assert [i for i, block in enumerate(gpt.h) if not block.mlp.c_fc.recipe] == spared and not gpt.lm_head.recipe
        assert [i for i, block in enumerate(gpt.h) if not block.attn.c_attn.recipe] == spared
        said = ", ".join(map(str, spared)) or "none"
        assert f"blocks in high precision: {said} of {n}; GEMMs simulated" in capsys.readouterr().err
    assert evaluation.shares_scales(gpt)


def test_a_token_alone_is_generated():
    """Without gradients nothing is rounded along the tokens: their number need not be a multiple of 16."""
    assert model({}).generate(torch.zeros(1, 1, dtype=torch.long), 3).shape == (1, 4)


def test_at_step_is_a_function_of_the_step():
    for switch in ("all", "forward"):
        flags = Config(nvfp4=True, switch_iter=5, switch=switch)
        gpt = model({"switch_iter": 5, "switch": switch})
        seen = []
        for now in (4, 5, 9, 0):
            nvfp4.at_step(flags, gpt, now)
            seen.append(gpt.h[0].mlp.c_fc.recipe)
            assert gpt.h[3].mlp.c_fc.recipe is None
        assert seen[0] is seen[3] and seen[1] is seen[2] and seen[0].output_input
        if switch == "all":
            assert seen[1] is None
        else:
            assert (seen[1].output_input, seen[1].output_weight) == (None, None)
            assert replace(seen[0], output_input=None, output_weight=None) == seen[1]


@pytest.mark.parametrize("switch", ["all", "forward"])
def test_a_run(switch, run, call, tmp_path):
    """It learns; interrupted before the switch it goes on bitwise; eval.py and the export see the same model."""
    pytest.importorskip("safetensors")
    flags = ["--preset=tiny,nvfp4", "--n_layer=2", "--schedule=wsd", "--lr_decay_iters=6", "--learning_rate=1e-2",
             "--switch_iter=5", f"--switch={switch}"]
    assert run(tmp_path / "whole", *flags)[0] == 0
    assert run(tmp_path / "cut", *flags, "--max_iters=4")[0] == 0
    code, _, err = run(tmp_path / "cut", "--resume", "--max_iters=6", small=[])
    assert code == 0, err
    whole, cut = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert same({**cut, "config": 0}, {**whole, "config": 0}) and whole["extensions"] == ["nvfp4"]
    losses = column(tmp_path / "whole", "val_loss")
    assert losses[-1] < losses[0] - 0.2
    assert run(tmp_path / "never", *flags[:-2])[0] == 0
    steps = [column(tmp_path / name, "loss") for name in ("whole", "never")]
    assert steps[0][:5] == steps[1][:5] and steps[0][5] != steps[1][5]  # the sixth step is the first behind the switch
    # evaluated before the switch, with its quantizers and without; behind it, forward is in high precision
    for name, step_now in (("never", 6), ("whole", 6)):
        printed = [call(evaluation.main, f"--ckpt={tmp_path / name}", "--sample_tokens=3", f"--quantizers={which}")
                   for which in ("trained", "off")]
        assert [p[0] for p in printed] == [0, 0], printed
        on, off = (p[1].splitlines()[1] for p in printed)
        assert f"{column(tmp_path / name, 'val_loss')[-1]:.4f} nats" in on and (on == off) == (name == "whole")
    assert call(evaluation.main, f"--ckpt={tmp_path / 'whole'}", f"--export={tmp_path / 'hf'}")[0] == 0


@pytest.mark.parametrize("flags, message", [
    (["--nvfp4", "--wbits=8"], "--nvfp4 with --wbits=8 rounds twice"),
    (["--nvfp4", "--gbits=8"], "--nvfp4 with --gbits=8 rounds twice"),
    (["--nvfp4", "--gemm=int8"], "--gemm=int8 has no effect"),
    (["--nvfp4", "--quant_head"], "--quant_head=True has no effect"),
    (["--rht=0"], "--rht=0 has no effect without --nvfp4"),
    (["--switch_iter=5"], "--switch_iter=5 has no effect without --nvfp4"),
    (["--nvfp4", "--switch=forward"], "--switch=forward has no effect without --switch_iter"),
    (["--nvfp4", "--sr=none", "--sr_room=1.5"], "--sr_room=1.5 has no effect with --sr=none"),
    (["--nvfp4", "--rht=12"], "--rht=12 must be a power of two from 2 to 128, or 0"),
    (["--nvfp4", "--switch_iter=0"], "--switch_iter=0 must be at least 1"),
    (["--nvfp4", "--spare=1"], "--spare=1.0 must be from 0 to below 1"),
    (["--nvfp4"], "--nvfp4 has no effect with all 1 blocks in high precision"),
    (["--nvfp4", "--n_layer=2", "--skip_blocks=0", "--spare=0"], "--spare=0.0 has no effect with --skip_blocks"),
    (["--nvfp4", "--spare=0", "--rht=32", "--batch_size=3", "--block_size=16"], "needs multiples of 32 tokens"),
    (["--nvfp4", "--spare=0", "--n_embd=24"], "--nvfp4 needs multiples of 16, h.0.attn.c_attn is 24 x 72")])
def test_bad_flags(flags, message, run, tmp_path):
    code, _, err = run(tmp_path / "a", *flags)
    assert code == 2 and message in err.splitlines()[-1]
