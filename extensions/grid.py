"""Weights on a grid whose step, range and exponent are learned, and with them its bits (arXiv 2502.16638, section 3.1).

    x~ = sgn(x) min(|x|, q_m)^t      Q(x) = d round(x~ / d)      b = log2(q_m^t / d + 1) + 1

d is the step, q_m the range, t the exponent (1: a uniform grid; below, denser for small weights), b the bits. There is
no zero point: 0 stays 0, exactly. Gradients (|x| = q_m counts as inside):

    dQ/dd = round(x~/d) - x~/d      dQ/dq_m = sgn(x) t q_m^(t-1) where |x| > q_m, else 0
    dQ/dx = 1                       dQ/dt = x~ ln min(|x|, q_m), and 0 at 0

(In the released code dQ/dx is 0 for |x| >= 2.) extensions/prune.py trains weights so, and packs them: `pack_weights`.
"""

import torch
import torch.nn as nn
from torch import Tensor

from support.codes import pack_bits, unpack_bits

START = 16  # bits of a new grid
FLOOR = 1e-6  # of q_m and t, which must stay positive


class LearnedGrid(nn.Module):
    """A reparam: weight (N, K) fp32 -> Q of it, the same shape. Its parameters d, q_m and t are () each."""

    def __init__(self, weight: Tensor, lr_scale: float):
        super().__init__()
        self.lr_scale = lr_scale  # optim.param_groups reads it
        self.d, self.q_m, self.t = (nn.Parameter(torch.ones(())) for _ in range(3))
        self.register_buffer("whole", torch.zeros(()))  # bits once they are fixed; 0: learned
        self.start(weight)

    @torch.no_grad()
    def start(self, w: Tensor) -> None:
        """Begin with the range of w (N, K), exponent 1 and 16 bits; the model calls this for loaded weights."""
        self.q_m.fill_(w.abs().max())
        self.t.fill_(1.0)
        self.d.fill_(0.0)
        self.whole.fill_(0.0)
        self.project(START, START)

    def step(self, bits: float | Tensor) -> Tensor:
        """Return d(b), the step of a grid of so many bits."""
        return self.q_m**self.t / (2 ** (bits - 1) - 1)

    @torch.no_grad()
    def bits(self) -> Tensor:
        """Return b, () fp32: codes reach from -(2^(b - 1) - 1) to 2^(b - 1) - 1, rounded."""
        return torch.log2(self.q_m**self.t / self.d + 1) + 1

    @torch.no_grad()
    def project(self, low: float, high: float) -> None:
        """Move d to where b lies in [low, high]; once bits are fixed, to b = whole."""
        self.q_m.clamp_(min=FLOOR), self.t.clamp_(min=FLOOR)
        low, high = (self.whole, self.whole) if self.whole else (low, high)
        self.d.copy_(self.d.clamp(self.step(high), self.step(low)))

    @torch.no_grad()
    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return w~ and round(w~ / d), both as w; d may be anything above 0."""
        c = w.sign() * w.abs().clamp(max=self.q_m) ** self.t
        return c, torch.round(c / self.d)

    def forward(self, w: Tensor) -> Tensor:
        """Return Q(w), to the bit on the grid; dQ/dw = 1, the others are exact but for the rounding."""
        c, k = self.codes(w)
        with torch.no_grad():
            by_d = k - c / self.d
            slope = self.t * self.q_m ** (self.t - 1)
            by_q = torch.where(w.abs() > self.q_m, w.sign() * slope, 0.0)
            by_t = torch.xlogy(c, w.abs().clamp(max=self.q_m))  # c ln min(|w|, q_m), 0 at 0

        def zero(p: Tensor) -> Tensor:  # exactly 0, but with the gradient of p
            return p - p.detach()
        brackets = zero(w) + by_d * zero(self.d) + by_q * zero(self.q_m) + by_t * zero(self.t)
        return self.d.detach() * k + brackets


def pack_weights(checkpoint: dict, grids: dict[str, tuple[Tensor, int]]) -> dict:
    """Return a checkpoint some of whose matrices are codes of b bits: {name: (d, b)}, of weights d k, |k| < 2^(b-1)."""
    packed, rest = {k: v for k, v in checkpoint.items() if k != "model"}, dict(checkpoint["model"])
    packed |= {"rest": rest, "packed": {}}
    for name, (d, bits) in grids.items():
        w = rest.pop(name)
        codes = torch.round(w / d).long().flatten() + 2 ** (bits - 1) - 1  # from 0 on
        packed["packed"][name] = {"codes": pack_bits(codes, bits), "bits": bits, "d": d, "shape": tuple(w.shape)}
    return packed


def unpack_weights(packed: dict) -> dict:
    """Return the checkpoint that `pack_weights` was given, bit for bit."""
    weights = dict(packed["rest"])
    for name, p in packed["packed"].items():
        bits, (n, k) = p["bits"], p["shape"]
        codes = unpack_bits(p["codes"], bits, n * k).view(n, k)
        weights[name] = p["d"] * (codes - 2 ** (bits - 1) + 1)
    return {k: v for k, v in packed.items() if k not in ("rest", "packed")} | {"model": weights}
