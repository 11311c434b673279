"""The record of a run: log.jsonl, the progress bar, and the optional trackers.

out_dir/log.jsonl has one JSON object a line. The first is the config, the last has "status": finished, interrupted or
diverged; training lines have step, tokens, loss, lr, grad_norm, tokens_per_s, mfu; evaluation lines step, tokens,
val_loss, val_bpb. Whoever wants a run's numbers, bench, plots, another run's report, reads this file.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from support.config import flatten


def _optional(name: str):
    """Import an optional package, or say how to get it."""
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(f"--{name} needs a package that is not installed: pip install {name}") from None


def read_log(path: Path) -> list[dict]:
    """Read a log.jsonl; a last line that a crash has cut off is left out. Raises: FileNotFoundError."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def evaluations(out_dir: str) -> dict[int, float]:
    """Return {step: val_loss} of the run in out_dir. Raises: FileNotFoundError."""
    path = Path(out_dir, "log.jsonl")
    if not path.exists():
        raise FileNotFoundError(f"--compare_to={out_dir}: there is no {path}")
    return {line["step"]: line["val_loss"] for line in read_log(path) if "val_loss" in line}


class Log:
    """log.jsonl, the progress bar (or plain lines where there is no terminal), and the optional trackers.

    Args:
        config: train.py's TrainConfig.  start: the step from which the run goes on.
        main: whether this process is the one that writes; the others may call everything, and nothing happens.
    Raises: ValueError if a tracker that was asked for is not installed.
    """

    def __init__(self, config: Any, start: int, main: bool):
        self.main, self.max_iters, self.path = main, config.max_iters, Path(config.out_dir, "log.jsonl")
        self.bar = tqdm(total=config.max_iters, initial=start, unit="step", dynamic_ncols=True,
                        disable=not (main and sys.stderr.isatty()))
        self.wandb = self.board = None
        if not main:
            return
        # What a killed run logged after its checkpoint will be logged again.
        kept = [line for line in read_log(self.path) if line.get("step", -1) <= start and "status" not in line] \
            if config.resume else []
        fresh = self.path.with_name("log.jsonl.tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(fresh, self.path)
        self.file = open(self.path, "a")  # noqa: SIM115 (open for the whole run)
        if config.wandb:
            self.wandb = _optional("wandb").init(project="nanoqpt", config=flatten(config), dir=config.out_dir)
        if config.tensorboard:
            _optional("tensorboard")
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(config.out_dir)

    def write(self, **values) -> None:
        """Append one JSON object, at once, and send its numbers to the trackers."""
        if not self.main:
            return
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
        if self.wandb and "step" in values:
            self.wandb.log(numbers, step=values["step"])
        for name, value in numbers.items() if self.board and "step" in values else ():
            self.board.add_scalar(name, value, values["step"])

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
