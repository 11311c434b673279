"""Whose part of the gradient do few bits lose? python results/easy_tokens.py DATA RUN [...]: folders of E0's runs.

The tokens of each of 64 batches in four equal parts by their loss, the easiest first. g at a token also holds what
later tokens ask of it. Of what each part contributes to the mean gradient of the block linears' weights when g is
rounded in grad_weight: how much of the length of the exact contribution is found along it (slope), how large the error
is beside the whole mean gradient (parts share scales, so errors do not add in squares), and the share of g's numbers
that are zero, a mean over layers.
"""

import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import layer_recipe  # noqa: E402
from probe import Probe, compare_gradients, flat_norm  # noqa: E402
from quant import QuantConfig, QuantLinear  # noqa: E402

PARTS = 4
FORMATS = {"4 bits per token (G3)": dict(gbits=4, split_qkv=True),
           "3 bits per token": dict(gbits=3, split_qkv=True),
           "4 bits in blocks of 32 tokens (G3-block)": dict(gbits=4, ggran="per_block", wblock=32),
           "the same at random": dict(gbits=4, ggran="per_block", wblock=32, rounding="stochastic")}


def captured(model: torch.nn.Module) -> dict[str, list[Tensor]]:
    """Return {layer: [x (M, K), g (M, N)]}, which every pass through the model fills anew."""
    kept = {}

    def watch(name: str, layer: QuantLinear) -> None:
        def hook(_, inputs, y):
            kept[name] = [inputs[0].detach().flatten(0, 1)]
            y.register_hook(lambda g: kept[name].append(g.flatten(0, 1)))
        layer.register_forward_hook(hook)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and name.startswith("h."):
            watch(name, layer)
    return kept


def contributions(run: str, data: str) -> tuple[list[dict], dict[str, list[dict]], dict[str, list], list[float]]:
    """Return by part the exact contribution {layer: dw (N, K)}, those by format, shares of zeros, and the mean loss."""
    probe = Probe(run, 64, data_dir=data)
    model, losses = probe.model({}), []  # nothing is rounded: one backward serves all formats
    kept = captured(model)
    rounds = {fmt: {name: layer_recipe(QuantConfig(**flags), name, layer.in_features, layer.out_features)
                    .grad_weight_grad_output for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
              for fmt, flags in FORMATS.items()}  # {format: {layer: quantizer of g.T}}
    total = {name: [{} for _ in range(PARTS)] for name in ("exact", *FORMATS)}
    zeros = {name: [[] for _ in range(PARTS)] for name in FORMATS}
    # the probe's batches are pieces of the text, one after the other: mix the windows
    order = torch.randperm(probe.batches[..., 0].numel(), generator=torch.Generator().manual_seed(0))
    for number, batch in enumerate(probe.batches.flatten(0, 1)[order].view_as(probe.batches)):
        torch.manual_seed(number)
        idx, targets = batch[:, :-1], batch[:, 1:]
        logits = model(idx).flatten(0, 1)[:, :probe.checkpoint["vocab_size"]]  # (M, vocabulary), without the padding
        loss = F.cross_entropy(logits, targets.flatten(), reduction="none")  # (M,)
        loss.mean().backward()
        loss = loss.detach()
        members = loss.argsort().chunk(PARTS)  # tokens, the easiest first
        losses.append([loss[m].mean().item() for m in members])
        for name, (x, g) in kept.items():
            for fmt, sums in total.items():
                g_t = g.T if fmt == "exact" else rounds[fmt][name](g.T)  # (N, M), scales as the whole batch has them
                for i, m in enumerate(members):
                    sums[i][name] = sums[i].get(name, 0) + g_t[:, m] @ x[m]  # (N, M/4) @ (M/4, K)
                    if fmt != "exact":
                        zeros[fmt][i].append((g_t[:, m] == 0).float().mean().item())
    return total.pop("exact"), total, zeros, [statistics.mean(part) for part in zip(*losses, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [contributions(run, sys.argv[1]) for run in sys.argv[2:]]
    losses = [statistics.mean(values) for values in zip(*(run[3] for run in runs), strict=True)]
    print("| slope; error; zeros | " + " | ".join(f"loss {x:.3f}" for x in losses)
          + " |\n" + "|---" * (PARTS + 1) + "|")
    for fmt in FORMATS:
        cells = []
        for part in range(PARTS):
            slopes, errors = [], []
            for exact, found, _, _ in runs:
                names = list(exact[0])
                whole = flat_norm({n: sum(e[n] for e in exact) for n in names})
                slopes.append(compare_gradients([exact[part]], [found[fmt][part]], names)["slope"])
                errors.append(flat_norm({n: found[fmt][part][n] - exact[part][n] for n in names}) / whole)
            none = statistics.mean(share for run in runs for share in run[2][fmt][part])
            cells.append(f"{statistics.mean(slopes):.3f}; {statistics.mean(errors):.3f}; {none:.2f}")
        print(f"| {fmt} | " + " | ".join(cells) + " |", flush=True)
