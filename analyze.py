"""Diagnostics of what quantization does, as tables, and as pictures (--out=NAME.png, which writes NAME.csv beside it).

    python analyze.py --what=curves --runs=out,out-fp32     # validation losses by step, differences to the last run
    python analyze.py --what=probe --ckpt=out               # one checkpoint under every recipe
    python analyze.py --what=sharpness --ckpt=out           # how steep the loss is around it; also landscape
    python analyze.py --what=outliers --runs=out,out-fp32   # channels and tokens that stand out
    python analyze.py --what=gradients --ckpt=out           # how sparse they are, layer by layer
    python analyze.py --what=memory                         # what fills it, GPT-2 small at several batch sizes
    python analyze.py --what=codebooks --out=codebooks.png  # the formats of Adam's moments
    python analyze.py --what=update_error --beta2=0.999     # and their error in training, a few minutes on a CPU

probe: change of the loss, and what becomes of the gradient (probe.py has the definitions); `update` is the error of u,
see update_error, when the checkpoint's moments are stored once. Judge W and A by loss, G by bias, moments by update.
sharpness: m-sharpness (Foret et al. 2021, arXiv 2010.01412), S = mean over batches of L(w + rho g / |g|) - L(w), beside
rho |g|, the part that the slope explains alone. landscape: the loss along two random directions, each matrix's as long
as the matrix (Li et al. 2018, arXiv 1712.09913).
outliers: of M = mean over the batch of |input of a linear| (T, C), channels whose mean over T exceeds mean + 6 std over
channels, tokens likewise (the paper's code); `crest` is max / rms of the channels' means: it has no ceiling, while
of C channels none can exceed the mean by sqrt(C - 1) std.
gradients: the share of a weight's gradient that 8 and 4 bits per_tensor round to zero, and how heavy its tail is.
memory: MiB that a step of GPT-2 small in bfloat16 has to hold; gradients come as what is kept for backward goes.
codebooks: every format of optim.py, a moment / its block's largest against the relative error it comes back with.
update_error: a run of the tiny model with fp32 AdamW; every format gets the same gradients. How far its
u = m / (sqrt(v) + eps), bias corrected, is from that of fp32 over the second half of the run:
sqrt(sum (u - u32)^2 / sum u32^2); and the largest |u|, in learning rates.
"""

if __name__ == "__main__":  # first: a bad command line is refused before torch is imported
    import support.early  # noqa: F401

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import extensions
from bench import EXPERIMENTS, MIB, BenchConfig, Variant, kept_for_backward, show
from model import GPT
from optim import AdamW, Moment, OptimConfig, decode, encode, new_scale, param_groups
from prepare_data import make_missing, open_dataset
from probe import Probe, gradient_rows, mean_loss, moved, outlier_rows, probe_rows, sharpness_rows
from support.config import build, flatten, one_line_errors, parse, refuse_idle
from support.device import Processes, resolve
from support.log import moment_bytes, read_log
from support.presets import SIZES
from train import Batches, TrainConfig, learning_rate

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


USES = {  # what each table reads of the flags below; a flag that would be ignored is refused
    "curves": "runs", "outliers": "runs data_dir batches batch_size", "codebooks": "",
    "probe": "ckpt recipes data_dir batches batch_size", "sharpness": "ckpt recipes data_dir batches batch_size rho",
    "landscape": "ckpt recipes data_dir batches batch_size rho seed", "gradients": "ckpt data_dir batches batch_size",
    "memory": "recipes", "update_error": "steps beta2 data_dir seed"}


@dataclass
class AnalyzeConfig:
    """What to look at."""
    what: Literal["curves", "probe", "sharpness", "landscape", "outliers", "gradients", "memory", "codebooks",
                  "update_error"] = "curves"  # which diagnostic
    out: str = ""  # file of the picture; beside it comes the table as .csv
    runs: str = "out"  # curves, outliers: out_dirs or checkpoints, separated by commas
    ckpt: str = "out"  # the checkpoint that is looked at, or the out_dir of its run
    recipes: str = ""  # presets joined by +, separated by commas; empty: all
    batches: int = 6  # how many batches of the validation split are looked at
    batch_size: int = 16  # sequences in one
    rho: float = 0.05  # length of the step of sharpness; landscape goes ten each way, in lengths of the weights
    steps: int = 200  # update_error: optimizer steps of the fp32 run; the second half is counted
    beta2: float = 0.95  # update_error: of the second moment
    data_dir: str | None = None  # where the token shards are; auto: where the run found them, or data
    seed: int = 1337  # of update_error's run, and of landscape's directions

    def __post_init__(self):
        for name, low in (("steps", 2), ("batches", 1), ("batch_size", 1), ("rho", 1e-6)):
            if not low <= getattr(self, name) < 2**53:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {low}")
        names = set(" ".join(USES.values()).split()) - set(USES[self.what].split())
        refuse_idle(self, **dict.fromkeys(names, (False, f"with --what={self.what}")))
        refuse_idle(self, out=(self.what != "update_error", "with --what=update_error"))
        if self.what in ("codebooks", "landscape") and not self.out:
            raise ValueError(f"--what={self.what} draws a picture; name its file: --out={self.what}.png")
        unknown = {p for name in self.recipes.split(",") for p in name.split("+")} - {"", *EXPERIMENTS}
        if unknown:
            raise ValueError(f"--recipes={self.recipes}: no preset {unknown.pop()!r}; "
                             f"use some of {', '.join(EXPERIMENTS)}")

    def probe(self, ckpt: str) -> Probe:
        """Return a checkpoint with the batches asked for."""
        return Probe(ckpt, self.batches, self.batch_size, self.data_dir)

    def flags(self) -> dict[str, dict]:
        """Return {name: flat flags} of the recipes asked for, the unquantized one first."""
        names = ["E0", *filter(None, self.recipes.split(",") if self.recipes else EXPERIMENTS)]
        return {name: recipe(name) for name in names}


def recipe(name: str) -> dict:
    """Return the flat flags of presets joined by +."""
    return {flag: value for preset in name.split("+") for flag, value in EXPERIMENTS[preset].items()}


def new_figure(rows: int = 1, columns: int = 2, size: tuple[float, float] = (11, 4.5), **options):
    """Return a figure and its array of panels. matplotlib is optional: say how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib; run: pip install matplotlib") from None
    figure = Figure(figsize=size, layout="tight")  # on white, so that it is readable in a dark page too
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    return figure, panels


def write_csv(rows: list[dict], path: Path) -> None:
    """Write a table; numbers with six digits."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row.values())


def save(figure, rows: list[dict], out: str) -> None:
    """Write the picture, and the numbers beside it."""
    figure.savefig(out, dpi=120)
    write_csv(rows, Path(out).with_suffix(".csv"))
    print(f"wrote {out} and {Path(out).with_suffix('.csv')}")


# -----------------------------------------------------------------------------
# runs

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
    for panel in panels[0]:
        for name, run in zip(names, runs, strict=True):
            x, y = ([line[what] for line in run.values()] for what in ("tokens", key))
            panel.plot(x, y, "o-", ms=3, label=name)
        panel.set(xlabel="tokens", ylabel=f"validation loss, {unit}")
    # The right panel is a zoom: the last third of the tokens, and the values there.
    tokens = max(line["tokens"] for run in runs for line in run.values())
    late = [line[key] for run in runs for line in run.values() if line["tokens"] >= tokens * 2 / 3]
    margin = 0.1 * (max(late) - min(late)) or 0.01
    panels[0][1].set(title="the end", xlim=(tokens * 0.66, tokens * 1.01),
                     ylim=(min(late) - margin, max(late) + margin))
    panels[0][0].legend()
    save(figure, [{"run": name, **{k: line[k] for k in ("step", "tokens", key)}}
                  for name, run in zip(names, runs, strict=True) for line in run.values()], config.out)


# -----------------------------------------------------------------------------
# one checkpoint

def probe(config: AnalyzeConfig) -> None:
    """Print what each recipe does to loss, gradient and update of one checkpoint."""
    one, figure = config.probe(config.ckpt), config.out and new_figure(1, 3, size=(16, 9))
    rows = probe_rows(one, config.flags())
    total = [row for row in rows if row["layer"] == "all"]
    numbers = [{k: "" if v is None else f"{v:.5f}" if isinstance(v, float) else v
                for k, v in row.items() if k != "layer"} for row in total]
    show(f"{config.ckpt} at step {one.checkpoint['step']}, {len(one.batches)} batches of {config.batch_size} windows; "
         "do not rank across kinds: W and A by loss, G by bias, moments by update", numbers, False)
    if figure:
        kinds = (("loss", "change of the loss, nats (W, A)", ("wbits", "abits")),
                 ("bias", "bias of the gradient (G)", ("gbits",)),
                 ("update", "error of Adam's update (moments)", ("m1bits", "m2bits")))
        for panel, (key, title, bits) in zip(figure[1][0], kinds, strict=True):
            mine = [row for row in total if row[key] is not None
                    and min(config.flags()[row["recipe"]].get(b, 32) for b in bits) < 32]
            panel.barh([row["recipe"] for row in mine], [row[key] for row in mine],
                       xerr=[row["loss_std"] for row in mine] if key == "loss" else None)
            panel.set_xscale("symlog" if key == "loss" else "log", **({"linthresh": 1e-3} if key == "loss" else {}))
            panel.set(title=title)
            panel.invert_yaxis()
        figure[0].suptitle("one checkpoint, without training; do not rank across the panels")
        save(figure[0], rows, config.out)


def sharpness(config: AnalyzeConfig) -> None:
    """Print m-sharpness under each recipe."""
    one, figure = config.probe(config.ckpt), config.out and new_figure(1, 1, size=(9, 7))
    flags = config.flags()
    if not config.recipes:  # of all, those that change the forward pass
        flags = {k: v for k, v in flags.items() if {"wbits", "abits"} & v.keys()}
    rows = sharpness_rows(one, flags, config.rho)
    show(f"{config.ckpt}, rho {config.rho}, {len(one.batches)} batches of {config.batch_size} windows", rows, False)
    if figure:
        panel, names = figure[1][0][0], [row["recipe"] for row in rows]
        panel.barh(names, [row["S"] for row in rows], xerr=[row["S_std"] for row in rows], label="S")
        panel.plot([row["rho |g|"] for row in rows], names, "k|", ms=12, label="rho |g|")
        panel.set(xlabel=f"loss at distance rho = {config.rho} up the gradient, minus loss")
        panel.legend()
        panel.invert_yaxis()
        save(figure[0], rows, config.out)


def landscape(config: AnalyzeConfig) -> None:
    """Draw the loss along one random direction for every recipe, and over two for the first and the last."""
    one, flags, rows = config.probe(config.ckpt), config.flags(), []
    models = {name: one.model(flat) for name, flat in flags.items()}
    generator = torch.Generator().manual_seed(config.seed)
    names = [n for n, p in models["E0"].named_parameters() if p.dim() >= 2]

    def direction() -> dict[str, Tensor]:
        found = {}
        for n in names:
            p = models["E0"].get_parameter(n).detach()
            d = torch.randn(p.shape, generator=generator)
            found[n] = d * (p.norm() / d.norm())  # as long as the matrix
        return found
    a, b = direction(), direction()
    figure, panels = new_figure(1, 3, size=(16, 4.8))
    line = [config.rho * x for x in range(-10, 11)]
    for name, model in models.items():
        for x in line:
            with moved(model, a, x):
                rows.append({"recipe": name, "x": x, "y": 0.0, "loss": mean_loss(model, one.batches)})
        panels[0][0].plot(line, [row["loss"] for row in rows[-len(line):]], label=name)
    panels[0][0].set(xlabel="step / length of the weights", ylabel="loss, nats per token")
    panels[0][0].legend()
    last = list(models)[-1]
    for panel, name in zip(panels[0][1:], ("E0", last), strict=True):
        grid = []
        for y in line[::2]:
            with moved(models[name], b, y):
                for x in line[::2]:
                    with moved(models[name], a, x):
                        grid.append({"recipe": name, "x": x, "y": y, "loss": mean_loss(models[name], one.batches[:1])})
        rows += grid
        n = len(line[::2])
        shape = panel.contour(line[::2], line[::2], torch.tensor([row["loss"] for row in grid]).view(n, n), 15)
        panel.clabel(shape, fontsize=7)
        panel.set(title=name, xlabel="first direction", ylabel="second")
    save(figure, rows, config.out)


def outliers(config: AnalyzeConfig) -> None:
    """Print the outliers of several checkpoints, as trained."""
    figure, rows = config.out and new_figure(1, 2), []
    for ckpt in dict.fromkeys(config.runs.split(",")):
        one = config.probe(ckpt)
        found = outlier_rows(one.model(None), one.batches)
        rows += [{"ckpt": ckpt, "step": str(one.checkpoint["step"]), **row} for row in found]
        if figure:
            for panel, what in zip(figure[1][0], ("channels", "tokens"), strict=True):
                panel.plot([row[f"crest, {what}"] for row in found], "o-", ms=3, label=ckpt)
                panel.set(xlabel="linear layer, from the input to the output", ylabel=f"max / rms over {what}")
    show("inputs of the linear layers", rows, False)
    if figure:
        figure[1][0][0].legend()
        save(figure[0], rows, config.out)


def gradients(config: AnalyzeConfig) -> None:
    """Print how much of each weight's gradient small codes round to zero."""
    one, figure = config.probe(config.ckpt), config.out and new_figure()
    rows = gradient_rows(one)
    show(f"{config.ckpt} at step {one.checkpoint['step']}", rows, False)
    if figure:
        norms, zeros = figure[1][0]
        folder = Path(config.ckpt)
        folder = folder if folder.is_dir() else folder.parent
        log = [x for x in read_log(folder / "log.jsonl") if "grad_norm" in x]
        norms.semilogy([x["tokens"] for x in log], [x["grad_norm"] for x in log])
        norms.set(xlabel="tokens", ylabel="gradient norm before clipping")
        for key in ("zero in 8 bits", "zero in 4 bits"):
            zeros.plot([row[key] for row in rows], "o-", ms=3, label=key)
        zeros.set(xlabel="weight, from the input to the output", ylabel="share of the gradient", ylim=(0, 1))
        zeros.legend()
        save(figure[0], rows, config.out)


# -----------------------------------------------------------------------------
# sizes and formats

def memory(config: AnalyzeConfig) -> None:
    """Print what a step of GPT-2 small holds, on fake tensors: no arithmetic, real sizes."""
    rows, few = [], ("E0", "w8a8", "w8a8+keep8", "w8a8+keep8+adam8")
    flags = config.flags() if config.recipes else {name: recipe(name) for name in few}
    for name, size in ((name, size) for name in flags for size in (4, 8, 16)):
        shape = BenchConfig(batch_size=size, vocab_size=50257, compile=False, dtype="bfloat16")
        with FakeTensorMode():
            v = Variant(name, shape, "cpu", flatten(shape.model) | flags[name])
            kept = kept_for_backward(v.forward, v.model)[0] / MIB
            weights = sum(p.nbytes for p in v.model.parameters()) / MIB
            moments = moment_bytes(v.optimizer)[0] * weights / 4
        rows.append({"recipe": name, "sequences": str(size), "parameters": weights, "optimizer": moments,
                     "kept for backward": kept, "kept, %": 100 * kept / (kept + weights + moments)})
    show("MiB, GPT-2 small, 1024 tokens a sequence, bfloat16, uncompiled", rows, False)
    if config.out:
        figure, ((panel,),) = new_figure(1, 1, size=(11, 5))
        names, left = [f"{row['recipe']}, {row['sequences']} sequences" for row in rows], [0.0] * len(rows)
        for key in ("parameters", "optimizer", "kept for backward"):
            panel.barh(names, [row[key] for row in rows], left=left, label=key)
            left = [x + row[key] for x, row in zip(left, rows, strict=True)]
        panel.invert_yaxis()
        panel.set(xlabel="MiB")
        panel.legend()
        save(figure, rows, config.out)


def codebooks(config: AnalyzeConfig) -> None:
    """Draw each format's largest relative error by value, 1e-8 to 1 of a block's largest one."""
    (figure, panels), rows = new_figure(sharey=True), []
    x = torch.logspace(-8, 0, 200_001, dtype=torch.float64).float()[None]  # a block
    for second, panel in enumerate(panels[0]):
        for fmt, color in (("linear", "tab:red"), ("dynamic", "tab:blue"), ("power", "tab:green")):
            for bits, style in ((8, "-"), (4, "--")):
                moment = Moment(bits, fmt, second=bool(second))
                scale = new_scale(x, moment)
                error = (decode(encode(x, scale, moment), scale, moment) - x).abs() / x
                bins, error = (t[0, :-1].view(400, -1) for t in (x, error))  # fiftieths of a decade
                panel.loglog(bins[:, 0], error.amax(1).clamp(min=1e-4), style, color=color, label=f"{fmt} {bits} bit")
                rows += [{"moment": "mv"[second], "format": f"{fmt}{bits}", "value": v, "error": e}
                         for v, e in zip(bins[:, 0].tolist(), error.amax(1).tolist(), strict=True)]
        panel.set(xlabel="value / largest of its block", ylim=(3e-3, 1e3),
                  title=("first moment m; ", "second moment v; ")[second] + "at 1 it comes back as 0")
        panel.legend()
    panels[0][0].set_ylabel("largest relative error")
    save(figure, rows, config.out)


def update_error(config: AnalyzeConfig) -> None:
    """Print the table of shadow moments."""
    train = build(TrainConfig, SIZES["tiny"] | dict(
        beta2=config.beta2, max_iters=config.steps, device="cpu", compile=False, seed=config.seed,
        data_dir=config.data_dir or "data", sample_tokens=0))
    processes = Processes("cpu")
    resolve(train, processes)
    make_missing(train.data)
    tokens, _, meta = open_dataset(train.data)
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
        print(f"| {name} | {errors} | {s[4]:,.2f} | {moment_bytes(optimizers[name])[0]:.3f} |")


def main() -> None:
    """Draw or print."""
    config = parse(AnalyzeConfig, doc=__doc__)
    with one_line_errors():
        {"curves": curves, "probe": probe, "sharpness": sharpness, "landscape": landscape, "outliers": outliers,
         "gradients": gradients, "memory": memory, "codebooks": codebooks,
         "update_error": update_error}[config.what](config)


if __name__ == "__main__":
    main()
