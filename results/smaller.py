"""Smaller models, two papers: distillation into few-bit weights, and pruning with learned bits. Loss against bytes.

    python results/smaller.py RUNS DATA             # make what is missing (about 25 minutes of one core a seed)
    python results/smaller.py RUNS DATA --report    # table and figure of what there is, and of smaller/rounded.jsonl,
                                                    # what prune_then_round.py printed for each seed

RUNS: the out_dirs of sweep.py's row E0 at scale laptop, as results/laptop/runs; E0-1 is the teacher of all students,
E0-SEED is what that seed's pruning begins with. Every run is an ordinary one of extensions.distill or extensions.prune,
in results/smaller/runs/NAME-SEED; what it measured becomes a line of results/smaller/runs.jsonl, and is not run again.
All students take 900 steps in all, `warm` ones 600 in fp32 and then 300; all pruned models 500 after E0's 2,250.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from analyze import new_figure  # noqa: E402
from extensions.points import Student, matrices, pack  # noqa: E402
from model import quant_linears  # noqa: E402
from quant import QuantConfig  # noqa: E402
from support.checkpoint import load_checkpoint, model_from, save_checkpoint  # noqa: E402
from support.log import read_log  # noqa: E402

OUT, SEEDS = ROOT / "results/smaller", (1, 2, 3)
ALL = "--compile=False --sample_tokens=0 --eval_interval=100"
# 1.770 and 1.862 for seeds 1 and 2 of "student"; with a warm-up of 50 steps 1.846 and, at half the learning rate, 1.997
# and 1.978: the steeper start leaves some runs far behind.
STUDENT = f"extensions.distill --preset=laptop-small {ALL} --warmup_iters=200"
PRUNE = f"extensions.prune --init_from={{runs}}/E0-{{seed}} --learning_rate=4e-3 --min_lr=0 --warmup_iters=20 {ALL}"
STAGES = "--stages=40,100,200,160"
TEACHER = "--teacher={runs}/E0-1"
WARM = (f"{STUDENT} {TEACHER} --init_from={{out}}/student-600-{{seed}} --max_iters=300 --learning_rate=8e-3 "
        "--warmup_iters=50")
NAMES = {  # name: command behind `python -m`; in this order
    "student-600": f"{STUDENT} {TEACHER} --max_iters=600",
    "student, warm": WARM,
    **{f"uniform {s}, warm": f"{WARM} --method=uniform --levels={s}" for s in (16, 4)},
    # on seed 1, learning rates of 1e-3, 3e-3, 1e-2, 3e-2 came to 2.214, -, 2.228, -, and 3.251, 3.003, 2.956, 3.416
    **{f"points {s}, warm": f"{WARM} --method=points --levels={s} --learning_rate={lr}" for s, lr in ((16, "1e-3"),
                                                                                                   (4, "1e-2"))},
    "student": f"{STUDENT} {TEACHER} --max_iters=900",
    "student, alone": f"{STUDENT} --soft=0 --max_iters=900",
    **{f"uniform {s}": f"{STUDENT} {TEACHER} --max_iters=900 --method=uniform --levels={s}" for s in (16, 4)},
    "uniform 4, alone": f"{STUDENT} --soft=0 --max_iters=900 --method=uniform --levels=4",
    "w8a8": f"{STUDENT.replace('laptop-small', 'laptop-small,w8a8')} {TEACHER} --max_iters=900",
    "dense": f"train {PRUNE.removeprefix('extensions.prune ')} --preset=laptop --max_iters=500",
    **{f"joint {name}": f"{PRUNE} --preset=laptop {STAGES} {flags}" for name, flags in {
        "0 %": "--sparsity=0", "30 %": "--sparsity=0.3", "50 %": "--sparsity=0.5", "70 %": "--sparsity=0.7",
        "50 %, at once": "--sparsity=0.5 --forget=False",
        "50 %, magnitude": "--sparsity=0.5 --score=magnitude",
        "50 %, random": "--sparsity=0.5 --score=random"}.items()},
    "50 %, 16 bits": f"{PRUNE} --preset=laptop {STAGES} --sparsity=0.5 --score=magnitude --bits=16,16",
}


def folder(name: str, seed: int) -> Path:
    """Return the out_dir of a run."""
    return OUT / "runs" / f"{name.replace(' %', '').replace(', ', '-').replace(' ', '-')}-{seed}"


def measure(name: str, seed: int, runs: str, data: str) -> dict:
    """Make a run, or what is left of it; return what it measured."""
    out = folder(name, seed)
    log = read_log(out / "log.jsonl") if (out / "log.jsonl").exists() else []
    if not log or log[-1].get("status") != "finished":
        words = NAMES[name].format(runs=runs, seed=seed, out=OUT / "runs").split()
        flags = {word.partition("=")[0]: word for word in words[1:]}  # the last of a flag counts
        command = [sys.executable, "-m", words[0], *flags.values(), f"--seed={seed}", f"--data_dir={data}",
                   f"--out_dir={out}", "--resume=auto"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        log = read_log(out / "log.jsonl")
    line = {"name": name, "seed": seed, "commit": log[0].get("commit"), "torch": log[0].get("torch"),
            "val_loss": [x["val_loss"] for x in log if isinstance(x.get("val_loss"), float)][-1]}
    more = [x.get("result", x) for x in log if "result" in x or "packed_bytes" in x]  # distill's, or prune's
    line |= {k: v for x in more for k, v in x.items() if k not in ("val_loss", "step")}
    if name == "student, warm":
        line["rounded_bytes"] = rounded_bytes(out)
    losses = [x["val_loss"] for x in more if isinstance(x["val_loss"], dict)]
    return line | ({"losses": losses[0]} if losses else {})


def rounded_bytes(out: Path) -> dict[str, int]:
    """Return the size of huffman.pt of a finished student, rounded as distill.py's last line rounds it."""
    source, sizes = load_checkpoint(out), {}
    gpt = model_from(source, quant_linears(QuantConfig(), source["config"]["n_layer"]))
    facts = {key: source[key] for key in ("config", "vocab_size", "step", "extensions")}
    for s, k in ((s, k) for k in (256, 0) for s in (16, 4)):
        levels = [s] * len(matrices(gpt))
        parts = pack(Student(gpt, levels, k))
        del parts["codes"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "huffman.pt")
            save_checkpoint(path, facts | {"levels": levels, "bucket": k, "model": parts})
            sizes[f"levels={s},bucket={k}"] = path.stat().st_size
    return sizes


def points(lines: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Return {what: [(bytes of the smallest file, val_loss), one a seed]} of the lines of runs.jsonl."""
    found = {}
    for line in lines:
        name, size = line["name"], line.get("bytes", {})
        size = line.get("packed_bytes") or size.get("huffman.pt") or size.get("fp32")
        found.setdefault(name, []).append((size, line["val_loss"]))
        for how, size in line.get("rounded_bytes", {}).items():
            s, k = (part.split("=")[1] for part in how.split(","))
            name = f"student, warm, rounded to {s}" + ("" if k == "256" else ", no buckets")
            found.setdefault(name, []).append((size, line["losses"][how]))
    for line in read_log(OUT / "rounded.jsonl") if (OUT / "rounded.jsonl").exists() else []:
        name = f"50 %, then rounded, {line['bits']} bits"
        found.setdefault(name, []).append((line["packed_bytes"], line["val_loss"]))
    return found


def report(lines: list[dict]) -> None:
    """Print the table, mean and standard deviation over seeds; draw loss against bytes and against speed.

    The dashed line is the Pareto front: what no other point beats in both. Speeds: forward_speed.py's, of seed 1.
    """
    figure, panels = new_figure(1, 3, size=(19, 6))
    speeds = read_log(OUT / "speed.jsonl") if (OUT / "speed.jsonl").exists() else []
    speeds, shown = {line["name"]: line["ratio"] for line in speeds}, []
    print("| | seeds | val_loss | bytes |\n|---|---|---|---|")
    for name, pairs in points(lines).items():
        size, loss = (statistics.mean(v) for v in zip(*((a or 0, b) for a, b in pairs), strict=True))
        spread = f" +- {statistics.stdev(b for _, b in pairs):.4f}" if len(pairs) > 1 else ""
        print(f"| {name} | {len(pairs)} | {loss:.4f}{spread} | {size:,.0f} |")
        kind = int(name.startswith(("joint", "50 %", "dense")))
        if size:
            panels[0][kind].plot(size / 1000, loss, "os"[kind], label=name, color=f"C{len(shown) % 10}",
                                 mfc=None if len(shown) % 2 else "none")
            shown.append((size / 1000, loss))
        if ratio := speeds.get(folder(name, 1).name):
            panels[0][2].plot(ratio, loss, "os"[kind], color="tab:gray")
            panels[0][2].annotate(name, (ratio, loss), fontsize=7, xytext=(3, 3), textcoords="offset points")
    front = [point for point in sorted(shown) if point[1] < min((b for a, b in shown if a < point[0]), default=9)]
    for panel, title in zip(panels[0], ("distilled students", "pruned models", "speed"), strict=True):
        panel.set(title=title, ylim=(1.38, 2.5), xlabel="kB of the file", ylabel="validation loss, nats per token")
    for panel in panels[0][:2]:
        panel.plot(*zip(*front, strict=True), "k--", lw=0.8)
        panel.set(xscale="log")
        panel.legend(fontsize=7)
    panels[0][2].set(xlabel="time of a forward pass, times the dense model's")
    figure.savefig(OUT / "smaller.png", dpi=80)


if __name__ == "__main__":
    runs, data = (str(Path(word).resolve()) for word in sys.argv[1:3])
    OUT.mkdir(exist_ok=True)
    lines = read_log(OUT / "runs.jsonl") if (OUT / "runs.jsonl").exists() else []
    done = {(line["name"], line["seed"]) for line in lines}
    if "--report" in sys.argv:
        report(lines)
    else:
        for seed in SEEDS:
            for name in NAMES:
                if (name, seed) not in done:
                    with open(OUT / "runs.jsonl", "a") as file:
                        file.write(json.dumps(line := measure(name, seed, runs, data)) + "\n")
                    print(name, seed, line["val_loss"], flush=True)
