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

The file reads from top to bottom: config and presets, set-up, data, the loop.
"""

import contextlib
import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from eval import bits_per_byte, choose_device, evaluate, sample, unigram_entropy, val_windows
from model import (
    GPT,
    GPTConfig,
    check_skip_blocks,
    load_checkpoint,
    load_hf,
    load_weights,
    quant_linears,
    save_checkpoint,
)
from optim import AdamW, OptimConfig, param_groups
from prepare_data import DataConfig, PrepareConfig, get_tokenizer, open_dataset, prepare
from quant import QuantConfig, QuantLinear, round_weights
from support.config import differences, flatten, one_line_errors, parse
from support.log import Log, evaluations


@dataclass
class TrainConfig:
    """The training loop. The defaults are GPT-2 small's; a preset is a dict of differences."""
    preset: str = ""  # composed from left to right, then come the flags; without a model size the device chooses one
    out_dir: str = "out"  # checkpoints and log.jsonl
    resume: bool = False  # go on with the run in out_dir, with its configuration
    init_from: str = "scratch"  # scratch, or the weights of: a checkpoint, a folder in Hugging Face's GPT-2 layout
    max_iters: int = 600000  # optimizer steps
    batch_size: int = 16  # sequences in a micro-batch of one process
    gradient_accumulation_steps: int = 32  # micro-batches in an optimizer step, over all processes together
    learning_rate: float = 6e-4  # peak of the schedule
    min_lr: float = 6e-5  # end of the schedule
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which the cosine reaches min_lr; auto: max_iters
    grad_clip: float = 1.0  # largest gradient norm, 0: no clipping
    eval_interval: int = 1000  # steps between two evaluations; each writes a checkpoint
    eval_tokens: int = 2**20  # validation tokens per evaluation, 0: all
    log_interval: int = 10  # steps between two lines of log.jsonl
    sample_tokens: int = 300  # text written at the end of a run
    compare_to: str = ""  # out_dir of another run, shown beside this one in the final report
    device: Literal["cpu", "cuda"] | None = None  # auto: a GPU if there is one
    dtype: Literal["float32", "bfloat16"] | None = None  # of the activations; auto: bfloat16 where that is fast
    compile: bool = True  # torch.compile the model, and the optimizer where its moments are quantized
    deterministic: bool | None = None  # bitwise reproducible kernels; auto: on a CPU
    seed: int = 1337  # of initialisation, data order, dropout and stochastic rounding
    wandb: bool = False  # log to Weights & Biases too (pip install wandb)
    tensorboard: bool = False  # write TensorBoard files to out_dir too (pip install tensorboard)
    data: DataConfig = field(default_factory=DataConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        for name, low in (("max_iters", 1), ("batch_size", 1), ("gradient_accumulation_steps", 1), ("warmup_iters", 0),
                          ("learning_rate", 0), ("min_lr", 0), ("grad_clip", 0), ("eval_interval", 1),
                          ("eval_tokens", 0), ("log_interval", 1), ("sample_tokens", 0), ("seed", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {low}, and finite")
        if self.lr_decay_iters is not None and self.lr_decay_iters < self.warmup_iters:
            raise ValueError(f"--lr_decay_iters={self.lr_decay_iters} lies before the end of the warm-up, "
                             f"--warmup_iters={self.warmup_iters}")


SIZES = {
    # minutes on two cores of a laptop
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=8, gradient_accumulation_steps=1,
                 learning_rate=3e-3, min_lr=3e-4, warmup_iters=100, beta2=0.99, max_iters=2000, eval_interval=500,
                 eval_tokens=2**16, log_interval=50),
    "gpt2": {},  # 124M: the defaults above
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=3e-4, min_lr=3e-5),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4, min_lr=2.5e-5, batch_size=8,
                       gradient_accumulation_steps=64),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4, min_lr=2e-5, batch_size=4,
                    gradient_accumulation_steps=128),  # 1558M
    # arXiv 2407.11722: 300,000 steps of 512 x 1024 tokens
    "paper": dict(dataset="openwebtext", max_iters=300000, min_lr=0.0, warmup_iters=1000, beta2=0.999, dropout=0.1,
                  seed=42, dtype="bfloat16"),
}
PRESETS = SIZES | {
    "w8a8": dict(wbits=8, abits=8),  # weights per_channel, activations per_token: the paper's recipe
    # the same on integer units (int8.py): the forward GEMM, or all three
    "int8": dict(wbits=8, abits=8, gemm="int8"),
    "int8-all": dict(wbits=8, abits=8, gbits=8, ggran="per_row", ggemm="both", gemm="int8"),
    # FP8 as in 2209.05433: precision forward, range for gradients. Every scale is per row, so that a row-wise scaled
    # FP8 GEMM could run all three.
    "fp8": dict(wbits=8, wfmt="e4m3", abits=8, afmt="e4m3", gbits=8, gfmt="e5m2", ggran="per_row", ggemm="both"),
    # GELU and attention keep their inputs for backward in 8 bits
    "keep8": dict(keep8="both"),
    # Adam's moments (optim.py)
    "adam8": dict(m1bits=8, m2bits=8),
    "adam4": dict(m1bits=4, m2bits=4),
    # 2110.02861: its code book, and its stable embedding layer
    "adam8-dynamic": dict(m1bits=8, m1fmt="dynamic", m2bits=8, m2fmt="dynamic", stable_embedding=True, membed32=True),
    # the paper's experiments by their ids in README
    "E0": {},
    "W1": dict(wbits=8, wgran="per_tensor"),
    "W2": dict(wbits=8),
    "W3": dict(wbits=4, wgran="per_tensor"),
    "W4": dict(wbits=4),
    "A1": dict(abits=8, agran="per_tensor"),
    "A2": dict(abits=8),
    "A3": dict(abits=4, agran="per_tensor"),
    "A4": dict(abits=4),
    "A5": dict(abits=4, asym=True),
    "A6": dict(abits=4, agran="per_channel"),
    "G1": dict(gbits=8, ggran="per_tensor", split_qkv=True),
    "G2": dict(gbits=8, split_qkv=True),
    "G3": dict(gbits=4, split_qkv=True),
    "G5": dict(gbits=8, ggemm="grad_input", split_qkv=True),
    "S1": dict(m1bits=8, m1fmt="linear", m1gran="per_tensor", membed32=True),
    "S2": dict(m1bits=8, m1fmt="linear", m1gran="per_channel", membed32=True),
    "S3": dict(m1bits=4, m1fmt="linear", m1gran="per_tensor", membed32=True),
    "S4": dict(m1bits=4, m1fmt="linear", m1gran="per_channel", membed32=True),
    "S6": dict(m2bits=8, m2fmt="linear", m2gran="per_channel", membed32=True),
    "S6-per_tensor": dict(m2bits=8, m2fmt="linear", m2gran="per_tensor", membed32=True),
    "C1": dict(wbits=8, abits=8),
    "C2": dict(wbits=8, abits=8, gbits=8, split_qkv=True),
}
# A resumed run takes these from the command line, and everything else from its checkpoint.
FREE_ON_RESUME = {"preset", "out_dir", "resume", "max_iters", "log_interval", "sample_tokens", "compare_to", "device",
                  "compile", "deterministic", "wandb", "tensorboard", "data_dir"}


def with_size(given: dict) -> None:
    """Put the model size that fits the device in front of the presets given, if they name none."""
    names = [name for name in given.get("preset", "").split(",") if name]
    if not any(name in SIZES for name in names):
        on_gpu = torch.cuda.is_available() and given.get("device") != "cpu"
        given["preset"] = ",".join(["gpt2" if on_gpu else "tiny", *names])


# -----------------------------------------------------------------------------
# set-up

class Processes:
    """Who takes part: rank, world size and device of this process, from torchrun's variables if they are there."""

    def __init__(self, device: str | None):
        self.device = choose_device(device)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0  # the process that prints and writes
        if self.device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} exceeds the "
                             f"{torch.cuda.device_count()} GPU(s) of this machine")
        if self.device == "cuda":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(self.device)
        if self.world > 1 or "RANK" in os.environ:
            dist.init_process_group("nccl" if "cuda" in self.device else "gloo")

    def print(self, text: str) -> None:
        """Print on the main process only."""
        if self.main:
            print(text, flush=True)

    def sum(self, values: list[float]) -> list[float]:
        """Sum a few numbers over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def after_main(self, work) -> None:
        """Run `work` on the main process while the others wait; all of them raise if it fails."""
        error = None
        if self.main:
            try:
                work()
            except (ValueError, OSError) as raised:
                error = raised
        if self.sum([float(error is not None)])[0]:
            raise error or ValueError("another process failed")


def fast_bfloat16(device: str) -> bool:
    """Tell whether the device multiplies bfloat16 matrices in hardware (emulated, it is slower than fp32)."""
    if "cuda" in device:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def can_compile() -> bool:
    """Tell whether torch.compile finds what it needs to build kernels: a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and Path(sysconfig.get_path("include"), "Python.h").exists()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: every step frees and asks for the same memory, and new pages cost faults.

    About 1.2 x the steps per second on one CPU (results/int8.md).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks, too, come from the heap ...
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: ... which never shrinks


def resolve(config: TrainConfig, processes: Processes) -> None:
    """Replace every `auto` by what the device asks for, in place, and print each choice."""
    chosen = []
    for name, value in (("device", processes.device.split(":")[0]),
                        ("dtype", "bfloat16" if fast_bfloat16(processes.device) else "float32"),
                        ("deterministic", "cuda" not in processes.device), ("lr_decay_iters", config.max_iters)):
        if getattr(config, name) is None:
            setattr(config, name, value)
            chosen.append(f"{name}={value}")
    if config.warmup_iters > config.lr_decay_iters:
        config.warmup_iters = config.lr_decay_iters
        chosen.append(f"warmup_iters={config.warmup_iters} (the whole run)")
    split = processes.world // config.gradient_accumulation_steps
    if split > 1 and processes.world % config.gradient_accumulation_steps == config.batch_size % split == 0:
        config.batch_size //= split
        config.gradient_accumulation_steps *= split
        chosen.append(f"batch_size={config.batch_size}, gradient_accumulation_steps="
                      f"{config.gradient_accumulation_steps} (one micro-batch each, the same global batch)")
    if config.compile and not can_compile():
        config.compile = False
        chosen.append("compile=False (no C++ compiler, or no Python.h beside it: install g++ and python3-dev)")
    if config.gradient_accumulation_steps % processes.world:
        raise ValueError(f"--gradient_accumulation_steps={config.gradient_accumulation_steps} (micro-batches over all "
                         f"processes) must be a multiple of the {processes.world} processes")
    tokens = config.batch_size * config.model.block_size
    if config.quant.ggran == "per_block" and config.quant.ggemm != "grad_input" and tokens % config.quant.wblock:
        raise ValueError(f"--wblock={config.quant.wblock} must divide the {tokens} tokens of a micro-batch "
                         "(grad_weight sums over them)")
    processes.print("chosen: " + ", ".join(chosen))
    if config.device == "cpu":
        keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


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


def make_model(config: TrainConfig, vocab_size: int, checkpoint: dict | None) -> GPT:
    """Build the model on the CPU: with the checkpoint's weights, else those that --init_from names, else random."""
    torch.manual_seed(config.seed)
    weights, path = None, Path(config.init_from)
    if checkpoint:
        weights, their_vocab_size = checkpoint["model"], checkpoint["vocab_size"]
    elif config.init_from != "scratch" and path.is_dir() and not (path / "ckpt.pt").exists():
        shape, their_vocab_size, weights = load_hf(path, config.model.block_size)
        if config.model.block_size > shape.block_size:
            raise ValueError(f"--block_size={config.model.block_size} exceeds the {shape.block_size} positions of the "
                             f"model in {path}")
        if config.model.stable_embedding:
            raise ValueError(f"--stable_embedding: the model in {path} has no LayerNorm behind its embedding; drop it")
        config.model = replace(shape, dropout=config.model.dropout, keep8=config.model.keep8)
    elif config.init_from != "scratch":
        source = load_checkpoint(path)
        weights, their_vocab_size = source["model"], source["vocab_size"]
    if weights and their_vocab_size != vocab_size:
        raise ValueError(f"--init_from={path} has a vocabulary of {their_vocab_size}, the data one of {vocab_size}; "
                         "prepare the data with the model's tokenizer")
    check_skip_blocks(config.quant, config.model.n_layer)
    model = GPT(config.model, vocab_size, quant_linears(config.quant), getattr(torch, config.dtype))
    if weights:
        load_weights(model, weights, "checkpoint" if checkpoint else config.init_from)
    return model


def make_optimizer(model: GPT, config: TrainConfig) -> AdamW:
    """AdamW with weight decay on matrices only, and its moments stored as the flags say."""
    return AdamW(param_groups(model, config.optim), config.learning_rate, config.optim, seed=config.seed,
                 compile=config.compile)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to learning_rate, then a cosine to min_lr at lr_decay_iters."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    progress = (step - config.warmup_iters) / max(1, config.lr_decay_iters - config.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


def peak_flops(config: TrainConfig, device: str) -> float:
    """Return the device's FLOP/s in dense bf16 GEMMs from data sheets, or else as measured on one GEMM, in `dtype`."""
    if config.dtype == "bfloat16" and "cuda" in device:
        name = torch.cuda.get_device_name(device)
        for key, peak in (("H100", 989e12), ("H200", 989e12), ("B200", 2250e12), ("A100", 312e12), ("L40S", 362e12),
                          ("4090", 165e12), ("3090", 71e12)):
            if key in name:
                return peak
    a, best = torch.randn(2048, 2048, dtype=getattr(torch, config.dtype), device=device), math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


# -----------------------------------------------------------------------------
# data

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
# what is printed

def introduce(config: TrainConfig, processes: Processes, model: GPT, optimizer: AdamW) -> None:
    """Print what runs where, and how the model differs from an unquantized one."""
    commit = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
                            capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    name = torch.cuda.get_device_name(processes.device) if "cuda" in processes.device else \
        f"CPU, {torch.get_num_threads()} threads"
    processes.print(f"nanoQPT {commit or 'without git'}, torch {torch.__version__}, "
                    f"{processes.world} process(es), {name}")
    processes.print("config: " + (", ".join(f"{k}={v}" for k, v in differences(config).items()) or "defaults"))
    quantized = sum(m.weight.numel() for m in model.modules() if isinstance(m, QuantLinear) and m.recipe)
    total = sum(p.numel() for p in model.parameters())
    processes.print(f"{total:,} parameters, {quantized:,} of them in quantized linear layers")
    processes.print(optimizer.describe()[1])


# -----------------------------------------------------------------------------
# the loop

class Run:
    """One training run: its parts, and what has to be in a checkpoint."""

    def __init__(self, config: TrainConfig, processes: Processes, checkpoint: dict | None, started: float):
        self.started = started  # time.perf_counter() of the start
        self.config, self.processes = config, processes
        self.train_tokens, self.val_tokens, self.meta = get_data(config, processes)
        if checkpoint and checkpoint["data"] != self.meta["train"]["sha256"]:
            raise ValueError(f"the data set {config.data.dataset} is not the one this run began with (its checksum "
                             "differs, or its vocabulary); resume needs the same data")
        self.raw = make_model(config, self.meta["vocab_size"], checkpoint)
        self.step, self.evaluated, self.best = 0, -1, math.inf
        self.raw.to(processes.device).train()
        self.optimizer = make_optimizer(self.raw, config)
        if checkpoint:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.step, self.evaluated, self.best = (checkpoint[k] for k in ("step", "evaluated", "best"))
        self.accumulates = config.gradient_accumulation_steps > processes.world
        if self.accumulates:
            round_weights(self.raw.h)
        self.windows = val_windows(self.val_tokens, config.model.block_size, config.eval_tokens)
        self.batches = Batches(self.train_tokens, config, processes)
        # Compile first, then DDP around it. Static shapes: every micro-batch has the same.
        self.model = torch.compile(self.raw, dynamic=False) if config.compile else self.raw
        if dist.is_initialized():
            ids = [torch.device(processes.device).index] if "cuda" in processes.device else None
            self.model = DDP(self.model, device_ids=ids, gradient_as_bucket_view=True)

    def checkpoint(self, best: bool = False) -> None:
        """Write out_dir/ckpt.pt, which is ckpt_best.pt too if it is the best so far."""
        def work():
            out = Path(self.config.out_dir)
            path = out / ("ckpt_best.pt" if best else "ckpt.pt")  # best first: a kill in between costs an evaluation
            save_checkpoint(path, {
                "config": flatten(self.config), "vocab_size": self.raw.vocab_size, "model": self.raw.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step, "evaluated": self.evaluated,
                "best": self.best, "data": self.meta["train"]["sha256"]})
            if best:
                second = out / "ckpt.pt.tmp"
                second.unlink(missing_ok=True)
                try:
                    os.link(path, second)  # two names of one file; the next save makes a new one
                except OSError:  # a file system without links
                    shutil.copyfile(path, second)
                os.replace(second, out / "ckpt.pt")
        self.processes.after_main(work)

    def evaluate(self, log: Log) -> float:
        """Measure the validation loss, log it, and write a checkpoint."""
        loss = evaluate(self.raw, self.windows, self.config.batch_size)
        bpb = bits_per_byte(loss, self.meta["val"])
        log.write(step=self.step, tokens=self.step * self.tokens_per_step, val_loss=loss, val_bpb=bpb)
        log.say(f"step {self.step}: val_loss {loss:.4f} nats per token, {bpb:.4f} bits per byte")
        self.evaluated = self.step
        better = loss < self.best
        self.best = min(self.best, loss)
        self.checkpoint(best=better)
        return loss

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one optimizer step, over all processes."""
        c = self.config
        return c.batch_size * c.gradient_accumulation_steps * c.model.block_size

    def train_step(self) -> tuple[float, float, bool]:
        """Take one optimizer step, unless loss or gradient are not finite.

        Returns: mean loss over the global batch, gradient norm, whether some process was told to stop.
        """
        config, last = self.config, self.batches.mine - 1
        seeds = np.random.SeedSequence((config.seed, self.step, self.processes.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))  # dropout, stochastic rounding
        total = torch.zeros((), device=self.processes.device)
        for micro in range(last + 1):
            x, y = self.batches.get(self.step, micro)
            waits = micro < last and isinstance(self.model, DDP)  # gradients are summed over processes once a step
            with self.model.no_sync() if waits else contextlib.nullcontext():
                loss = self.model(x, y) / (last + 1)
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), config.grad_clip or math.inf)
        loss, stops = self.processes.sum([total.item(), float(len(self.stop))])  # agreed on: all leave at one step
        loss /= self.processes.world
        if math.isfinite(loss) and math.isfinite(norm):  # the same on every process
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config)
            self.optimizer.step()
            if self.accumulates:
                round_weights(self.raw.h)  # once for all micro-batches
            self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm.item(), stops > 0

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
        since, steps = time.perf_counter(), 0
        while self.step < config.max_iters:
            if self.step % config.eval_interval == 0 and self.step > self.evaluated:
                paused = time.perf_counter()
                self.evaluate(log)
                since += time.perf_counter() - paused
            loss, norm, stopping = self.train_step()
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
                log.training({"step": self.step, "tokens": self.step * self.tokens_per_step, "loss": loss,
                              "lr": learning_rate(self.step - 1, config), "grad_norm": norm, "tokens_per_s": speed,
                              "mfu": self.raw.flops_per_token() * speed / peak},
                             (config.max_iters - self.step) * self.tokens_per_step / speed)
                since, steps = time.perf_counter(), 0
            if stopping and self.step < config.max_iters:
                number = self.stop[0] if self.stop else signal.SIGTERM
                self.checkpoint()
                log.say(f"stopped by signal {number} at step {self.step}; to go on: "
                        f"python train.py --resume --out_dir={config.out_dir}")
                return "interrupted", 128 + number
        if self.evaluated < self.step:
            self.evaluate(log)
        return "finished", 0


def report(run: Run, seconds: float) -> None:
    """Print the result of a finished run, beside another one's if asked for, and a sample of text."""
    config, meta = run.config, run.meta
    mine = evaluations(config.out_dir)
    loss = mine[run.step]
    print("-" * 80)
    print(f"step {run.step}: val_loss {loss:.4f} nats per token, {bits_per_byte(loss, meta['val']):.4f} bits per byte "
          f"(unigram entropy {unigram_entropy(run.val_tokens):.4f} nats)")
    if config.compare_to:
        other = evaluations(config.compare_to)
        shared = max(set(mine) & set(other), default=None)
        print(f"{config.compare_to}: no evaluation at a step of this run" if shared is None else
              f"{config.compare_to} at step {shared}: val_loss {other[shared]:.4f}; this run {mine[shared]:.4f}, "
              f"difference {mine[shared] - other[shared]:+.4f} nats")
    if run.speeds:
        print(f"{np.median(run.speeds):,.0f} tokens/s (median of the log's lines), {seconds:.0f} s in all")
    if config.sample_tokens:
        print("sample:")
        print(sample(run.raw, meta["tokenizer"], new_tokens=config.sample_tokens, seed=config.seed))


def load_config() -> tuple[TrainConfig, dict | None]:
    """Read the command line: (config, None), or with --resume the run's own config and its checkpoint."""
    checkpoint = {}

    def base(given: dict) -> dict:
        if not given.get("resume"):
            with_size(given)
            return {}
        checkpoint.update(load_checkpoint(Path(given.get("out_dir", TrainConfig.out_dir))))
        return {**checkpoint["config"], "device": None}
    config = parse(TrainConfig, presets=PRESETS, doc=__doc__, base=base)
    if not checkpoint:
        return config, None
    for name, value in flatten(config).items():
        began = checkpoint["config"].get(name, value)  # a flag that is younger than the checkpoint
        if name not in FREE_ON_RESUME and value != began:
            began = "auto" if began is None else began
            raise ValueError(f"--{name}={value} differs from the {began} this run began with, "
                             "and would make it another run; choose another --out_dir")
    if checkpoint["step"] >= config.max_iters:
        raise ValueError(f"the run in {config.out_dir} has finished its {checkpoint['step']} steps; "
                         "a larger --max_iters goes on")
    return config, checkpoint


def main() -> None:
    """Train, from the command line to the exit code."""
    started = time.perf_counter()
    with one_line_errors(quiet=int(os.environ.get("LOCAL_RANK", 0)) > 0):  # each machine speaks once
        config, checkpoint = load_config()
        out = Path(config.out_dir)
        processes = Processes(config.device)
        if not config.resume and (out / "ckpt.pt").exists():
            raise ValueError(f"--out_dir={out} holds another run; add --resume to go on with it, "
                             "or choose another --out_dir")
        if config.compare_to:
            evaluations(config.compare_to)
        resolve(config, processes)
        run = Run(config, processes, checkpoint, started)
        introduce(config, processes, run.raw, run.optimizer)
        processes.after_main(lambda: out.mkdir(parents=True, exist_ok=True))
        log = Log(config, run.step, processes.main)
        if not config.resume:
            log.write(config=flatten(config))
        status, code = run.train(log)
        log.bar.close()
        log.write(status=status, step=run.step)
        if status == "finished" and processes.main:
            report(run, time.perf_counter() - run.started)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
