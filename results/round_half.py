"""Which tokens must not be rounded? python results/round_half.py small|large FLAGS: train.py with half of them exact.

Rounds of the gradient in grad_weight only the tokens whose norm is below the median of the layer's (small), or the
others (large), with the scales that the whole has; the other half stays as it is. FLAGS are of train.py, those of
sweep.py's row G3-block.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import model  # noqa: E402
import train  # noqa: E402
from quant import QuantConfig, Quantizer, Recipe, make_recipe  # noqa: E402


def half(quantizer: Quantizer, small: bool):
    """Return a quantizer of g.T (N, M) that leaves one half of the M tokens alone."""
    def rounded(g_t: torch.Tensor) -> torch.Tensor:
        size = g_t.norm(dim=0)  # (M,)
        return torch.where((size < size.median()) == small, quantizer(g_t), g_t)
    return rounded


def recipe(config: QuantConfig, third: int | None = None) -> Recipe:
    """Make the recipe of the flags as quant.make_recipe does, but with half a quantizer in grad_weight."""
    whole = make_recipe(config, third)
    return replace(whole, grad_weight_grad_output=half(whole.grad_weight_grad_output, SMALL))


if __name__ == "__main__":
    SMALL = {"small": True, "large": False}[sys.argv.pop(1)]
    model.make_recipe = recipe  # where layer_recipe looks it up
    train.main()
