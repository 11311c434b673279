"""Learned step size quantization of the weights (LSQ, Esser et al. 2020, arXiv 1902.08153): a worked extension.

The core recomputes a scale from the weights at each call. LSQ trains it instead, one step size s per layer:

    w^ = s * clamp(round(w / s), -qmax, qmax)          dw^/dw = 1 inside the range, 0 where w clips
    dw^/ds = round(w / s) - w / s inside, +-qmax where w clips (eq. 3), times 1 / sqrt(n qmax) (section 2.2)

with s = 2 mean|w| / sqrt(qmax) at the start (section 2.1). The paper trains with SGD, where the factor sets how fast
s moves. Adam divides by a gradient's size: here the factor keeps s out of the norm that is clipped, --lsq_lr sets its
speed (with 1, lsq4 loses half of what W3 does: results/laptop/table.md). That is a reparam: it maps the weight (N, K)
to the one that is used, and brings a parameter of its own, which trains and is saved, resumed, evaluated and exported
with the model.

    python train.py --preset=lsq4                      # 4-bit weights with learned steps; W3 is its untrained twin

Copy this file to begin your own: a Config, and those of the functions listed in extensions/__init__.py that you need.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from model import Linear
from quant import SCALE_FLOOR, QuantLinear, largest_code
from support.config import refuse_idle


@dataclass
class Config:
    """Weights on a grid whose step is trained."""
    lsq_bits: int = 32  # bits of the block linears' weights, 2 to 8; 32: off
    lsq_lr: float = 1.0  # learning rate of the steps, times that of the weights

    def __post_init__(self):
        if self.lsq_bits != 32 and not 2 <= self.lsq_bits <= 8:
            raise ValueError(f"--lsq_bits={self.lsq_bits} must be 2 to 8, or 32 for none")
        refuse_idle(self, lsq_lr=(self.lsq_bits < 32, "without --lsq_bits below 32"))


def round_ste(x: Tensor, bits: int) -> Tensor:
    """Round x to integers of so many bits; its gradient is 1 inside their range, 0 where x clips; a nan stays one.

    The core's scales are dynamic and never clip, so QuantLinear needs no such mask; a learned or a static one does.
    Source: Bengio et al. 2013, arXiv 1308.3432 (straight-through estimator); mask as in PyTorch's fake_quantize ops.
    """
    q, qmax = torch.round(x.detach()), largest_code(bits)
    # the difference is 0, its gradient is 1
    return q.clamp(-qmax, qmax) + torch.where(q.abs() > qmax, 0.0, x - x.detach())


PRESETS = {"lsq4": dict(lsq_bits=4), "lsq8": dict(lsq_bits=8)}


class LearnedStep(nn.Module):
    """A reparam: weight (N, K) fp32 -> the same, rounded to multiples of the trained step s."""

    def __init__(self, weight: Tensor, bits: int, lr_scale: float):
        super().__init__()
        self.bits, self.lr_scale = bits, lr_scale  # lr_scale: optim.param_groups reads it
        self.slow = (weight.numel() * (2 ** (bits - 1) - 1)) ** -0.5  # of the gradient, section 2.2
        self.s = nn.Parameter(torch.ones(()))  # () fp32

    @torch.no_grad()
    def start(self, w: Tensor) -> None:
        """Set s for the weight w (N, K); the model calls this when it has drawn or loaded its weights."""
        s = 2 * w.abs().mean() / (2 ** (self.bits - 1) - 1) ** 0.5
        self.s.copy_(s.clamp_min(SCALE_FLOOR))  # zeros are legal

    def forward(self, w: Tensor) -> Tensor:
        """Return s * round(w / s), clipped; both w and s get their gradients."""
        s = self.s * self.slow + (self.s * (1 - self.slow)).detach()  # s, with a slower gradient
        return s * round_ste(w / s, self.bits)  # (N, K); the gradient reaches w and s


def linears(config: Config, flat: dict, linear: Linear) -> Linear:
    """Give the linears of the blocks a learned step; lm_head, which is the embedding, stays as it is."""
    if config.lsq_bits == 32:
        return linear
    if flat.get("skip_blocks"):
        raise ValueError("--skip_blocks has no effect on the weights of --lsq_bits; drop one")

    def with_step(name: str, in_features: int, out_features: int, bias: bool) -> QuantLinear:
        layer = linear(name, in_features, out_features, bias)  # as the core makes it
        if layer.recipe and layer.recipe.output_weight:
            raise ValueError(f"--lsq_bits={config.lsq_bits} with --wbits or --nvfp4 rounds the weights twice; drop one")
        if name != "lm_head":
            layer.reparam = LearnedStep(layer.weight, config.lsq_bits, config.lsq_lr)
        return layer
    return with_step
