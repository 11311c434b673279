"""Gaussian weight sampling: noise instead of rounding, so that weights learn to survive it (arXiv 2505.11170).

Our reading: only the abstract and reviews of a follow-up were to be had, no code. In training each forward adds noise
of the size of a rounding error to the weights, then casts them to bfloat16; there is no straight-through estimator:

    step  = max|w| over a block of 32 x 32 * 2^(1 - b)          b bits, per block
    w^    = bf16(w + R step),   R = round(N(0, 1) / 2)          fresh each time; in evaluation w^ = w
    dw    = dw^,                db = -ln 2 * sum over the block of dw^ R step
    b     = b_target + t (b_init - b_target)                    t is trained, from 1
    loss += b_decay * mean over layers of the mean |b - b_target|

R is a small integer, 0 with probability .68, so a float of p significant bits carries the noise while b <= p + 1:
bfloat16 (p = 8) up to 9 bits. It is made from one uniform number by inverting its distribution, and not kept: backward
finds it again as round((w^ - w) / step), exactly up to 8 bits. What is kept for backward is w^ alone.
Guesses of ours: the block's size, t, the form and weight of the decay, which layers (the blocks' linears), one sample
per micro-batch and process (gradients are then averages over samples).

    python train.py --preset=gaussws                    # from 6 bits toward 4; -6, -4: constant; -uniform: a control
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import GPT, Linear
from quant import SCALE_FLOOR, QuantLinear, tiles
from support.config import refuse_idle

# P(R >= k) = P(N(0, 1) > 2k - 1) for k = 1, 2, 3; a 4 comes once in 10^12 draws
TAILS = tuple(math.erfc((2 * k - 1) / math.sqrt(2)) / 2 for k in (1, 2, 3))
CARRIED = 9  # bits up to which bfloat16 carries the noise


@dataclass
class Config:
    """Weights that are sampled instead of rounded."""
    gaussws: bool = False  # add noise of a rounding error's size to the block linears' weights
    b_init: float = 6.0  # bits at the start: noise of max|w| 2^(1 - bits)
    b_target: float = 4.0  # bits that b_decay pulls to
    b_decay: float = 0.0  # weight of the distance to b_target in the loss; 0: bits stay at b_init
    b_lr: float = 1.0  # learning rate of the bits, times that of the weights
    b_block: int = 32  # rows and columns of a block that shares its bits
    b_noise: Literal["gauss", "uniform"] = "gauss"  # round(N(0, 1) / 2), or U(-1/2, 1/2) as a control

    def __post_init__(self):
        refuse_idle(self, **{name: (self.gaussws, "without --gaussws") for name in
                             ("b_init", "b_target", "b_decay", "b_lr", "b_block", "b_noise")})
        refuse_idle(self, **{name: (self.b_decay > 0, "without --b_decay above 0: bits are constant")
                             for name in ("b_target", "b_lr")})
        if not 1 <= self.b_init <= CARRIED:
            raise ValueError(f"--b_init={self.b_init} must lie in 1 to {CARRIED}: "
                             f"bfloat16 carries the noise up to {CARRIED} bits")
        if not 1 <= self.b_target <= self.b_init and self.b_decay:
            raise ValueError(f"--b_target={self.b_target} must lie in 1 to --b_init={self.b_init}")
        if not 0 <= self.b_lr < math.inf or self.b_decay and self.b_target == self.b_init:
            raise ValueError(f"--b_lr={self.b_lr} must be at least 0, and --b_target={self.b_target} "
                             f"below --b_init={self.b_init} for --b_decay to have something to do")
        if self.b_block < 1 or self.b_decay < 0 or not math.isfinite(self.b_decay):
            raise ValueError(f"--b_block={self.b_block} must be at least 1, "
                             f"--b_decay={self.b_decay} at least 0")


PRESETS = {"gaussws": dict(gaussws=True, b_decay=0.01), "gaussws-6": dict(gaussws=True),
           "gaussws-4": dict(gaussws=True, b_init=4.0),
           "gaussws-uniform": dict(gaussws=True, b_noise="uniform")}


def rounded_normal(u: Tensor) -> Tensor:
    """Turn uniform numbers u in [0, 1) into draws of round(N(0, 1) / 2): -3 to 3, fp32."""
    return sum((u < c).float() - (u >= 1 - c).float() for c in TAILS)


def block_step(w: Tensor, b: Tensor, block: int) -> Tensor:
    """Return max|w| 2^(1 - b) of each block of w (N, K); b and the result are (N/block, 1, K/block, 1) fp32."""
    return tiles(w, (block, block)).abs().amax((1, 3), keepdim=True) * torch.exp2(1 - b)


def round_to_bfloat16(x: Tensor) -> Tensor:
    """Round fp32 to numbers of bfloat16, half to even, by the bits: a compiler drops a cast there and back."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


class _Sample(torch.autograd.Function):
    # w (N, K) fp32 and b -> w^ (N, K), values of bfloat16 in `dtype`. In bfloat16 the GEMM keeps this very tensor.
    @staticmethod
    def forward(ctx, w, b, block, noise, dtype):
        u = torch.rand_like(w)
        R = rounded_normal(u) if noise == "gauss" else u - 0.5
        step = block_step(w, b, block)
        w_hat = (tiles(w, (block, block)) + tiles(R, (block, block)) * step).view(w.shape)
        w_hat = w_hat.to(dtype) if dtype == torch.bfloat16 else round_to_bfloat16(w_hat)
        ctx.save_for_backward(w, b, w_hat)
        ctx.block, ctx.noise = block, noise
        return w_hat

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        w, b, w_hat = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return g.float(), None, None, None, None
        square = (ctx.block, ctx.block)
        step = block_step(w, b, ctx.block)
        R = (tiles(w_hat.float(), square) - tiles(w, square)) / step.clamp_min(SCALE_FLOOR)
        R = torch.round(R) if ctx.noise == "gauss" else R  # a block of zeros: 0
        db = -math.log(2) * (tiles(g.float(), square) * R * step).sum((1, 3), keepdim=True)
        return g.float(), db, None, None, None


class Sampled(nn.Module):
    """A reparam: weight (N, K) -> a noisy sample of it in training, itself in evaluation."""

    def __init__(self, weight: Tensor, config: Config, dtype: torch.dtype):
        super().__init__()
        self.config, self.dtype, self.lr_scale = config, dtype, config.b_lr  # optim.param_groups reads lr_scale
        n, k = (size // config.b_block for size in weight.shape)
        self.t = nn.Parameter(torch.ones(n, 1, k, 1), requires_grad=config.b_decay > 0)

    def bits(self) -> Tensor:
        """Return b of each block, (N/block, 1, K/block, 1)."""
        c = self.config
        return c.b_target + self.t * (c.b_init - c.b_target)

    def forward(self, w: Tensor) -> Tensor:
        """Return w^."""
        if not self.training:
            return w
        return _Sample.apply(w, self.bits(), self.config.b_block, self.config.b_noise, self.dtype)


def linears(config: Config, flat: dict, linear: Linear) -> Linear:
    """Let the linears of the blocks sample their weights; lm_head and embeddings stay as they are."""
    if not config.gaussws:
        return linear
    if flat.get("skip_blocks"):
        raise ValueError("--skip_blocks has no effect on weights that --gaussws samples; drop one")
    dtype = getattr(torch, flat.get("dtype") or "float32")

    def sampled(name: str, in_features: int, out_features: int, bias: bool) -> QuantLinear:
        layer = linear(name, in_features, out_features, bias)
        if name == "lm_head":
            return layer
        if layer.recipe and layer.recipe.output_weight:
            raise ValueError("--gaussws with --wbits or --nvfp4: noise stands for rounding; drop one")
        if layer.reparam is not None:
            raise ValueError("--gaussws with another extension that changes the weights; drop one")
        for size in (in_features, out_features):
            if size % config.b_block:
                raise ValueError(f"--b_block={config.b_block} must divide the {out_features} x "
                                 f"{in_features} weight of {name}; "
                                 f"try {math.gcd(in_features, out_features)}")
        layer.reparam = Sampled(layer.weight, config, dtype)
        return layer
    return sampled


def losses(config: Config, model: GPT) -> dict[str, Tensor]:
    """Return the term that pulls the bits to b_target, each layer with the same weight."""
    if not (config.gaussws and config.b_decay):
        return {}
    layers = [m.bits() for m in model.modules() if isinstance(m, Sampled)]
    distances = [(b - config.b_target).abs().mean() for b in layers]
    return {"penalty": config.b_decay * torch.stack(distances).mean()}
