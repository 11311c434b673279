"""What one checkpoint says of a recipe, without training: numbers for analyze.py's pictures and sweep.py's tables.

The recipes are put on the same weights, and the same batches of the validation split go through all of them. Of the
gradient g of all weights, beside the unquantized one, over the batches:

    error  |gq - g| / |g|       cosine  <gq, g> / |gq| |g|       slope  <gq, g> / <g, g>      means over batches
    bias   as error, but of the mean of DRAWS gradients gq of the same batch: the error itself where nothing is drawn
           at random; where rounding is stochastic and unbiased, its noise leaves error / sqrt(DRAWS)

As in training, the windows of a batch share what scales share over tokens. Judge W and A by the change of the loss
(their gradients belong to another loss than the unquantized one), G by the bias, moments by the error of the update,
and do not rank across kinds.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import extensions
from eval import val_windows
from model import GPT, GPTConfig
from optim import AdamW, OptimConfig, layout, pack, param_groups, unpack
from prepare_data import DataConfig, open_dataset
from quant import QuantLinear
from support.checkpoint import load_checkpoint, load_weights
from support.config import own

DRAWS = 8  # gradients of the same batch, where they differ


class Probe:
    """A checkpoint, batches of its validation split, and its model under any recipe."""

    def __init__(self, ckpt: str, batches: int = 6, batch_size: int = 16,
                 data_dir: str | None = None):
        self.checkpoint = load_checkpoint(Path(ckpt))
        self.flat = self.checkpoint["config"]
        folder = DataConfig(self.flat["dataset"], data_dir or self.flat["data_dir"])
        _, val, meta = open_dataset(folder)
        if meta["vocab_size"] != self.checkpoint["vocab_size"]:
            raise ValueError(f"the data in --data_dir={folder.data_dir} has a vocabulary of "
                             f"{meta['vocab_size']}, {ckpt} one of {self.checkpoint['vocab_size']}; "
                             "name the folder it was trained on")
        T, n = self.flat["block_size"], batches * batch_size
        windows = torch.from_numpy(val_windows(val, T, n * T))  # (windows, T+1), evenly spread
        if len(windows) < n:
            raise ValueError(f"--batches={batches} of --batch_size={batch_size} need {n} windows, the "
                             f"validation split has {len(windows)}; use fewer")
        self.batches = windows.view(batches, batch_size, T + 1)

    def model(self, flags: dict | None) -> GPT:
        """Return the model in fp32 under the flat flags of a recipe; None: as it was trained."""
        flat = self.flat if flags is None else {"n_layer": self.flat["n_layer"], **flags}
        shape = {**self.flat, "keep8": flat.get("keep8", "none"), "dropout": 0.0}
        model = GPT(own(GPTConfig, shape), self.checkpoint["vocab_size"], extensions.linears(flat))
        # under a recipe of its own a reparam is rebuilt, under another one it starts anew
        load_weights(model, self.checkpoint["model"], "checkpoint" if flags is None else "the checkpoint")
        extensions.at_step(flat, model, self.checkpoint["step"])
        return model.train()  # what samples its weights does so

    def passes(self, model: GPT, draw: int = 0) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Yield loss and gradients {name: fp32} for each batch; another draw is another seed of what is random."""
        for i, batch in enumerate(self.batches):
            torch.manual_seed(1000 * draw + i)
            model.zero_grad()
            loss = model(batch[:, :-1], batch[:, 1:])
            loss.backward()
            yield loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()
                                if p.grad is not None}


def flat_norm(tensors: dict[str, Tensor]) -> float:
    """Return the norm of all of them together."""
    return sum(t.double().square().sum().item() for t in tensors.values()) ** 0.5


def dot(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    """Return the inner product of those tensors, summed in float64."""
    return sum((a[n].double() * b[n].double()).sum().item() for n in names)


def spread(values: list[float]) -> float:
    """Return the standard deviation; of a single value 0."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def compare_gradients(exact: list[dict[str, Tensor]], found: list[dict[str, Tensor]],
                      names: list[str]) -> dict:
    """Return error (and its spread), cosine and slope of the gradients `names`, means over batches."""
    errors, cosines, slopes = [], [], []
    for g, q in zip(exact, found, strict=True):
        gg, gq, qq = dot(g, g, names), dot(g, q, names), dot(q, q, names)
        errors.append(max(0.0, qq - 2 * gq + gg) ** 0.5 / gg**0.5 if gg else float("nan"))
        cosines.append(gq / (gg * qq) ** 0.5 if gg * qq else float("nan"))
        slopes.append(gq / gg if gg else float("nan"))
    return {"error": statistics.mean(errors), "error_std": spread(errors),
            "cosine": statistics.mean(cosines), "slope": statistics.mean(slopes)}


def stored_update_error(checkpoint: dict, model: GPT, flags: dict) -> float | None:
    """Return the error of Adam's u when the checkpoint's fp32 moments are stored once as the flags say, all matrices.

    None where the flags store nothing, or the checkpoint's own moments are no fp32 ones.
    """
    config, saved = own(OptimConfig, flags), checkpoint.get("optimizer", {}).get("state", {})
    if min(config.m1bits, config.m2bits) == 32 or not saved:
        return None
    optimizer = AdamW(param_groups(model, config), 1.0, config, compile=False)
    index, error, size = 0, 0.0, 0.0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state, (m1, m2, n, width) = saved[index], layout(p, group)
            index += 1
            if "scales" in state:
                return None
            if p.dim() < 2:
                continue
            rows = [F.pad(state[k].flatten(), (0, n * width - p.numel())).view(n, width)
                    for k in ("exp_avg", "exp_avg_sq")]
            back, rng = [], torch.Generator().manual_seed(index)
            noise = torch.rand(n, 1, generator=rng).clamp(1e-4, 1 - 1e-4)
            for x, moment in zip(rows, (m1, m2), strict=True):
                codes = torch.zeros(n, width * moment.bits // 8, dtype=torch.uint8)
                codes = codes if moment.bits < 32 else x.clone()
                scale = torch.zeros(1 if moment.gran == "per_tensor" else n, 1)
                pack(x, codes, scale, moment, noise)
                back.append(unpack(codes, scale, moment))
            u, exact = ((m / (v.sqrt() + 1e-8)).flatten()[:p.numel()] for m, v in (back, rows))
            error += (u - exact).double().square().sum().item()
            size += exact.double().square().sum().item()
    return (error / size) ** 0.5 if size else None


def draws(probe: Probe, model: GPT, found: tuple[dict[str, Tensor], ...]) -> list[dict[str, Tensor]]:
    """Return each batch's mean gradient over DRAWS draws, of which the first was `found`."""
    mean = [dict(g) for g in found]
    for draw in range(1, DRAWS):
        for i, (_, g) in enumerate(probe.passes(model, draw)):
            if draw == 1 and i == 0 and all(torch.equal(g[n], found[0][n]) for n in g):
                return mean  # nothing is random
            mean[i] = {n: mean[i][n] + (g[n] - mean[i][n]) / (draw + 1) for n in g}
    return mean


def probe_rows(probe: Probe, recipes: dict[str, dict]) -> list[dict]:
    """Return a row for each recipe {name: flags} in all, and one for each of its linear layers."""
    base = probe.model({})
    losses, exact = zip(*probe.passes(base), strict=True)
    linears = [f"{n}.weight" for n, m in base.h.named_modules(prefix="h")
               if isinstance(m, QuantLinear)]
    rows = []
    for name, flags in recipes.items():
        model = probe.model(flags)
        mine, found = zip(*probe.passes(model), strict=True)
        mean = draws(probe, model, found)
        changes = [a - b for a, b in zip(mine, losses, strict=True)]
        for layer, names in (("all", list(exact[0])), *((n, [n]) for n in linears)):
            compared = compare_gradients(exact, found, names)
            compared["bias"] = compare_gradients(exact, mean, names)["error"]
            update = stored_update_error(probe.checkpoint, base, flags) if layer == "all" else None
            rows.append({"recipe": name, "layer": layer, "loss": statistics.mean(changes),
                         "loss_std": spread(changes), **compared, "update": update})
    return rows


@contextmanager
def moved(model: GPT, step: dict[str, Tensor], by: float) -> Iterator[None]:
    """Add by * step to the master weights, which quantizers then see, and take them back."""
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(step[n], alpha=by) if n in step else None
    try:
        yield
    finally:
        model.load_state_dict(kept, strict=False)


@torch.no_grad()
def mean_loss(model: GPT, batches: Tensor) -> float:
    """Return the mean loss over batches (n, B, T+1)."""
    return statistics.mean(model(batch[:, :-1], batch[:, 1:]).item() for batch in batches)


def sharpness_rows(probe: Probe, recipes: dict[str, dict], rho: float) -> list[dict]:
    """Return S, rho |g| and their ratio under each recipe, means over batches and the spread of S."""
    rows = []
    for name, flags in recipes.items():
        model, found, norms = probe.model(flags), [], []
        for batch, (loss, g) in zip(probe.batches, probe.passes(model), strict=True):
            norms.append(flat_norm(g))
            with moved(model, g, rho / norms[-1]):
                found.append(mean_loss(model, batch[None]) - loss)
        S, slope = statistics.mean(found), rho * statistics.mean(norms)
        rows.append({"recipe": name, "S": S, "S_std": spread(found), "rho |g|": slope,
                     "S / (rho |g|)": S / slope})
    return rows


def outlier_rows(model: GPT, batches: Tensor) -> list[dict]:
    """Return for the input of each linear: channels and tokens above mean + 6 std, and crest factors."""
    seen = {}

    def hook(name: str, layer: torch.nn.Module, args: tuple) -> None:
        seen[name] = seen.get(name, 0) + args[0].abs().mean(0).double() / len(batches)  # (T, C)
    handles = [m.register_forward_pre_hook(partial(hook, n))
               for n, m in model.h.named_modules(prefix="h") if isinstance(m, QuantLinear)]
    mean_loss(model, batches)
    for handle in handles:
        handle.remove()
    rows = []
    for name, M in seen.items():
        row = {"layer": name}
        for what, values in (("channels", M.mean(0)), ("tokens", M.mean(1))):  # (C,), (T,)
            count = (values > values.mean() + 6 * values.std()).sum().item()
            crest = values.max() / values.square().mean().sqrt()
            row |= {what: str(count), f"crest, {what}": crest.item()}
        rows.append(row)
    return rows


def gradient_rows(probe: Probe) -> list[dict]:
    """Return for the gradient of each linear, as trained, what small codes per_tensor round to zero, and its tail."""
    _, found = zip(*probe.passes(probe.model(None)), strict=True)
    rows = []
    for name in (n for n in found[0] if found[0][n].dim() == 2 and n.startswith("h.")):
        three = 3 if name.endswith("c_attn.weight") else 1  # q, k and v apart
        for part, letter in enumerate("qkv"[:three]):
            g = [x[name].chunk(three)[part].abs() for x in found]  # of each batch
            zero8, zero4 = ([(x < x.max() / top / 2).float().mean().item() for x in g]
                            for top in (127, 7))
            crest = [(x.max() / x.square().mean().sqrt()).item() for x in g]
            rows.append({"gradient of": name.removesuffix(".weight") + f".{letter}" * (three > 1),
                         "zero in 8 bits": statistics.mean(zero8),
                         "zero in 4 bits": statistics.mean(zero4), "max / rms": statistics.mean(crest),
                         "norm": statistics.mean(x.norm().item() for x in g)})
    return rows


@torch.no_grad()
def rescale(model: GPT, reader: str, channels: list[int], s: float) -> None:
    """Multiply input channels of a linear by s and the weight's columns by 1 / s, in place: the same function.

    s > 1 makes outliers in the activations, s < 1 in the weights. Args: reader: "attn.c_attn" or "mlp.c_fc", whose
    LayerNorm takes up s, or "attn.c_proj", for which the rows of v do; in every block.
    """
    for block in model.h:
        linear = block.get_submodule(reader)
        if reader == "attn.c_proj":  # c_attn's rows are q, k and v
            rows = [2 * linear.in_features + c for c in channels]
            before = [(t, rows) for t in block.attn.c_attn.parameters()]
        else:
            norm = block.ln_1 if reader == "attn.c_attn" else block.ln_2
            before = [(t, channels) for t in norm.parameters()]
        for t, where in before:
            t[where] *= s
        linear.weight[:, channels] /= s
