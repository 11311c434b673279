"""Does training with noise make weights survive rounding? python results/gaussws_rounding.py DATA RUN [RUN ...]

DATA: the folder of the data; RUN: out_dirs of finished runs. For each run, one JSON object: validation loss of its
weights w as they are, and the change of that loss for

    sampled N     w + R step as gaussws samples it at N bits, the mean of 4 samples
    p bits        w rounded to p significant bits with any exponent: what rounding to e4m3 (4), e3m2 (3), e2m1 (2) costs
                  where no number leaves the range
    fp8, 6, 4     w rounded to e4m3, e3m2, e2m1, subnormal numbers included, the largest number of each block of 32 x 32
                  scaled to the largest of the format

The linears of the blocks are rounded, nothing else; quantizers of the run's own are off, activations are not rounded.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import evaluate, val_windows  # noqa: E402
from extensions.gaussws import block_step, rounded_normal  # noqa: E402
from model import GPT, GPTConfig, quant_linears  # noqa: E402
from prepare_data import DataConfig, open_dataset  # noqa: E402
from quant import QuantConfig, QuantLinear, tiles  # noqa: E402
from support.checkpoint import load_checkpoint, load_weights  # noqa: E402
from support.config import own  # noqa: E402

BLOCK = 32
FORMATS = {"fp8": (4, -6, 448.0), "fp6": (3, -2, 28.0), "fp4": (2, 0, 6.0)}  # significant bits, least exponent, maximum


def significant(x: Tensor, p: int, least: int = -126) -> Tensor:
    """Round x to p significant bits, half to even; below 2**least the spacing stays that of 2**least."""
    exponent = torch.frexp(x).exponent.sub(1).clamp_min(least)  # x = 1.f * 2**exponent
    step = torch.exp2((exponent - (p - 1)).to(x.dtype))
    return torch.round(x / step) * step


def to_format(w: Tensor, name: str) -> Tensor:
    """Round w (N, K) to a format, block by block: max|w| of a block becomes the format's largest number."""
    p, least, most = FORMATS[name]
    t = tiles(w, (BLOCK, BLOCK))
    scale = (t.abs().amax((1, 3), keepdim=True) / most).clamp_min(1e-30)
    return (significant(t / scale, p, least) * scale).view(w.shape)


def sampled(w: Tensor, bits: float) -> Tensor:
    """Return w + R step at so many bits."""
    step = block_step(w, torch.tensor(float(bits)), BLOCK)
    return (tiles(w, (BLOCK, BLOCK)) + tiles(rounded_normal(torch.rand_like(w)), (BLOCK, BLOCK)) * step).view(w.shape)


def measure(run: str, data_dir: str) -> dict[str, float]:
    """Return the loss of a run's weights, and its changes."""
    checkpoint = load_checkpoint(Path(run))
    flat = checkpoint["config"]
    _, val, _ = open_dataset(DataConfig(flat["dataset"], data_dir))
    windows = val_windows(val, flat["block_size"], flat["eval_tokens"])
    model = GPT(own(GPTConfig, flat), checkpoint["vocab_size"], quant_linears(QuantConfig(), flat["n_layer"]))
    weights = {k: v for k, v in checkpoint["model"].items() if ".reparam." not in k}
    load_weights(model, weights, "the checkpoint")
    layers = [m for m in model.h.modules() if isinstance(m, QuantLinear)]
    kept = [layer.weight.detach().clone() for layer in layers]

    def loss(change) -> float:
        for layer, w in zip(layers, kept, strict=True):
            layer.weight.data.copy_(change(w))
        return evaluate(model.eval(), windows, 16)
    torch.manual_seed(0)
    exact = loss(lambda w: w)
    found = {f"sampled {b}": sum(loss(lambda w, b=b: sampled(w, b)) for _ in range(4)) / 4 for b in (6, 4)}
    found |= {f"{p} bits": loss(lambda w, p=p: significant(w, p)) for p in (4, 3, 2)}
    found |= {name: loss(lambda w, name=name: to_format(w, name)) for name in FORMATS}
    return {"run": Path(run).name, "loss": round(exact, 4)} | {k: round(v - exact, 4) for k, v in found.items()}


if __name__ == "__main__":
    e2m1 = torch.tensor([0.2, 0.25, 0.3, 0.75, 1.25, 2.5, 4.9, 5.0, 6.0])
    assert significant(e2m1, 2, 0).tolist() == [0, 0, 0.5, 1, 1, 2, 4, 4, 6]
    x = torch.linspace(-448, 448, 9999)
    assert torch.equal(significant(x, 4, -6), x.to(torch.float8_e4m3fn).float())
    for run in sys.argv[2:]:
        print(json.dumps(measure(run, sys.argv[1])), flush=True)
