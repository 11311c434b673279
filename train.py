"""Pre-train a GPT-2 with quantized weights, activations, gradients and optimizer states.

    python train.py --wbits=8 --abits=8                                  # the preset tiny: minutes on a laptop
    torchrun --standalone --nproc_per_node=8 train.py --preset=gpt2,w8a8 --dataset=openwebtext
    python train.py --resume --out_dir=out                               # go on where the run stopped

One process or many (torchrun), GPUs (NCCL) or CPUs (gloo). Every random number is a function of (seed, step, rank) and
nothing else: data position and random state need no file, the global batch is the same at any world size, and a killed
run that is resumed is, with --deterministic, bitwise the run that was never killed.
out_dir has log.jsonl, every number as one JSON object a line; ckpt.pt, the newest checkpoint; and ckpt_best.pt, the one
of the best validation loss. Exit codes: 0 finished, 2 bad input, 3 diverged, 128 + n stopped by signal n after saving.
The file reads from top to bottom: config, learning rate, data, a step, the loop. Presets are in support/presets.py.
To train something else, override methods of Run and call main with config and run classes of your own.
"""

if __name__ == "__main__":  # first: a bad command line is refused before torch is imported
    import support.early  # noqa: F401

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
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import extensions
from eval import bits_per_byte, evaluate, sample, show, unigram_entropy, val_windows
from model import GPT, GPTConfig
from optim import AdamW, OptimConfig, param_groups
from prepare_data import DataConfig, get_tokenizer, make_missing, open_dataset
from quant import QuantConfig
from support.checkpoint import load_weights, save_checkpoint
from support.checks import check_train
from support.config import flatten, one_line_errors
from support.device import Processes, explain_compile_errors, flops_per_token, peak_flops, resolve
from support.lock import claim
from support.log import Log, introduce, read_log
from support.presets import PRESETS, load_config


@dataclass
class TrainConfig:
    """The training loop. The defaults are gpt2's; the preset tiny comes first without a GPU, or with stdlib."""
    preset: str = ""  # from left to right, then the flags; without a size, gpt2 on a GPU with --dataset, else tiny
    out_dir: str = "out"  # checkpoints and log.jsonl
    resume: bool | None = False  # go on with the run in out_dir, and its config; auto: if it is there
    init_from: str = "scratch"  # or weights and shape of a checkpoint, or Hugging Face GPT-2 folder
    max_iters: int = 600000  # optimizer steps
    batch_size: int = 16  # sequences in a micro-batch of one process
    gradient_accumulation_steps: int = 32  # micro-batches in a step, of all processes together
    learning_rate: float = 6e-4  # peak of the schedule
    min_lr: float = 6e-5  # end of the schedule
    schedule: Literal["cosine", "wsd"] = "cosine"  # cosine, or flat with a linear decay
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which the schedule reaches min_lr; auto: max_iters
    wsd_decay: float = 0.2  # share of lr_decay_iters that wsd's decay takes, at its end
    grad_clip: float = 1.0  # largest gradient norm, 0: no clipping
    eval_interval: int = 1000  # steps between two evaluations; each writes a checkpoint
    eval_tokens: int = 2**20  # validation tokens per evaluation, 0: all
    log_interval: int = 10  # steps between two lines of log.jsonl
    sample_tokens: int = 300  # text written at the end of a run
    device: Literal["cpu", "cuda"] | None = None  # auto: a GPU if there is one
    dtype: Literal["float32", "bfloat16"] | None = None  # of activations; auto: bfloat16 where fast
    compile: bool = True  # torch.compile the model, and the optimizer of quantized moments
    deterministic: bool | None = None  # bitwise reproducible kernels; auto: on a CPU
    seed: int = 1337  # of initialisation, data order, dropout and stochastic rounding
    wandb: bool = False  # log to Weights & Biases too (pip install wandb)
    data: DataConfig = field(default_factory=DataConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    more: extensions.Config = field(default_factory=extensions.Config)

    def __post_init__(self):
        check_train(self)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine to min_lr at lr_decay_iters, as nanoGPT.

    wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) decays linearly, over the last wsd_decay of steps.
    """
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    start, end = config.warmup_iters, config.lr_decay_iters  # of the decay from height 1 to 0
    if config.schedule == "wsd":
        start = max(start, round(end * (1 - config.wsd_decay)))
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))  # 0 to 1
    height = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + height * (config.learning_rate - config.min_lr)


# -----------------------------------------------------------------------------
# data

class Batches:
    """Random windows of the training split, drawn from (seed, step) for all processes; each takes its share."""
    def __init__(self, tokens: np.ndarray, config: TrainConfig, processes: Processes):
        self.tokens, self.config, self.processes = tokens, config, processes
        self.T, self.size = config.model.block_size, config.batch_size
        if len(tokens) <= self.T:
            raise ValueError(f"the training split has {len(tokens)} tokens, one window needs "
                             f"{self.T + 1}; use a smaller --block_size or more data")
        self.sequences = config.batch_size * config.gradient_accumulation_steps  # of all processes
        self.mine = config.gradient_accumulation_steps // processes.world  # my micro-batches a step
        self.pool, self.ahead = ThreadPoolExecutor(1), {}  # {(step, micro): what is being fetched}

    def _fetch(self, step: int, micro: int) -> Tensor:
        """Return the (batch_size, T+1) int64 tokens of one micro-batch of this process."""
        rng = np.random.default_rng((self.config.seed, step))
        starts = rng.integers(0, len(self.tokens) - self.T, self.sequences)  # of the whole step
        first = (self.processes.rank * self.mine + micro) * self.size
        batch = np.stack([self.tokens[s:s + self.T + 1] for s in starts[first:first + self.size]])
        batch = torch.from_numpy(batch.astype(np.int64))
        return batch.pin_memory() if "cuda" in self.processes.device else batch

    def get(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, (batch_size, T) each, on the device; the next ones are fetched meanwhile."""
        now = self.ahead.pop((step, micro), None) or self.pool.submit(self._fetch, step, micro)
        after = (step, micro + 1) if micro + 1 < self.mine else (step + 1, 0)
        self.ahead = {after: self.pool.submit(self._fetch, *after)}
        batch = now.result().to(self.processes.device, non_blocking=True)  # (batch_size, T+1)
        return batch[:, :-1], batch[:, 1:]  # each token is to predict the next one


# -----------------------------------------------------------------------------
# a step, and the loop

class Run:
    """One training run. The first eight methods are what another program overrides to train something else."""
    needs = ()  # names of extensions whose layers make_model adds: without them a checkpoint is another model

    def make_model(self) -> GPT:
        """Build the GPT on the CPU, with the weights of a checkpoint or a Hugging Face folder if there are any."""
        source, size, name = self.source, self.meta["vocab_size"], self.config.init_from
        if source and source["vocab_size"] not in (size, -(-size // 64) * 64):  # or padded, as wte
            raise ValueError(f"--init_from={name} has a vocabulary of {source['vocab_size']}, the "
                             f"data one of {size}; prepare the data with the model's tokenizer")
        linears, dtype = extensions.linears(self.flat), getattr(torch, self.config.dtype)
        model = GPT(self.config.model, size, linears, dtype)
        if source:
            load_weights(model, source["model"], "checkpoint" if self.config.resume else name)
        return model

    def make_objective(self) -> torch.nn.Module:
        """Return what is compiled, trained and called as (inputs, targets) -> loss; by default the GPT itself."""
        return self.raw

    def make_optimizer(self) -> AdamW:
        """AdamW for the objective's parameters: decay on matrices only, moments stored as the flags say."""
        config, groups = self.config, param_groups(self.objective, self.config.optim)
        return AdamW(groups, config.learning_rate, config.optim, seed=config.seed, compile=config.compile)

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

    def before_checkpoint(self, log: Log) -> None:
        """Write what is to stand before ckpt.pt does; called on all processes, its weights are finite."""

    def __init__(self, config: TrainConfig, processes: Processes, source: dict | None, started: float):
        self.config, self.processes, self.source = config, processes, source
        self.flat, self.started = flatten(config), started  # {flag: value}; time.perf_counter()
        processes.after_main(lambda: make_missing(config.data))  # the others wait for the first
        self.train_tokens, self.val_tokens, self.meta = open_dataset(config.data)
        if config.sample_tokens:
            get_tokenizer(self.meta["tokenizer"])  # missing, it would be missed only at the end
        if config.resume and source["data"] != self.meta["train"]["sha256"]:
            raise ValueError(f"--dataset={config.data.dataset} is not the data this run began with")
        self.windows = val_windows(self.val_tokens, config.model.block_size, config.eval_tokens)
        self.batches = Batches(self.train_tokens, config, processes)
        self.tokens_per_step = self.batches.sequences * config.model.block_size
        torch.manual_seed(config.seed)  # model and optimizer: new, or those of a checkpoint
        self.raw = self.make_model().to(processes.device).train()
        self.objective = self.make_objective()
        self.parameters = list(self.objective.parameters())
        self.optimizer = self.make_optimizer()
        self.step, self.evaluated, self.best = 0, -1, math.inf  # best: validation loss
        if config.resume:
            self.optimizer.load_state_dict(source["optimizer"])
            self.step, self.evaluated, self.best = (source[k] for k in ("step", "evaluated", "best"))
            self.load_extra_state(source["extra"])
        self.source = None  # its tensors are copied: let them go
        # compile first, then DDP around it. Static shapes: every micro-batch has the same
        self.model = torch.compile(self.objective, dynamic=False) if config.compile else self.objective
        if dist.is_initialized():
            ids = [torch.device(processes.device).index] if "cuda" in processes.device else None
            self.model = DDP(self.model, device_ids=ids, gradient_as_bucket_view=True)

    def train_step(self) -> tuple[float, dict[str, float], float, bool]:
        """Take one optimizer step, unless something is not finite: (global mean loss, terms, gradient norm, stop?)."""
        config, last = self.config, self.batches.mine - 1
        seeds = np.random.SeedSequence((config.seed, self.step, self.processes.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))  # dropout, rounding
        extensions.at_step(self.flat, self.raw, self.step)
        total, extras = torch.zeros((), device=self.processes.device), {}
        # (1) gradients: a mean over micro-batches, here and over the processes
        for micro in range(last + 1):
            x, y = self.batches.get(self.step, micro)
            waits = micro < last and isinstance(self.model, DDP)  # gradients are summed once a step
            with self.model.no_sync() if waits else contextlib.nullcontext():
                loss, terms = self.loss(x, y)
                loss = loss / (last + 1)
                sum((term / (last + 1) for term in terms.values()), loss).backward()
            total += loss.detach()
            for name, term in terms.items():
                extras[name] = extras.get(name, 0.0) + term.detach() / (last + 1)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip or math.inf)
        # (2) what all processes must agree on: they leave the loop at the same step
        loss, stops = self.processes.sum([total.item(), float(len(self.stop))])
        loss /= self.processes.world
        if math.isfinite(loss) and math.isfinite(norm):  # (3) the step, the same on every process
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config) * group.get("lr_scale", 1.0)
            self.optimizer.step()
            self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return loss, {name: term.item() for name, term in extras.items()}, norm.item(), stops > 0

    def train(self, log: Log) -> tuple[str, int]:
        """Run to max_iters, a signal or a non-finite loss: (status, exit code)."""
        config, self.stop, self.speeds = self.config, [], []  # signals that have come, tokens/s
        def on_signal(number, frame):
            self.stop.append(number)
            signal.signal(number, signal.SIG_DFL)  # a second one is obeyed at once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        peak = peak_flops(config, self.processes.device) * self.processes.world
        since, steps, first = time.perf_counter(), 0, self.step  # the log line to come starts here
        while self.step < config.max_iters:
            # (1) evaluation, and a checkpoint: from time to time, not on the clock of the steps
            if self.step % config.eval_interval == 0 and self.step > self.evaluated:
                paused = time.perf_counter()
                if not self.evaluate(log):
                    return "diverged", 3
                since += time.perf_counter() - paused
            # (2) step: self.step counts it, if it was taken
            loss, extras, norm, stopping = self.train_step()
            steps += 1
            # (3) divergence: the weights are still those of before
            if not (math.isfinite(loss) and math.isfinite(norm)):
                log.say(f"diverged at step {self.step}: loss {loss}, gradient norm {norm}")
                return "diverged", 3
            # (4) log line; the first step compiles, so it has no part in the speed
            if self.step == first + 1:
                log.say(f"first step after {time.perf_counter() - self.started:.0f} s (compile={config.compile})")
                if self.step % config.log_interval:
                    since, steps = time.perf_counter(), 0
            if self.step % config.log_interval == 0:
                speed = steps * self.tokens_per_step / (time.perf_counter() - since)  # tokens/s
                if self.step > first + 1:
                    self.speeds.append(speed)
                numbers = {"step": self.step, "tokens": self.step * self.tokens_per_step, "loss": loss,
                           **extras, "lr": learning_rate(self.step - 1, config), "grad_norm": norm,
                           "tokens_per_s": speed, "mfu": flops_per_token(self.raw) * speed / peak}
                log.training(numbers, (config.max_iters - self.step) * self.tokens_per_step / speed)
                since, steps = time.perf_counter(), 0
            # (5) signal, to this process or another: save and leave
            if stopping and self.step < config.max_iters:
                number = self.stop[0] if self.stop else signal.SIGTERM
                if not self.checkpoint(log):
                    return "diverged", 3
                log.say(f"stopped by signal {number} at step {self.step}; to go on: "
                        f"python {sys.argv[0]} --resume --out_dir={config.out_dir}")
                return "interrupted", 128 + number
        return ("finished", 0) if self.evaluated == self.step or self.evaluate(log) else ("diverged", 3)

    def evaluate(self, log: Log) -> bool:
        """Measure the validation loss, log it, and write a checkpoint; return whether all of it is finite."""
        extensions.at_step(self.flat, self.raw, self.step)  # as eval.py does at a checkpoint's step
        loss = evaluate(self.evaluated_model(), self.windows, self.config.batch_size)
        if not math.isfinite(loss):
            log.say(f"diverged at step {self.step}: validation loss {loss}")
            return False
        bpb, tokens = bits_per_byte(loss, self.meta["val"]), self.step * self.tokens_per_step
        log.write(step=self.step, tokens=tokens, val_loss=loss, val_bpb=bpb)
        log.say(f"step {self.step}: val_loss {loss:.4f} nats per token, {bpb:.4f} bits per byte")
        self.evaluated, better, self.best = self.step, loss < self.best, min(self.best, loss)
        return self.checkpoint(log, best=better)

    def checkpoint(self, log: Log, best: bool = False) -> bool:
        """Write ckpt.pt, before it ckpt_best.pt if it is the best; with a non-finite weight return False instead."""
        spoilt = float(not all(p.isfinite().all() for p in self.parameters))
        if self.processes.sum([spoilt])[0]:  # on any: all agree
            log.say(f"diverged at step {self.step}: a weight is not finite")
            return False
        self.before_checkpoint(log)

        def work():  # the best first: a kill in between costs an evaluation that is made again
            state = {"config": self.flat, "asked": self.asked, "data": self.meta["train"]["sha256"],
                     "vocab_size": self.raw.vocab_size, "step": self.step, "best": self.best,
                     "evaluated": self.evaluated, "model": self.raw.state_dict(),
                     "optimizer": self.optimizer.state_dict(), "extra": self.extra_state(),
                     "extensions": [*extensions.active(self.flat), *self.needs]}
            for name in ("ckpt_best.pt", "ckpt.pt") if best else ("ckpt.pt",):
                save_checkpoint(Path(self.config.out_dir, name), state)
        self.processes.after_main(work)  # written once
        return True

    def report(self, seconds: float) -> None:
        """Print the result of a finished run, and a sample of text."""
        config, lines = self.config, read_log(Path(self.config.out_dir, "log.jsonl"))
        loss = [line["val_loss"] for line in lines if "val_loss" in line][-1]
        bpb, unigram = bits_per_byte(loss, self.meta["val"]), unigram_entropy(self.val_tokens)
        print("-" * 80 + f"\nstep {self.step}: val_loss {loss:.4f} nats per token, {bpb:.4f} bits per "
              f"byte (unigram entropy {unigram:.4f} nats)")
        if self.speeds:
            print(f"{np.median(self.speeds):,.0f} tokens/s (median of the log's lines), {seconds:.0f} s in all")
        if config.sample_tokens:
            print("sample:")
            show(sample(self.evaluated_model(), self.meta["tokenizer"], "", config.sample_tokens, config.seed))


# -----------------------------------------------------------------------------
# from the command line to the exit code

def main(config_class: type = TrainConfig, run_class: type = Run, doc: str = __doc__) -> None:
    """Train, from the command line to the exit code."""
    started = time.perf_counter()
    with one_line_errors(quiet=int(os.environ.get("LOCAL_RANK", 0)) > 0):  # once a machine
        config, source = load_config(config_class, PRESETS | extensions.PRESETS, doc)
        asked = source["asked"] if config.resume else flatten(config)
        processes = Processes(config.device)
        resolve(config, processes)
        run = run_class(config, processes, source, started)
        run.asked = asked
        with contextlib.ExitStack() as stack:  # out_dir is ours alone, until here ends
            processes.after_main(lambda: stack.enter_context(claim(config, source)))
            facts = introduce(config, processes, run.raw, run.optimizer)
            log = Log(config, run.step, processes.main)
            if not config.resume:
                log.write(config=flatten(config), data=run.meta["train"]["sha256"], **facts)
            with explain_compile_errors():
                status, code = run.train(log)
            log.bar.close()
            log.write(status=status, step=run.step)
        if status == "finished" and processes.main:
            run.report(time.perf_counter() - run.started)
    if dist.is_initialized():
        processes.sum([0.0])  # nobody closes its connections while another still reports
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
