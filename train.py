"""Pre-train a GPT-2 with quantized weights, activations, gradients and optimizer states.

    python train.py --wbits=8 --abits=8                                  # tiny on a laptop, 124M on a GPU
    torchrun --standalone --nproc_per_node=8 train.py --preset=gpt2,w8a8 --dataset=openwebtext
    python train.py --resume --out_dir=out                               # go on where the run stopped

One process or many (torchrun), GPUs (NCCL) or CPUs (gloo). Every random number is a function of (seed, step, rank)
and nothing else: the data position and the random state need no file, the global batch is the same at any world
size, and a killed run that is resumed is, with --deterministic, bitwise the run that was never killed.

out_dir/log.jsonl holds every number, one JSON object a line; out_dir/ckpt.pt is the newest checkpoint and
out_dir/ckpt_best.pt the one with the best validation loss. Exit codes: 0 finished, 2 bad input, 3 diverged,
128 + n stopped by signal n after saving (130 is Ctrl-C).

The file reads from top to bottom: config, learning rate, data, a step, the loop. Presets are in support/presets.py.
A program that trains something else overrides methods of Run and calls main with its own config and run classes.
"""

import support.early  # noqa: F401  isort: skip (first: refuse a bad command line before torch is imported)

import contextlib
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import extensions
from eval import bits_per_byte, evaluate, sample, show, unigram_entropy, val_windows
from model import GPT, GPTConfig
from optim import AdamW, OptimConfig, param_groups
from prepare_data import DataConfig, PrepareConfig, get_tokenizer, open_dataset, prepare
from quant import QuantConfig
from support.checkpoint import load_weights, save_checkpoint
from support.config import flatten, one_line_errors, refuse_idle
from support.device import Processes, explain_compile_errors, peak_flops, resolve
from support.lock import lock
from support.log import Log, introduce, read_log
from support.presets import PRESETS, load_config


@dataclass
class TrainConfig:
    """The training loop. The defaults are GPT-2 small's; a preset is a dict of differences."""
    preset: str = ""  # composed from left to right, then come the flags; without a model size the device chooses one
    out_dir: str = "out"  # checkpoints and log.jsonl
    resume: bool | None = False  # go on with the run in out_dir, as it was configured; auto: if there is one
    init_from: str = "scratch"  # scratch, or weights and shape of a checkpoint, or of a Hugging Face GPT-2 folder
    max_iters: int = 600000  # optimizer steps
    batch_size: int = 16  # sequences in a micro-batch of one process
    gradient_accumulation_steps: int = 32  # micro-batches in an optimizer step, over all processes together
    learning_rate: float = 6e-4  # peak of the schedule
    min_lr: float = 6e-5  # end of the schedule
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up: a cosine, or stable and then a linear decay
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which the schedule reaches min_lr; auto: max_iters
    wsd_decay: float = 0.2  # share of lr_decay_iters that wsd's decay takes, at its end
    grad_clip: float = 1.0  # largest gradient norm, 0: no clipping
    eval_interval: int = 1000  # steps between two evaluations; each writes a checkpoint
    eval_tokens: int = 2**20  # validation tokens per evaluation, 0: all
    log_interval: int = 10  # steps between two lines of log.jsonl
    sample_tokens: int = 300  # text written at the end of a run
    device: Literal["cpu", "cuda"] | None = None  # auto: a GPU if there is one
    dtype: Literal["float32", "bfloat16"] | None = None  # of the activations; auto: bfloat16 where that is fast
    compile: bool = True  # torch.compile the model, and the optimizer where its moments are quantized
    deterministic: bool | None = None  # bitwise reproducible kernels; auto: on a CPU
    seed: int = 1337  # of initialisation, data order, dropout and stochastic rounding
    wandb: bool = False  # log to Weights & Biases too (pip install wandb)
    data: DataConfig = field(default_factory=DataConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    more: extensions.Config = field(default_factory=extensions.Config)

    def __post_init__(self):
        for name, low in (("max_iters", 1), ("batch_size", 1), ("gradient_accumulation_steps", 1), ("warmup_iters", 0),
                          ("learning_rate", 0.0), ("min_lr", 0.0), ("grad_clip", 0.0), ("eval_interval", 1),
                          ("eval_tokens", 0), ("log_interval", 1), ("sample_tokens", 0), ("seed", 0)):
            if not low <= getattr(self, name) < (2**53 if isinstance(low, int) else math.inf):
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {low}, and finite")
        if not self.out_dir:
            raise ValueError("--out_dir= is empty; name a folder")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"--min_lr={self.min_lr} exceeds --learning_rate={self.learning_rate}: the rate would "
                             "rise; give a smaller --min_lr too")
        if self.lr_decay_iters is not None and self.lr_decay_iters < self.warmup_iters:
            raise ValueError(f"--lr_decay_iters={self.lr_decay_iters} lies before the end of the warm-up, "
                             f"--warmup_iters={self.warmup_iters}")
        refuse_idle(self, wsd_decay=(self.schedule == "wsd", "without --schedule=wsd"))
        if not 0 < self.wsd_decay <= 1:
            raise ValueError(f"--wsd_decay={self.wsd_decay} must lie in (0, 1]")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then the schedule to min_lr at lr_decay_iters.

    cosine: half a cosine, as nanoGPT. wsd (warm-up, stable, decay): learning_rate, and a linear decay over the last
    wsd_decay of the steps, so that a run can be prolonged from before its decay (Hu et al. 2024, arXiv 2404.06395).
    """
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    start = config.warmup_iters
    if config.schedule == "wsd":
        start = max(start, round(config.lr_decay_iters * (1 - config.wsd_decay)))
    progress = min(1.0, max(0.0, (step - start) / max(1, config.lr_decay_iters - start)))
    height = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + height * (config.learning_rate - config.min_lr)


# -----------------------------------------------------------------------------
# data

def get_data(config: TrainConfig, processes: Processes) -> tuple[np.memmap, np.memmap, dict]:
    """Open the token shards; the default data set is prepared on the spot where it is missing."""
    def make():
        folder = Path(config.data.data_dir, config.data.dataset)
        if config.data.dataset == "stdlib" and not folder.exists():
            processes.print(f"{folder} is missing: preparing it from the standard library of this Python")
            prepare(PrepareConfig(data=config.data, processes=1))
    processes.after_main(make)
    train_tokens, val_tokens, meta = open_dataset(config.data)
    if config.sample_tokens:
        get_tokenizer(meta["tokenizer"])  # missing, it would be missed only when the run is over
    return train_tokens, val_tokens, meta


class Batches:
    """Random windows of the training split; the next micro-batch is fetched while this one is computed.

    The windows of a step are drawn from (seed, step) for all processes together, and each takes its share.
    """

    def __init__(self, tokens: np.ndarray, config: TrainConfig, processes: Processes):
        T, need = config.model.block_size, config.model.block_size + 1
        if len(tokens) < need:
            raise ValueError(f"the training split has {len(tokens)} tokens, one window needs {need}; "
                             "use a smaller --block_size or more data")
        self.tokens, self.T, self.seed, self.size = tokens, T, config.seed, config.batch_size
        self.sequences = config.batch_size * config.gradient_accumulation_steps
        self.mine = config.gradient_accumulation_steps // processes.world  # micro-batches a step of this process
        self.rank, self.device = processes.rank, processes.device
        self.pool, self.ahead = ThreadPoolExecutor(1), {}

    def _fetch(self, step: int, micro: int) -> Tensor:
        """Return the (batch_size, T+1) int64 tokens of one micro-batch of this process."""
        starts = np.random.default_rng((self.seed, step)).integers(0, len(self.tokens) - self.T, self.sequences)
        first = (self.rank * self.mine + micro) * self.size
        batch = np.stack([self.tokens[s:s + self.T + 1] for s in starts[first:first + self.size]])
        batch = torch.from_numpy(batch.astype(np.int64))
        return batch.pin_memory() if "cuda" in self.device else batch

    def get(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, (batch_size, T) each, on the device."""
        now = self.ahead.pop((step, micro), None) or self.pool.submit(self._fetch, step, micro)
        after = (step, micro + 1) if micro + 1 < self.mine else (step + 1, 0)
        self.ahead = {after: self.pool.submit(self._fetch, *after)}
        batch = now.result().to(self.device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]


# -----------------------------------------------------------------------------
# a step, and the loop

class Run:
    """One training run: its parts, a step, the loop.

    The first seven methods are the seams: what another program overrides to train something else.
    """

    def make_model(self) -> GPT:
        """Build the GPT on the CPU, with the weights of a checkpoint or a Hugging Face folder if there are any."""
        source, vocab_size, name = self.source, self.meta["vocab_size"], self.config.init_from
        if source and source["vocab_size"] not in (vocab_size, -(-vocab_size // 64) * 64):  # or with its padding rows
            raise ValueError(f"--init_from={name} has a vocabulary of {source['vocab_size']}, the data one of "
                             f"{vocab_size}; prepare the data with the model's tokenizer")
        dtype = getattr(torch, self.config.dtype)
        model = GPT(self.config.model, vocab_size, extensions.linears(flatten(self.config)), dtype)
        if source:
            load_weights(model, source["model"], "checkpoint" if self.config.resume else name)
        return model

    def make_objective(self) -> nn.Module:
        """Return what is compiled, trained and called as (inputs, targets) -> loss; by default the GPT itself."""
        return self.raw

    def make_optimizer(self) -> AdamW:
        """AdamW with weight decay on matrices only, and its moments stored as the flags say."""
        config = self.config
        return AdamW(param_groups(self.raw, config.optim), config.learning_rate, config.optim, seed=config.seed,
                     compile=config.compile)

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss that is reported, and terms by name that are trained on too and logged apart."""
        return self.model(x, y), extensions.losses(self.flat, self.raw)

    def evaluated_model(self) -> GPT:
        """Return the GPT whose validation loss and samples count."""
        return self.raw

    def extra_state(self) -> dict:
        """Return what a checkpoint must hold besides model and optimizer: tensors and plain values."""
        return {}

    def load_extra_state(self, state: dict) -> None:
        """Take up what extra_state returned when the checkpoint was written."""

    def __init__(self, config: TrainConfig, processes: Processes, source: dict | None, started: float):
        self.config, self.processes, self.source, self.flat = config, processes, source, flatten(config)
        self.started = started  # time.perf_counter() of the start
        self.train_tokens, self.val_tokens, self.meta = get_data(config, processes)
        if config.resume and source["data"] != self.meta["train"]["sha256"]:
            raise ValueError(f"the data set {config.data.dataset} is not the one this run began with (its checksum "
                             "differs, or its vocabulary); resume needs the same data")
        torch.manual_seed(config.seed)
        self.raw = self.make_model().to(processes.device).train()
        objective = self.make_objective()
        self.parameters = list(objective.parameters())
        self.optimizer = self.make_optimizer()
        self.step, self.evaluated, self.best = 0, -1, math.inf
        if config.resume:
            self.optimizer.load_state_dict(source["optimizer"])
            self.step, self.evaluated, self.best = (source[k] for k in ("step", "evaluated", "best"))
            self.load_extra_state(source["extra"])
        self.source = None  # its tensors are copied: let them go
        self.windows = val_windows(self.val_tokens, config.model.block_size, config.eval_tokens)
        self.batches = Batches(self.train_tokens, config, processes)
        self.tokens_per_step = config.batch_size * config.gradient_accumulation_steps * config.model.block_size
        # Compile first, then DDP around it. Static shapes: every micro-batch has the same.
        self.model = torch.compile(objective, dynamic=False) if config.compile else objective
        if dist.is_initialized():
            ids = [torch.device(processes.device).index] if "cuda" in processes.device else None
            self.model = DDP(self.model, device_ids=ids, gradient_as_bucket_view=True)

    def train_step(self) -> tuple[float, dict[str, float], float, bool]:
        """Take one optimizer step, unless loss or gradient are not finite.

        Returns: mean loss over the global batch, the extra terms, gradient norm, whether some process was told to stop.
        """
        config, last = self.config, self.batches.mine - 1
        seeds = np.random.SeedSequence((config.seed, self.step, self.processes.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))  # dropout, stochastic rounding
        extensions.at_step(self.flat, self.raw, self.step)
        total, extras = torch.zeros((), device=self.processes.device), {}
        # (1) gradients: a mean over micro-batches, here and over the processes
        for micro in range(last + 1):
            x, y = self.batches.get(self.step, micro)
            waits = micro < last and isinstance(self.model, DDP)  # gradients are summed over processes once a step
            with self.model.no_sync() if waits else contextlib.nullcontext():
                loss, terms = self.loss(x, y)
                loss = loss / (last + 1)
                sum((term / (last + 1) for term in terms.values()), loss).backward()
            total += loss.detach()
            for name, term in terms.items():
                extras[name] = extras.get(name, 0.0) + term.item() / (last + 1)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip or math.inf)
        # (2) what all processes must agree on: they leave the loop at the same step
        loss, stops = self.processes.sum([total.item(), float(len(self.stop))])
        loss /= self.processes.world
        # (3) the step
        if math.isfinite(loss) and math.isfinite(norm):  # the same on every process
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config) * group.get("lr_scale", 1.0)
            self.optimizer.step()
            self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return loss, extras, norm.item(), stops > 0

    def train(self, log: Log) -> tuple[str, int]:
        """Run to max_iters, a signal or a non-finite loss: (status, exit code)."""
        config, self.stop = self.config, []

        def on_signal(number, frame):
            self.stop.append(number)
            signal.signal(number, signal.SIG_DFL)  # a second one is obeyed at once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)

        peak = peak_flops(config, self.processes.device) * self.processes.world
        first, self.speeds = self.step, []
        since, steps = time.perf_counter(), 0  # of the log line to come
        while self.step < config.max_iters:
            if self.step % config.eval_interval == 0 and self.step > self.evaluated:
                paused = time.perf_counter()
                if not self.evaluate(log):
                    return "diverged", 3
                since += time.perf_counter() - paused
            loss, extras, norm, stopping = self.train_step()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                log.say(f"diverged at step {self.step}: loss {loss}, gradient norm {norm}")
                return "diverged", 3
            steps += 1
            if self.step == first + 1:
                log.say(f"first step after {time.perf_counter() - self.started:.0f} s (compile={config.compile})")
                if self.step % config.log_interval:  # the first step compiles: the speed is that of the others
                    since, steps = time.perf_counter(), 0
            if self.step % config.log_interval == 0:
                speed = steps * self.tokens_per_step / (time.perf_counter() - since)
                if self.step > first + 1:
                    self.speeds.append(speed)
                log.training({"step": self.step, "tokens": self.step * self.tokens_per_step, "loss": loss, **extras,
                              "lr": learning_rate(self.step - 1, config), "grad_norm": norm, "tokens_per_s": speed,
                              "mfu": self.raw.flops_per_token() * speed / peak},
                             (config.max_iters - self.step) * self.tokens_per_step / speed)
                since, steps = time.perf_counter(), 0
            if stopping and self.step < config.max_iters:
                number = self.stop[0] if self.stop else signal.SIGTERM
                if not self.checkpoint(log):
                    return "diverged", 3
                log.say(f"stopped by signal {number} at step {self.step}; to go on: "
                        f"python {sys.argv[0]} --resume --out_dir={config.out_dir}")
                return "interrupted", 128 + number
        if self.evaluated < self.step and not self.evaluate(log):
            return "diverged", 3
        return "finished", 0

    def evaluate(self, log: Log) -> bool:
        """Measure the validation loss, log it, and write a checkpoint; return whether all of it is finite."""
        extensions.at_step(self.flat, self.raw, self.step)  # as eval.py, which knows nothing but the checkpoint's step
        loss = evaluate(self.evaluated_model(), self.windows, self.config.batch_size)
        if not math.isfinite(loss):
            log.say(f"diverged at step {self.step}: validation loss {loss}")
            return False
        bpb = bits_per_byte(loss, self.meta["val"])
        log.write(step=self.step, tokens=self.step * self.tokens_per_step, val_loss=loss, val_bpb=bpb)
        log.say(f"step {self.step}: val_loss {loss:.4f} nats per token, {bpb:.4f} bits per byte")
        self.evaluated, better, self.best = self.step, loss < self.best, min(self.best, loss)
        return self.checkpoint(log, best=better)

    def checkpoint(self, log: Log, best: bool = False) -> bool:
        """Write out_dir/ckpt.pt, and before it ckpt_best.pt if this is the best so far, unless a weight is not finite.

        Returns: whether the weights, on all processes the same, are finite. If not, what was good stays.
        """
        if not all(p.isfinite().all() for p in self.parameters):
            log.say(f"diverged at step {self.step}: a weight is not finite")
            return False

        def work():
            state = {"config": self.flat, "asked": self.asked, "vocab_size": self.raw.vocab_size, "step": self.step,
                     "model": self.raw.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best,
                     "evaluated": self.evaluated, "data": self.meta["train"]["sha256"], "extra": self.extra_state()}
            # Best first: a kill between the two costs an evaluation that a resumed run makes again.
            for name in ("ckpt_best.pt", "ckpt.pt") if best else ("ckpt.pt",):
                save_checkpoint(Path(self.config.out_dir, name), state)
        self.processes.after_main(work)
        return True

    def report(self, seconds: float) -> None:
        """Print the result of a finished run, and a sample of text."""
        loss = [line["val_loss"] for line in read_log(Path(self.config.out_dir, "log.jsonl")) if "val_loss" in line][-1]
        print("-" * 80)
        print(f"step {self.step}: val_loss {loss:.4f} nats per token, {bits_per_byte(loss, self.meta['val']):.4f} bits "
              f"per byte (unigram entropy {unigram_entropy(self.val_tokens):.4f} nats)")
        if self.speeds:
            print(f"{np.median(self.speeds):,.0f} tokens/s (median of the log's lines), {seconds:.0f} s in all")
        if self.config.sample_tokens:
            print("sample:")
            show(sample(self.evaluated_model(), self.meta["tokenizer"], new_tokens=self.config.sample_tokens,
                        seed=self.config.seed))


# -----------------------------------------------------------------------------
# from the command line to the exit code

def main(config_class: type = TrainConfig, run_class: type = Run, doc: str = __doc__) -> None:
    """Train, from the command line to the exit code."""
    started = time.perf_counter()
    with one_line_errors(quiet=int(os.environ.get("LOCAL_RANK", 0)) > 0):  # each machine speaks once
        config, source = load_config(config_class, PRESETS | extensions.PRESETS, doc)
        out, asked = Path(config.out_dir), source["asked"] if config.resume else flatten(config)
        processes = Processes(config.device)
        resolve(config, processes)
        run = run_class(config, processes, source, started)
        run.asked = asked
        with contextlib.ExitStack() as stack:

            def enter():
                busy = f"another run trains in --out_dir={out}; choose another, or end that one"
                try:
                    stack.enter_context(lock(out, busy))
                except (FileExistsError, NotADirectoryError):
                    raise ValueError(f"--out_dir={out} is or lies in a file, not a folder; choose another") from None
                if not config.resume and (out / "ckpt.pt").exists():
                    raise ValueError(f"--out_dir={out} holds another run; add --resume to go on with it, "
                                     "or choose another --out_dir")
            processes.after_main(enter)
            introduce(config, processes, run.raw, run.optimizer)
            log = Log(config, run.step, processes.main)
            if not config.resume:
                log.write(config=flatten(config))
            with explain_compile_errors():
                status, code = run.train(log)
            log.bar.close()
            log.write(status=status, step=run.step)
        if status == "finished" and processes.main:
            run.report(time.perf_counter() - run.started)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
