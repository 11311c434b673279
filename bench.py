"""What quantization costs in time: a training step, or the optimizer's step alone, interleaved in one process.

    python bench.py --n_layer=4 --n_embd=128 --n_head=4 --block_size=128      # the shape of tiny
    python bench.py --n_layer=2 --n_embd=768 --n_head=12 --block_size=512 --batch_size=4
    python bench.py --what=memory --dtype=bfloat16       # what backward keeps, GPT-2 small
    python bench.py --what=optimizer                                     # AdamW alone on GPT-2 small's 148 tensors

Each round times one step (forward, backward, clipping, AdamW) of each variant after the other, so that a machine whose
speed drifts drifts for all of them; the ratio is the median over rounds of (variant / unquantized) in the same round.

`plain` is the loop of nanoGPT on the same shape: nn.Linear, autocast for bfloat16, F.cross_entropy on the full logits.
The others are train.py's presets on train.py's model.

--what=memory counts the bytes that forward keeps for backward, each storage once, and whose they are. Nothing is
computed (fake tensors), so any size is counted in seconds. This is eager mode; the compiler recomputes some of it.

--what=optimizer steps the parameters of the shape given (default: GPT-2 small, 124M, 3 GB) with random gradients under
every format of optim.py; the ratio is to torch.optim.AdamW(fused=True) in the same round.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from config import build, one_line_errors, parse
from eval import choose_device
from model import GPT, GPTConfig, quant_linears
from optim import AdamW, OptimConfig, param_groups
from quant import QuantConfig, QuantLinear
from train import PRESETS, SIZES, TrainConfig, fast_bfloat16, keep_freed_memory, make_optimizer


@dataclass
class BenchConfig:
    """Time training steps."""
    what: Literal["step", "optimizer", "memory"] = "step"  # the training step, AdamW alone, what backward keeps
    variants: str = "E0,w8a8,int8-all"  # presets of train.py, compared with E0, the unquantized one; plain (step only)
    rounds: int = 20  # steps of each variant that are counted
    batch_size: int = 8  # sequences
    vocab_size: int | None = None  # tokens; auto: 50257, for step 257
    compile: bool = True  # torch.compile the models
    device: Literal["cpu", "cuda"] | None = None  # auto: a GPU if there is one
    dtype: Literal["float32", "bfloat16"] | None = None  # of the activations; auto: bfloat16 where that is fast
    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self):
        idle = {"step": (), "optimizer": ("variants", "batch_size", "dtype"), "memory": ("rounds", "compile")}
        for name in idle[self.what]:
            if getattr(self, name) != getattr(BenchConfig, name):
                raise ValueError(f"--{name}={getattr(self, name)} has no effect with --what={self.what}; drop it")
        if self.what == "memory" and "plain" in self.variants.split(","):
            raise ValueError(f"--variants={self.variants}: plain is timed only; drop it from --what=memory")
        if self.vocab_size is None:
            self.vocab_size = 257 if self.what == "step" else 50257
        unknown = [v for v in self.variants.split(",") if v != "plain" and (v not in PRESETS or v in SIZES)]
        if unknown or "E0" not in self.variants.split(","):
            raise ValueError(f"--variants={self.variants} must hold E0, and else plain or experiments of train.py")
        if min(self.rounds, self.batch_size, self.vocab_size) < 1:
            raise ValueError("--rounds, --batch_size and --vocab_size must be at least 1")


def plain_step(config: BenchConfig, device: str):
    """Return nanoGPT's step on this shape, as a function without arguments."""
    model = GPT(config.model, config.vocab_size, lambda name, k, n, bias: nn.Linear(k, n, bias)).to(device)

    def loss(idx, targets):
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits = model(idx)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.flatten())
    return _step(model, torch.compile(loss, dynamic=False) if config.compile else loss, OptimConfig(),
                 config, device)


def our_step(preset: str, config: BenchConfig, device: str):
    """Return a step of train.py's model under a preset, as a function without arguments."""
    train = build(TrainConfig, PRESETS[preset])
    model = GPT(config.model, config.vocab_size, quant_linears(train.quant), getattr(torch, config.dtype)).to(device)
    return _step(model, torch.compile(model, dynamic=False) if config.compile else model, train.optim, config, device)


def _step(model: GPT, loss, optim: OptimConfig, config: BenchConfig, device: str):
    optimizer = make_optimizer(model, TrainConfig(model=config.model, optim=optim, compile=config.compile))
    tokens = torch.randint(config.vocab_size, (config.batch_size, config.model.block_size + 1), device=device)

    def step():
        loss(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # waits for the device
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if "cuda" in device:
            torch.cuda.synchronize()
    return step


OPTIMIZERS = {
    "fp32": {}, "power8 + power8 (adam8)": PRESETS["adam8"],
    "power8 + power8, v stochastic": dict(m1bits=8, m2bits=8, m2round="stochastic"),
    "power8 + power8, per_channel": dict(m1bits=8, m2bits=8, m1gran="per_channel", m2gran="per_channel"),
    "linear8 + power8": dict(m1bits=8, m1fmt="linear", m2bits=8),
    "linear8 + linear8": dict(m1bits=8, m1fmt="linear", m2bits=8, m2fmt="linear"),
    "dynamic8 + dynamic8": dict(m1bits=8, m1fmt="dynamic", m2bits=8, m2fmt="dynamic"),
    "power4 + power4 (adam4)": PRESETS["adam4"],
    "linear8 m, per_channel (S2)": dict(m1bits=8, m1fmt="linear", m1gran="per_channel"),
}


def bench_optimizer(config: BenchConfig, device: str) -> None:
    """Print a row per format: bytes, first step (compile), a step, its ratio to torch's fused AdamW."""
    model = GPT(config.model, config.vocab_size, quant_linears(QuantConfig())).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3 * torch.exp(torch.randn_like(p))

    def timed(optimizer) -> float:
        start = time.perf_counter()
        optimizer.step()
        if "cuda" in device:
            torch.cuda.synchronize()
        return time.perf_counter() - start
    fused = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    timed(fused)
    print(f"{len(list(model.parameters()))} tensors, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M "
          f"parameters, {machine(device)}, medians of {config.rounds} rounds")
    print("| moments | bytes per parameter | first step, s | fused, ms | ours, ms | ratio |\n|---|---|---|---|---|---|")
    for name, flags in OPTIMIZERS.items():
        optim = OptimConfig(**flags)
        ours = AdamW(param_groups(model, optim), 1e-6, optim, compile=config.compile)
        size, first = ours.describe()[0], timed(ours)
        timed(ours)
        pairs = [(timed(fused), timed(ours)) for _ in range(config.rounds)]
        a, b = (statistics.median(x) * 1e3 for x in zip(*pairs, strict=True))
        ratio = statistics.median(y / x for x, y in pairs)
        print(f"| {name} | {size:.3f} | {first:.1f} | {a:.0f} | {b:.0f} | {ratio:.2f} |", flush=True)


def bench_memory(config: BenchConfig, device: str) -> None:
    """Print what forward keeps for backward: by the linear layers of the blocks, and by all, MiB."""
    m = config.model
    print(f"n_layer {m.n_layer}, n_embd {m.n_embd}, {config.batch_size} x {m.block_size} tokens, {config.dtype}, "
          f"eager, torch {torch.__version__}")
    print("| variant | linears, MiB | x E0 | everything, MiB | x E0 |\n|---|---|---|---|---|")
    base = None
    for name in sorted(config.variants.split(","), key=lambda v: v != "E0"):
        train = build(TrainConfig, PRESETS[name])
        with FakeTensorMode(), torch.device(device):
            model = GPT(m, config.vocab_size, quant_linears(train.quant), getattr(torch, config.dtype))
            kept = kept_for_backward(model, config.batch_size, device)
        linears, total = kept["linear"], kept["all"]
        base = base or (linears, total)
        print(f"| {name} | {linears / 2**20:,.0f} | {linears / base[0]:.2f} | {total / 2**20:,.0f} | "
              f"{total / base[1]:.2f} |")


def kept_for_backward(model: GPT, batch_size: int, device: str) -> dict[str, int]:
    """Return the bytes that autograd keeps of one forward, {"linear": by the blocks' linears, "all": by everything}.

    Parameters do not count, what is made of them does (weights cast or rounded). "linear" counts all that the linears
    of the blocks keep, also where attention keeps the same storage; in "all" a storage counts once.
    """
    inside, kept = [], {"linear": {}, "all": {}}
    for layer in model.h.modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(lambda *_: inside.append(True))
            layer.register_forward_hook(lambda *_: inside.pop() and None)
    owned = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        for where in ["linear", "all"] if inside else ["all"]:
            if storage._cdata not in owned:
                kept[where][storage._cdata] = t  # kept alive, so that an address is not used twice
        return t
    tokens = torch.randint(model.vocab_size, (batch_size, model.config.block_size + 1), device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(tokens[:, :-1], tokens[:, 1:])
    return {where: sum(t.untyped_storage().nbytes() for t in tensors.values()) for where, tensors in kept.items()}


def machine(device: str) -> str:
    """Describe what the numbers were measured on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "CPU") if Path("/proc/cpuinfo").exists() else "CPU"
    return (f"torch {torch.__version__}, {torch.cuda.get_device_name() if 'cuda' in device else cpu}, "
            f"{torch.get_num_threads()} threads")


def main() -> None:
    """Print the table."""
    config = parse(BenchConfig, presets={}, doc=__doc__)
    with one_line_errors():
        device = choose_device(config.device)
        if device == "cpu":
            keep_freed_memory()
        if config.what == "optimizer":
            return bench_optimizer(config, device)
        config.dtype = config.dtype or ("bfloat16" if fast_bfloat16(device) else "float32")
        if config.what == "memory":
            return bench_memory(config, device)
        names = config.variants.split(",")
        steps = [plain_step(config, device) if n == "plain" else our_step(n, config, device) for n in names]
    first = []
    for step in steps:
        start = time.perf_counter()
        step()
        first.append(time.perf_counter() - start)
        step()
    times = [[] for _ in steps]
    for _ in range(config.rounds):
        for step, mine in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            mine.append(time.perf_counter() - start)
    base, m = times[names.index("E0")], config.model
    print(f"{machine(device)}, {config.dtype}, compile={config.compile}")
    print(f"n_layer {m.n_layer}, n_embd {m.n_embd}, n_head {m.n_head}, {config.batch_size} x {m.block_size} tokens, "
          f"vocabulary {config.vocab_size}, medians of {config.rounds} rounds")
    print("| variant | ms per step | tokens/s | x E0 | first step, s |\n|---|---|---|---|---|")
    for name, mine, compiled in zip(names, times, first, strict=True):
        seconds = statistics.median(mine)
        ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
        speed = config.batch_size * m.block_size / seconds
        print(f"| {name} | {seconds * 1e3:.1f} | {speed:,.0f} | {ratio:.3f} | {compiled:.1f} |")


if __name__ == "__main__":
    main()
