"""Rerun the study of arXiv 2407.11722: every row of its matrix, its controls, several seeds, and a verdict per claim.

    python sweep.py                                   # 5 to 12 hours of two cores; cut off, it goes on
    python sweep.py --rows=E0,C1,W4 --seeds=1         # a part of it
    python sweep.py --report                          # tables and figures of the runs there are
    python sweep.py --scale=paper --show              # only print the commands

A row is a few flags of train.py. Each of its runs is an ordinary one: `--show` prints its command. What a finished run
has measured becomes one line of runs.jsonl in the sweep's folder; a run that stands there is never repeated, and one
that was killed goes on from its checkpoint. Rows are compared within seeds: verdicts.py has how.
"""

if __name__ == "__main__":  # first: a bad command line is refused before torch is imported
    import support.early  # noqa: F401

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import extensions
from analyze import write_csv
from bench import BenchConfig, Variant
from probe import Probe, probe_rows
from support.config import flatten, one_line_errors, parse, refuse_idle
from support.device import choose_device
from support.lock import lock
from support.log import read_log
from support.presets import PRESETS, SIZES
from train import TrainConfig
from verdicts import TIE, WIDE, chaos, compare, draw, draw_probe, final, judge

ROOT = Path(__file__).parent


class Row(NamedTuple):
    """A line of the matrix.

    flags: of train.py.  paper: its claim; "?" if the outcome is not known to us, empty for a control of ours.
    expects: tie, better, worse or diverged, what the claim means for the difference to the row `beside`.
    """
    flags: str
    paper: str = ""
    expects: str = ""
    beside: str = "E0"


# The most telling rows first: whoever stops early has them.
ROWS = {
    "E0": Row("--preset=E0", "the baseline"),
    "C1": Row("--preset=C1", "W8A8, the recipe, is on par with the baseline", "tie"),
    "W4": Row("--preset=W4", "worse than 8 bits", "worse", "W2"),
    "A4": Row("--preset=A4", "unstable: its curve ends at 37k of 300k steps", "diverged"),
    "G2": Row("--preset=G2", "trains, but worse than the baseline", "worse"),
    "G3": Row("--preset=G3", "fails to converge", "diverged"),
    "S4": Row("--preset=S4", "about the baseline (perplexity +0.5 %)", "tie"),
    "S6": Row("--preset=S6", "not adequate", "worse"),
    "W2": Row("--preset=W2", "the best of W, below the baseline", "better"),
    "A6": Row("--preset=A6", "the best of the 4-bit activations", "better", "A4"),
    "A3": Row("--preset=A3", "unstable: its curve ends at 20k steps", "diverged"),
    "W3": Row("--preset=W3", "unstable, the sharpest", "worse", "W4"),
    "C2": Row("--preset=C2", "worse than C1", "worse", "C1"),
    "A2": Row("--preset=A2", "comparable with the baseline", "tie"),
    "W1": Row("--preset=W1", "competitive with the baseline", "tie"),
    "A1": Row("--preset=A1", "comparable with the baseline", "tie"),
    "A5": Row("--preset=A5", "?"),
    "G1": Row("--preset=G1", "worse than G2", "worse", "G2"),
    "G5": Row("--preset=G5", "?"),
    "S1": Row("--preset=S1", "about the baseline", "tie"),
    "S2": Row("--preset=S2", "about the baseline", "tie"),
    "S3": Row("--preset=S3", "slightly worse than S4", "worse", "S4"),
    "S6-per_tensor": Row("--preset=S6-per_tensor", "not adequate", "worse"),
    # controls: Adam's moments
    "adam8": Row("--preset=adam8"),
    "adam4": Row("--preset=adam4"),
    "adam4-stochastic": Row("--preset=adam4 --m1round=stochastic --compile=True"),
    "S6-floor": Row("--preset=S6 --mfloor"),
    "m2-power8": Row("--m2bits=8 --membed32"),
    "m2-dynamic8": Row("--m2bits=8 --m2fmt=dynamic --membed32"),
    "E0-beta2=.95": Row("--preset=E0 --beta2=0.95"),
    "E0-beta2=.999": Row("--preset=E0 --beta2=0.999"),
    "S6-beta2=.95": Row("--preset=S6 --beta2=0.95"),
    "S6-beta2=.999": Row("--preset=S6 --beta2=0.999"),
    # controls: what helps 4-bit activations and weights
    "A5-gelu": Row("--preset=A4 --asym_gelu"),
    "A4-block": Row("--preset=A4 --agran=per_block --wblock=32"),
    "A5-block": Row("--preset=A5 --agran=per_block --wblock=32"),
    "W4-block": Row("--preset=W4 --wgran=per_block --wblock=32"),
    "W4A8": Row("--wbits=4 --abits=8"),
    "W4A4": Row("--wbits=4 --abits=4"),
    # controls: backward with the quantized operands or the untouched ones
    "W4-fp": Row("--preset=W4 --backward=fp"),
    "A4-fp": Row("--preset=A4 --backward=fp"),
    "C1-fp": Row("--preset=C1 --backward=fp"),
    # controls: gradients
    "G2-both": Row("--preset=G2 --ggemm=both"),
    "G2-fused": Row("--gbits=8"),
    "G2-stochastic": Row("--preset=G2 --rounding=stochastic"),
    "G3-3bits": Row("--preset=G3 --gbits=3"),
    "G3-3bits-stochastic": Row("--preset=G3 --gbits=3 --rounding=stochastic"),
    "G3-2bits": Row("--preset=G3 --gbits=2"),
    "G3-2bits-stochastic": Row("--preset=G3 --gbits=2 --rounding=stochastic"),
    "G3-both": Row("--preset=G3 --ggemm=both"),
    "G3-input": Row("--preset=G3 --ggemm=grad_input"),
    "G3-stochastic": Row("--preset=G3 --rounding=stochastic"),
    "G3-block": Row("--gbits=4 --ggran=per_block --wblock=32"),
    "G3-block-stochastic": Row("--gbits=4 --ggran=per_block --wblock=32 --rounding=stochastic"),
    # controls: the head, and other formats
    "E0-untied": Row("--preset=E0 --untied_head"),
    "W2-untied": Row("--preset=W2 --untied_head"),
    "C1-head": Row("--preset=C1 --quant_head"),
    "int8-all": Row("--preset=int8-all"),
    "fp8": Row("--preset=fp8"),
    # beyond the paper: the fewest bits of W + A + G + m1 + m2 (its own recipe: 8 + 8 + 32 + 4 + 32). G as the paper has
    # it, in grad_weight alone, or in both GEMMs
    "bits84": Row("--preset=C1,S4"),
    # compiled, moments in 4 bits are 1.6 times as fast
    "bits36": Row("--preset=C1,G3,adam8 --compile=True"),
    "bits32": Row("--preset=C1,G3 --m1bits=4 --m2bits=8 --compile=True"),
    "bits32-6": Row("--preset=G3,adam8 --wbits=6 --abits=6 --asym --compile=True"),
    "bits31": Row("--preset=G3,adam8 --wbits=6 --abits=6 --asym --gbits=3 --rounding=stochastic "
                  "--compile=True"),
    "bits28-6": Row("--preset=G3 --wbits=6 --abits=6 --asym --m1bits=4 --m2bits=8 --compile=True"),
    "bits27": Row("--preset=G3 --wbits=6 --abits=6 --asym --gbits=3 --rounding=stochastic "
                  "--m1bits=4 --m2bits=8 --compile=True"),
    "bits26": Row("--preset=G3 --wbits=5 --abits=6 --asym --gbits=3 --rounding=stochastic "
                  "--m1bits=4 --m2bits=8 --compile=True"),
    "bits28": Row("--preset=C1,G3 --m1bits=4 --m2bits=4 --compile=True"),
    "bits24": Row("--preset=G3 --wbits=6 --abits=6 --asym --m1bits=4 --m2bits=4 --compile=True"),
    "bits24-both": Row("--wbits=6 --abits=6 --asym --gbits=4 --ggemm=both --rounding=stochastic --m1bits=4 --m2bits=4"),
}
HEAD = """# The matrix of arXiv 2407.11722 at scale {scale}

`python sweep.py --scale={scale} --report` wrote this from {runs} runs in runs.jsonl. Loss: validation, nats per
token. Differences: within seeds, mean +- half of the 95 % interval, from a standard deviation of {chaos[0]:.4f}
between seeds with {chaos[1]} degrees of freedom, or the row's own where that is {wide:g} times as large (verdicts.py
says how). A row of which each seed by itself differs by more than chance is worse or better whatever its interval.
Below {tie} nats is no difference; of twenty rows that change nothing, one is expected to seem to. Memory: one step,
uncompiled, MiB. probe_*: what E0's checkpoint says of a recipe (probe.py): change of its loss in nats, bias of the
gradient and error of Adam's update as shares of their size. Commit, data and machine of each run stand in runs.jsonl;
runs share the machine with others, so tokens_per_s are lower bounds.
"""
# Further papers, one row a preset; uncompiled, nvfp4 takes six times as long.
ROWS |= {name: Row(f"--preset={name}" + " --compile=True" * name.startswith("nvfp4")) for name in extensions.PRESETS}


class Scale(NamedTuple):
    """How large the runs are: flags of train.py before the row's, the default seeds, what one run costs."""
    flags: str
    seeds: tuple[int, ...]
    cost: str


SCALES = {
    "laptop": Scale("--preset=laptop --compile=False --sample_tokens=0", (1, 2, 3),
                    "229,000 parameters, 4.6M tokens, 2 to 9 minutes of one core"),
    "laptop-small": Scale("--preset=laptop-small --compile=False --sample_tokens=0", (1, 2, 3),
                          "65,000 parameters, 1.3M tokens, 1 to 3 minutes of one core; results/sizes.py compares"),
    "laptop-large": Scale("--preset=laptop-large --compile=False --sample_tokens=0", (1, 2, 3),
                          "491,000 parameters, 9.8M tokens, 9 to 20 minutes of one core"),
    **{f"width-{width}": Scale(f"--preset=width-{width} --dataset=english --dtype=float32 --sample_tokens=0", (1, 2, 3),
                               f"{cost}; own text as bytes, see results/gpu.md") for width, cost in (
        (64, "229,000 parameters, 4.6M tokens"), (128, "851,000 parameters, 17M tokens"),
        (256, "3.3M parameters, 66M tokens"))},
    "gpu": Scale("--preset=gpu --sample_tokens=0", (1, 2, 3), "23M parameters, 0.47G tokens; not run yet"),
    "paper": Scale("--preset=paper", (42,), "124M parameters, 157G tokens; 98 H100 hours by "
                   "a measured step, 413 A100 hours by the paper's account; not run yet"),
}


@dataclass
class SweepConfig:
    """Run the matrix, or report on it."""
    scale: Literal["laptop", "laptop-small", "laptop-large", "width-64", "width-128", "width-256",
                   "gpu", "paper"] = "laptop"  # how large the runs are
    rows: str = ""  # ids separated by commas; empty: all
    seeds: int | None = None  # how many; auto: 3, or 1 at the paper's scale
    jobs: int | None = None  # runs at a time; auto: one a core without a GPU, else one
    out_dir: str = ""  # folder of runs.jsonl and the report; empty: results/<scale>
    data_dir: str = "data"  # where the token shards are, or are made
    launcher: str = ""  # starts train.py, as "torchrun --nproc_per_node=8"; empty: this Python
    show: bool = False  # only print the commands
    report: bool = False  # only write tables and figures

    def __post_init__(self):
        for name in filter(None, self.rows.split(",")):
            if name not in ROWS:
                raise ValueError(f"--rows={self.rows}: there is no row {name!r}; use some of {','.join(ROWS)}")
        if self.show and self.report:
            raise ValueError("--show and --report exclude each other; drop one")
        refuse_idle(self, **{name: (not self.report, "with --report")
                             for name in ("rows", "seeds", "jobs", "launcher")})
        refuse_idle(self, jobs=(not self.show, "with --show"))
        for name, most in (("seeds", 100), ("jobs", 64)):
            if (value := getattr(self, name)) is not None and not 1 <= value <= most:
                raise ValueError(f"--{name}={value} must lie in 1 to {most}")

    def resolve(self) -> None:
        """Replace each auto."""
        cuda = torch.cuda.is_available()
        self.seeds = self.seeds or len(SCALES[self.scale].seeds)
        self.jobs = self.jobs or (1 if cuda else os.cpu_count())
        self.out_dir = self.out_dir or f"results/{self.scale}"

    def runs(self) -> list[tuple[str, int]]:
        """Return (row, seed) of every run asked for, in the order in which they are made; E0 is always first."""
        same = f"--beta2={SIZES[self.scale]['beta2']}"  # a control that is E0's own at this scale
        names = [name for name, row in ROWS.items() if same not in row.flags.split()]
        names = self.rows.split(",") if self.rows else names
        first = SCALES[self.scale].seeds[0]
        return [(name, first + i) for name in ROWS if name in {"E0", *names} for i in range(self.seeds)]


def command(config: SweepConfig, name: str, seed: int) -> list[str]:
    """Return the command line of one run, behind "python"."""
    flags = f"{SCALES[config.scale].flags} {ROWS[name].flags}".split()
    presets = [flag.removeprefix("--preset=") for flag in flags if flag.startswith("--preset=")]
    last = {flag.partition("=")[0]: flag for flag in flags} | {"--preset": f"--preset={','.join(presets)}"}
    return ["train.py", *last.values(), f"--seed={seed}",
            f"--data_dir={config.data_dir}", f"--out_dir={config.out_dir}/runs/{name}-{seed}"]


# -----------------------------------------------------------------------------
# making the runs

def read_runs(path: Path, scale: str) -> dict[tuple[str, int], dict]:
    """Return {(row, seed): what that run has measured} of runs.jsonl; a line cut off by a crash is left out."""
    lines = read_log(path) if path.exists() else []
    for line in lines:
        if missing := {"scale", "row", "seed", "status", "step", "val_loss", "tokens_per_s", "data"} - line.keys():
            raise ValueError(f"{path} has a line without {missing.pop()}: {str(line)[:60]}...; mend or delete it")
    if other := {line["scale"] for line in lines} - {scale}:
        raise ValueError(f"{path} has runs of --scale={other.pop()}; choose another --out_dir for --scale={scale}")
    if len(data := {line["data"] for line in lines}) > 1:
        raise ValueError(f"{path} has runs of {len(data)} data sets ({', '.join(sorted(data))}); keep those of one")
    return {(line["row"], line["seed"]): line for line in lines}


def record(scale: str, name: str, seed: int, log: list[dict], status: str) -> dict:
    """Sum up a run's log.jsonl: its curves, how it ended, and what the log says of commit and machine."""
    train = [line for line in log if "grad_norm" in line]
    speeds = [line["tokens_per_s"] for line in train]
    return {"scale": scale, "row": name, "seed": seed, "status": status,
            "step": max(line.get("step", 0) for line in log),
            "val_loss": [[x["step"], x["tokens"], x["val_loss"]] for x in log if "val_loss" in x],
            "loss": [[line["step"], round(line["loss"], 5)] for line in train],
            "grad_norm_max": max((line["grad_norm"] for line in train), default=None),
            "tokens_per_s": round(statistics.median(speeds)) if speeds else None,
            **{key: value for key, value in log[0].items() if key != "config"}}


class Job:
    """One run of train.py in a process of its own; what it prints goes to train.txt in its folder."""

    def __init__(self, config: SweepConfig, name: str, seed: int):
        self.scale, self.name, self.seed = config.scale, name, seed
        args = command(config, name, seed)
        self.folder = Path(args[-1].partition("=")[2])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.output = open(self.folder / "train.txt", "a")  # noqa: SIM115 (open while the process lives)
        self.before = self.output.tell(), self.logged()  # what earlier processes said
        self.process = subprocess.Popen(
            [*(config.launcher.split() or [sys.executable]), str(ROOT / args[0]), *args[1:], "--resume=auto"],
            stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"})  # with another number sums round differently

    def logged(self) -> int:
        """Return when log.jsonl was last written, 0 where there is none."""
        path = self.folder / "log.jsonl"
        return path.stat().st_mtime_ns if path.exists() else 0

    def result(self) -> dict | None:
        """Return the record of the run once its process has ended; None where it is to be tried again."""
        self.output.close()
        said = (self.folder / "train.txt").read_bytes()[self.before[0]:]
        said = said.decode(errors="replace").rstrip()
        log = read_log(self.folder / "log.jsonl") if self.logged() else []
        # a launcher has exit codes of its own: what counts is what this process has logged
        status = log[-1].get("status") if self.logged() > self.before[1] else None
        status = "finished" if self.process.returncode == 0 and log else status
        if status in ("finished", "diverged"):
            return record(self.scale, self.name, self.seed, log, status)
        if any(words in said for words in ("another run trains in", "another run went on", "holds another run")):
            time.sleep(2)  # a sweep that was killed has left it running
            return None
        last = said.splitlines()[-1] if said else ""
        raise ValueError(f"{self.name} with seed {self.seed} failed with exit code "
                         f"{self.process.returncode}: {last}; see {self.folder}/train.txt, "
                         "mend it and start the sweep again")


def sweep(config: SweepConfig) -> None:
    """Make the runs that are missing."""
    out, path = Path(config.out_dir), Path(config.out_dir, "runs.jsonl")
    with lock(out, f"another sweep runs in --out_dir={out}; choose another, or end that one"):
        done, wanted = read_runs(path, config.scale), config.runs()
        todo, jobs = [run for run in wanted if run not in done], []
        print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are done, {config.jobs} at a time; "
              f"a run: {SCALES[config.scale].cost}", flush=True)
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            with open(path, "a") as file:  # a line that a crash cut off: read_log leaves it out
                file.write("\n")
        started, made = time.monotonic(), 0
        try:
            while todo or jobs:
                while todo and len(jobs) < config.jobs:
                    jobs.append(Job(config, *todo.pop(0)))
                    while len(jobs) == 1 and jobs[0].process.poll() is None and not done \
                            and not (jobs[0].folder / "log.jsonl").exists():
                        time.sleep(0.2)  # the very first one makes the data, for all
                time.sleep(0.2)
                for job in [job for job in jobs if job.process.poll() is not None]:
                    jobs.remove(job)
                    run, line = (job.name, job.seed), job.result()
                    if line is None:
                        todo.insert(0, run)
                        continue
                    if any(old["data"] != line["data"] for old in done.values()):
                        raise ValueError(f"{path} has runs of other data than {run[0]}'s; "
                                         "choose another --out_dir")
                    with open(path, "a") as file:
                        file.write(json.dumps(line) + "\n")
                    done[run], made = line, made + 1
                    left = (time.monotonic() - started) / made * (len(todo) + len(jobs))
                    end = describe(line, done.get(("E0", job.seed)))
                    print(f"{sum(r in done for r in wanted)}/{len(wanted)} {job.name}, seed {job.seed}: "
                          f"{end}, about {left / 3600:.1f} h left", flush=True)
        finally:  # Ctrl-C or SIGTERM or a failed run: the others save and leave
            for job in jobs:
                job.process.terminate()
            for job in jobs:
                job.process.wait()


def describe(line: dict, base: dict | None) -> str:
    """Say in a few words how a run ended, beside E0 of the same seed."""
    if line["status"] != "finished":
        return f"{line['status']} at step {line['step']}"
    beside = f" ({final(line) - final(base):+.4f} to E0)" if base and line is not base else ""
    return f"val_loss {final(line):.4f}{beside}"


# -----------------------------------------------------------------------------
# the report

def train_config(config: SweepConfig, name: str) -> TrainConfig:
    """Return the config of a row's first run."""
    return parse(TrainConfig, command(config, name, 1)[1:], PRESETS | extensions.PRESETS)


def probes(config: SweepConfig, names: list[str]) -> dict[str, dict]:
    """Return what E0's checkpoint says of each row (probe.py); where there is none, what probe.csv kept of it."""
    path = Path(config.out_dir, "probe.csv")
    ckpt = Path(config.out_dir, f"runs/E0-{SCALES[config.scale].seeds[0]}")
    if (ckpt / "ckpt.pt").exists():
        flags = {name: flatten(train_config(config, name)) for name in names}
        rows = probe_rows(Probe(str(ckpt), data_dir=config.data_dir), flags)
        write_csv([row for row in rows if row["layer"] == "all"], path)
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {row["recipe"]: {f"probe_{key}": float(row[key]) if row[key] else None
                                for key in ("loss", "bias", "update")} for row in csv.DictReader(file)}


def memory(config: SweepConfig, name: str) -> dict[str, float]:
    """Return MiB that one step of a row keeps for backward and allocates at most, and MiB of its moments."""
    if config.scale != "laptop":  # a step of it is not for every machine
        return dict.fromkeys(("kept_mib", "peak_mib", "optimizer_mib"))
    train = train_config(config, name)
    shape = BenchConfig(batch_size=train.batch_size, compile=False, dtype=train.dtype or "float32",
                        model=train.model)
    variant = Variant(name, shape, choose_device(train.device), flatten(train))
    variant.step()  # the first makes the moments
    found = variant.memory()
    return {"kept_mib": found["kept"], "peak_mib": found["peak"], "optimizer_mib": found["optimizer"]}


def table(config: SweepConfig, done: dict) -> list[dict]:
    """Return a dict of columns for every row that has runs."""
    rows, names = [], [name for name in ROWS if any(row == name for row, _ in done)]
    probed = probes(config, names)
    for name in names:
        mine = [line for (row, _), line in sorted(done.items()) if row == name]
        losses = [final(line) for line in mine if line["status"] == "finished"]
        speeds = [line["tokens_per_s"] for line in mine if line["tokens_per_s"]]
        d = compare(done, name, "E0")
        rows.append({
            "id": name, "seeds": len(mine), "val_loss_mean": statistics.mean(losses) if losses else None,
            "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
            "diff_to_E0_mean": d.mean if d.pairs and name != "E0" else None,
            "diff_to_E0_ci": d.half if d.half < float("inf") and name != "E0" else None,
            "diverged": ", ".join(f"{x['seed']}: step {x['step']}" for x in mine if x["status"] != "finished"),
            "verdict": d.verdict() if name != "E0" else "",
            "tokens_per_s": round(statistics.median(speeds)) if speeds else None,
            **probed.get(name, dict.fromkeys(("probe_loss", "probe_bias", "probe_update"))),
            **memory(config, name), "paper": ROWS[name].paper,
            "command": " ".join(["OMP_NUM_THREADS=1 python", *(
                a for a in command(config, name, mine[0]["seed"]) if not a.startswith(("--data_dir", "--out_dir")))])})
    return rows


def report(config: SweepConfig) -> None:
    """Write table.csv, table.md with a verdict per claim, and curves.png into the sweep's folder."""
    out = Path(config.out_dir)
    torch.set_num_threads(1)  # as the runs; two wait for each other where others work
    done = read_runs(out / "runs.jsonl", config.scale)
    rows = table(config, done)
    if not rows or rows[0]["id"] != "E0":
        raise ValueError(f"{out}/runs.jsonl has no run of E0 yet; "
                         f"python sweep.py --scale={config.scale} --rows=E0")
    write_csv(rows, out / "table.csv")

    def cell(value: float | str | None) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    lines = [HEAD.format(scale=config.scale, runs=len(done), chaos=chaos(done), tie=TIE, wide=WIDE),
             "| claim of the paper | difference | verdict |", "|---|---|---|"]
    for name, (_, claim, expected, base) in ((n, row) for n, row in ROWS.items() if row.expects):
        d = compare(done, name, base)
        shown = f"{name} - {base}"
        shown += f": {d.mean:+.4f} +- {d.half:.4f} ({d.pairs} seeds)" if d.pairs else ""
        shown += f", diverged {d.diverged}" if d.diverged else ""
        lines.append(f"| {name}: {claim} | {shown} | {judge(d, expected)} |")
    lines += ["", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    draw(done, out / "curves.png")
    draw_probe(rows, out / "probe.png")
    print("\n".join(lines) + f"\n\nwrote {out}/table.md, table.csv, curves.png and probe.png")


def main() -> None:
    """Run, show or report."""
    config = parse(SweepConfig, doc=__doc__)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler speaks of itself
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`
    with one_line_errors():
        config.resolve()
        if config.show:
            for name, seed in config.runs():
                words = [config.launcher or "OMP_NUM_THREADS=1 python", *command(config, name, seed)]
                print(f"{name}, seed {seed}: " + " ".join(words))
        elif config.report:
            report(config)
        else:
            sweep(config)


if __name__ == "__main__":
    main()
