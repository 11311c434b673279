"""A float of p significant bits carries the noise of p + 1 bits: python results/gaussws_rule.py

The share of the non-zero noise of gaussws that rounding w + R step to p significant bits swallows, by b - p: 1024 x
1024 Gaussian weights, blocks of 32 x 32, float64, seeds 0 (weights) and 2 (noise). It matters a little where a block's
largest weight lies between two powers of two, so the table gives the range over standard deviations 1, 1.19, 1.41 and
1.68; the picture, gaussws_rule.png, has the mean.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from gaussws_rounding import BLOCK, significant  # noqa: E402

from analyze import new_figure  # noqa: E402
from extensions.gaussws import block_step, rounded_normal  # noqa: E402
from quant import tiles  # noqa: E402

FORMATS = {2: "FP4, e2m1", 3: "FP6, e3m2", 4: "FP8, e4m3", 8: "bfloat16"}


def swallowed(w: torch.Tensor, R: torch.Tensor, b: float, p: int) -> float:
    """Return the share of R != 0 for which w + R step, of b bits, rounds to what w rounds to."""
    step = block_step(w, torch.tensor(float(b)), BLOCK).double()
    noisy = (tiles(w, (BLOCK, BLOCK)).double() + tiles(R, (BLOCK, BLOCK)).double() * step).view(w.shape)
    lost = (significant(noisy, p) == significant(w.double(), p)) & (R != 0)
    return lost.sum().item() / (R != 0).sum().item()


if __name__ == "__main__":
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    R = rounded_normal(torch.rand(w.shape, generator=torch.Generator().manual_seed(2)))
    figure, panels = new_figure(1, 1, size=(7, 4))
    print("| p | format | b = p | p + 1 | p + 2 | p + 3 |\n|---|---|---|---|---|---|")
    x = np.arange(-1, 3.01, 0.5)  # b - p
    for p, name in FORMATS.items():
        y = np.array([[swallowed(w * 2 ** (i / 4), R, p + dx, p) for dx in x] for i in range(4)])
        cells = [f"{low:.4f} to {high:.4f}" for low, high in zip(y.min(0), y.max(0), strict=True)]
        print(f"| {p} | {name} | " + " | ".join(cells[2::2]) + " |", flush=True)
        panels[0][0].plot(x, y.mean(0), ".-", label=f"{name}: p = {p}")
    panels[0][0].axvline(1, color="gray", ls=":")
    panels[0][0].set(xlabel="bits of the noise, b - p", ylabel="share of the noise that the cast swallows")
    panels[0][0].legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=80)
