"""Is it outliers or sharpness that breaks 4 bits? An experiment on checkpoints of the unquantized model.

    python sweep.py --rows=E0                              # three seeds of E0
    python results/outliers_or_sharpness.py                # outliers_or_sharpness.csv and .png, a quarter of an hour

Two interventions, each of which moves one suspect and leaves the other:
(1) outliers without sharpness: input channels of c_attn and c_fc times s, the weights' columns by 1 / s
    (probe.rescale): the same function, with outliers in the activations (s > 1) or in the weights (s < 1);
(2) sharpness without outliers: some more steps with sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412:
    the gradient is taken a step rho up the gradient), beside as many ordinary ones.
Measured on the validation split, without training under the recipe: the change of the loss under W4, A4 (per token) and
A6 (per channel), m-sharpness S, and crest factors (max / rms) of input channels and of weight columns.
"""

import csv
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from analyze import new_figure  # noqa: E402
from probe import Probe, mean_loss, moved, outlier_rows, rescale  # noqa: E402
from support.presets import PRESETS  # noqa: E402

READERS, STEPS, RHO, DOSES = ("attn.c_attn", "mlp.c_fc"), 400, 0.2, (2, 4, 8, 16, 32)


def train_on(one: Probe, tokens: np.ndarray, rho: float) -> dict:
    """Return the checkpoint's weights after STEPS more steps, sharpness-aware if rho > 0."""
    model, T = one.model({}), one.flat["block_size"]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        starts = np.random.default_rng((7, step)).integers(0, len(tokens) - T, 16)
        batch = torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts]).astype(np.int64))

        def gradient(batch: torch.Tensor = batch) -> dict[str, torch.Tensor]:
            model.zero_grad()
            model(batch[:, :-1], batch[:, 1:]).backward()
            return {n: p.grad for n, p in model.named_parameters()}
        g = gradient()
        if rho:
            up = {n: t.clone() for n, t in g.items()}
            norm = sum(t.square().sum() for t in up.values()).sqrt().item()
            with moved(model, up, rho / norm):
                gradient()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {k: v.clone() for k, v in model.state_dict().items()}


def measure(one: Probe, weights: dict, channels: int, s: float) -> dict:
    """Return losses, sharpness and crest factors of the weights, some channels of theirs rescaled by s."""
    def model(recipe: str):
        found = one.model(PRESETS[recipe])
        found.load_state_dict(weights)
        for reader in READERS:
            rescale(found, reader, list(range(5, 5 + channels)), s)
        return found
    plain = model("E0")
    loss = mean_loss(plain, one.batches)
    row = {"loss": loss, **{r: mean_loss(model(r), one.batches) - loss for r in ("W4", "A4", "A6")}}
    rises, slopes = [], []
    for batch, (before, g) in zip(one.batches, one.passes(plain), strict=True):
        norm = sum(t.square().sum() for t in g.values()).sqrt().item()
        with moved(plain, g, 0.05 / norm):
            rises.append(mean_loss(plain, batch[None]) - before)
        slopes.append(0.05 * norm)
    inputs = [r["crest, channels"] for r in outlier_rows(plain, one.batches) if r["layer"].endswith(READERS)]
    columns = [w.abs().amax(0) for b in plain.h for w in (b.get_submodule(r).weight for r in READERS)]
    crest = statistics.mean((c.max() / c.square().mean().sqrt()).item() for c in columns)
    return row | {"S": statistics.mean(rises), "S / (rho |g|)": statistics.mean(rises) / statistics.mean(slopes),
                  "crest, inputs": statistics.mean(inputs), "crest, weights": crest}


def main() -> None:
    """Measure, and write the table and the figure."""
    torch.set_num_threads(1)
    rows = []
    for seed in (1, 2, 3):
        one = Probe(str(ROOT / f"results/laptop/runs/E0-{seed}"), 6, 16)
        tokens = np.memmap(Path(one.flat["data_dir"], one.flat["dataset"], "train.bin"), np.uint16, "r")
        trained = one.checkpoint["model"]
        states = {"trained": trained, "more": train_on(one, tokens, 0.0), "SAM": train_on(one, tokens, RHO)}
        for state, weights in states.items():
            doses = DOSES if state == "trained" else (16,)
            for where, channels, s in (("nowhere", 0, 1.0), *(("activations", 1, float(d)) for d in doses),
                                       *(("weights", 4, 1.0 / d) for d in doses)):
                row = {"seed": seed, "weights": state, "outliers in": where, "times": max(s, 1 / s)}
                rows.append(row | measure(one, weights, channels, s))
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    with open(ROOT / "results/outliers_or_sharpness.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    figure, ((doses, sharp),) = new_figure(1, 2)
    for where, style in (("activations", "-"), ("weights", "--")):
        for key, color in (("A4", "tab:red"), ("W4", "tab:blue"), ("S", "black")):
            points = {}
            for row in rows:
                if row["weights"] == "trained" and row["outliers in"] in ("nowhere", where):
                    points.setdefault(row["times"], []).append(row[key])
            y = [statistics.mean(points[x]) for x in sorted(points)]
            doses.plot(sorted(points), y, style, color=color, label=f"{key}, outliers in the {where}")
    doses.set(xscale="log", yscale="log", xlabel="outlier, times", ylabel="loss added by 4 bits; S",
              title="same function")
    doses.legend(fontsize=7)
    for key, color in (("A4", "tab:red"), ("W4", "tab:blue")):
        for state, mark in (("trained", "o"), ("more", "s"), ("SAM", "^")):
            mine = [r for r in rows if r["weights"] == state and r["outliers in"] == "nowhere"]
            sharp.plot([r["S"] for r in mine], [r[key] for r in mine], mark, color=color, label=f"{key}, {state}")
    sharp.set(xlabel="m-sharpness S", ylabel="loss added by 4 bits", title="other weights, no outliers added")
    sharp.legend(fontsize=7)
    figure.savefig(ROOT / "results/outliers_or_sharpness.png", dpi=120)


if __name__ == "__main__":
    main()
