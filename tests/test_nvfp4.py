"""extensions/nvfp4.py: the format by brute force, each ingredient by its own measure, and that it is a run like any."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import column, same
from hypothesis import given
from hypothesis import strategies as st
from test_train import one_and_two

import eval as evaluation
import extensions
from bench import kept_for_backward
from eval import generate
from extensions import nvfp4
from extensions.nvfp4 import LEVELS, NVFP4, Config, Packed, e2m1, make_recipe, pack, rotate, scales, swizzle, unpack
from model import GPT, GPTConfig
from quant import QuantLinear, Recipe, gemm, restore
from support.checkpoint import load_checkpoint

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # numbers of the codes 0 to 255


def nearest(x, table):
    """Return the code of the number nearest to |x| in an ascending table, by looking at them all; at a tie the even."""
    distance = np.abs(np.abs(np.float64(x))[..., None] - np.float64(table))
    odd, even = distance[..., 1::2].argmin(-1) * 2 + 1, distance[..., ::2].argmin(-1) * 2
    at = [np.take_along_axis(distance, code[..., None], -1)[..., 0] for code in (odd, even)]
    return np.where(at[0] < at[1], odd, even)


def data(rows=64, columns=128, seed=0):
    """Return Gaussian numbers, their columns over six decades."""
    torch.manual_seed(seed)
    return torch.randn(rows, columns) * torch.logspace(-3, 3, columns)


def test_codes():
    """All 256 bytes, the ties, every bf16 number; and all products are exact in bf16, so that a GEMM may have them."""
    codes = torch.arange(256, dtype=torch.uint8)[None]
    numbers = unpack(codes)
    assert numbers[0, 2 * 0xf1:2 * 0xf1 + 2].tolist() == [0.5, -6]  # the even column in the low half
    assert torch.equal(pack(e2m1(numbers.float())[1]), codes)  # -0, too
    assert e2m1(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5]))[0].tolist() == [0, 1, 1, 2, 2, 4, -4]
    x = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    x = x[x.isfinite()]
    (q, code), expected = e2m1(x), nearest(x.clamp(-6, 6), LEVELS)
    assert np.array_equal(code % 8, expected) and torch.equal(code >= 8, x.signbit())
    assert torch.equal(q, torch.tensor(LEVELS)[expected].copysign(x))
    product = torch.tensor(LEVELS)[:, None].double() * E4M3[E4M3.isfinite()].double()
    assert torch.equal(product.to(torch.bfloat16).double(), product)


def by_hand(x, rows):
    """Return (q * scale, outer) of x as eq. B.1 to B.3 have it, in numpy, block by block."""
    x, f, most = x.numpy(), np.float32, np.abs(x.numpy()).max()
    with np.errstate(all="ignore"):
        enc = f(1) if most == 0 else min(f(6 * 448) / most, np.finfo(f).max)
        out = np.zeros_like(x)
        for i in range(0, x.shape[0], rows):
            for j in range(0, x.shape[1], 16):
                block = x[i:i + rows, j:j + 16]
                scale = E4M3[nearest(min(np.abs(block).max() * (enc * f(1 / 6)), f(448)), E4M3[:127])].numpy()
                y = np.clip(block * min(f(1) / (scale * (f(1) / enc)), np.finfo(f).max), f(-6), f(6))
                out[i:i + rows, j:j + 16] = np.sign(y) * f(LEVELS)[nearest(y, LEVELS)] * scale
        return torch.from_numpy(out), torch.tensor(f(1) / enc)


@given(st.integers(-30, 30), st.integers(0, 2**16), st.sampled_from([1, 16]),
       st.sampled_from(["plain", "zero", "outlier", "bf16"]), st.booleans())
def test_scales_by_hand(exponent, seed, rows, kind, keep):
    x = data(16, 48, seed) * 2.0**exponent
    x = {"zero": x * 0, "bf16": x.bfloat16().float()}.get(kind, x)
    x[:, 16:32] = 0  # a block of zeros
    x[3, 5] = 1e5 * 2.0**exponent if kind == "outlier" else x[3, 5]  # beside it others get scale 0
    q = NVFP4(rows, keep=keep).quantize(x)
    q = q.unpack() if keep else q
    product, outer = by_hand(x, rows)
    assert torch.equal(q.codes.float(), product) and torch.equal(q.scale.flatten()[0], outer)
    assert torch.equal(NVFP4(rows)(-x), -NVFP4(rows)(x))
    assert torch.equal(NVFP4(rows)(x * 2.0**7), NVFP4(rows)(x) * 2.0**7)


def test_square_blocks_are_transposed_and_what_is_not_finite_shows():
    """grad_input sees forward's own weights with 16 x 16, others with 1 x 16; one nan or inf spoils the matrix."""
    for keep in (True, False):
        for rows in (1, 16):
            q, q_t = (NVFP4(rows, keep=keep)(w) for w in (data(64, 96), data(64, 96).T))
            assert torch.equal(q.T, q_t) == (rows == 16)
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = data()
            x[3, 5] = bad
            assert not NVFP4(keep=keep)(x).isfinite().any()


def test_rotation():
    """H is Sylvester's with signs, and orthogonal; in grad_weight, (g.T H)(x.T H).T is g.T x."""
    h, sylvester = rotate(torch.eye(16), 16), torch.ones(1, 1)
    for _ in range(4):
        sylvester = torch.kron(torch.tensor([[1.0, 1], [1, -1]]), sylvester)
    assert torch.equal(h, torch.tensor(nvfp4.SIGNS)[:, None] * sylvester / 4) and torch.equal(h @ h.T, torch.eye(16))
    assert torch.equal(rotate(8 * torch.eye(16), 16).abs(), torch.full((16, 16), 2.0))  # a lone 8: sixteen +-2
    for d in (2, 16, 64):
        x, g, slot = data(64, 48), data(64, 32, 1), partial(rotate, d=d)
        layer = QuantLinear(48, 32, recipe=Recipe(grad_weight_grad_output=slot, grad_weight_input=slot, backward="fp"))
        layer(x).backward(g)
        assert (layer.weight.grad - g.T @ x).norm() <= 1e-5 * (g.T @ x).norm()


def test_stochastic_rounding():
    """Its mean is what is rounded. As published 4 % of Gaussian numbers clip, with 17/16 of headroom none."""
    torch.manual_seed(0)
    n, y = 2000, torch.linspace(-6, 6, 241)
    step = torch.where(y.abs() < 2, 0.5, torch.where(y.abs() < 4, 1.0, 2.0))
    p = (y.abs() / step) % 1
    enough, sigma = n * p * (1 - p) >= 9, step * (p * (1 - p) / n).sqrt()
    mean = e2m1(y.expand(n, -1), torch.rand(n, len(y)))[0].mean(0)
    assert ((mean - y).abs() <= 6 * sigma)[enough].all() and enough.sum() > 150
    assert torch.equal(e2m1(torch.tensor([-9.0, 9]), torch.tensor([0.9, 0]))[0], torch.tensor([-6.0, 6]))  # clipped
    x = torch.randn(256, 512)
    t = x.view(-1, 16)
    clips, roomy = ((t * scales(t, room)[1]).abs().view(x.shape) > 6 * (1 + 1e-6) for room in (1.0, 17 / 16))
    assert 0.03 < clips.float().mean() < 0.05 and not roomy.any()
    for room, slope in ((1.0, 0.995), (17 / 16, 1.0)):
        q = sum(NVFP4(stochastic=True, room=room)(x) for _ in range(16)) / 16
        assert (q * x).sum() / (x * x).sum() == pytest.approx(slope, abs=2e-3)
        assert (q * x)[~clips].sum() / (x * x)[~clips].sum() == pytest.approx(1, abs=1e-3)


def step(recipe, compiled=False):
    """Return output, gradients and bytes kept of a layer 48 -> 32 on 64 tokens."""
    torch.manual_seed(0)
    layer, x = QuantLinear(48, 32, recipe=recipe), data(64, 48).requires_grad_()
    y = (torch.compile(layer, backend="aot_eager") if compiled else layer)(x)
    y.backward(data(64, 32, 1))
    return y, x.grad, layer.weight.grad, kept_for_backward(lambda: layer(x), layer)[0]


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-norht", "nvfp4-no2d", "compiled"])
def test_early_is_fp(name, monkeypatch):
    """x.T rounded in forward is x.T rounded in backward, bit for bit, and is kept in 0.5625 bytes an element."""
    recipe = make_recipe(Config(**extensions.PRESETS.get(name, dict(nvfp4=True, sr="none"))))
    # compiled, rounding is one operator; what is in it is not compiled here
    monkeypatch.setattr(nvfp4, "_compiled", lambda *how: lambda t: nvfp4._round(t, *how))
    (*early, kept), (*fp, more) = step(recipe, name == "compiled"), step(replace(recipe, backward="fp"))
    assert same(early, fp) and kept == 64 * 48 * 0.5625 + 4 and more == 4 * 64 * 48
    assert sum(t.nbytes for t in NVFP4(16, keep=True).quantize(data(64, 128))) == 64 * 128 * (0.5 + 1 / 256) + 4


@pytest.mark.parametrize("name, change", {
    "": lambda *q: q, "-all": lambda *q: q, "-norht": lambda r, s, h: (r, s, 0), "-nosr": lambda r, s, h: (r, False, h),
    "-srall": lambda r, s, h: (r, True, h), "-no2d": lambda r, s, h: (1, s, h),
    "-naive": lambda *_: (1, False, 0)}.items())
def test_ingredients(name, change):
    """Each ablation misses its own ingredient, and nothing else."""
    full = [(1, False, 0), (16, False, 0), (1, True, 0), (16, False, 0), (1, True, 16), (1, False, 16)]
    slots = list(vars(make_recipe(Config(**extensions.PRESETS[f"nvfp4{name}"]))).values())[:6]
    assert [(q.rows, q.stochastic, q.rht) for q in slots] == [change(*q) for q in full]


@pytest.mark.parametrize("rows, columns, n", [(16, 2, 1), (160, 9, 1), (256, 4, 16)])
def test_swizzle_is_a_plain_loop(rows, columns, n):
    scale, across = torch.randint(1, 127, (rows // n, columns), dtype=torch.uint8), -(-columns // 4)
    expected = torch.zeros(-(-rows // 128) * across * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            expected[(r // 128 * across + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r // n, c]
    assert torch.equal(swizzle(scale.view(torch.float8_e4m3fn), rows).view(torch.uint8), expected)


def test_fp4_units_are_given_the_same_operands(monkeypatch):
    """A stand-in for F.scaled_mm, which undoes packing and swizzle, computes what the simulation does."""
    def scaled_mm(a, b_t, a_scales, levels, b_scales, b_levels, order, b_order, output_dtype):
        assert levels == b_levels == [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
        assert order == b_order == [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
        operands = []
        for codes, (scale, outer) in ((a.view(torch.uint8), a_scales), (b_t.T.view(torch.uint8), b_scales)):
            r, c = torch.meshgrid(torch.arange(len(codes)), torch.arange(codes.shape[1] // 8), indexing="ij")
            place = (c // 4) * 512 + r % 32 * 16 + r // 32 * 4 + c % 4  # fewer than 128 rows
            scale = scale.view(torch.uint8)[place].view(torch.float8_e4m3fn)
            operands.append(restore(Packed(codes, scale, outer).unpack()))
        called.append(output_dtype)
        return (operands[0] @ operands[1].T).to(output_dtype)

    called, recipe = [], make_recipe(Config(nvfp4=True, sr="none"))
    simulated = step(recipe)
    monkeypatch.setattr(nvfp4, "fp4_units", lambda device: True)
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    for ours, theirs in zip(step(recipe)[:3], simulated[:3], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert called[:3] == [torch.float32] * 3  # all three GEMMs
    x, b = data(32, 64), NVFP4().quantize(data(48, 64, 1))
    assert torch.equal(nvfp4.nvfp4_gemm(x, b, torch.float32), gemm(x, b, torch.float32))


@pytest.mark.parametrize("flags, n, spared", [
    ({}, 20, [17, 18, 19]), ({"spare": 0.0, "switch": "all"}, 2, []), ({"skip_blocks": (0, -1)}, 3, [0, 2])])
def test_which_blocks_and_until_when(flags, n, spared, capsys):
    """The last 15 % of the blocks, rounded up, or those of --skip_blocks, and the head, are spared; it is said."""
    flags = {"nvfp4": True, "switch_iter": 5, "switch": "forward", **flags}
    gpt, seen = GPT(GPTConfig(n, 2, 32, 16), 50, extensions.linears({"n_layer": n, **flags})), []
    for now in (4, 5, 9, 0):
        extensions.at_step(flags, gpt, now)
        seen.append(gpt.h[1].mlp.c_fc.recipe)
        if now < 5:
            assert [i for i, block in enumerate(gpt.h) if not block.mlp.c_fc.recipe] == spared
            assert not gpt.lm_head.recipe and evaluation.shares_scales(gpt)
            # without gradients nothing is rounded along the tokens, so one alone is no error
            assert generate(gpt, torch.zeros(1, 1, dtype=torch.long), 2).shape == (1, 3)
    assert seen[0] is seen[3] and seen[1] is seen[2]  # the same objects: nothing is compiled again
    assert seen[1] == (None if flags["switch"] == "all" else replace(seen[0], output_input=None, output_weight=None))
    said = f"blocks in high precision: {', '.join(map(str, spared)) or 'none'} of {n}; GEMMs simulated"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("switch", ["all", "forward"])
def test_a_run(switch, run, call, tmp_path):
    """It learns; interrupted before the switch it goes on bitwise; eval.py and the export see the same model."""
    flags = ["--preset=tiny,nvfp4", "--n_layer=2", "--schedule=wsd", "--lr_decay_iters=6", "--learning_rate=1e-2"]
    late = [*flags, "--switch_iter=5", f"--switch={switch}"]
    for name, more in (("never", flags), ("whole", late), ("cut", [*late, "--max_iters=4"])):
        assert run(tmp_path / name, *more)[0] == 0
    assert run(tmp_path / "cut", "--resume", "--max_iters=6", small=[])[0] == 0
    whole, cut = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert same({**cut, "config": 0}, {**whole, "config": 0}) and whole["extensions"] == ["nvfp4"]
    never, switched = (column(tmp_path / name, "loss") for name in ("never", "whole"))
    assert never[:5] == switched[:5] and never[5] != switched[5] and never[5] < never[0] - 0.2
    for name in ("never", "whole"):  # behind the switch forward is in high precision, as without quantizers
        on, off = (call(evaluation.main, f"--ckpt={tmp_path / name}", "--sample_tokens=3", f"--quantizers={which}")
                   for which in ("trained", "off"))
        assert on[0] == off[0] == 0 and f"{column(tmp_path / name, 'val_loss')[-1]:.4f} nats" in on[1]
        assert (on[1].splitlines()[1] == off[1].splitlines()[1]) == (name == "whole")
    pytest.importorskip("safetensors")
    assert call(evaluation.main, f"--ckpt={tmp_path / 'never'}", f"--export={tmp_path / 'hf'}")[0] == 0


@pytest.mark.parametrize("preset, apart", [("nvfp4-nosr", 1e-5), ("nvfp4", 3e-3)])
def test_two_processes(preset, apart, run, data, tmp_path):
    """Micro-batches have outer scales of their own, in one process or two; only stochastic rounding's noise differs."""
    one, two = one_and_two(run, data, tmp_path, f"--preset=tiny,{preset}", "--spare=0")
    assert one == pytest.approx(two, abs=apart)
    assert (preset == "nvfp4-nosr") == (one == pytest.approx(two, abs=1e-5))


@pytest.mark.parametrize("flags, message", [
    (["--wbits=8"], "--nvfp4 with --wbits=8 rounds twice"), (["--gbits=8"], "--nvfp4 with --gbits=8 rounds twice"),
    (["--spare=0", "--lsq_bits=4"], "--lsq_bits=4 with --wbits or --nvfp4 rounds the weights twice"),
    (["--spare=0", "--gaussws"], "noise stands for rounding"), (["--gemm=int8"], "--gemm=int8 has no effect"),
    (["--quant_head"], "--quant_head=True has no effect"),
    (["--nvfp4=False", "--rht=0"], "--rht=0 has no effect without --nvfp4"),
    (["--switch=forward"], "--switch=forward has no effect without --switch_iter"),
    (["--sr=none", "--sr_room=1.5"], "--sr_room=1.5 has no effect with --sr=none"),
    (["--rht=12"], "--rht=12 must be a power of two"), (["--spare=1"], "--spare=1.0 must be from 0"),
    (["--switch_iter=0"], "--switch_iter=0 must be at least 1"), ([], "no effect with all 1 blocks in high precision"),
    (["--n_layer=2", "--skip_blocks=0", "--spare=0"], "--spare=0.0 has no effect with --skip_blocks"),
    (["--spare=0", "--rht=32", "--batch_size=3", "--block_size=16"], "needs multiples of 32 tokens"),
    (["--spare=0", "--n_embd=24"], "--nvfp4 needs multiples of 16, h.0.attn.c_attn is 24 x 72")])
def test_bad_flags(flags, message, run, tmp_path):
    code, _, err = run(tmp_path / "a", "--nvfp4", *flags)
    assert code == 2 and message in err.splitlines()[-1]
