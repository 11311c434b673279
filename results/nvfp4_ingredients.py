"""Each ingredient of NVFP4 by its own measure, on one checkpoint: python results/nvfp4_ingredients.py RUN [DATA].

RUN: the out_dir of an unquantized run; DATA: the folder of its data. One batch of 16 windows, all linears
but those of the last block. Prints one JSON object: shares and relative errors, means over the linears.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from extensions.nvfp4 import NVFP4, rotate  # noqa: E402
from probe import Probe  # noqa: E402
from quant import QuantLinear  # noqa: E402


def error(a, b):
    """Return |a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def crest(t):
    """Return max / rms of blocks of 16, the mean of those that are not zero."""
    t = t.reshape(-1, 16)
    return (t.abs().amax(1) / t.square().mean(1).sqrt())[t.abs().amax(1) > 0].mean().item()


def measure(x, w, g):
    """Return the measures of one linear: x (M, K), w (N, K), g (M, N)."""
    dw, found, both = g.T @ x, {}, (g.T.contiguous(), x.T.contiguous())
    for name, d in (("plain", 0), ("rht", 16)):
        g_t, x_t = (rotate(t, d) if d else t for t in both)
        q = NVFP4()(g_t)
        found[f"{name}: g.T rounded to 0"] = ((q == 0) & (g_t != 0)).float().mean().item()
        found[f"{name}: crest of g.T"] = crest(g_t)
        found[f"{name}: error of dw"] = error(q @ NVFP4()(x_t).T, dw)
    for name, slot in (("nearest", NVFP4()), ("sr", NVFP4(stochastic=True)),
                       ("sr, 17/16", NVFP4(stochastic=True, room=17 / 16))):
        total = 0
        for n in range(1, 17):  # g alone is rounded
            total = total + slot(both[0]) @ x
            if n in (1, 4, 16):
                found[f"{name}: error of dw, mean of {n}"] = error(total / n, dw)
        found[f"{name}: slope of dw"] = ((total / 16 * dw).sum() / (dw * dw).sum()).item()
    for name, slot in (("1x16", NVFP4()), ("16x16", NVFP4(16))):
        found[f"{name}: error of w"] = error(slot(w), w)
        found[f"{name}: backward's w off forward's"] = error(slot(w.T).T, slot(w))
    return found


torch.manual_seed(0)
torch.set_num_threads(1)
probe = Probe(sys.argv[1], 1, 16, *sys.argv[2:])
model, seen = probe.model({}), {}
layers = [m for block in model.h[:-1] for m in block.modules() if isinstance(m, QuantLinear)]
for layer in layers:
    layer.register_forward_hook(lambda m, args, y: seen.update({(m, "x"): args[0].flatten(0, 1).detach()}))
    layer.register_full_backward_hook(lambda m, _, g: seen.update({(m, "g"): g[0].flatten(0, 1)}))
list(probe.passes(model))
rows = [measure(seen[m, "x"], m.weight.detach(), seen[m, "g"]) for m in layers]
print(json.dumps({k: round(statistics.mean(row[k] for row in rows), 4) for k in rows[0]}, indent=1))
