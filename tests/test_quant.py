"""Tests of quant.py: against PyTorch's own fake_quantize ops, float64, naive loops, and properties of any matrix.

U is fp32's unit roundoff: the result of one operation is within U times itself of the exact one.
"""

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

U, BITS, FORMATS = 2.0**-24, range(2, 9), ("int", *FLOAT8)
NAN, INF, ONE = math.nan, math.inf, torch.tensor(1.0)
SCALES = [torch.tensor(scale) for scale in (SCALE_FLOOR, 1e-30, 0.02, 1 / 3, 1.0, 7.7, 1e30)]
W8A8 = {"wbits": 8, "abits": 8}
W8A8G8 = {**W8A8, "gbits": 8, "ggemm": "both"}
FP8 = {**W8A8G8, "wfmt": "e4m3", "afmt": "e4m3", "gfmt": "e5m2", "ggran": "per_row"}
SOME = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) + 0.01
INT4, INT8 = Quantizer(4, (1, None)), Quantizer(8, (1, None))


def bitwise(a, b):
    """Equal in dtype, shape and every bit; 0.0 and -0.0 differ, nan equals nan."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*(t.view(ints[t.itemsize]) for t in (a, b)))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(layer, x, g):
    """Output, and the gradients of x and of every parameter, in their order."""
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
    "normal": lambda x: x, "sparse": lambda x: x * (x > 1),
    "positive": lambda x: x.abs() + 0.5,  # a range that excludes zero
    "outlier": lambda x: torch.where(x == x.max(), 1e4, x),
    "ties": lambda x: (x * 40).round() / 2,  # many .5 at scale 1
    "constant": lambda x: torch.full_like(x, x.flatten()[0].item()), "almost constant": lambda x: 1 + x * 1e-5,
}
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
        limit = torch.tensor(1e30).item()
        values = st.lists(st.floats(-limit, limit, width=32), min_size=columns, max_size=columns)
        x = torch.tensor(draw(values)).repeat(rows, 1).roll(1, 0)
    tile = tuple(draw(st.sampled_from([None] + [d for d in range(1, n + 1) if n % d == 0])) for n in x.shape)
    if (fmt := draw(st.sampled_from(formats))) != "int":
        return x, Quantizer(8, tile, fmt=fmt)
    return x, Quantizer(draw(st.sampled_from(BITS)), tile, draw(st.booleans()), draw(st.sampled_from(roundings)))


def for_all(*quantizers, examples=150, **options):
    """Run a test of one case on drawn ones and, by name, on every corner under each of the quantizers."""
    def add(test):
        for case in product(CORNERS, quantizers):
            test = example(case)(test)
        return settings(max_examples=examples)(given(cases(**options))(test))
    return add


def spread(t, shape):
    """Repeat a scale or zero point (R/tr, 1, C/tc, 1) over the matrix it belongs to."""
    return t.expand(-1, shape[0] // t.shape[0], -1, shape[1] // t.shape[2]).reshape(shape)


def magnitudes(fmt):
    """The finite numbers of a format that are not negative, by code, in float64; Micikevicius et al. 2022, table 1.

    e4m3: bias 7, and only the last mantissa of the last exponent is no number (nan). e5m2: bias 15, and the last
    exponent is inf and nan, as IEEE 754 has it. Exponent 0 has no leading one.
    """
    step, bias, codes = {"e4m3": (8, 7, 127), "e5m2": (4, 15, 124)}[fmt]
    return torch.tensor([math.ldexp((c >= step) + c % step / step, max(c // step, 1) - bias) for c in range(codes)],
                        dtype=torch.float64)


def nearest_float8(x, fmt):
    """The number of the format nearest to x, in float64: a tie to the even code, all beyond the last to it."""
    numbers, x = magnitudes(fmt), x.double()
    middles = (numbers[1:] + numbers[:-1]) / 2  # 5 bits at most, exact
    code = torch.searchsorted(middles, x.abs().contiguous())  # of a tie the lower neighbour
    odd_tie = (code < len(middles)) & (middles[code.clamp_max(len(middles) - 1)] == x.abs()) & (code % 2 == 1)
    return numbers[code + odd_tie].copysign(x)


def largest(quantizer):
    """qmax of the symmetric range."""
    return 2 ** (quantizer.bits - 1) - 1 if quantizer.fmt == "int" else magnitudes(quantizer.fmt)[-1].item()


def naive(x, quantizer):
    """Fake-quantize x as the quantizer should, tile by tile."""
    y, qmax = torch.empty(x.shape), largest(quantizer)
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
    """Symmetric: amax / qmax, correctly rounded (float64 says so), never below the smallest normal number.

    Asymmetric: (max - min) / (2 qmax) to two roundings, and -round(min / scale + 2^(bits-1)) to three.
    """
    x, quantizer = case
    _, scale, zero_point = quantizer.quantize(x)
    t, qmax = quant.tiles(x.double(), quantizer.tile), largest(quantizer)
    lo, hi, amax = (f(dim=(1, 3), keepdim=True) for f in (t.amin, t.amax, t.abs().amax))
    if not quantizer.asym:
        assert bitwise(scale, (amax / qmax).float().clamp_min(torch.finfo(torch.float32).tiny)) and zero_point is None
        return
    expected = torch.maximum((hi - lo) / (2 * qmax), (amax * 2.0**-22).clamp_min(SCALE_FLOOR))
    assert ((scale.double() - expected).abs() <= 2.01 * U * expected).all()
    assert torch.equal(zero_point, zero_point.round())
    steps = lo / scale.double()
    slack = U * (2 * steps.abs() + (steps + qmax + 1).abs()) * 1.01  # 1 / scale, times lo, plus 2^(bits-1)
    assert ((zero_point.double() + steps + qmax + 1).abs() <= 0.5 + slack).all()


@for_all(*SYMMETRIC, *ASYM, formats=("int",))
def test_equals_torch(case):
    """Every bit of torch.fake_quantize with the same scale, per tensor and along either axis.

    Asymmetric: where the zero point is a code, as torch demands (the range then holds zero).
    """
    x, quantizer = case
    qmin, qmax = -largest(quantizer) - quantizer.asym, largest(quantizer)
    for axis, tile in ((None, (None, None)), (0, (1, None)), (1, (None, 1))):
        ours = replace(quantizer, tile=tile)
        _, scale, zero = ours.quantize(x)
        zero = torch.zeros_like(scale) if zero is None else zero
        legal = (zero >= qmin) & (zero <= qmax)
        s, z = scale.flatten(), torch.where(legal, zero, 0).flatten().int()
        theirs = (torch.fake_quantize_per_tensor_affine(x, s[0], z[0], qmin, qmax) if axis is None else
                  torch.fake_quantize_per_channel_affine(x, s, z, axis, qmin, qmax))
        legal = spread(legal, x.shape)
        assert legal.all() or quantizer.asym
        assert bitwise(ours(x)[legal], theirs[legal] + 0.0)  # theirs may be -0.0, an int8 code has but one zero


@for_all(*SYMMETRIC, *ASYM, *STOCHASTIC, *FLOATS, examples=300, roundings=("nearest", "stochastic"))
def test_error_and_range(case):
    """|x_hat - x| <= scale / 2 (stochastic: scale) and three fp32 roundings, nothing else: dynamic ranges never clip.

    1 / scale, x times it, and code times scale are rounded once each: 2 U |x| + U |x_hat|. Beside a symmetric step
    that is nothing, |x| <= 127 scale; for an almost constant asymmetric tile it is what is left of the mantissa. Half
    a step of FP8 is 2^-4 of the number (e5m2: 2^-3), or half the smallest. The largest |value| has the code qmax (with
    a zero point the smallest has qmin), and none is beyond, though 127.00001 may round up.
    """
    x, quantizer = case
    nearest, fmt, qmax = quantizer.rounding == "nearest", quantizer.fmt, largest(quantizer)
    codes, scale, _ = q = quantizer.quantize(x)
    step, error, size = spread(scale, x.shape).double(), (restore(q).double() - x.double()).abs(), x.double().abs()
    if fmt == "int":
        slack = U * (2 * size + restore(q).double().abs()) * (1 + 1e-6)
        assert (error <= (step / 2 if nearest else step * (1 + U)) + slack).all()
    else:
        half = torch.maximum(size * (2.0**-4 if fmt == "e4m3" else 2.0**-3), magnitudes(fmt)[1] / 2 * step)
        assert (error <= half * (1 + 8 * U)).all() and (codes.float()[x == 0] == 0).all()
    assert codes.dtype == FLOAT8.get(fmt, torch.int8) and codes.shape == x.shape and codes.nbytes == x.numel()
    t = quant.tiles(codes.float(), quantizer.tile)
    assert t.min() >= -qmax - quantizer.asym and t.max() <= qmax
    reached = t.amin((1, 3)) == -qmax - 1 if quantizer.asym else t.abs().amax((1, 3)) == qmax
    assert not nearest or reached[(scale[:, 0, :, 0] > SCALE_FLOOR) | quantizer.asym].all()


@for_all(*SYMMETRIC, *ASYM, formats=("int",))
def test_idempotent(case):
    """With scale and zero point kept, quantize undoes dequantize: three roundings are under half a step up to 2^21.

    The scale found again, fl(fl(127 scale) / 127), moves by 1 ulp at most, values by 2, and a third time nothing. (An
    asymmetric range found again may differ by a step where lo / scale was close to a tie.)
    """
    x, quantizer = case
    codes, scale, zero_point = first = quantizer.quantize(x)
    if zero_point is None or zero_point.abs().max() <= 2**21:
        back = quant.dequantize(quant.tiles(codes, quantizer.tile), scale, zero_point)
        assert torch.equal(quant.quantize(back, scale, zero_point, quantizer.bits).view(x.shape), codes)
    if zero_point is None:
        second = quantizer.quantize(restore(first))
        assert torch.equal(codes, second.codes)
        for one, two, ulps in ((scale, second.scale, 1), (restore(first), restore(second), 2)):
            assert (one.view(torch.int32) - two.view(torch.int32)).abs().max() <= ulps  # signs agree where it is small
        assert all(map(bitwise, quantizer.quantize(restore(second))[:2], second[:2]))


@for_all(*SYMMETRIC, *ASYM, *FLOATS)
def test_what_changes_nothing(case):
    """2^k x has the codes of x and 2^k its scale, in the normal numbers; q(-x) = -q(x); in a tile q is monotone.

    Half to even knows no side, and FP8 turns the sign bit, of a zero too. A tile is what shares a scale, as in a loop
    over tiles; per_block(K) == per_token, a block of everything == per_tensor. Views are quantized as their copies,
    Quantized.T transposes, and bf16 is quantized in fp32 and only then cast back.
    """
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
    for here, there in (((1, x.shape[1]), (1, None)), (tuple(x.shape), (None, None))):
        assert bitwise(replace(quantizer, tile=here)(x), replace(quantizer, tile=there)(x))
    strided = torch.empty(x.shape[0] * 2, x.shape[1] * 3)[::2, ::3].copy_(x)
    for view in (x.T.contiguous().T, strided, x[:1].expand(x.shape), x[:, :1].expand(x.shape)):
        here, there = quantizer.quantize(view), quantizer.quantize(view.contiguous())
        assert bitwise(here.codes, there.codes) and torch.equal(here.scale, there.scale)
        assert bitwise(quantizer(view), restore(here)) and bitwise(restore(here.T), restore(here).T)
    x = x.bfloat16()
    assert bitwise(quantizer(x), quantizer(x.float()).bfloat16())
    assert bitwise(quantizer.quantize(x).scale, quantizer.quantize(x.float()).scale)


@pytest.mark.parametrize("how", [{}, {"asym": True}, {"rounding": "stochastic"}, {"fmt": "e4m3"}, {"fmt": "e5m2"}])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_inf_are_not_hidden(bad, how):
    """One nan or inf makes its whole tile non-finite (in nothing else would a diverged run be seen), and no other."""
    x, quantizer = torch.tensor([[1.0, bad, -2.0], [1.0, 2.0, 3.0]]), Quantizer(8, (1, None), **how)
    y, _, dw, _ = run(QuantLinear(3, 2, recipe=Recipe(quantizer, INT8)), x, torch.ones(2, 2))
    for z in (quantizer(x), y):
        assert not z[0].isfinite().any() and z[1].isfinite().all()
    assert not dw.isfinite().any()
    x = torch.tensor([bad, 1.0]).requires_grad_()  # with a given scale, too, nan stays nan; inf saturates
    y = quant.round_ste(x, ONE)
    assert y[0].isnan() if bad != bad else y[0] == math.copysign(127, bad)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [bad != bad, 1]


@pytest.mark.parametrize("bits", BITS)
def test_every_integer(bits):
    """dequantize then quantize is the identity on every code, for any scale and zero point; halves go to the even code.

    Everything beyond the ends goes to qmax and -qmax, with a zero point to qmin. On ordinary data every number of the
    asymmetric formula is met, and the codes span the whole range.
    """
    qmax, zero = 2 ** (bits - 1) - 1, torch.tensor(0.0)
    codes = torch.arange(-qmax - 1, qmax + 1, dtype=torch.int8)
    for scale in SCALES:
        x = quant.dequantize(codes, scale)
        assert torch.equal(quant.quantize(x, scale, bits=bits), codes.clamp_min(-qmax))
        assert torch.equal(x.double(), (codes.double() * scale.double()).float().double())
        for zero_point in map(torch.tensor, (-300.0, -128.0, -1.0, 0.0, 5.0, 127.0, 1e4)):
            x = quant.dequantize(codes, scale, zero_point)
            assert torch.equal(x.sign(), (codes - zero_point).sign())
            assert torch.equal(quant.quantize(x, scale, zero_point, bits), codes)
    halves = torch.arange(-qmax - 2, qmax + 2) + 0.5
    even = [round(h) for h in halves.tolist()]  # Python's round is half to even too
    assert quant.quantize(halves, ONE, bits=bits).tolist() == [min(max(e, -qmax), qmax) for e in even]
    assert quant.quantize(halves, ONE, ONE, bits).tolist() == [min(max(e + 1, -qmax - 1), qmax) for e in even]
    far, noise = torch.tensor([-INF, -1e30, -qmax - 1.0, qmax + 1.0, 1e30, INF]), torch.full((6,), 0.999)
    for how, qmin in (((None, bits), -qmax), ((None, bits, noise), -qmax), ((zero, bits), -qmax - 1)):
        assert quant.quantize(far, ONE, *how).tolist() == [qmin] * 3 + [qmax] * 3
    for x in (normal(1, 500, seed=seed) + 0.3 for seed in range(20)):
        codes, _, zero_point = Quantizer(bits, asym=True).quantize(x)
        s = (x.max().double() - x.min().double()) / (2 * qmax)
        assert zero_point.item() == -torch.round(x.min().double() / s + qmax + 1).item()
        assert codes.min() == -qmax - 1 and codes.max() == qmax - 1


def test_every_float8():
    """Every code, and every sign, exponent and 7 bits of mantissa, a hair beside and halfway between.

    All 256 codes mean what the paper says, in bf16 too, and the finite ones come back from any scale, signs kept.
    Rounding is to nearest, ties to even, saturated: among the 393,216 numbers are all ties of both formats, their
    neighbours in fp32, infinities and nans. Compiled code says the same: backends' casts differ past the largest.
    """
    def both(x):
        return [quant.quantize(x, ONE, fmt=fmt) for fmt in FLOAT8]
    torch._dynamo.reset()
    top = torch.arange(-2**15, 2**15, dtype=torch.int32) << 16
    x = torch.cat([(top + low).view(torch.float32) for low in (-1, 0, 1, 2**15 - 1, 2**15, 2**15 + 1)])
    for fmt, last, *results in zip(FLOAT8, (448, 57344), both(x), torch.compile(both, fullgraph=True)(x), strict=True):
        for rounded in results:
            assert rounded.dtype == FLOAT8[fmt] and rounded[x.isnan()].float().isnan().all()
            assert bitwise(rounded[~x.isnan()].double(), nearest_float8(x[~x.isnan()], fmt))
        codes, finite = torch.arange(256, dtype=torch.uint8).view(FLOAT8[fmt]), torch.arange(256) % 128
        finite = finite < len(magnitudes(fmt))
        assert magnitudes(fmt)[-1] == last and (~finite).sum() == {"e4m3": 2, "e5m2": 8}[fmt]
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(codes.to(dtype)[finite].double(), torch.cat((magnitudes(fmt), -magnitudes(fmt))))
            assert not codes.to(dtype)[~finite].isfinite().any()
        for scale in SCALES:
            assert bitwise(quant.quantize(quant.dequantize(codes[finite], scale), scale, fmt=fmt), codes[finite])


def test_spelt_out():
    """The docstrings' examples: half to even, in FP8 to the even mantissa; amax 2.54 and [0, 2.54] at 8 bits."""
    for x, scale, fmt, codes in (
            ([0.05, 0.07], 0.02, "int", [2, 4]),
            ([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, 126.5, -126.5], 1.0, "int", [0, 2, 2, 4, 0, -2, 126, -126]),
            ([17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 460.0], 1.0, "e4m3", [16, 20, -16, 0, 2.0**-8, 448]),
            ([9.0, 11.0, -9.0, 2.0**-17, 3 * 2.0**-17, -INF], 1.0, "e5m2", [8, 12, -8, 0, 2.0**-15, -57344])):
        assert quant.quantize(torch.tensor(x), torch.tensor(scale), fmt=fmt).tolist() == codes
    assert quant.dequantize(torch.tensor([2], dtype=torch.int8), torch.tensor(0.02)).item() == pytest.approx(0.04)
    assert Quantizer().quantize(torch.tensor([[1.0, -2.54]])).scale.item() == pytest.approx(0.02)
    _, scale, zero_point = Quantizer(asym=True).quantize(torch.tensor([[0.0, 2.54]]))
    assert scale.item() == pytest.approx(0.01) and zero_point.item() == -128


# -----------------------------------------------------------------------------
# stochastic rounding, and the straight-through estimator with its mask

def test_stochastic_rounding_by_enumeration():
    """Over all noises k/16 the mean of round(x) is exactly x, for every x = k/16: up with probability x - floor(x)."""
    x, noise = torch.arange(-64, 65)[:, None] / 16, torch.arange(16) / 16
    rounded = quant.round_stochastic(x.expand(-1, 16), noise.expand(129, -1))  # (129, 16)
    assert torch.equal(rounded, x.floor() + (noise < x - x.floor()))
    assert torch.equal(rounded.mean(1, keepdim=True), x) and torch.equal(rounded[::16], x[::16].expand(-1, 16))


@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9, 0.999]), st.integers(-3, 2))
@settings(max_examples=30)
def test_stochastic_quantizer_is_unbiased(seed, fraction, floor):
    """The mean of 4032 draws lies within 5 sigma of x; the same seed draws the same; integers never move."""
    quantizer, x = Quantizer(3, rounding="stochastic"), torch.full((64, 64), floor + fraction)
    x[0] = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 3.0]).repeat(8)  # the maximum 3 makes the scale 1
    torch.manual_seed(seed)
    y = quantizer(x)
    sigma = math.sqrt(fraction * (1 - fraction) / (63 * 64))
    assert abs(y[1:].double().mean().item() - x[1, 0].item()) < 5 * sigma
    assert set(y[1:].unique().tolist()) <= {floor, floor + 1.0} and torch.equal(y[0], x[0])
    torch.manual_seed(seed)
    assert torch.equal(quantizer(x), y) and not torch.equal(quantizer(x), y)


def test_stochastic_gradients_are_unbiased():
    """Over 400 backward passes the mean of dx and dw is exact within 5 sigma, at 4 bits, where nearest is biased."""
    x, g, layer, found = normal(6, 5), normal(6, 4, seed=1), QuantLinear(5, 4, bias=False), {}
    exact = torch.cat((g.double() @ layer.weight.double(), g.double().T @ x.double())).detach()
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        layer.recipe = make_recipe(QuantConfig(gbits=4, ggemm="both", rounding=rounding))
        draws = torch.stack([torch.cat(run(layer, x, g)[1:]) for _ in range(400)]).double()
        found[rounding] = (draws.mean(0) - exact).abs(), draws.std(0) / 20
    bound = 5 * found["stochastic"][1] + 1e-6
    assert (found["stochastic"][0] <= bound).all()
    assert (found["nearest"][0] > bound).any() and found["nearest"][1].max() < 1e-12


@given(cases(("int",), low=-2, high=3), st.sampled_from([0.02, 0.5, 1.0, 3.0]), st.integers(-9, 9))
@example((torch.tensor([[127.0, 127.49, 127.5, 127.51, 128.5, -127.5, -128.0, -128.5, -128.51]]), INT8), 1.0, 0)
@example((torch.tensor([[7.5, 7.4999, -8.5, -7.5, 6.5, 0.0, -0.0]]), INT4), 1.0, -1)
@example(((torch.arange(-130, 130) + 0.5) * SOME, INT8), SOME, 0)
def test_ste_mask_is_the_clip_range(case, scale, zero):
    """Value and mask are torch.fake_quantize's, a scale per row, bit for bit: 1 where no code was clamped, else 0.

    The last example lies near ties, where x / scale would decide otherwise than x times a reciprocal, as torch has it.
    """
    x, bits = case[0].clamp(-1e7, 1e7), case[1].bits  # theirs goes through int64
    qmax, g, rows = 2 ** (bits - 1) - 1, normal(*x.shape, seed=1), torch.arange(len(x))[:, None]
    scale = scale * 2.0 ** -(rows % 3) if isinstance(scale, float) else scale
    zeros = (max(min(zero, qmax), -qmax) * (1 - rows % 3)).float()
    for zero_point, qmin in ((None, -qmax), (zeros, -qmax - 1)):
        z = zeros * 0 if zero_point is None else zeros
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = quant.round_ste(ours, scale, zero_point, bits)
        expected = torch.fake_quantize_per_channel_affine(theirs, scale.flatten(), z.flatten().int(), 0, qmin, qmax)
        dx, = torch.autograd.grad(y, ours, g)
        assert bitwise(y.detach(), expected.detach() + 0.0)
        assert torch.equal(dx, *torch.autograd.grad(expected, theirs, g))
        steps = torch.round(x * (1.0 / scale)) + z
        assert torch.equal(dx, torch.where((steps >= qmin) & (steps <= qmax), g, 0.0))
        assert quant.round_ste(x.bfloat16(), scale, zero_point, bits).dtype == torch.bfloat16


# -----------------------------------------------------------------------------
# the three GEMMs

@given(cases(low=-8, high=8), st.data())
def test_gemm_against_float64(case, data):
    """gemm of any two operands, transposed or not, is the float64 product of what they stand for; backward its adjoint.

    Run in float64 it may differ by the one fp32 rounding of each dequantized element, in fp32 by L + 5 roundings.
    """
    x, quantizer = case
    turned = replace(quantizer, tile=quantizer.tile[::-1])
    a = data.draw(st.sampled_from([x, quantizer.quantize(x), turned.quantize(x.T).T]))
    tall = normal(x.shape[1], data.draw(st.integers(1, 5)))
    tile = data.draw(st.sampled_from([(None, None), (1, None), (None, 1), (1, 1)]))
    other = Quantizer(8, tile, data.draw(st.booleans()))
    b = data.draw(st.sampled_from([tall.T, other.quantize(tall).T, other.quantize(tall.T)]))
    left, right = (t.double() if isinstance(t, torch.Tensor) else restore(t).double() for t in (a, b))
    bound, exact = left.abs() @ right.abs().T * U, left @ right.T
    assert ((quant.gemm(a, b, torch.float64) - exact).abs() <= 2.01 * bound).all()
    y = quant.gemm(a, b, torch.float32)
    assert y.dtype == torch.float32 and ((y - exact).abs() <= (x.shape[1] + 5) * bound).all()
    assert quant.gemm(a, b, torch.bfloat16).dtype == torch.bfloat16
    g = normal(*y.shape, seed=2).double()
    grads = quant.linear_backward(g, a, b, Recipe())
    for ours, to, other in zip(grads, (g, g.T), (right, left), strict=True):
        assert ((ours - to @ other).abs() <= 2.01 * U * (to.abs() @ other.abs())).all()
    for ours, one in zip(quant.linear_backward(-4 * g, a, b, Recipe()), grads, strict=True):
        assert torch.equal(ours, -4 * one)  # linear in g


@pytest.mark.parametrize("length", [768, 3072])
def test_bf16_gemm_of_codes_is_the_int32_accumulator(length):
    """Integers up to 256 are exact in bf16, and a bf16 GEMM on codes is the int32 accumulator rounded to bf16."""
    integers = torch.arange(-256, 257)
    assert torch.equal(integers.bfloat16().long(), integers) and torch.tensor(257.0).bfloat16().item() == 256
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        torch.manual_seed(0)
        a, b = (torch.randint(-127, 128, (rows, length), dtype=torch.int8) for rows in (65, 130))
        a[0], b[0] = 127, 127  # the longest sum, 2^23.6 and 2^25.6
        a[1], b[1] = -127, 126
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
    size = g.double().abs().max()  # no quantized g is larger
    bounds = [(xq.abs() @ wq.abs().T + bias.abs()) * (x.shape[1] + 7),
              size * b.abs().sum(0) * (w.shape[0] + 7), size * a.abs().sum(0) * (x.shape[0] + 7)]
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
@settings(max_examples=200)
@example((1, 1, 1, QuantConfig(**W8A8G8)), 0, 0)
@example((7, 1, 5, QuantConfig(wbits=8, abits=4, asym=True, backward="fp")), 1, 0)
@example((4, 6, 9, QuantConfig(wbits=4, wgran="per_tensor", gbits=8, split_qkv=True, ggemm="both")), 2, -8)
@example((4, 6, 384, QuantConfig(gbits=8, split_qkv=True)), 2, 0)  # a third as long as --wblock's default
@example((4, 6, 8, QuantConfig(gbits=8, ggran="per_block", wblock=2, ggemm="both")), 3, -3)
@example((9, 7, 8, QuantConfig(**FP8 | {"ggran": "per_token"})), 4, -9)
def test_quant_linear_against_its_twin(layer, seed, exponent):
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


def test_per_row_of_unquantized_operands():
    """With nothing to fold, a row is a token in grad_input and an output in grad_weight: per_token, per_channel."""
    x, w, g = normal(12, 7), normal(5, 7, seed=1), normal(12, 5, seed=2)
    rows, tokens, channels = (
        quant.linear_backward(g, x, w, make_recipe(QuantConfig(gbits=8, ggran=f"per_{word}", ggemm="both")))
        for word in ("row", "token", "channel"))
    assert bitwise(rows[0], tokens[0]) and bitwise(rows[1], channels[1])


# -----------------------------------------------------------------------------
# the layer and its slots

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


class Foreign(NamedTuple):
    """Codes of another kind: what unpack() returns enters a GEMM, and backward="ste" asks for T of what was kept."""
    codes: torch.Tensor
    scale: torch.Tensor

    def unpack(self):
        return Quantized(self.codes, self.scale, None)

    T = property(lambda self: self.unpack().T)


FOREIGN = SimpleNamespace(quantize=lambda x: Foreign(*INT4.quantize(x)[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot", [None, FOREIGN, *FLOATS, Quantizer(8, (2, 4), asym=True)], ids=str)
def test_what_waits_for_backward(slot, dtype):
    """Codes and scales of x and w (ste), x and w (fp), or w and the codes of x.T (early, otherwise bit for bit fp).

    Codes of another kind give bit for bit what the same numbers as Quantized give.
    """
    layer, x, g = QuantLinear(16, 8, bias=False), normal(4, 16).to(dtype), normal(4, 8, seed=1).to(dtype)

    def results(slot, backward):
        own = None if backward == "ste" else slot
        layer.recipe = Recipe(slot, slot, slot, own, slot, own, backward)
        return run(layer, x, g)

    def size(z):
        return sum(t.nbytes for t in (slot.quantize(z) if slot else [z]) if t is not None)
    w = size(layer.weight.detach()) if slot else 0  # `kept` does not count the weight itself
    for backward, expected in (("ste", size(x) + w), ("fp", x.nbytes), ("early", size(x.T))):
        ours = results(slot, backward)
        assert kept(layer, x) == expected
        assert slot is not FOREIGN or all(map(bitwise, ours, results(INT4, backward)))
    assert all(map(bitwise, ours, results(slot, "fp")))


@pytest.mark.parametrize("recipe, bias", [(None, True), (None, False), (Recipe(), False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_rounded_is_nn_linear(dtype, recipe, bias):
    """bits=32: forward and every gradient are F.linear's, bit for bit, for an fp32 weight and any input dtype.

    Six slots of None take the hand-written path and still give its numbers and dtypes.
    """
    assert make_recipe(QuantConfig()) is None and Quantizer(32)(ONE) is ONE
    plain, ours = torch.nn.Linear(33, 17, bias), QuantLinear(33, 17, bias, recipe)
    ours.load_state_dict(plain.state_dict())
    x, g = normal(10, 33).view(2, 5, 33).to(dtype).requires_grad_(), normal(10, 17, seed=1).view(2, 5, 17).to(dtype)
    y = F.linear(x, *(p.to(dtype) for p in plain.parameters()))
    expected = [y.detach(), *torch.autograd.grad(y, [x, *plain.parameters()], g)]
    for a, b in zip(run(ours, x, g), expected, strict=True):
        assert bitwise(a, b) or recipe and a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_finite_differences():
    """Where nothing is rounded backward, reparam and bias pass float64 finite differences; no second derivative."""
    def layer(x, weight, bias):
        linear = QuantLinear(4, 3, recipe=Recipe(), reparam=lambda w: w.tanh() * w.norm())
        return torch.func.functional_call(linear, {"weight": weight, "bias": bias}, x)
    inputs = [normal(10, 4).view(2, 5, 4), normal(3, 4, seed=1), normal(3, seed=2)]
    inputs = [t.double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(layer, inputs)
    dx, = torch.autograd.grad(layer(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_compiled_equals_eager():
    """Integers with zero points and FP8 that folds: one graph, no bit of y, dx, dw changes; db sums in other order."""
    torch._dynamo.reset()
    layer = torch.nn.Sequential(QuantLinear(33, 21, recipe=make_recipe(QuantConfig(**W8A8G8, asym=True))),
                                QuantLinear(21, 12, recipe=make_recipe(QuantConfig(**FP8))))
    x, g = normal(34, 33).view(2, 17, 33), normal(34, 12, seed=1).view(2, 17, 12)
    for i, (a, b) in enumerate(zip(run(layer, x, g), run(torch.compile(layer, fullgraph=True), x, g), strict=True)):
        assert bitwise(a, b) or i in (3, 5)  # y, dx, dw, db, dw, db; fp32
        torch.testing.assert_close(a, b)


def test_no_gemm_that_nobody_needs():
    """An input without gradient costs no grad_input, a frozen weight no grad_weight: GEMMs counted by their shape."""
    shapes = []
    recipe = Recipe(engine=lambda a, b, dtype: shapes.append((*a.shape, len(b))) or quant.gemm(a, b, dtype))
    for x_needs, w_needs in product((False, True), repeat=2):
        layer, x = QuantLinear(4, 5, recipe=recipe), normal(3, 4).requires_grad_(x_needs)
        layer.weight.requires_grad_(w_needs)
        shapes.clear()
        layer(x).sum().backward()
        assert shapes == [(3, 4, 5)] + [(3, 5, 4)] * x_needs + [(5, 3, 4)] * w_needs
        assert [t.grad is not None for t in (x, layer.weight, layer.bias)] == [x_needs, w_needs, True]


@pytest.mark.parametrize("reparam", [lambda w: 3 * w.sin(), torch.nn.PReLU()], ids=["function", "module"])
def test_reparam_is_trained_through(reparam):
    """What reparam returns is quantized, and autograd differentiates it; a module's parameters are the layer's, too."""
    x, g, recipe = normal(5, 4), normal(5, 3, seed=1), make_recipe(QuantConfig(**W8A8))
    layer, plain = QuantLinear(4, 3, False, recipe, reparam), QuantLinear(4, 3, False, recipe)
    used = layer.used_weight()
    assert bitwise(used, reparam(layer.weight))
    assert len([*layer.parameters()]) == 1 + isinstance(reparam, torch.nn.Module)
    plain.load_state_dict({"weight": used})
    y, dx, dw = run(plain, x, g)
    for a, b in zip(run(layer, x, g), (y, dx, *torch.autograd.grad(used, [*layer.parameters()], dw)), strict=True):
        assert bitwise(a, b)
    layer.recipe = None
    assert bitwise(layer(x).detach(), F.linear(x, plain.weight).detach())


def test_empty_input():
    """No tokens are no error: an empty output, and gradients of zero."""
    layer = QuantLinear(4, 3, recipe=make_recipe(QuantConfig(**W8A8G8)))
    y, dx, dw, db = run(layer, torch.zeros(2, 0, 4), torch.zeros(2, 0, 3))
    assert y.shape == (2, 0, 3) and dx.shape == (2, 0, 4) and not dw.any() and not db.any()


# -----------------------------------------------------------------------------
# what is refused: the error is about the first flag of a line; where it does not fit another, that is the last

IDLE = """wgran=per_tensor; wgran=per_block abits=8; wfmt=e4m3 abits=8; agran=per_channel wbits=8; asym=True gbits=8;
afmt=e5m2 wbits=8; ggran=per_tensor wbits=8; ggemm=both abits=8; gfmt=e5m2; rounding=stochastic wbits=8;
wblock=64 wbits=8; split_qkv=True; split_qkv=True wbits=8; split_qkv=True abits=8 agran=per_tensor;
split_qkv=True gbits=8 ggran=per_channel; backward=fp; backward=fp gbits=8; gemm=int8; gemm=int8 wbits=8;
gemm=int8 abits=8; quant_head=True""".replace("\n", " ").split("; ")
PER_ROW = "gbits=8 ggran=per_row"
UNFIT = [f"{line}={fmt}" for fmt in FLOAT8 for line in (
    "wbits=4 wfmt", "abits=7 afmt", "asym=True abits=8 afmt", "gbits=2 gfmt", "rounding=stochastic gbits=8 gfmt")]
UNFIT += [f"{line} wbits=8 abits=8 gemm=int8" for line in (
    "wgran=per_block", "agran=per_block", "agran=per_channel", "asym=True", "wfmt=e4m3", "afmt=e5m2",
    "ggran=per_token gbits=8", "ggran=per_tensor gbits=8", f"gfmt=e5m2 {PER_ROW}", f"backward=fp {PER_ROW}")]
UNFIT += [f"{line} {PER_ROW}" for line in ("agran=per_block abits=8", "wgran=per_block wbits=8", "asym=True abits=8")]


@pytest.mark.parametrize("line", IDLE + UNFIT)
def test_refused_flags(line):
    """What has no effect or does not fit is an error that names flags, values and a way out that works."""
    def config(words):
        return QuantConfig(**{name: {"True": True, "False": False}.get(value, int(value) if value.isdigit() else value)
                              for name, value in (word.split("=") for word in words)})
    first, *others = line.split()
    with pytest.raises(ValueError) as error:
        config([first, *others])
    message = str(error.value)
    if line in IDLE:
        assert re.fullmatch(f"--{first} has no effect (without|while) .*; drop it or add that", message)
        config(others)
    else:
        assert message.startswith(f"--{first} does not fit --{others[-1]}: ")
        config([*others, re.search(rf"; use --({first.split('=')[0]}=\w+)", message)[1]])


def test_every_flag_is_in_the_tables():
    """Each flag has its case above, but skip_blocks: that one is checked where the number of blocks is known."""
    named = {line.split("=")[0] for line in IDLE + UNFIT}
    assert named | {"skip_blocks"} == {f.name for f in fields(QuantConfig)} and QuantConfig(skip_blocks=(0, 11))


@pytest.mark.parametrize("make, message", [
    *((lambda b=b: Quantizer(b), f"bits={b} is not supported: use 2 to 8, or 32") for b in (0, 1, 9, 16, 31, 33, -8)),
    *((lambda flag=flag: QuantConfig(**{flag: 16}), f"--{flag}=16 is not supported: use 2 to 8, or 32")
      for flag in ("wbits", "abits", "gbits")),
    (lambda: QuantConfig(wbits=8, wgran="per_block", wblock=0), "--wblock=0 must be at least 1"),
    (lambda: Quantizer(8, (1, 5))(torch.zeros(4, 12)), r"a tile of 1 x 5 does not divide a .* of \(4, 12\).*--wblock"),
    (lambda: Quantizer(8, (3, None))(torch.zeros(4, 12)), "tile of 3 x 12 does not divide"),
    (lambda: Quantizer(rounding="up"), "rounding='up': use 'nearest' or 'stochastic'"),
    (lambda: Quantizer(fmt="e3m4"), "fmt='e3m4': use 'int', 'e4m3' or 'e5m2'"),
    *((lambda how=how: Quantizer(fmt="e4m3", **how), "fmt='e4m3' is symmetric, 8 bits, rounded to nearest")
      for how in ({"bits": 4}, {"bits": 32}, {"asym": True}, {"rounding": "stochastic"})),
    (lambda: Recipe(backward="late"), "backward='late': use 'ste', 'fp' or 'early'"),
    *((lambda slot=slot: Recipe(**{slot: Quantizer()}), "use 'fp' or 'early' to give backward its own")
      for slot in ("grad_input_weight", "grad_weight_input")),
    (lambda: QuantLinear(4, 3, recipe=Recipe())(torch.zeros(2, 4).half()), "float16.*use bfloat16 or float32"),
])
def test_refused(make, message):
    """What a user can cause is a ValueError that says what is wrong and what to use instead."""
    with pytest.raises(ValueError, match=message):
        make()
