"""Diagnostics of what quantization does, as pictures (pip install matplotlib) and as tables.

    python analyze.py --what=curves --runs=out,out-fp32                 # a table; with --out=curves.png a picture too
    python analyze.py --what=update_error --beta2=0.999                 # a few minutes on a CPU
    python analyze.py --what=codebooks --out=results/codebooks.png

curves: the validation losses of several runs by step, and how far each is from the last one named. Where the runs have
different data, and so perhaps different tokens, bits per byte instead of nats per token.

codebooks: every format of optim.py, the value of a moment (in units of its block's largest) against the relative error
it comes back with. Both axes are logarithmic; a format is as good as its curve is low, as far to the left as it is.

update_error: one fp32 AdamW run of the tiny model, and beside it the moments of every format, fed with the very same
gradients ("shadow moments"). Each row compares the update a format would make, u = m / (sqrt(v) + eps) with bias
correction, with that of fp32, over the second half of the run: sqrt(sum (u - u32)^2 / sum u32^2) for the block linears
and for the embeddings, and the largest |u| anywhere. AdamW's own steps rarely exceed 1; a u of 1000 moves a weight by
a thousand learning rates.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import extensions
from model import GPT
from optim import AdamW, Moment, OptimConfig, decode, encode, new_scale, param_groups
from support.config import build, flatten, one_line_errors, parse, refuse_idle
from support.device import Processes, resolve
from support.log import read_log
from support.presets import SIZES
from train import Batches, TrainConfig, get_data, learning_rate

# name: what the flags --m1bits, --m1fmt, ... would say
FORMATS = {
    "linear8 m, per_channel (S2)": dict(m1bits=8, m1fmt="linear", m1gran="per_channel"),
    "linear4 m, per_channel (S4)": dict(m1bits=4, m1fmt="linear", m1gran="per_channel"),
    "linear8 v, per_channel (S6)": dict(m2bits=8, m2fmt="linear", m2gran="per_channel"),
    "linear8 v, per_channel, floor 1e-8": dict(m2bits=8, m2fmt="linear", m2gran="per_channel", mfloor=True),
    "linear8 v, per_tensor (S6)": dict(m2bits=8, m2fmt="linear", m2gran="per_tensor"),
    "linear8 v, per_block": dict(m2bits=8, m2fmt="linear"),
    "linear8 + linear8, per_block": dict(m1bits=8, m1fmt="linear", m2bits=8, m2fmt="linear"),
    "dynamic8 + dynamic8": dict(m1bits=8, m1fmt="dynamic", m2bits=8, m2fmt="dynamic"),
    "linear8 + power8": dict(m1bits=8, m1fmt="linear", m2bits=8),
    "power8 + power8 (adam8)": dict(m1bits=8, m2bits=8),
    "power8 + power8, v nearest": dict(m1bits=8, m2bits=8, m2round="nearest"),
    "power8 + power8, blocks of 64": dict(m1bits=8, m2bits=8, mblock=64),
    "dynamic4 + dynamic4": dict(m1bits=4, m1fmt="dynamic", m2bits=4, m2fmt="dynamic"),
    "linear4 + linear4": dict(m1bits=4, m1fmt="linear", m2bits=4, m2fmt="linear"),
    "linear4 + power4": dict(m1bits=4, m1fmt="linear", m2bits=4),
    "dynamic4 + power4": dict(m1bits=4, m1fmt="dynamic", m2bits=4),
    "power4 + power4 (adam4)": dict(m1bits=4, m2bits=4),
    "power4 + power4, v nearest": dict(m1bits=4, m2bits=4, m2round="nearest"),
    "power4 + power8": dict(m1bits=4, m2bits=8),
}


@dataclass
class AnalyzeConfig:
    """What to look at."""
    what: Literal["curves", "update_error", "codebooks"] = "curves"  # which diagnostic
    runs: str = "out"  # out_dirs of the runs whose curves are shown, separated by commas
    out: str = ""  # file of the picture
    steps: int = 200  # optimizer steps of the fp32 run; the second half is counted
    beta2: float = 0.95  # of the second moment
    data_dir: str = "data"  # where the token shards of stdlib are, or are made
    seed: int = 1337  # of the run

    def __post_init__(self):
        if self.steps < 2:
            raise ValueError(f"--steps={self.steps} must be at least 2")
        idle = {"update_error": ("out", "runs"), "codebooks": ("runs", "steps", "beta2", "data_dir", "seed"),
                "curves": ("steps", "beta2", "data_dir", "seed")}[self.what]
        refuse_idle(self, **{name: (False, f"with --what={self.what}") for name in idle})
        if self.what == "codebooks" and not self.out:
            raise ValueError("--what=codebooks draws a picture; name its file: --out=codebooks.png")


def _pyplot():
    """Import the optional dependency, or say how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures are drawn with matplotlib; run: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def curves(config: AnalyzeConfig) -> None:
    """Print the validation losses of several runs, and draw them if --out names a file."""
    names = list(dict.fromkeys(config.runs.split(",")))
    logs = [read_log(Path(name, "log.jsonl")) for name in names]
    data = {line["config"]["dataset"] for log in logs for line in log if "config" in line}
    key, unit = ("val_loss", "nats per token") if len(data) == 1 else ("val_bpb", "bits per byte")
    runs = [{line["step"]: line for line in log if key in line} for log in logs]
    print(f"{key}, {unit}; in brackets the difference to {names[-1]}\n")
    print("| step | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for step in sorted(set().union(*runs)):
        *others, last = [run[step][key] if step in run else math.nan for run in runs]
        cells = [*(f"{value:.4f} ({value - last:+.4f})" for value in others), f"{last:.4f}"]
        print(f"| {step} | " + " | ".join(cells).replace("nan (+nan)", "").replace("(+nan)", "") + " |")
    if not config.out:
        return
    plt = _pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    for name, run in zip(names, runs, strict=True):
        for panel in panels:
            panel.plot([line["tokens"] for line in run.values()], [line[key] for line in run.values()], "o-", ms=3,
                       label=name)
    # The right panel is a zoom: the last third of the tokens, and the values that the runs have there.
    tokens = max(line["tokens"] for run in runs for line in run.values())
    late = [line[key] for run in runs for line in run.values() if line["tokens"] >= tokens * 2 / 3]
    margin = 0.1 * (max(late) - min(late)) or 0.01
    panels[1].set(xlim=(tokens * 0.66, tokens * 1.01), ylim=(min(late) - margin, max(late) + margin), title="the end")
    for panel in panels:
        panel.set(xlabel="tokens", ylabel=f"validation loss, {unit}")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(config.out, dpi=120)
    print(f"wrote {config.out}")


def codebooks(path: str) -> None:
    """Draw the largest relative error of each format over the values from 1e-8 to 1 of a block's largest one."""
    plt = _pyplot()
    x = torch.logspace(-8, 0, 200_001, dtype=torch.float64).float()[None]  # one block, its largest value is 1
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for second, panel in enumerate(panels):
        for fmt, color in (("linear", "tab:red"), ("dynamic", "tab:blue"), ("power", "tab:green")):
            for bits, style in ((8, "-"), (4, "--")):
                moment = Moment(bits, fmt, second=bool(second))
                scale = new_scale([x], moment)
                error = (decode(encode(x, scale, moment), scale, moment) - x).abs() / x
                error = error[0, :-1].view(400, -1).amax(1)  # the envelope over a fiftieth of a decade
                panel.loglog(x[0, :-1].view(400, -1)[:, 0], error.clamp(min=1e-4), style, color=color,
                             label=f"{fmt} {bits} bit")
        panel.set_xlabel("value / largest of its block")
        panel.set_title("second moment v; at 1 it comes back as 0, above 1 as too large" if second
                        else "first moment m; at 1 it comes back as 0")
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("largest relative error")
    panels[0].set_ylim(3e-3, 1e3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def update_error(config: AnalyzeConfig) -> None:
    """Print the table of shadow moments."""
    train = build(TrainConfig, {**SIZES["tiny"], "beta2": config.beta2, "max_iters": config.steps, "device": "cpu",
                                "seed": config.seed, "data_dir": config.data_dir, "sample_tokens": 0})
    processes = Processes("cpu")
    resolve(train, processes)
    tokens, _, meta = get_data(train, processes)
    torch.manual_seed(train.seed)
    model = GPT(train.model, meta["vocab_size"], extensions.linears(flatten(train)))
    batches = Batches(tokens, train, processes)
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() >= 2]
    runs = {"fp32": {}, **FORMATS}
    # A shadow steps zeros with learning rate 1 and without decay: what it leaves there is -u.
    shadows = {name: [torch.nn.Parameter(torch.zeros_like(p)) for _, p in matrices] for name in runs}
    optimizers = {name: AdamW(shadows[name], 1.0, OptimConfig(weight_decay=0.0, beta2=config.beta2, **flags),
                              compile=False) for name, flags in runs.items()}
    main = AdamW(param_groups(model, train.optim), train.learning_rate, train.optim, compile=False)
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in runs}
    for step in range(config.steps):
        loss = model(*batches.get(step, 0))
        main.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        for group in main.param_groups:
            group["lr"] = learning_rate(step, train)
        main.step()
        for name, mine in shadows.items():
            for (_, p), shadow in zip(matrices, mine, strict=True):
                shadow.grad = p.grad
            optimizers[name].step()
            if step >= config.steps // 2:
                for (where, _), u, exact in zip(matrices, mine, shadows["fp32"], strict=True):
                    i = 2 * where.startswith("w")  # wte, wpe
                    sums[name][i] += (u - exact).double().square().sum().item()
                    sums[name][i + 1] += exact.double().square().sum().item()
                    sums[name][4] = max(sums[name][4], u.abs().max().item())
        for mine in shadows.values():
            for shadow in mine:
                shadow.data.zero_()
    print(f"beta2 {config.beta2}, {config.steps} steps of {train.batch_size * train.model.block_size} tokens, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, seed {config.seed}, torch {torch.__version__}")
    print("| moments | error, linears | error, embeddings | largest update, lr | bytes per parameter |")
    print("|---|---|---|---|---|")
    for name, s in sums.items():
        size = optimizers[name].describe()[0]
        print(f"| {name} | {(s[0] / s[1]) ** 0.5:.3f} | {(s[2] / s[3]) ** 0.5:.3f} | {s[4]:,.2f} | {size:.3f} |")


def main() -> None:
    """Draw or print."""
    config = parse(AnalyzeConfig, doc=__doc__)
    with one_line_errors():
        {"curves": curves, "update_error": update_error, "codebooks": lambda c: codebooks(c.out)}[config.what](config)


if __name__ == "__main__":
    main()
