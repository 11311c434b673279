"""The record of a run: log.jsonl, the progress bar, the first lines, and Weights & Biases if asked for.

out_dir/log.jsonl has one JSON object a line. The first is the config, the last has "status": finished, interrupted or
diverged; training lines have step, tokens, loss, lr, grad_norm, tokens_per_s, mfu; evaluation lines step, tokens,
val_loss, val_bpb. Whoever wants a run's numbers, bench, plots, another run's report, reads this file.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from optim import AdamW, layout, new_state
from quant import QuantLinear
from support.config import differences, flatten
from support.device import Processes, machine


def read_log(path: Path) -> list[dict]:
    """Read a log.jsonl; what is no JSON object on a line of its own, as a crash may leave it, is left out."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; "
                                f"python train.py --out_dir={path.parent} makes one")
    lines = []  # what a crash leaves is at the end of the file; damage may be anywhere
    for text in path.read_text(errors="replace").split("\n")[:-1]:  # the last is cut off, or empty
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def moment_bytes(optimizer: AdamW) -> tuple[float, str]:
    """Return (bytes per parameter, one line): which moments are stored how, as the real tensors count."""
    kinds = {}  # format -> array (tensors, elements, bytes)
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p] = optimizer.state[p] or new_state(p, group)
            size = sum(t.nbytes for name, t in state.items() if name != "step")
            kind = "+".join("fp32" if m.bits == 32 else f"{m.fmt}{m.bits}"
                            for m in layout(p, group)[:2])
            kinds[kind] = kinds.get(kind, 0) + np.array([1, p.numel(), size])
    parts = "; ".join(f"{kind} {n} tensors, {elements / 1e6:.2f}M elements, {size / 1e6:.2f} MB"
                      for kind, (n, elements, size) in kinds.items())
    _, elements, size = sum(kinds.values(), np.zeros(3))
    each = float(size / max(1, elements))
    return each, f"optimizer state: {each:.3f} bytes per parameter ({parts}); fp32 has 8"


def introduce(config: Any, processes: Processes, model: nn.Module, optimizer: AdamW) -> dict:
    """Print what runs where, and how the model differs from an unquantized one; return what the log is to keep."""
    commit = shutil.which("git") and subprocess.run(
        ["git", "-C", Path(__file__).parent.parent, "describe", "--always", "--dirty"],
        capture_output=True, text=True).stdout.strip()
    name = machine(processes.device)
    changed = ", ".join(f"{k}={v}" for k, v in differences(config).items()) or "defaults"
    quantized = [m.weight for m in model.modules() if isinstance(m, QuantLinear) and m.recipe]
    total, quantized = (sum(p.numel() for p in part) for part in (model.parameters(), quantized))
    each, moments = moment_bytes(optimizer)
    processes.print(f"nanoQPT {commit or 'without git'}, torch {torch.__version__}, "
                    f"{processes.world} process(es), {name}\nconfig: {changed}\n"
                    f"{total:,} parameters, {quantized:,} of them in quantized linear layers\n"
                    f"{moments}")
    return {"commit": commit or "", "torch": torch.__version__, "device": name, "parameters": total,
            "optimizer_bytes": each}


class Log:
    """log.jsonl and the progress bar, or plain lines, of a run that goes on from step `start`; only `main` writes."""

    def __init__(self, config: Any, start: int, main: bool):
        self.main, self.max_iters, self.wandb = main, config.max_iters, None
        # A bar where somebody looks; elsewhere each line is printed for good.
        self.bar = tqdm(total=config.max_iters, initial=start, unit="step", dynamic_ncols=True,
                        disable=not (main and sys.stderr.isatty()))
        if not main:
            return
        if config.wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("--wandb needs a package that is not installed: pip install wandb") from None
            self.wandb = wandb.init(project="nanoqpt", config=flatten(config), dir=config.out_dir)
        path, fresh = Path(config.out_dir, "log.jsonl"), Path(config.out_dir, "log.jsonl.tmp")
        old = read_log(path) if config.resume and path.exists() else []
        # What a killed run logged after its checkpoint will be logged again.
        kept = (line for line in old if line.get("step", -1) <= start and "status" not in line)
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(fresh, path)
        self.file = open(path, "a")  # noqa: SIM115 (open for the whole run)

    def write(self, **values) -> None:
        """Append one JSON object, at once, and send it to Weights & Biases."""
        if not self.main:
            return
        # At once: whatever kills the run, all lines but the last are whole.
        self.file.write(json.dumps(values, allow_nan=False) + "\n")  # nan is no JSON
        self.file.flush()
        if self.wandb and "step" in values:
            self.wandb.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.main:
            self.bar.write(text)
            sys.stdout.flush()

    def training(self, line: dict, seconds_left: float) -> None:
        """Record a training line and show it."""
        self.write(**line)
        text = (f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, norm {line['grad_norm']:.2f}, "
                f"{line['tokens_per_s']:,.0f} tokens/s, MFU {line['mfu']:.1%}")
        if self.bar.disable:
            self.say(f"step {line['step']}/{self.max_iters}: {text}, {seconds_left:.0f} s left")
        else:
            self.bar.update(line["step"] - self.bar.n)
            self.bar.set_postfix_str(text)
