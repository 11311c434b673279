"""quant.py against PyTorch's own fake_quantize ops, float64 and naive loops, and properties of any matrix."""

import math
import re
from dataclasses import fields, replace
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import quant
from quant import FLOAT8, SCALE_FLOOR, QuantConfig, Quantized, Quantizer, QuantLinear, Recipe, make_recipe, restore

U = 2.0**-24  # fp32's unit roundoff: the result of one operation is within U times itself of the exact one
BITS, FORMATS = range(2, 9), ("int", *FLOAT8)
NAN, INF, ONE = math.nan, math.inf, torch.tensor(1.0)
SCALES = [torch.tensor(scale) for scale in (SCALE_FLOOR, 1e-30, 0.02, 1 / 3, 1.0, 7.7, 1e30)]
W8A8G8 = {"wbits": 8, "abits": 8, "gbits": 8, "ggemm": "both"}
FP8 = {**W8A8G8, "wfmt": "e4m3", "afmt": "e4m3", "gfmt": "e5m2", "ggran": "per_row"}
SOME = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) + 0.01
INT4, INT8 = Quantizer(4, (1, None)), Quantizer(8, (1, None))
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def bitwise(a, b):
    """Equal in dtype, shape and every bit; 0.0 and -0.0 differ, nan equals nan."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*(t.view(ints[t.itemsize]) for t in (a, b)))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(layer, x, g):
    """Return the output, and the gradients of x and of every parameter, in their order."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], g)]


def kept(f, x):
    """Bytes that f keeps for backward, parameters apart."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        f(x.detach().clone().requires_grad_())
    return sum(t.nbytes for t in saved if not isinstance(t, torch.nn.Parameter))


# -----------------------------------------------------------------------------
# any matrix, any quantizer: the corners by name, the rest by hypothesis

KINDS = {
    "normal": lambda x: x, "sparse": lambda x: x * (x > 1), "outlier": lambda x: torch.where(x == x.max(), 1e4, x),
    "positive": lambda x: x.abs() + 0.5,  # a range that excludes zero
    "ties": lambda x: (x * 40).round() / 2,  # many .5 at scale 1
    "constant": lambda x: torch.full_like(x, x.flatten()[0].item()), "almost constant": lambda x: 1 + x * 1e-5}
CORNERS = [torch.tensor(rows) for rows in (
    [[0.0] * 3] * 2, [[-0.0, -0.0]], [[1e-3, 1e30, -1.0]], [[-7.5]], [[1e-45, -1e-40], [1e-38, 0.0]],
    [[3e38, -3e38, 1e-3]], [[3e-39, -1.0]], [[0.0, 2.54]])]
SYMMETRIC, ASYM, STOCHASTIC = ([Quantizer(bits, **how) for bits in (8, 4, 2)]
                               for how in ({}, {"asym": True}, {"rounding": "stochastic"}))
FLOATS = [Quantizer(fmt=fmt) for fmt in FLOAT8]


@st.composite
def cases(draw, formats=FORMATS, roundings=("nearest",), low=-30, high=29):
    """(x, Quantizer): up to 9 x 9 of a kind times a power of ten, or any numbers up to 1e30; any tile, any format."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.integers(0, 3)):
        kind, seed, power = (draw(s) for s in (st.sampled_from([*KINDS]), st.integers(0, 999), st.integers(low, high)))
        x = KINDS[kind](normal(rows, columns, seed=seed)) * 10.0**power
    else:
        values = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=columns, max_size=columns)  # 1.3e30
        x = torch.tensor(draw(values)).repeat(rows, 1)
    tile = tuple(draw(st.sampled_from([None] + [d for d in range(1, n + 1) if n % d == 0])) for n in x.shape)
    if (fmt := draw(st.sampled_from(formats))) != "int":
        return x, Quantizer(8, tile, fmt=fmt)
    return x, Quantizer(draw(st.sampled_from(BITS)), tile, draw(st.booleans()), draw(st.sampled_from(roundings)))


def for_all(*quantizers, examples=80, **options):
    """Run a test of one case on drawn ones and, by name, on every corner under each of the quantizers."""
    def add(test):
        for case in product(CORNERS, quantizers):
            test = example(case)(test)
        return settings(max_examples=examples)(given(cases(**options))(test))
    return add


def magnitudes(fmt):
    """The finite numbers >= 0 of a format by code, in float64; Micikevicius et al. 2022, table 1."""
    # e4m3: only the last mantissa of the last exponent is nan; e5m2: that whole exponent is inf and nan (IEEE 754).
    step, bias, codes = {"e4m3": (8, 7, 127), "e5m2": (4, 15, 124)}[fmt]  # exponent 0 has no leading one
    return torch.tensor([math.ldexp((c >= step) + c % step / step, max(c // step, 1) - bias) for c in range(codes)],
                        dtype=torch.float64)


def nearest_float8(x, fmt):
    """The number of the format nearest to x, in float64: a tie to the even code, all beyond the last to it."""
    numbers, x = magnitudes(fmt), x.double()
    middles = (numbers[1:] + numbers[:-1]) / 2  # 5 bits at most, exact
    code = torch.searchsorted(middles, x.abs().contiguous())  # of a tie the lower neighbour
    odd_tie = (code < len(middles)) & (middles[code.clamp_max(len(middles) - 1)] == x.abs()) & (code % 2 == 1)
    return numbers[code + odd_tie].copysign(x)


def naive(x, quantizer):
    """Fake-quantize x as the quantizer should, tile by tile."""
    y, qmax = torch.empty(x.shape), quant.largest_code(quantizer.bits, quantizer.fmt)
    height, width = (t or n for t, n in zip(quantizer.tile, x.shape, strict=True))
    for i, j in product(range(0, x.shape[0], height), range(0, x.shape[1], width)):
        tile = slice(i, i + height), slice(j, j + width)
        v = x[tile].float()
        scale, zero_point = (v.abs().max() / qmax).clamp_min(SCALE_FLOOR), 0
        if quantizer.asym:
            scale = ((v.max() / 2 - v.min() / 2) / qmax).clamp_min(v.abs().max() * 2.0**-22).clamp_min(SCALE_FLOOR)
            zero_point = -torch.round(v.min() * (1 / scale) + qmax + 1)
        q = v * (1 / scale)
        q = (torch.round(q) + zero_point).clamp(-qmax - 1, qmax) if quantizer.fmt == "int" else \
            nearest_float8(q, quantizer.fmt).float()
        y[tile] = (q - zero_point) * scale
    return y


# -----------------------------------------------------------------------------
# the quantizer

@for_all(*SYMMETRIC, *ASYM, *FLOATS)
def test_scale_and_zero_point_are_the_papers(case):
    """amax / qmax correctly rounded; (max - min) / (2 qmax), -round(min / scale + 2^(bits-1)) to 2 and 3 roundings."""
    x, quantizer = case
    _, scale, zero_point = quantizer.quantize(x)
    t, qmax = quant.tiles(x.double(), quantizer.tile), quant.largest_code(quantizer.bits, quantizer.fmt)
    lo, hi, amax = (f(dim=(1, 3), keepdim=True) for f in (t.amin, t.amax, t.abs().amax))
    if not quantizer.asym:
        assert bitwise(scale, (amax / qmax).float().clamp_min(torch.finfo(torch.float32).tiny)) and zero_point is None
        return
    expected = torch.maximum((hi - lo) / (2 * qmax), (amax * 2.0**-22).clamp_min(SCALE_FLOOR))
    assert ((scale.double() - expected).abs() <= 2.01 * U * expected).all()
    steps = lo / scale.double()
    slack = U * (2 * steps.abs() + (steps + qmax + 1).abs()) * 1.01  # 1 / scale, times lo, plus 2^(bits-1)
    assert ((zero_point.double() + steps + qmax + 1).abs() <= 0.5 + slack).all() and not (zero_point % 1).any()


@for_all(*SYMMETRIC, *ASYM, formats=("int",))
def test_equals_torch(case):
    """Every bit of torch.fake_quantize with the same scale, where the zero point is one that torch takes, a code."""
    x, quantizer = case
    ours, qmax = replace(quantizer, tile=(1, None)), quant.largest_code(quantizer.bits)
    qmin = -qmax - quantizer.asym  # below the symmetric range lies one more code
    for t in (x, x.T, x.reshape(1, -1)):
        _, scale, zero = ours.quantize(t)
        s, zero = scale.flatten(), torch.zeros(len(t)) if zero is None else zero.flatten()
        legal = (zero >= qmin) & (zero <= qmax)
        theirs = torch.fake_quantize_per_channel_affine(t, s, torch.where(legal, zero, 0).int(), 0, qmin, qmax)
        assert legal.all() or quantizer.asym
        assert bitwise(ours(t)[legal], theirs[legal] + 0.0)  # theirs may be -0.0, an int8 code has but one zero


@for_all(*SYMMETRIC, *ASYM, *STOCHASTIC, *FLOATS, examples=160, roundings=("nearest", "stochastic"))
def test_error_and_range(case):
    """|x_hat - x| <= scale / 2 (stochastic: scale) and 3 roundings, FP8 half a step: nothing clips, all is used."""
    x, quantizer = case
    nearest, fmt = quantizer.rounding == "nearest", quantizer.fmt
    codes, scale, zero_point = quantizer.quantize(x)
    t, qmax = quant.tiles(codes.float(), quantizer.tile), quant.largest_code(quantizer.bits, fmt)
    there, exact = quant.dequantize(t, scale, zero_point).double(), quant.tiles(x.double(), quantizer.tile)
    error, size, step = (there - exact).abs(), exact.abs(), scale.double()
    if fmt == "int":
        slack = U * (2 * size + there.abs()) * (1 + 1e-6)  # 1 / scale, x times it, code times scale
        assert (error <= (step / 2 if nearest else step * (1 + U)) + slack).all()
    else:
        half = torch.maximum(size * (2.0**-4 if fmt == "e4m3" else 2.0**-3), magnitudes(fmt)[1] / 2 * step)
        assert (error <= half * (1 + 8 * U)).all() and (codes.float()[x == 0] == 0).all()
    assert codes.dtype == FLOAT8.get(fmt, torch.int8) and codes.shape == x.shape and codes.nbytes == x.numel()
    assert t.min() >= -qmax - quantizer.asym and t.max() <= qmax
    reached = t.amin((1, 3)) == -qmax - 1 if quantizer.asym else t.abs().amax((1, 3)) == qmax
    assert not nearest or reached[(scale[:, 0, :, 0] > SCALE_FLOOR) | quantizer.asym].all()


@for_all(*SYMMETRIC, *ASYM, formats=("int",))
def test_idempotent(case):
    """With its scale kept, quantize undoes dequantize; a symmetric scale found again moves by 1 ulp, then nothing."""
    x, quantizer = case
    codes, scale, zero_point = first = quantizer.quantize(x)
    if zero_point is None or zero_point.abs().max() <= 2**21:  # till there three roundings are under half a step
        back = quant.dequantize(quant.tiles(codes, quantizer.tile), scale, zero_point)
        assert torch.equal(quant.quantize(back, scale, zero_point, quantizer.bits).view(x.shape), codes)
    if zero_point is None:  # an asymmetric range may differ by a step where lo / scale was close to a tie
        second = quantizer.quantize(restore(first))
        assert torch.equal(codes, second.codes)
        for one, two, ulps in ((scale, second.scale, 1), (restore(first), restore(second), 2)):
            assert (one.view(torch.int32) - two.view(torch.int32)).abs().max() <= ulps  # signs agree where it is small
        assert all(map(bitwise, quantizer.quantize(restore(second))[:2], second[:2]))


@for_all(*SYMMETRIC, *ASYM, *FLOATS)
def test_symmetries_and_granularities(case):
    """q(2^k x) = 2^k q(x), q(-x) = -q(x), monotone in a tile; tiles are a loop's; views, transposes, bf16 as copies."""
    x, quantizer = case
    codes, scale, zero_point = quantizer.quantize(x)
    lowest = SCALE_FLOOR * 2.0**(32 if quantizer.fmt == "int" else 48)  # FP8 has codes down to 2^-16
    for power in (-30, -20, -1, 5, 30) if (scale > lowest).all() and x.abs().max() < 1e29 or not x.any() else ():
        there = quantizer.quantize(x * 2.0**power)
        assert bitwise(codes, there.codes) and (not x.any() or bitwise(scale * 2.0**power, there.scale))
        assert zero_point is None or bitwise(zero_point, there.zero_point)
    if not quantizer.asym:
        there = quantizer.quantize(-x)
        turned = -codes if quantizer.fmt == "int" else (codes.view(torch.uint8) ^ 128).view(codes.dtype)
        assert bitwise(turned, there.codes) and bitwise(scale, there.scale)
    row = x.flatten()[None]
    codes = replace(quantizer, tile=(None, None)).quantize(row).codes
    assert (codes[0, row[0].argsort()].float().diff() >= 0).all()
    assert torch.equal(quantizer(x), naive(x, quantizer))
    for here, there in (((1, x.shape[1]), (1, None)), (tuple(x.shape), (None, None))):  # per_block(K) == per_token
        assert bitwise(replace(quantizer, tile=here)(x), replace(quantizer, tile=there)(x))
    strided = torch.empty(x.shape[0] * 2, x.shape[1] * 3)[::2, ::3].copy_(x)
    for view in (x.T.contiguous().T, strided, x[:1].expand(x.shape), x[:, :1].expand(x.shape)):
        here, there = quantizer.quantize(view), quantizer.quantize(view.contiguous())
        assert bitwise(here.codes, there.codes) and torch.equal(here.scale, there.scale)
        assert bitwise(quantizer(view), restore(here)) and bitwise(restore(here.T), restore(here).T)
    assert bitwise(quantizer(x.bfloat16()), quantizer(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("how", [{}, {"asym": True}, {"rounding": "stochastic"}, {"fmt": "e4m3"}, {"fmt": "e5m2"}])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_inf_are_not_hidden(bad, how):
    """One nan or inf makes its whole tile non-finite (in nothing else would a diverged run be seen), and no other."""
    x, quantizer = torch.tensor([[1.0, bad, -2.0], [1.0, 2.0, 3.0]]), Quantizer(8, (1, None), **how)
    y, _, dw, _ = run(QuantLinear(3, 2, recipe=Recipe(quantizer, INT8)), x, torch.ones(2, 2))
    for z in (quantizer(x), y):
        assert not z[0].isfinite().any() and z[1].isfinite().all()
    assert not dw.isfinite().any()


@pytest.mark.parametrize("bits", BITS)
def test_every_integer(bits):
    """Every code comes back from any scale and zero point; halves go to the even code, all beyond the ends to those."""
    qmax, zero = 2 ** (bits - 1) - 1, torch.tensor(0.0)
    codes = torch.arange(-qmax - 1, qmax + 1, dtype=torch.int8)
    assert quant.largest_code(bits) == qmax
    for scale in SCALES:
        x = quant.dequantize(codes, scale)
        assert torch.equal(quant.quantize(x, scale, bits=bits), codes.clamp_min(-qmax))
        for zero_point in map(torch.tensor, (-300.0, -128.0, -1.0, 0.0, 5.0, 127.0, 1e4)):
            x = quant.dequantize(codes, scale, zero_point)
            assert torch.equal(quant.quantize(x, scale, zero_point, bits), codes)
    halves = torch.arange(-qmax - 2, qmax + 2) + 0.5
    even = [round(h) for h in halves.tolist()]  # Python's round is half to even too
    assert quant.quantize(halves, ONE, bits=bits).tolist() == [min(max(e, -qmax), qmax) for e in even]
    assert quant.quantize(halves, ONE, ONE, bits).tolist() == [min(max(e + 1, -qmax - 1), qmax) for e in even]
    far, noise = torch.tensor([-INF, -1e30, -qmax - 1.0, qmax + 1.0, 1e30, INF]), torch.full((6,), 0.999)
    for how, qmin in (((None, bits), -qmax), ((None, bits, noise), -qmax), ((zero, bits), -qmax - 1)):
        assert quant.quantize(far, ONE, *how).tolist() == [qmin] * 3 + [qmax] * 3


def test_every_float8():
    """All 256 codes mean what the paper says and come back from any scale; all ties, eager and compiled, saturated."""
    def both(x):
        return [quant.quantize(x, ONE, fmt=fmt) for fmt in FLOAT8]
    torch._dynamo.reset()
    top = torch.arange(-2**15, 2**15, dtype=torch.int32) << 16  # every sign, exponent and 7 bits of mantissa
    x = torch.cat([(top + low).view(torch.float32) for low in (-1, 0, 1, 2**15 - 1, 2**15, 2**15 + 1)])
    for fmt, last, *results in zip(FLOAT8, (448, 57344), both(x), torch.compile(both, fullgraph=True)(x), strict=True):
        for rounded in results:
            assert rounded.dtype == FLOAT8[fmt] and rounded[x.isnan()].float().isnan().all()
            assert bitwise(rounded[~x.isnan()].double(), nearest_float8(x[~x.isnan()], fmt))
        codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8[fmt])
        finite = torch.arange(256) % 128 < len(magnitudes(fmt))
        assert magnitudes(fmt)[-1] == last == quant.largest_code(8, fmt) and (~finite).sum() == {448: 2, 57344: 8}[last]
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(codes.to(dtype)[finite].double(), torch.cat((magnitudes(fmt), -magnitudes(fmt))))
            assert not codes.to(dtype)[~finite].isfinite().any()
        for scale in SCALES:
            assert bitwise(quant.quantize(quant.dequantize(codes[finite], scale), scale, fmt=fmt), codes[finite])


# -----------------------------------------------------------------------------
# stochastic rounding, and the straight-through estimator with its mask

def test_stochastic_rounding_by_enumeration():
    """Over all noises k/16 the mean of round(x) is exactly x, for every x = k/16: up with probability x - floor(x)."""
    x, noise = torch.arange(-64, 65)[:, None] / 16, torch.arange(16) / 16
    rounded = quant.round_stochastic(x.expand(-1, 16), noise.expand(129, -1))  # (129, 16)
    assert torch.equal(rounded, x.floor() + (noise < x - x.floor()))
    assert torch.equal(rounded.mean(1, keepdim=True), x) and torch.equal(rounded[::16], x[::16].expand(-1, 16))


@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9, 0.999]), st.integers(-3, 2))
@settings(max_examples=15)
def test_stochastic_quantizer_is_unbiased(seed, fraction, floor):
    """The mean of 4032 draws lies within 5 sigma of x; the same seed draws the same; integers never move."""
    recipe = make_recipe(QuantConfig(gbits=3, ggran="per_tensor", ggemm="both", rounding="stochastic"))
    quantizer, x = recipe.grad_input_grad_output, torch.full((64, 64), floor + fraction)
    assert quantizer == recipe.grad_weight_grad_output == Quantizer(3, rounding="stochastic")
    x[0] = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 3.0]).repeat(8)  # the maximum 3 makes the scale 1
    torch.manual_seed(seed)
    y = quantizer(x)
    assert abs(y[1:].double().mean().item() - x[1, 0].item()) < 5 * math.sqrt(fraction * (1 - fraction) / (63 * 64))
    assert set(y[1:].unique().tolist()) <= {floor, floor + 1.0} and torch.equal(y[0], x[0])
    torch.manual_seed(seed)
    assert torch.equal(quantizer(x), y) and not torch.equal(quantizer(x), y)


# -----------------------------------------------------------------------------
# the three GEMMs, and the layer with its six slots

@given(cases(low=-8, high=8), st.data())
def test_gemm_against_float64(case, data):
    """gemm of any two operands, transposed or not, is the float64 product of what they stand for; and backward."""
    x, quantizer = case
    turned = replace(quantizer, tile=quantizer.tile[::-1])
    a = data.draw(st.sampled_from([x, quantizer.quantize(x), turned.quantize(x.T).T]))
    tall = normal(x.shape[1], data.draw(st.integers(1, 5)))
    tile, asym = data.draw(st.sampled_from([(None, None), (1, None), (None, 1), (1, 1)])), data.draw(st.booleans())
    other = Quantizer(8, tile, asym)
    b = data.draw(st.sampled_from([tall.T, other.quantize(tall).T, other.quantize(tall.T)]))
    left, right = (t.double() if isinstance(t, torch.Tensor) else restore(t).double() for t in (a, b))
    bound, exact = left.abs() @ right.abs().T * U, left @ right.T
    assert ((quant.gemm(a, b, torch.float64) - exact).abs() <= 2.01 * bound).all()  # each dequantized element rounds
    y, g = quant.gemm(a, b, torch.float32), normal(*exact.shape, seed=2).double()
    assert y.dtype == torch.float32 and ((y - exact).abs() <= (x.shape[1] + 5) * bound).all()
    for ours, to, other in zip(quant.linear_backward(g, a, b, Recipe()), (g, g.T), (right, left), strict=True):
        assert ((ours - to @ other).abs() <= 2.01 * U * (to.abs() @ other.abs())).all()


@pytest.mark.parametrize("length", [768, 3072])
def test_bf16_gemm_of_codes_is_the_int32_accumulator(length):
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        torch.manual_seed(0)
        a, b = (torch.randint(-127, 128, (rows, length), dtype=torch.int8) for rows in (65, 130))
        a[:2], b[:2] = torch.tensor([[127], [-127]]), torch.tensor([[127], [126]])  # the longest sums, up to 2^25.6
        accumulator = (a.int() @ b.int().T).float().bfloat16()
        assert bitwise((a.to(device).bfloat16() @ b.to(device).bfloat16().T).cpu(), accumulator)
        qx, qw = (Quantized(q.to(device), torch.rand(len(q), 1, 1, 1, device=device), None) for q in (a, b))
        expected = accumulator.float() * qx.scale.cpu().view(-1, 1) * qw.scale.cpu().view(1, -1)
        assert bitwise(quant.gemm(qx, qw, torch.bfloat16).cpu(), expected.bfloat16())


def twin(x, w, bias, g, c):
    """y, dx and dw in float64, each STORED tensor rounded by a loop, and bounds for fp32's roundings."""
    third = len(w) // 3 if c.split_qkv else None
    tile = {"per_tensor": (None, None), "per_token": (1, None), "per_channel": (None, 1), "per_block": (1, c.wblock)}
    w_tile = {**tile, "per_tensor": (third, None), "per_channel": (1, None)}[c.wgran]
    g_tile = {**tile, "per_tensor": (None, third), "per_token": (1, third)}[c.ggran]

    def rounded(t, bits, tile, fmt, asym=False):
        return (t if bits == 32 else naive(t, Quantizer(bits, tile, asym, fmt=fmt))).double()
    xq, wq = rounded(x, c.abits, tile[c.agran], c.afmt, c.asym), rounded(w, c.wbits, w_tile, c.wfmt)
    a, b = (xq, wq) if c.backward == "ste" else (x.double(), w.double())
    to_x = rounded(g, c.gbits if c.ggemm != "grad_weight" else 32, g_tile, c.gfmt)
    turned = (lambda t: t.T) if c.ggran == "per_block" else (lambda t: t)  # along the contraction: here the tokens
    to_w = turned(rounded(turned(g), c.gbits if c.ggemm != "grad_input" else 32, g_tile, c.gfmt))
    bounds = [(xq.abs() @ wq.abs().T + bias.abs()) * (x.shape[1] + 7)]
    bounds += [g.double().abs().max() * t.abs().sum(0) * (len(t) + 7) for t in (b, a)]  # no quantized g is larger
    return [xq @ wq.T + bias, to_x @ b, to_w.T @ a], [bound * U for bound in bounds]


OPTIONS = {f.name: get_args(f.type) for f in fields(QuantConfig) if f.name not in ("gemm", "rounding", "skip_blocks")}
OPTIONS |= dict.fromkeys(("wbits", "abits", "gbits"), (32, 8, 8, 6, 4, 3, 2)) | {"wblock": (1, 2, 3)}
OPTIONS["ggran"] = OPTIONS["ggran"][:-1]  # per_row: test_int8.py


@st.composite
def layers(draw):
    """(M, K, N, QuantConfig): any flags, less those that its errors name; blocks divide what they must."""
    flags, config = {name: draw(st.sampled_from(values or (False, True))) for name, values in OPTIONS.items()}, None
    while not config:
        try:
            config = QuantConfig(**flags)
        except ValueError as error:
            name, fmt = re.match(r"--(\w+)=\S+ (?:does not fit --(\w+))?", str(error)).groups()
            del flags[fmt or name]
    block = config.wblock if "per_block" in flags.values() else 1
    m, k, n = (draw(st.integers(1, 4)) * block for _ in range(3))
    return m, k, n * (3 if config.split_qkv else 1), config


@given(layers(), st.integers(0, 99), st.integers(-12, 4))
@settings(max_examples=120)
@example((1, 1, 1, QuantConfig(**W8A8G8)), 0, 0)
@example((4, 6, 384, QuantConfig(gbits=8, split_qkv=True)), 2, 0)  # a third as long as --wblock's default
@example((9, 7, 8, QuantConfig(**FP8 | {"ggran": "per_token"})), 4, -9)
def test_every_granularity_against_its_twin(layer, seed, exponent):
    """All equals the twin's, to an fp32 GEMM's roundings; db is the sum of untouched g; a second call is the first."""
    m, k, n, config = layer
    x, g = normal(m, k, seed=seed), normal(m, n, seed=seed + 1) * 10.0**exponent
    w, bias = normal(n, k, seed=seed + 2), normal(n, seed=seed + 3)
    linear = QuantLinear(k, n, recipe=make_recipe(config, n // 3 if config.split_qkv else None))
    linear.load_state_dict({"weight": w, "bias": bias})
    results = run(linear, x, g)
    for ours, twins, bound in zip(results, *twin(x, w, bias, g, config), strict=False):
        assert ours.dtype == torch.float32 and ((ours - twins).abs() <= bound).all()
    assert bitwise(results[3], g.sum(0)) and all(map(bitwise, run(linear, x, g), results))


@pytest.mark.parametrize("backward", ["ste", "fp", "early"])
def test_each_slot_rounds_its_own_operand(backward):
    """A slot is any callable and sees its operand as quant.py's table writes it; under ste, forward's are reused."""
    slots = [INT8, lambda w: 2 * w, Quantizer(6, (None, 1)), Quantizer(5, (1, 3)), torch.neg, Quantizer(3, (1, None))]
    layer, x, g = QuantLinear(6, 9, bias=False), normal(4, 6), normal(4, 9, seed=2)
    w = layer.weight.detach()
    q = [slot(t) for slot, t in zip(slots, (x, w, g, w.T, g.T, x.T), strict=True)]
    if backward == "ste":
        slots[3], slots[5], q[3], q[5] = None, None, q[1].T, q[0].T
    layer.recipe = Recipe(*slots, backward)
    for ours, a, b in zip(run(layer, x, g), q[::2], q[1::2], strict=True):
        a, b = a.double(), b.double()
        assert ((ours - a @ b.T).abs() <= 16 * U * (a.abs() @ b.abs().T)).all()
    for i in (i for i in range(6) if slots[i]):  # Quantizer(32) is None, bit for bit, in any slot
        found = []
        for slots[i] in (None, Quantizer(32)):
            layer.recipe = Recipe(*slots, backward)
            found.append((kept(layer, x), *run(layer, x, g)))
        assert found[0][0] == found[1][0] and all(map(bitwise, found[0][1:], found[1][1:]))


class Foreign(NamedTuple):
    """Codes of another kind: what unpack() returns enters a GEMM, and backward="ste" asks for T of what was kept."""
    codes: torch.Tensor
    scale: torch.Tensor
    T = property(lambda self: self.unpack().T)

    def unpack(self):
        return Quantized(self.codes, self.scale, None)


@both_dtypes
@pytest.mark.parametrize("slot", [None, INT4, *FLOATS, Quantizer(8, (2, 4), asym=True)], ids=str)
def test_what_waits_for_backward(slot, dtype):
    """Codes and scales of x and w (ste), x and w (fp), or w and the codes of x.T (early, otherwise bit for bit fp)."""
    layer, x, g, found = QuantLinear(16, 8, bias=False), normal(4, 16).to(dtype), normal(4, 8, seed=1).to(dtype), []
    foreign = SimpleNamespace(quantize=lambda x: Foreign(*INT4.quantize(x)[:2]))

    def size(z):
        return sum(t.nbytes for t in (slot.quantize(z) if slot else [z]) if t is not None)
    w = size(layer.weight.detach()) if slot else 0  # `kept` does not count the weight itself
    for q in [slot] + [foreign] * (slot is INT4):
        for backward, expected in (("ste", size(x) + w), ("fp", x.nbytes), ("early", size(x.T))):
            own = None if backward == "ste" else q
            layer.recipe = Recipe(q, q, q, own, q, own, backward)
            assert kept(layer, x) == expected
            found.append(run(layer, x, g))
    assert all(map(bitwise, found[1], found[2]))
    assert all(map(bitwise, sum(found[:3], []), sum(found[-3:], [])))  # foreign codes are the same numbers


@both_dtypes
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_rounded_is_nn_linear(bias, dtype):
    assert make_recipe(QuantConfig()) is None and Quantizer(32)(ONE) is ONE
    plain, ours = torch.nn.Linear(33, 17, bias), QuantLinear(33, 17, bias)
    ours.load_state_dict(plain.state_dict())
    x, g = normal(2, 5, 33).to(dtype).requires_grad_(), normal(2, 5, 17, seed=1).to(dtype)
    y = F.linear(x, *(p.to(dtype) for p in plain.parameters()))
    assert all(map(bitwise, run(ours, x, g), [y.detach(), *torch.autograd.grad(y, [x, *plain.parameters()], g)]))


def test_finite_differences():
    """Where nothing is rounded backward, reparam and bias pass float64 finite differences; no second derivative."""
    def layer(x, weight, bias):
        linear = QuantLinear(4, 3, recipe=Recipe(), reparam=lambda w: w.tanh() * w.norm())
        return torch.func.functional_call(linear, {"weight": weight, "bias": bias}, x)
    inputs = [normal(*shape, seed=1).double().requires_grad_() for shape in ((2, 5, 4), (3, 4), (3,))]
    assert torch.autograd.gradcheck(layer, inputs)
    dx, = torch.autograd.grad(layer(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_compiled_equals_eager():
    """Integers with zero points and FP8 that folds: one graph, no bit of y, dx, dw changes; db sums in other order."""
    torch._dynamo.reset()
    layer = torch.nn.Sequential(QuantLinear(33, 21, recipe=make_recipe(QuantConfig(**W8A8G8, asym=True))),
                                QuantLinear(21, 12, recipe=make_recipe(QuantConfig(**FP8))))
    x, g = normal(2, 17, 33), normal(2, 17, 12, seed=1)
    for i, (a, b) in enumerate(zip(run(layer, x, g), run(torch.compile(layer, fullgraph=True), x, g), strict=True)):
        assert bitwise(a, b) or i in (3, 5)  # y, dx, dw, db, dw, db; fp32
        torch.testing.assert_close(a, b)


def test_no_gemm_that_nobody_needs():
    shapes = []
    recipe = Recipe(engine=lambda a, b, dtype: shapes.append((*a.shape, len(b))) or quant.gemm(a, b, dtype))
    for x_needs, w_needs in product((False, True), repeat=2):
        layer, x = QuantLinear(4, 5, recipe=recipe), normal(3, 4).requires_grad_(x_needs)
        layer.weight.requires_grad_(w_needs)
        shapes.clear()
        layer(x).sum().backward()
        assert shapes == [(3, 4, 5)] + [(3, 5, 4)] * x_needs + [(5, 3, 4)] * w_needs
        assert [t.grad is not None for t in (x, layer.weight, layer.bias)] == [x_needs, w_needs, True]
    shapes.clear()
    y, dx, dw, db = run(layer, torch.zeros(2, 0, 4), torch.zeros(2, 0, 5))
    assert y.shape == (2, 0, 5) and dx.shape == (2, 0, 4) and not dw.any() and not db.any() and not shapes


# -----------------------------------------------------------------------------
# what is refused: the error is about the first flag of a line; where it does not fit another, that is the last

IDLE = """wgran=per_tensor; wgran=per_block abits=8; wfmt=e4m3 abits=8; agran=per_channel wbits=8;
asym=True gbits=8; asym_gelu=True wbits=8; afmt=e5m2 wbits=8; ggran=per_tensor wbits=8; ggemm=both abits=8; gfmt=e5m2;
rounding=stochastic wbits=8; wblock=64 wbits=8; split_qkv=True wbits=8; split_qkv=True abits=8 agran=per_tensor;
split_qkv=True gbits=8 ggran=per_channel; quant_head=True; backward=fp gbits=8; gemm=int8 wbits=8; gemm=int8 abits=8"""
UNFIT = """wbits=4 wfmt=e4m3; abits=7 afmt=e5m2; asym=True abits=8 afmt=e4m3; asym=True abits=4 asym_gelu=True;
gbits=2 gfmt=e4m3; rounding=stochastic gbits=8 gfmt=e5m2; wgran=per_block INT8; agran=per_block INT8;
agran=per_channel INT8; asym=True INT8; wfmt=e4m3 INT8; afmt=e5m2 INT8; ggran=per_token gbits=8 INT8;
gfmt=e5m2 ROW INT8; backward=fp ROW INT8; agran=per_block abits=8 ROW; wgran=per_block wbits=8 ROW;
asym=True abits=8 ROW""".replace("INT8", "wbits=8 abits=8 gemm=int8").replace("ROW", "gbits=8 ggran=per_row")
LINES = re.split(r";\s", f"{IDLE}; {UNFIT}")


@pytest.mark.parametrize("line", LINES)
def test_refused_flags(line):
    def config(words):
        values = {"True": True, "False": False, **{str(n): n for n in range(99)}}
        return QuantConfig(**{name: values.get(v, v) for name, v in (word.split("=") for word in words)})
    first, *others = line.split()
    with pytest.raises(ValueError) as error:
        config([first, *others])
    way_out = re.fullmatch(rf"--{first} (?:has no effect (?:without|while) .*; drop it or add that|"
                           rf"does not fit --{line.split()[-1]}: .*; use --(\w+=\w+).*)", str(error.value))[1]
    assert (way_out is None) == (line in IDLE)
    config([*others, *filter(None, [way_out])])


@pytest.mark.parametrize("make, how, message", [
    *((Quantizer, {"bits": b}, f"bits={b} is not supported: use 2 to 8, or 32") for b in (1, 9, 31)),
    *((QuantConfig, {f"{x}bits": 16}, f"--{x}bits=16 is not supported: use 2 to 8, or 32") for x in "wag"),
    (QuantConfig, {"wbits": 8, "wgran": "per_block", "wblock": 0}, "--wblock=0 must be at least 1"),
    (Quantizer(8, (1, 5)), {"x": torch.zeros(4, 12)}, r"a tile of 1 x 5 does not divide a .* of \(4, 12\)"),
    *((Quantizer, {"fmt": "e4m3", **how}, "fmt='e4m3' is symmetric, 8 bits, rounded to nearest")
      for how in ({"bits": 4}, {"bits": 32}, {"asym": True}, {"rounding": "stochastic"})),
    *((Recipe, {slot: INT8}, "use 'fp' or 'early'") for slot in ("grad_input_weight", "grad_weight_input")),
    (QuantLinear(4, 3, recipe=Recipe()), {"x": torch.zeros(2, 4).half()}, "use bfloat16 or float32")])
def test_refused(make, how, message):
    with pytest.raises(ValueError, match=message):
        make(**how)


def test_every_flag_has_its_line():
    """But skip_blocks: that one is checked where the number of blocks is known."""
    assert {line.split("=")[0] for line in LINES} | {"skip_blocks"} == {f.name for f in fields(QuantConfig)}
