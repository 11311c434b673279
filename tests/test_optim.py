"""Tests of optim.py: against torch's AdamW, a step written in float64, the published code book; the seven properties.

Most run uncompiled: the arithmetic is the same (test_7 says so, bit for bit), and it starts at once.
"""

import copy
import io
import math
import multiprocessing
import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import optim
from optim import AdamW, Moment, OptimConfig, adamw_update, decode, encode, hash_noise, new_scale, param_groups

U, INF, NAN = 2.0**-24, math.inf, math.nan
ONE = torch.ones(1, 1)
BOOKS = [Moment(bits, fmt, second=second) for fmt in ("linear", "dynamic", "power") for bits in (8, 4)
         for second in (False, True)]
SHAPES = [(48, 256), (77, 101), (5000,), (64, 64), (4097,), (100,), (30, 50, 3)]  # ragged, odd, 1-D, small, 3-D


def both(bits=8, **options):
    """Return the flags of both moments in one format."""
    return {f"m{i}{name}": value for i in (1, 2) for name, value in {"bits": bits, **options}.items()}


DEFAULT8, DEFAULT4, DYNAMIC8, M1 = both(), both(4), both(fmt="dynamic"), dict(m1bits=8)
NEAREST8, NEAREST4 = both(round="nearest"), both(4, round="nearest")
CONFIGS = [DEFAULT8, DEFAULT4, DYNAMIC8, M1, dict(m2bits=4), dict(m1bits=4, m2bits=8), NEAREST8, NEAREST4,
           both(fmt="linear"), both(round="stochastic"), both(4, fmt="linear", round="stochastic"),
           both(4, fmt="dynamic"), both(gran="per_tensor"), both(gran="per_channel"),
           both(4, gran="per_tensor", round="stochastic")]


def name(case):
    """Name a parametrized case."""
    values = case.values() if isinstance(case, dict) else (case.fmt, case.bits, "mv"[case.second])
    return "-".join(map(str, values)) or "fp32"


by_book, by_config = (pytest.mark.parametrize(*args, ids=name) for args in (("moment", BOOKS), ("config", CONFIGS)))
by_noisy_book = pytest.mark.parametrize("moment", [moment for moment in BOOKS if moment.fmt != "dynamic"], ids=name)


def make(config, shapes=SHAPES, lr=1e-3, dtype=torch.float32, **options):
    """Return (parameters, optimizer), the same ones for the same arguments."""
    gen = torch.Generator().manual_seed(0)
    params = [nn.Parameter((torch.randn(s, generator=gen) * 0.02).to(dtype)) for s in shapes]
    return params, AdamW(params, lr, OptimConfig(**config), **{"compile": False, **options})


def walk(params, opt, steps, sign=1.0):
    """Take steps with gradients that depend on the step's number: normal times a log-uniform magnitude."""
    for t in steps:
        gen = torch.Generator().manual_seed(t)
        for p in params:
            g = torch.randn(p.shape, generator=gen) * 10 ** (-2 * torch.rand(p.shape, generator=gen))
            p.grad = (sign * g).to(p.dtype)
        opt.step()


def same(params, others, opt=None, opt2=None):
    """Whether two lists of parameters, and their states, are equal in dtype and every bit."""
    states = [[opt.state[p], opt2.state[q]] for p, q in zip(params, others, strict=True)] if opt else []
    if any(a.keys() != b.keys() for a, b in states):
        return False
    pairs = [*zip(params, others, strict=True), *((a[k], b[k]) for a, b in states for k in a)]
    return all(a.dtype == b.dtype and a.shape == b.shape and
               torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b))) for a, b in pairs)


# -----------------------------------------------------------------------------
# code books

def published_dynamic(signed, bits):
    """The book as 2110.02861 and bitsandbytes describe it: middles of equal bins per decade, 0 and 1 (float64)."""
    values = [0.0, 1.0]
    for i in range(bits - 1):
        edges = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - (bits - 2))).tolist()
        values += middles + [-x for x in middles] * signed
    return torch.tensor(sorted(values), dtype=torch.float64)


def book(moment):
    """Return the value of every code in units of the scale, in float64 and by another way than optim.py's."""
    if moment.fmt == "dynamic":
        return published_dynamic(not moment.second, moment.bits)
    half, square = 2 ** (moment.bits - 1), moment.fmt == "power"
    if moment.second:
        k = torch.arange(1, 2 * half + 1).double() if square else torch.arange(half).double()
        return k**2 if square and moment.bits == 8 else k
    k = torch.arange(-half + 1, half).double()
    return k * k.abs() if square else k


def unpack(codes, bits):
    """Codes (n, B/2) of 4 bits -> (n, B): low halves first."""
    return torch.cat([codes & 15, codes >> 4], 1) if bits == 4 else codes


def stored(opt, p):
    """Return m and v of p as its state has them, in float64, in rows (n, B)."""
    group, state = next(g for g in opt.param_groups if any(p is q for q in g["params"])), opt.state[p]
    result = []
    for i, key in enumerate(("exp_avg", "exp_avg_sq")):
        x, moment = state[key], Moment(*group[f"m{i + 1}"])._replace(second=bool(i))
        if x.dtype == torch.uint8:
            x = book(moment)[unpack(x, moment.bits).long()] * state["scales"][:, i, None].double()
        result.append(x.double())
    return result


def nearest_enough(x, scale, codes, moment, ulps, size=None):
    """Whether every code is the nearest one, but for x having errors of `ulps` units of rounding of `size` (x)."""
    values = book(moment)
    slack = ulps * U * (x.abs() if size is None else size).double() / scale.double()
    x = (x.double() / scale.double()).contiguous()
    right = torch.searchsorted(values, x).clamp(1, len(values) - 1)
    best = torch.minimum((x - values[right]).abs(), (x - values[right - 1]).abs())
    return ((x - values[codes.long()]).abs() <= best + slack).all()


@by_book
def test_code_books_are_the_documented_ones_and_every_code_survives(moment):
    """Ascending: a code is a rank. Dynamic m has 1 but no -1. encode(decode(code)) = code, at any scale, with noise."""
    codes = torch.arange(len(book(moment)), dtype=torch.uint8).view(1, -1)
    values = decode(codes, ONE, moment)[0]
    torch.testing.assert_close(values.double(), book(moment), rtol=1.001 * U, atol=0)  # one rounding to fp32
    assert (values[1:] > values[:-1]).all()
    if moment.fmt == "dynamic":
        assert len(values) == 2**moment.bits and values[-1] == 1 and (values == 0).sum() == 1 and -1 not in values
    for scale in (ONE, ONE * 3e-9, ONE * 7e4, ONE * 1.1e-30):
        x = decode(codes, scale, moment)
        assert torch.equal(encode(x, scale, moment), codes)
        for noise in (0.001, 0.5, 0.999, *((2.0**-16, 1 - 2.0**-16) if scale is ONE else ())):
            assert torch.equal(encode(x, scale, moment, torch.tensor([[noise]])), codes)


@by_book
def test_encode_is_nearest_and_ties_are_the_documented_ones(moment):
    """Random numbers and all middles; ties go away from zero, in dynamic up."""
    gen, values = torch.Generator().manual_seed(0), book(moment)
    mid, low = (values[1:] + values[:-1]) / 2, torch.arange(len(values) - 1)
    x = values[-1] * torch.cat([torch.rand(20000, generator=gen), 10 ** (-9 * torch.rand(20000, generator=gen))])
    x = torch.cat([x, *([] if moment.second else [-x]), *(mid * (1 + e * U) for e in range(-6, 7, 2))])
    x = x.float().view(1, -1)
    assert nearest_enough(x, ONE, encode(x, ONE, moment), moment, ulps=4)

    up = mid > 0
    exact = (mid.float().double() - mid).abs() <= 1e-14 * mid.abs()  # dynamic: 0.1 + 0.9 j / 64 is for j = 4, 9, ...
    assert exact.all() if moment.fmt != "dynamic" else exact.sum() >= 20 or moment.bits == 4
    at, above, below = (encode((mid.float() * (1 + e * U)).view(1, -1), ONE, moment)[0] for e in (0, 4, -4))
    assert torch.equal(at[exact], (low + (up | (moment.fmt == "dynamic")))[exact].byte())
    assert torch.equal(above, (low + up).byte()) and torch.equal(below, (low + ~up).byte())  # (away from, towards 0)


@given(st.sampled_from(BOOKS), st.sampled_from(["per_tensor", "per_block"]), st.floats(-30, 15), st.integers(0, 99),
       st.sampled_from([(3, 64), (5, 7)]), st.booleans())
@settings(max_examples=60)
@example(BOOKS[0], "per_block", -38.5, 0, (3, 64), False)
@example(BOOKS[11], "per_tensor", -38.5, 0, (5, 7), True)
def test_stored_moment_is_close(moment, gran, magnitude, seed, shape, outlier):
    """Any magnitude, zeros, an outlier, subnormals: no code is closer, and the scale has the shape of its blocks."""
    moment = moment._replace(gran=gran)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    x = x.abs() if moment.second else x
    x[0], x[1].view(-1)[5] = 0.0, x.abs().max() * (1000 if outlier else 1)
    scale = new_scale(x, moment)
    assert scale.shape == (1 if gran == "per_tensor" else len(x), 1) and (scale > 0).all()
    codes = encode(x, scale, moment)
    y = decode(codes, scale, moment)
    assert codes.dtype == torch.uint8 and torch.isfinite(y).all() and (x * y >= 0).all()
    assert nearest_enough(x, scale, codes, moment, ulps=6)
    assert (y[0].abs() <= scale[0]).all() and (moment.second or (y[0] == 0).all())
    if x.max() > 1e-28:
        assert y.max() == pytest.approx(x.max().item(), rel=1e-6 if x.max() == x.abs().max() else 0.5)


@by_noisy_book
def test_stochastic_rounding_is_unbiased(moment):
    """To the code below or above, and the mean of many is the number: 5 sigma, and noise of 15 bits."""
    n = 2**16
    x = torch.cat([torch.tensor([0.999, 0.31, 0.117, 0.063]) * book(moment)[-1].float(), torch.tensor([1.3, 2.9])])
    x = (x if moment.second else torch.cat([x, torch.tensor([0.02, 0.3, 0.9])]))
    x = (x if moment.second else torch.cat([x, -x])).expand(n, -1)
    noise = hash_noise(torch.tensor([12345, 0], dtype=torch.int32), n)[moment.second]
    y = decode(encode(x, ONE, moment, noise), ONE, moment).double()
    up = (book(moment) > x[0, :, None].double()).int().argmax(1)
    for i, column in enumerate(y.T):
        torch.testing.assert_close(column.unique(), book(moment)[up[i] - 1:up[i] + 1], rtol=0, atol=0)
    assert ((y.mean(0) - x[0].double()).abs() <= 5 * y.std(0) / n**0.5 + (y.amax(0) - y.amin(0)) * 2.0**-16).all()


@by_noisy_book
def test_the_ends_of_a_book(moment):
    """The largest is not rounded up past its code (256 would be 0), though an ulp too large, with the largest noise.

    Whatever the noise, power's v is never zero while its block is not: what is below its smallest code becomes that.
    """
    x = 10 ** (torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0)) * 60 - 28)
    x = torch.cat([x, (1 + torch.arange(100_000) * 2.0**-22)[:, None]])
    codes = encode(x, new_scale(x, moment), moment, torch.tensor([[1 - 2.0**-16]]))
    assert (codes == len(book(moment)) - 1).all()
    if moment.fmt == "power" and moment.second:
        x = torch.tensor([[0.0, 1e-9, 0.2, 0.7, 1.0]]).expand(99, -1)
        assert (encode(x, ONE, moment, torch.linspace(1e-5, 1 - 1e-5, 99)[:, None]) == 0).all()


@pytest.mark.parametrize(("floor", "scale", "v"), [(True, 1e-8 / 127, 1.8e-10), (True, 1e-8 / 127, 3e-11),
                                                   (False, 1.8e-10 / 127, 1.8e-10)])
def test_the_papers_floor(floor, scale, v):
    """It holds max|x|, as amax.clamp(min=1e-8) / 127 does, and not the scale: v below half a step becomes zero."""
    (p,), opt = make({**both(fmt="linear"), "mfloor": floor}, [(16, 256)])
    p.grad = torch.full_like(p, (v / 0.05) ** 0.5)
    opt.step()
    assert opt.state[p]["scales"][0, 1].item() == pytest.approx(scale, rel=1e-4)
    assert ((stored(opt, p)[1] == 0) == (v < scale / 2)).all()


def test_noise_is_uniform_and_depends_on_seed_and_row_only():
    """64 bins, no correlation of the two, of neighbours or of seeds; a piece sees the noise of the whole."""
    key = torch.tensor([[5, 0], [6, 0], [5, 400]], dtype=torch.int32)
    a, b = hash_noise(key[0], 256000)
    other, _ = hash_noise(key[1], 256000)
    for u in (a, b, other):
        assert 0 < u.min() and u.max() < 1 and (torch.histc(u, 64, 0, 1) - 4000).abs().max() < 5.5 * 4000**0.5
    columns = torch.stack([u.flatten() for u in (a, b, a.flatten().roll(1), a.flatten().roll(256), other)])
    assert (torch.corrcoef(columns) - torch.eye(5)).abs().max() < 5 / 256000**0.5
    for u, whole in zip(hash_noise(key[2], 600), (a, b), strict=True):
        assert u.shape == (600, 1) and torch.equal(u, whole[400:1000])


# -----------------------------------------------------------------------------
# the update

RATES = st.tuples(st.floats(1e-4, 0.1), st.floats(0, 0.99), st.floats(0.5, 0.9999), st.floats(0, 0.3),
                  st.sampled_from([1e-8, 1e-6]))  # lr, beta1, beta2, weight decay, eps


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.booleans(), RATES)
@settings(max_examples=12)
def test_32_bits_is_torchs_adamw(shape, fused, rates):
    """60 steps with a moving learning rate: the fused kernel bit for bit, foreach to rounding."""
    (lr, beta1, beta2, decay, eps), gen = rates, torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.randn(shape, generator=gen))
    q = nn.Parameter(p.detach().clone())
    theirs = torch.optim.AdamW([q], lr, (beta1, beta2), eps, decay, fused=fused, foreach=not fused)
    ours = AdamW([p], lr, OptimConfig(weight_decay=decay, beta1=beta1, beta2=beta2), eps=eps)
    for t in range(60):
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = lr / (1 + t / 20)
        q.grad = torch.randn(shape, generator=gen)
        p.grad = q.grad.clone()
        theirs.step()
        ours.step()
    assert not fused or same([p], [q], ours, theirs)
    torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-5 * 60 * lr)


def hyper(t, lr, beta1, beta2, decay, eps, dtype=torch.float32):
    """The seven numbers as the top of optim.py describes them."""
    root = math.sqrt(1 - beta2**t)
    return torch.tensor([1 - lr * decay, lr * root / (1 - beta1**t), beta1, 1 - beta1, beta2, 1 - beta2, eps * root],
                        dtype=dtype)


@given(RATES)
@settings(max_examples=8)
def test_update_with_fp32_moments_is_torchs_adamw(rates):
    """adamw_update itself, both moments in 32 bits, beside torch's AdamW in float64: 60 steps, to fp32 rounding."""
    (lr, *betas, decay, eps), gen = rates, torch.Generator().manual_seed(2)
    p, m, v, scales = torch.randn(8, 32, generator=gen), torch.zeros(8, 32), torch.zeros(8, 32), torch.zeros(8, 2)
    q = nn.Parameter(p.double())
    theirs = torch.optim.AdamW([q], lr, tuple(betas), eps, decay)
    for t in range(1, 61):
        g = torch.randn(p.shape, generator=gen)
        q.grad = g.double()
        theirs.step()
        adamw_update(p, g, m, v, scales, hyper(t, *rates), None, Moment(), Moment(second=True))
    # a step rounds p three times: in the constant 1 - lr wd, in the product with it, in the difference
    torch.testing.assert_close(p.double(), q.detach(), rtol=3 * 60 * U, atol=1e-5 * 60 * lr)
    # m near zero is a difference of larger numbers: its rounding counts in units of the gradient
    torch.testing.assert_close(m.double(), theirs.state[q]["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(v.double(), theirs.state[q]["exp_avg_sq"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("config", [*CONFIGS, both(4, fmt="linear")], ids=name)
def test_a_step_is_the_papers_in_float64(config):
    """Read the codes, update, step with the FRESH moments, store: each step from what optim.py has stored before."""
    (p,), opt = make(config, [(96, 64)], lr=0.01)  # a block is also a row
    old, group = [torch.zeros(96, 64).double()] * 2, opt.param_groups[0]
    for t in range(1, 9):
        before = p.detach().double()
        walk([p], opt, [t])
        g, state, new = p.grad.double(), opt.state[p], stored(opt, p)
        decay, lr, b1, rest1, b2, rest2, eps = hyper(t, 0.01, 0.9, 0.95, 0.1, 1e-8, torch.float64)
        m, v = b1 * old[0] + rest1 * g, b2 * old[1] + rest2 * g * g
        sizes = b1 * old[0].abs() + rest1 * g.abs(), v  # m can be the difference of larger numbers
        error = (p.detach().double() - (decay * before - lr * m / (v.sqrt() + eps))).abs()
        assert (error <= 4 * U * before.abs() + 16 * U * lr * sizes[0] / (v.sqrt() + eps)).all()
        for i, (x, key) in enumerate(zip((m, v), ("exp_avg", "exp_avg_sq"), strict=True)):
            moment = Moment(*group[f"m{i + 1}"])._replace(second=bool(i))
            if moment.bits == 32:
                assert ((new[i] - x).abs() <= 4 * U * sizes[i]).all()
                continue
            scale, codes = state["scales"][:, i, None].double(), unpack(state[key], moment.bits).long()
            values = book(moment)
            top = x.abs().amax(None if moment.gran == "per_tensor" else 1, keepdim=True)
            torch.testing.assert_close(scale * values[-1], top, rtol=1e-6, atol=1e-37)
            if moment.rounding == "nearest":
                assert nearest_enough(x, scale, codes, moment, 32, sizes[i])
            else:  # x lies between the codes beside it
                edges = torch.cat([torch.tensor([-INF]), values, torch.tensor([INF])])
                slack = 32 * U * sizes[i]
                assert ((edges[codes] * scale - slack < x) & (x < edges[codes + 2] * scale + slack)).all()
        old = new


# -----------------------------------------------------------------------------
# the seven properties

def largest_update(config, decades):
    """The largest |update| / lr of 110 steps with gradients' log-uniform magnitudes, drawn anew every ten steps."""
    (p,), opt = make({"weight_decay": 0.0, **config}, [(24, 256)], lr=1.0)
    gen, worst = torch.Generator().manual_seed(0), 0.0
    for t in range(110):
        if t % 10 == 0:
            size = 10 ** (-decades * torch.rand(p.shape, generator=gen))
        p.grad, before = size * torch.randn(p.shape, generator=gen).sign(), p.detach().clone()
        opt.step()
        worst = max(worst, (p.detach() - before).abs().max().item())
    return worst


@pytest.mark.parametrize("config", [DEFAULT8, DEFAULT4, NEAREST8, NEAREST4, DYNAMIC8, M1], ids=name)
def test_1_updates_are_bounded(config):
    """At most 3 lr (exact Adam: 1.2) with gradients of 1, 2 and 3 decades within a block."""
    assert max(largest_update(config, decades) for decades in (1, 2, 3)) <= 3


def test_1_linear_and_4_bit_dynamic_v_explode():
    """The paper's linear v rounds to zero before its m does: over 100 lr. So does v in 4-bit dynamic."""
    assert largest_update(dict(m2bits=8, m2fmt="linear"), 3) > 100 and largest_update(both(4, fmt="dynamic"), 3) > 50


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.get("m1fmt") != "dynamic"], ids=name)
def test_2_the_mirrored_gradient_gives_the_mirrored_update(config):
    """Exactly, weight decay and stochastic rounding included. (Dynamic has no -1: see the code books.)"""
    (params, opt), (others, opt2) = make(config), make(config)
    for q in others:
        q.data.neg_()
    walk(params, opt, range(4))
    walk(others, opt2, range(4), sign=-1.0)
    assert all(torch.equal(p, -q) for p, q in zip(params, others, strict=True))


@by_config
def test_3_a_zero_gradient_moves_nothing(config):
    """Not by one bit, without weight decay; and it leaves m at zero."""
    params, opt = make({**config, "weight_decay": 0.0})
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        opt.step()
    assert same(params, before)
    assert all((stored(opt, p)[0] == 0).all() for p in params if p.numel() >= 4096)


@by_config
def test_4_one_bad_element_harms_nobody(config):
    """A gradient with inf, nan or over 2^63 gives the bits of one with a zero there; one of 9e18 stays finite."""
    shapes = [s for s in SHAPES if math.prod(s) >= 4096]
    (params, opt), (others, opt2) = make(config, shapes), make(config, shapes)
    for t, bad in enumerate([INF, 0.0, NAN, -INF, 1e30, -1e19, 9e18]):
        for ps, o, value in (params, opt, bad), (others, opt2, bad if abs(bad) <= 9e18 else 0.0):
            gen = torch.Generator().manual_seed(t)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=gen)
                p.grad.view(-1)[77] = value
            o.step()
        assert same(params, others, opt, opt2)
    assert all(torch.isfinite(x).all() for x in [*params, *stored(opt, params[0])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, *CONFIGS], ids=name)
def test_5_a_resumed_run_is_the_same_bit_for_bit(config, dtype):
    """state_dict -> torch.save -> torch.load(weights_only=True), and the state keeps its dtypes."""
    (params, opt), (others, opt2), file = make(config, dtype=dtype), make(config, dtype=dtype), io.BytesIO()
    walk(params[:-1], opt, range(3))  # the last one has no gradient
    torch.save(opt.state_dict(), file)
    walk(others[:2], opt2, [9])  # what it has is replaced
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    file.seek(0)
    opt2.load_state_dict(torch.load(file, weights_only=True))
    assert same(params, others, opt, opt2)
    for ps, o in (params, opt), (others, opt2):
        walk(ps[:-1], o, range(3, 6))
    assert same(params, others, opt, opt2)
    expected = {32: torch.float32, 8: torch.uint8, 4: torch.uint8}[config.get("m1bits", 32)]
    assert opt2.state[others[0]]["exp_avg"].dtype == expected


@pytest.mark.parametrize(("bits", "each", "total"), [(8, 2 + 8 / 64, 2.13), (4, 1 + 8 / 64, 1.13)])
def test_6_bytes_of_the_state(bits, each, total):
    """2 and 1 + 8/64 bytes exactly where blocks fit, 2.13 and 1.13 over GPT-2 small; describe() says so."""
    c = 768
    layer = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (4 * c, c), (4 * c,), (c, 4 * c), (c,)]
    params = [nn.Parameter(torch.empty(s)) for s in [(50304, c), (1024, c), *layer * 12, (c,), (c,)]]
    opt = AdamW(params, 1e-3, OptimConfig(**both(bits)))
    line = opt.describe()[1]
    size = {p: sum(x.nbytes for key, x in opt.state[p].items() if key != "step") for p in params}
    assert len(params) == 148 and all(size[p] == (each if p.numel() >= 4096 else 8) * p.numel() for p in params)
    mean = sum(size.values()) / sum(p.numel() for p in params)
    assert round(mean, 2) == total
    assert f"{mean:.3f} bytes per parameter" in line and f"power{bits}+power{bits} 50 tensors" in line


def memory(field):
    """Bytes of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure peak memory")
@pytest.mark.parametrize(("compile", "copies"), [(True, 8), (False, 24)])
def test_6_temporary_memory(compile, copies):
    """A step of 16M elements takes a few fp32 pieces of 1M, and no copy of the tensor."""
    (p,), opt = make(DEFAULT8, [(4096, 4096)], compile=compile)
    walk(*make(DEFAULT8, [(64, 256)], compile=compile), range(2))  # compiles
    p.grad = torch.ones_like(p)
    opt.describe()  # allocates the state, and touches it
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts here
    before = memory("VmRSS")
    opt.step()
    assert memory("VmHWM") - before < copies * 4 * optim.PIECE


class TinyGPT(nn.Module):
    """The kinds of shapes of a GPT-2 with two blocks, head tied."""

    def __init__(self, c=96):
        super().__init__()
        self.wte, self.wpe, self.lm_head = nn.Embedding(301, c), nn.Embedding(64, c), nn.Linear(c, 301, bias=False)
        self.h = nn.ModuleList(nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c),
                                             nn.Linear(c, 4 * c), nn.Linear(4 * c, c)) for _ in range(2))
        self.lm_head.weight = self.wte.weight


@pytest.mark.parametrize("config", [DEFAULT8, NEAREST8, DEFAULT4, DYNAMIC8], ids=name)
def test_7_two_graphs_and_the_bits_of_eager(config, monkeypatch):
    """A new learning rate every step, ragged shapes, pieces, a missing gradient: two graphs at most, eager's bits."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    optim.compiled_update.cache_clear()
    counters.clear()
    monkeypatch.setattr(optim, "PIECE", 20_000)
    model, config = TinyGPT(), OptimConfig(**config)
    models = model, copy.deepcopy(model)
    opts = [AdamW(param_groups(m, config), 1e-3, config, compile=c) for m, c in zip(models, (True, False), strict=True)]
    params = [list(m.parameters()) for m in models]
    for t in range(4):
        for ps, opt in zip(params, opts, strict=True):
            for group in opt.param_groups:
                group["lr"] = 1e-3 * (t + 1)
            ps[5].grad = None
            walk([p for i, p in enumerate(ps) if t != 2 or i != 5], opt, [t])
        assert same(*params, *opts)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_7_many_formats_in_one_process(monkeypatch):
    """Dynamo's limit of recompilations (8; here 2) and what it has seen vary are each format's own."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, **{**k, "backend": "eager"}))
    torch._dynamo.reset()
    optim.compiled_update.cache_clear()
    try:
        with torch._dynamo.config.patch(recompile_limit=2):
            for config in M1, dict(m1bits=4), dict(m1bits=8, m1fmt="linear"), DEFAULT4, DYNAMIC8:
                walk(*make(config, [(64, 256)], compile=True), [0])
    finally:
        optim.compiled_update.cache_clear()
        torch._dynamo.reset()


# -----------------------------------------------------------------------------
# bookkeeping

@by_config
def test_odd_parameters(config, monkeypatch):
    """Non-contiguous ones, in one piece or many, are the straight ones; frozen, idle, empty ones are left alone."""
    crooked = nn.Parameter(torch.randn(60, 96, generator=torch.Generator().manual_seed(0)).t() * 0.02)
    before = crooked.detach().clone()
    straight, idle = nn.Parameter(before.contiguous()), nn.Parameter(torch.ones(70, 70))
    frozen = nn.Parameter(torch.ones(70, 70), requires_grad=False)
    rest = [frozen, idle, nn.Parameter(torch.empty(0, 9)), nn.Parameter(torch.empty(9, 0).bfloat16())]
    opt, opt2 = (AdamW(ps, 1e-3, OptimConfig(**config), compile=False) for ps in ([crooked, *rest], [straight]))
    walk([crooked, *rest[2:]], opt, range(3))
    monkeypatch.setattr(optim, "PIECE", 1000)
    walk([straight], opt2, range(3))
    assert not crooked.is_contiguous() and same([crooked], [straight], opt, opt2)
    assert (crooked != before).all() and (idle == 1).all() and opt.state[idle]["step"] == 0 and (frozen == 1).all()


def test_noise_differs_by_parameter_step_and_seed_only():
    """Equal gradients, other codes, in most of 64 rows; a missing gradient elsewhere changes nothing."""
    def codes(seed=0, missing=False, step=0):
        params, opt = make(both(4, round="stochastic"), [(16, 256)] * 3, seed=seed)
        for p in params:
            p.grad = torch.randn(64, generator=torch.Generator().manual_seed(7)).repeat(16, 4)  # equal blocks of 64
        params[0].grad = None if missing else params[0].grad
        opt.describe()  # makes the state
        for p in params:
            opt.state[p]["step"] += step
        opt.step()
        return [opt.state[p]["exp_avg"] for p in params[1:]]
    a, again = codes(), codes(missing=True)
    assert all(map(torch.equal, a, again)) and not torch.equal(*a)
    assert not any(torch.equal(a[0], other[0]) for other in (codes(seed=1), codes(step=1)))
    assert len(a[0].unique(dim=0)) > 20


@pytest.mark.parametrize("bits", [8, 4])
def test_a_channel_is_a_block_of_its_width(bits):
    """per_channel and per_block with the block as long as the row: the same bits."""
    (p, opt), (q, opt2) = (make({**both(bits, gran=gran), **block}, [(40, 128)])
                           for gran, block in (("per_channel", {}), ("per_block", {"mblock": 128})))
    walk(p, opt, range(4))
    walk(q, opt2, range(4))
    assert same(p, q, opt, opt2)


@pytest.mark.parametrize(("config", "m1", "m2"), [
    (DEFAULT8, "nearest", "stochastic"), (NEAREST8, "nearest", "nearest"), (DYNAMIC8, "nearest", "nearest"),
    (both(4, fmt="linear"), "nearest", "nearest"), (both(round="stochastic"), "stochastic", "stochastic")])
def test_v_is_rounded_stochastically_where_its_format_can(config, m1, m2):
    """auto: power's v, whose code has no zero; the paper's linear and bitsandbytes' dynamic stay as published."""
    formats = OptimConfig(**config).formats()
    assert (Moment(*formats["m1"]).rounding, Moment(*formats["m2"]).rounding) == (m1, m2)


BAD = [("weight_decay", dict(weight_decay=-1)), ("beta1", dict(beta1=1.0)), ("beta2", dict(beta2=-0.1)),
       ("m1bits", dict(m1bits=5)), ("m2bits", dict(m2bits=16)), ("m1fmt", dict(m1fmt="linear")),
       ("m2gran", dict(m1bits=8, m2gran="per_tensor")), ("m2round", dict(m2round="stochastic")),
       ("m2round", dict(m2round="nearest")), ("m1round", dict(m1bits=8, m1fmt="dynamic", m1round="stochastic")),
       ("m2round", {**DYNAMIC8, "m2round": "stochastic"}), ("m1gran", {**DEFAULT8, "m1gran": "per_tensor"}),
       ("mblock", dict(mblock=32)), ("mblock", {**M1, "mblock": 63}), ("mblock", {**M1, "mblock": 0}),
       ("mblock", {**M1, "m1gran": "per_channel", "mblock": 32}),
       ("mfloor", {**DEFAULT8, "mfloor": True}), ("membed32", dict(membed32=True))]


@pytest.mark.parametrize(("flag", "config"), BAD)
def test_a_useless_flag_is_refused_by_name(flag, config):
    """Each check of OptimConfig."""
    with pytest.raises(ValueError, match=rf"--{flag}\b"):
        OptimConfig(**config)


def test_parameters_that_cannot_be_stored_are_refused():
    """Odd rows in 4 bits and complex numbers at once, a sparse gradient in the step."""
    with pytest.raises(ValueError, match=r"\(77, 101\).*101"):
        make(both(4, gran="per_channel"), [(77, 101)])
    with pytest.raises(ValueError, match=r"\(3, 5\).*complex"):
        make({}, [(3, 5)], dtype=torch.complex64)
    table = nn.Embedding(1000, 8, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        AdamW(table.parameters(), 1e-3, OptimConfig(**DEFAULT8)).step()
    assert AdamW([{"params": []}], 1e-3).describe()[0] == 0


def test_a_foreign_state_is_refused():
    """Another format, block or shape, torch's own, a missing part: both sides are named, and nothing is loaded."""
    params, opt = make(DEFAULT8)
    fresh = copy.deepcopy(opt.state_dict())
    walk(params, opt, [0])
    saved, theirs = opt.state_dict(), torch.optim.AdamW(params)
    for config in ({}, DEFAULT4, NEAREST8, both(fmt="linear"), both(gran="per_channel")):
        with pytest.raises(ValueError, match=rf"\(8, 'power'.*this optimizer has .*\({config.get('m1bits', 32)},"):
            make(config, SHAPES)[1].load_state_dict(saved)
    walk(params, theirs, [0])
    with pytest.raises(ValueError, match=r"\(32,\).*this optimizer has.*power"):
        opt.load_state_dict(theirs.state_dict())
    for config, shapes in ({**DEFAULT8, "mblock": 32}, SHAPES), (DEFAULT8, [(48, 512), *SHAPES[1:]]):
        _, other = make(config, shapes)
        with pytest.raises(ValueError, match=r"uint8 \(192, 64\).*uint8 \((384, 32|384, 64)\)"):
            other.load_state_dict(saved)
        assert not other.state
    with pytest.raises(ValueError, match="this optimizer has"):
        make(DEFAULT8, SHAPES[:-1])[1].load_state_dict(saved)
    state = saved["state"]
    for broken, shape in (({k: v for k, v in state.items() if k != 1}, r"\(77, 101\).*nothing"),
                          ({**state, 2: {"step": state[2]["step"]}}, r"exp_avg of a \(5000,\).*nothing")):
        with pytest.raises(ValueError, match=shape):
            make(DEFAULT8)[1].load_state_dict({**saved, "state": broken})
    opt.load_state_dict(fresh)  # of a run before its first step
    assert not opt.state


@pytest.mark.parametrize("broken", [{}, None, {"param_groups": 3}, {"param_groups": "ab"}, {"state": [1]},
                                    {"state": {0: 5}}, {"state": {0: {"exp_avg": 1}}}, {"param_groups": [{"lr": 1}]},
                                    {"param_groups": [{"params": [0], "m1": (32,), "m2": (32,)}]}], ids=str)
def test_nonsense_is_no_state(broken):
    """Whatever is missing or of another type: one line."""
    params, opt = make({}, SHAPES[:1])
    walk(params, opt, [0])
    with pytest.raises(ValueError, match=r"^this is not the state_dict of an optimizer: [^\n]*$"):
        opt.load_state_dict({**opt.state_dict(), **broken} if broken else broken)


def test_the_way_from_torch():
    """A state_dict of torch's fused AdamW loads into 32 bits, and goes on bit for bit."""
    (params, _), (others, opt) = make({}), make({})
    theirs = torch.optim.AdamW(params, 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True)
    walk(params, theirs, range(2))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    opt.load_state_dict(theirs.state_dict())
    walk(params, theirs, [2])
    walk(others, opt, [2])
    assert same(params, others)
    for option in ("amsgrad", "maximize"):  # would step otherwise here
        with pytest.raises(ValueError, match="amsgrad or maximize"):
            opt.load_state_dict(torch.optim.AdamW(params, **{option: True}).state_dict())


@pytest.mark.parametrize("membed32", [False, True])
def test_param_groups(membed32):
    """The tied head is one tensor with the embedding; vectors do not decay; frozen ones are left out."""
    model, config = TinyGPT(), OptimConfig(**DEFAULT8, membed32=membed32)
    model.wpe.weight.requires_grad_(False)
    opt = AdamW(param_groups(model, config), 1e-3, config, compile=False)
    matrices, tables, vectors = (g["params"] for g in opt.param_groups)
    assert len(tables) == 1 and tables[0] is model.lm_head.weight and all(p.dim() == 1 for p in vectors)
    assert len(matrices) == 8 and len(matrices) + 1 + len(vectors) == len(list(model.parameters())) - 1
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.1, 0.0]
    assert opt.param_groups[2]["m1"] == opt.param_groups[2]["m2"] == (32,)  # also a bias of 4,096 elements or more
    walk([matrices[0], tables[0], vectors[0]], opt, [0])
    assert [opt.state[ps[0]]["exp_avg"].dtype for ps in (matrices, tables, vectors)] == \
        [torch.uint8, torch.float32 if membed32 else torch.uint8, torch.float32]


def test_reparams_have_groups_of_their_own():
    """One per lr_scale, no decay, fp32 moments; a group's own keys outlive a checkpoint."""
    model, config = TinyGPT(), OptimConfig(**DEFAULT8)
    for block, layer, scale in ((0, 1, None), (0, 2, 0.1), (1, 1, 0.1)):
        model.h[block][layer].reparam = nn.Linear(96, 96, bias=False)  # a matrix, large enough for 8 bits
        if scale:
            model.h[block][layer].reparam.lr_scale = scale
    model.h[1][2].reparam = None
    opts = [AdamW(param_groups(model, config), 1e-3, config, compile=False) for _ in range(2)]
    groups = [(len(g["params"]), g.get("lr_scale"), g["weight_decay"], g["m1"][0], g["m2"][0])
              for g in opts[0].param_groups]
    assert groups[0][0] == 8 and groups[3:] == [(2, 0.1, 0.0, 32, 32), (1, 1.0, 0.0, 32, 32)]
    assert sum(group[0] for group in groups) == len(list(model.parameters()))
    opts[0].param_groups[0]["note"] = 5
    saved = opts[0].state_dict()
    del saved["param_groups"][3]["lr_scale"]  # what a checkpoint does not say stays as it is here
    opts[1].load_state_dict(saved)
    assert [(g.get("lr_scale"), g.get("note")) for g in opts[1].param_groups] == \
        [(None, 5), (None, None), (None, None), (0.1, None), (1.0, None)]


def test_torchs_step_hooks_are_called():
    """register_step_pre_hook and register_step_post_hook, as on any optimizer of torch."""
    params, opt = make(DEFAULT8)
    seen = []
    for register in (opt.register_step_pre_hook, opt.register_step_post_hook):
        register(lambda *args: seen.append(params[0].detach().clone()))
    walk(params, opt, [0])
    before, after = seen
    assert not torch.equal(before, params[0]) and torch.equal(after, params[0])


def test_stochastic_v_follows_where_nearest_is_stuck():
    """beta2 = 0.999: gradients fall tenfold, but for one element per block that keeps the scale up."""
    ratio = {}
    for rounding in ("nearest", "stochastic"):
        (p,), opt = make({**DEFAULT8, "beta2": 0.999, "m2round": rounding, "mblock": 256}, [(16, 256)])
        gen, exact = torch.Generator().manual_seed(0), torch.zeros(16, 256)
        for t in range(1000):
            p.grad = torch.randn(p.shape, generator=gen)
            p.grad[:, 1:] *= 1.0 if t < 100 else 0.1
            exact = 0.999 * exact + 0.001 * p.grad.square()
            opt.step()
        ratio[rounding] = (stored(opt, p)[1][:, 1:].mean() / exact[:, 1:].mean()).item()
    assert ratio["stochastic"] == pytest.approx(1, abs=0.1) and ratio["nearest"] > 1.5


def test_trains():
    """A regression on a small teacher network: 8 bits end within 2 % of the fp32 loss, 4 bits within 15 %."""
    losses = []
    for config in ({}, DEFAULT8, DEFAULT4):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64))
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        opt, curve = AdamW(model.parameters(), 3e-3, OptimConfig(**config), compile=False), []
        for _ in range(250):
            x = torch.randn(64, 64)
            opt.zero_grad()
            loss = (model(x) - teacher(x).detach()).square().mean()
            loss.backward()
            opt.step()
            curve.append(loss.item())
        losses.append(sum(curve[-20:]) / 20)
    assert losses[0] < 0.2 * curve[0] and losses[1] < 1.02 * losses[0] and losses[2] < 1.15 * losses[0]


def ddp_rank(rank, folder):
    """Train three steps as one of two processes; save parameters and state."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(80, 70))
    opt = AdamW(model.parameters(), 1e-3, OptimConfig(**both(4, round="stochastic")), compile=False)
    torch.manual_seed(rank + 1)  # ranks see different data and have different generators
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(16, 80)).square().sum().backward()
        opt.step()
    torch.save((opt.state_dict()["state"], model.state_dict()), f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_hold_identical_codes(tmp_path):
    """Two processes under DDP with stochastic rounding: no bit differs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optim"])
    ranks = [context.Process(target=ddp_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    (state, weights), (state2, weights2) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert all(torch.equal(weights[k], weights2[k]) for k in weights) and state[0]["exp_avg"].dtype == torch.uint8
    assert all(torch.equal(state[i][k], state2[i][k]) for i in state for k in state[i])
