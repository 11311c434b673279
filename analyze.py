"""Diagnostics of what quantization does, as pictures (pip install matplotlib) and as tables.

    python analyze.py --what=curves --runs=out,out-fp32      # a table; --out=x.png: a picture
    python analyze.py --what=update_error --beta2=0.999      # a few minutes on a CPU
    python analyze.py --what=codebooks --out=results/codebooks.png

curves: validation losses by step, and differences to the last run; bits per byte if data differ.
codebooks: every format of optim.py, a moment / its block's largest against the relative error it
comes back with (above 1: too large); a good format's is low, and stays so far to the left.
update_error: a run of the tiny model with fp32 AdamW; every format gets the same gradients. How far
its u = m / (sqrt(v) + eps), bias corrected, is from that of fp32 over the second half of the run:
sqrt(sum (u - u32)^2 / sum u32^2); and the largest |u|, in learning rates.
"""

if __name__ == "__main__":  # first: a bad command line is refused before torch is imported
    import support.early  # noqa: F401

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

FORMATS = {  # name: what the flags --m1bits, --m1fmt, ... would say
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
    "power8 + power8, blocks of 256": dict(m1bits=8, m2bits=8, mblock=256),
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
        training = "steps", "beta2", "data_dir", "seed"
        idle = {"update_error": ("out", "runs"), "codebooks": ("runs", *training), "curves": training}[self.what]
        refuse_idle(self, **dict.fromkeys(idle, (False, f"with --what={self.what}")))
        if self.what == "codebooks" and not self.out:
            raise ValueError("--what=codebooks draws a picture; name its file: --out=codebooks.png")


def new_figure(rows: int = 1, columns: int = 2, size: tuple[float, float] = (11, 4.5), **options):
    """Return a figure and its array of panels. matplotlib is optional: say how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib; run: pip install matplotlib") from None
    figure = Figure(figsize=size, layout="tight")
    panels = figure.subplots(rows, columns, **options)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    return figure, panels


def curves(config: AnalyzeConfig) -> None:
    """Print the validation losses of several runs, and draw them if --out names a file."""
    names = list(dict.fromkeys(config.runs.split(",")))
    logs = [read_log(Path(name, "log.jsonl")) for name in names]
    data = {line["config"]["dataset"] for log in logs for line in log if "config" in line}
    key, unit = ("val_loss", "nats per token") if len(data) == 1 else ("val_bpb", "bits per byte")
    runs = [{line["step"]: line for line in log if key in line} for log in logs]
    if not any(runs):
        raise ValueError(f"--runs={config.runs}: no evaluation yet; wait for the first")
    figure, panels = new_figure() if config.out else (None, ())
    print(f"{key}, {unit}; in brackets the difference to {names[-1]}\n")
    print("| step | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for step in sorted(set().union(*runs)):
        values = [run[step][key] if step in run else None for run in runs]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        for i, value in enumerate(values[:-1]):
            if None not in (value, values[-1]):
                cells[i] += f" ({value - values[-1]:+.4f})"
        print(f"| {step} | " + " | ".join(cells) + " |")
    if figure is None:
        return
    for panel in panels:
        for name, run in zip(names, runs, strict=True):
            x, y = ([line[what] for line in run.values()] for what in ("tokens", key))
            panel.plot(x, y, "o-", ms=3, label=name)
        panel.set(xlabel="tokens", ylabel=f"validation loss, {unit}")
    # The right panel is a zoom: the last third of the tokens, and the values there.
    tokens = max(line["tokens"] for run in runs for line in run.values())
    late = [line[key] for run in runs for line in run.values() if line["tokens"] >= tokens * 2 / 3]
    margin = 0.1 * (max(late) - min(late)) or 0.01
    panels[1].set(xlim=(tokens * 0.66, tokens * 1.01), ylim=(min(late) - margin, max(late) + margin), title="the end")
    panels[0].legend()
    figure.savefig(config.out, dpi=120)
    print(f"wrote {config.out}")


def codebooks(config: AnalyzeConfig) -> None:
    """Draw each format's largest relative error by value, 1e-8 to 1 of a block's largest one."""
    figure, panels = new_figure(sharey=True)
    x = torch.logspace(-8, 0, 200_001, dtype=torch.float64).float()[None]  # a block
    for second, panel in enumerate(panels):
        for fmt, color in (("linear", "tab:red"), ("dynamic", "tab:blue"), ("power", "tab:green")):
            for bits, style in ((8, "-"), (4, "--")):
                moment = Moment(bits, fmt, second=bool(second))
                scale = new_scale(x, moment)
                error = (decode(encode(x, scale, moment), scale, moment) - x).abs() / x
                bins, error = (t[0, :-1].view(400, -1) for t in (x, error))  # fiftieths of a decade
                panel.loglog(bins[:, 0], error.amax(1).clamp(min=1e-4), style, color=color, label=f"{fmt} {bits} bit")
        panel.set(xlabel="value / largest of its block", ylim=(3e-3, 1e3),
                  title=("first moment m; ", "second moment v; ")[second] + "at 1 it comes back as 0")
        panel.legend()
    panels[0].set_ylabel("largest relative error")
    figure.savefig(config.out, dpi=120)
    print(f"wrote {config.out}")


def update_error(config: AnalyzeConfig) -> None:
    """Print the table of shadow moments."""
    train = build(TrainConfig, SIZES["tiny"] | dict(
        beta2=config.beta2, max_iters=config.steps, device="cpu", compile=False, seed=config.seed,
        data_dir=config.data_dir, sample_tokens=0))
    processes = Processes("cpu")
    resolve(train, processes)
    tokens, _, meta = get_data(train, processes)
    torch.manual_seed(train.seed)
    model = GPT(train.model, meta["vocab_size"], extensions.linears(flatten(train)))
    batches = Batches(tokens, train, processes)
    main = AdamW(param_groups(model, train.optim), train.learning_rate, train.optim, compile=False)
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() >= 2]
    # A shadow steps zeros with learning rate 1 and without decay: what it leaves there is -u.
    runs = {"fp32": {}, **FORMATS}
    shadows = {k: [torch.nn.Parameter(torch.zeros_like(p)) for _, p in matrices] for k in runs}
    optimizers = {name: AdamW(shadows[name], 1.0, compile=False, config=OptimConfig(
        weight_decay=0.0, beta2=config.beta2, **flags)) for name, flags in runs.items()}
    # squares of error and update in the linears, the same in the embeddings, the largest update
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in runs}
    for step in range(config.steps):
        main.zero_grad()
        model(*batches.get(step, 0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        for group in main.param_groups:
            group["lr"] = learning_rate(step, train)
        main.step()
        for name, mine in shadows.items():  # fp32 first
            for (_, p), shadow in zip(matrices, mine, strict=True):
                shadow.data.zero_()
                shadow.grad = p.grad
            optimizers[name].step()
            if step >= config.steps // 2:
                for (where, _), u, exact in zip(matrices, mine, shadows["fp32"], strict=True):
                    i = 2 * where.startswith("w")  # wte, wpe
                    sums[name][i] += (u - exact).double().square().sum().item()
                    sums[name][i + 1] += exact.double().square().sum().item()
                    sums[name][4] = max(sums[name][4], u.abs().max().item())
    count, size = sum(p.numel() for p in model.parameters()), batches.size * batches.T
    print(f"beta2 {config.beta2}, {config.steps} steps of {size} tokens, {count:,} parameters, "
          f"seed {config.seed}, torch {torch.__version__}")
    print("| moments | error, linears | error, embeddings | largest update, lr | bytes per parameter |\n"
          "|---|---|---|---|---|")
    for name, s in sums.items():
        errors = f"{(s[0] / s[1]) ** 0.5:.3f} | {(s[2] / s[3]) ** 0.5:.3f}"
        print(f"| {name} | {errors} | {s[4]:,.2f} | {optimizers[name].describe()[0]:.3f} |")


def main() -> None:
    """Draw or print."""
    config = parse(AnalyzeConfig, doc=__doc__)
    with one_line_errors():
        {"curves": curves, "update_error": update_error, "codebooks": codebooks}[config.what](config)


if __name__ == "__main__":
    main()
