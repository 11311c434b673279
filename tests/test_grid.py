"""extensions/grid.py: gradients against their formulas in float64, bits and range of the codes, files bit for bit."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from extensions.grid import LearnedGrid, pack_weights, unpack_weights


def grid_for(w, bits=16.0, t=1.0, q=None):
    """Return a grid of w's dtype, with so many bits."""
    grid = LearnedGrid(w, 1.0).to(w.dtype)
    grid.start(w)
    grid.t.data.fill_(t)
    grid.q_m.data.fill_(q or float(w.abs().max()))
    grid.project(bits, bits)
    return grid


def weights(n=24, k=10, seed=0, dtype=torch.float64):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.05


@pytest.mark.parametrize("bits, t", [(2.0, 1.0), (4.0, 0.7), (5.3, 1.3), (16.0, 1.0)])
def test_the_four_gradients(bits, t):
    """Element by element in Python: dQ/dw = 1, and the formulas of d, q_m and t; |x| = q_m and 0 are corners."""
    w = weights()
    w[0, 0], w[0, 1], w[1, 1], q = 0.0, 0.06, -0.06, 0.06
    w.requires_grad_()
    grid, g = grid_for(w.detach(), bits, t, q), torch.randn(24, 10, dtype=torch.float64)
    (grid(w) * g).sum().backward()
    d, by_d, by_q, by_t = grid.d.item(), 0.0, 0.0, 0.0
    for x, upstream in zip(w.flatten().tolist(), g.flatten().tolist(), strict=True):
        size = min(abs(x), q)
        c = math.copysign(size**t, x)
        by_d += upstream * (round(c / d) - c / d)
        by_q += upstream * (math.copysign(t * q ** (t - 1), x) if abs(x) > q else 0.0)
        by_t += upstream * (c * math.log(size) if x else 0.0)
    assert torch.equal(w.grad, g) and (w.abs() > q).any()
    found = [float(p.grad) for p in (grid.d, grid.q_m, grid.t)]
    assert found == pytest.approx([by_d, by_q, by_t], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("t", [0.6, 1.0, 1.4])
def test_gradients_are_slopes(t):
    """With the rounding frozen, Q = x~ + d R: its central differences in q_m and t, where no |x| is near q_m."""
    w, q = weights(), 0.06
    w = w[(w.abs() - q).abs() > 1e-4][None]
    grid = grid_for(w, 6.0, t, q)
    grid(w).sum().backward()

    def smooth(q, t):
        return float((w.sign() * w.abs().clamp(max=q) ** t).sum())
    for p, slope in ((grid.q_m, smooth(q + 1e-6, t) - smooth(q - 1e-6, t)),
                     (grid.t, smooth(q, t + 1e-6) - smooth(q, t - 1e-6))):
        assert float(p.grad) == pytest.approx(slope / 2e-6, rel=1e-6)


@given(bits=st.integers(2, 16), t=st.floats(0.5, 2), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@example(bits=2, t=1.0, scale=1.0, seed=0)
@example(bits=16, t=1.0, scale=1e-3, seed=0)
def test_codes_fit_their_bits(bits, t, scale, seed):
    """bits(d(b)) = b; |code| <= 2^(b-1) - 1, reached; Q = d code to the bit, odd, 0 at 0."""
    w = weights(seed=seed, dtype=torch.float32) * scale
    w[0, 0] = 0.0
    grid = grid_for(w, bits, t)
    c, k = grid.codes(w)
    with torch.no_grad():
        assert float(grid.bits()) == pytest.approx(bits, abs=1e-4)
        assert k.abs().max() == 2 ** (bits - 1) - 1 and torch.equal(k, k.round())
        assert (c - grid.d * k).abs().max() <= grid.d * 0.5001 + c.abs().max() * 1e-6
        assert torch.equal(grid(w), grid.d * k) and torch.equal(grid(-w), -grid(w)) and grid(w)[0, 0] == 0
        assert torch.equal(grid(torch.zeros(2, 3)), torch.zeros(2, 3))
        for low, high in ((2, 4), (5, 8), (bits, bits)):  # wherever Adam has moved d, to either side of 0
            for d in (-1.0, 0.0, float(grid.d), 1e9):
                grid.d.fill_(d)
                grid.project(low, high)
                assert low - 1e-4 <= grid.bits() <= high + 1e-4
        grid.whole.fill_(3.0)
        grid.q_m.mul_(1.1)
        grid.project(4, 8)  # bits that are whole stay, whatever q_m does
        assert float(grid.bits()) == pytest.approx(3, abs=1e-4)


def test_a_layer_of_zeros():
    """No range, no step, no nan: neither in values nor in gradients."""
    w = torch.zeros(4, 4, requires_grad=True)
    grid = LearnedGrid(w, 1.0)
    grid(w).sum().backward()
    assert torch.equal(grid(w), torch.zeros(4, 4)) and grid.d > 0
    assert w.grad.eq(1).all() and all(p.grad == 0 for p in (grid.d, grid.q_m, grid.t))


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 11, 16])
def test_packed_weights_are_the_weights(bits):
    """Codes of b bits: n b / 8 bytes, and from them every weight to the last bit; what is no code stays."""
    w = weights(33, 7, dtype=torch.float32)
    grid, bias = grid_for(w, bits), torch.randn(7)
    with torch.no_grad():
        model = {"a.weight": grid(w), "a.bias": bias}
    packed = pack_weights({"step": 3, "model": model}, {"a.weight": (grid.d.detach(), bits)})
    assert packed["packed"]["a.weight"]["codes"].numel() == math.ceil(33 * 7 * bits / 8)
    assert list(packed["rest"]) == ["a.bias"] and "model" not in packed
    back = unpack_weights(packed)
    assert back["step"] == 3 and set(back["model"]) == set(model)
    assert all(torch.equal(back["model"][name], t) for name, t in model.items())
