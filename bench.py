"""What each bit costs and buys: a training step, AdamW alone, one GEMM, or what backward keeps.

    python bench.py --n_layer=4 --n_embd=128 --n_head=4 --block_size=128    # the shape of tiny
    python bench.py --what=memory --dtype=bfloat16    # what backward keeps, GPT-2 small
    python bench.py --what=optimizer                  # AdamW alone on GPT-2 small's 148 tensors
    python bench.py --what=gemm --rounds=5            # the three GEMMs of its linears

A variant is presets of train.py joined by +, as in w8a8+adam8; `plain` is nanoGPT's loop: nn.Linear,
autocast for bfloat16, cross_entropy on full logits. A round times each side once, so that a machine
whose speed drifts drifts for all; a ratio is the median over rounds.

step: forward, backward, clipping, AdamW. Memory in MiB: `kept` is what forward leaves for backward
(a storage once, no parameters; our head's gradients, the logits of `plain`), `peak` the most allocated
at once. The columns do not add up to it: gradients come as what is kept goes.
memory: `kept` on fake tensors, any size in seconds; eager, the compiler would recompute some of it.
optimizer: random gradients under every format of optim.py, beside torch.optim.AdamW(fused=True).
gemm: quantized operands at hand, scales applied after; int_mm: the integers alone, contiguous. The
roofline is the longer of arithmetic and memory traffic, at the rates this device reached just
before in a large GEMM and a large copy.
"""

if __name__ == "__main__":  # first: a bad command line is refused before torch is imported
    import support.early  # noqa: F401

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler import profile

import extensions
from int8 import int8_gemm
from model import GPT, GPTConfig
from optim import AdamW, OptimConfig, param_groups
from quant import Quantizer, QuantLinear, gemm
from support.config import build, flatten, one_line_errors, parse, refuse_idle
from support.device import choose_device, fast_bfloat16, flops_per_token, keep_freed_memory, machine, peak_flops
from support.presets import PRESETS, SIZES
from train import TrainConfig

EXPERIMENTS = {k: v for k, v in (PRESETS | extensions.PRESETS).items() if k not in SIZES}
# Flags that a table has no use for, and those of the model that are no part of its shape.
IDLE = {"step": ("peers",), "memory": ("rounds", "compile", "peers"),
        "optimizer": ("variants", "batch_size", "dtype", "dropout"),
        "gemm": ("variants", "vocab_size", "peers", "n_layer", "bias", "dropout")}
NO_SHAPE = "keep8", "stable_embedding", "heads", "hidden"
LARGE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the large GEMM
MIB = 2**20


@dataclass
class BenchConfig:
    """Measure, side by side."""
    what: Literal["step", "optimizer", "memory", "gemm"] = "step"  # which table
    variants: str = "E0,w8a8,int8-all,adam8"  # presets joined by +, E0 (unquantized), plain
    rounds: int = 20  # repetitions that are counted
    batch_size: int = 8  # sequences
    vocab_size: int | None = None  # tokens; auto: 50257, for step 257
    compile: bool = True  # torch.compile
    device: Literal["cpu", "cuda"] | None = None  # auto: a GPU if there is one
    dtype: Literal["float32", "bfloat16"] | None = None  # of activations; auto: bfloat16 where fast
    peers: bool = False  # optimizer: torchao's and bitsandbytes' too, whichever is installed
    json: bool = False  # print JSON instead of a table
    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self):
        reasons = dict.fromkeys(IDLE[self.what], (False, f"with --what={self.what}")) | dict.fromkeys(
            NO_SHAPE, (False, "on all sides: a variant says so itself, as in --variants=E0,keep8"))
        for config in (self, self.model):
            refuse_idle(config, **{k: v for k, v in reasons.items() if hasattr(config, k)})
        names = self.names()
        presets = {p for name in names if name != "plain" for p in name.split("+")}
        if names[0] != "E0" or len(names) > len(set(names)) or not presets <= set(EXPERIMENTS):
            raise ValueError(f"--variants={self.variants} must hold E0, and else plain or experiments "
                             "of train.py, none twice, as in E0,w8a8,w8a8+adam8")
        if self.what == "memory" and "plain" in names:
            raise ValueError(f"--variants={self.variants}: plain is no --what=memory; drop it")
        if self.vocab_size is None:
            self.vocab_size = 257 if self.what == "step" else 50257
        if min(self.rounds, self.batch_size, self.vocab_size) < 1:
            raise ValueError("--rounds, --batch_size and --vocab_size must be at least 1")
        self.compile = self.compile and self.what != "memory"

    def names(self) -> list[str]:
        """Return the variants, E0 first: all are compared to it."""
        return sorted(self.variants.split(","), key=lambda name: name != "E0")

    def describe(self) -> str:
        """Return the flags that matter to the table and to all of its rows."""
        hidden = {"variants", "device", "peers", "json", *IDLE[self.what], *NO_SHAPE}
        return ", ".join(f"{k}={v}" for k, v in flatten(self).items() if k not in hidden)


def seconds(work: Callable, device: str) -> float:
    """Return the time that work() takes, with what it leaves running on a GPU."""
    start = time.perf_counter()
    work()
    if "cuda" in device:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(works: list[Callable], rounds: int, device: str) -> list[tuple[float, float]]:
    """Run each once a round; return its median ms, and that of its time / the first one's in a round."""
    times = [[seconds(work, device) for work in works] for _ in range(rounds + 1)][1:]  # after a warm-up
    return [(1e3 * statistics.median(row[i] for row in times),
             statistics.median(row[i] / row[0] for row in times)) for i in range(len(works))]


def show(title: str, rows: list[dict], as_json: bool) -> None:
    """Print the rows as a Markdown table under its title, or both as JSON."""
    if as_json:
        return print(json.dumps({"title": title, "rows": rows}, indent=1))
    print(f"{title}\n\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:  # four digits
        cells = [v if isinstance(v, str) else f"{v:,.{max(0, 4 - len(str(int(v))))}f}"
                 for v in row.values()]
        print("| " + " | ".join(cells) + " |")


# -----------------------------------------------------------------------------
# a training step

class Variant:
    """One side of the comparison: a model, its loss and its optimizer; flags: in place of the presets in its name."""

    def __init__(self, name: str, config: BenchConfig, device: str, flags: dict | None = None):
        flags = flags or {k: v for p in name.split("+") for k, v in EXPERIMENTS.get(p, {}).items()}
        train = build(TrainConfig, {**flatten(config.model), **flags, "dtype": config.dtype})
        linear, dtype = extensions.linears(flatten(train)), getattr(torch, config.dtype)
        if name == "plain":
            linear, dtype = (lambda name, *sizes: nn.Linear(*sizes)), torch.float32
        self.config, self.device = config, device
        with torch.device(device):  # not .to(): fake tensors cannot be moved
            self.model = GPT(train.model, config.vocab_size, linear, dtype)
        loss = self._plain_loss if name == "plain" else self.model
        self.loss = torch.compile(loss, dynamic=False) if config.compile else loss
        self.optimizer = AdamW(param_groups(self.model, train.optim), train.learning_rate, train.optim,
                               compile=config.compile)
        size = config.batch_size, train.model.block_size + 1
        self.tokens = torch.randint(config.vocab_size, size, device=device)
        self.adamw = []  # seconds of the optimizer in each step

    def _plain_loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        device, enabled = self.device.split(":")[0], self.config.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            return F.cross_entropy(self.model(idx).flatten(0, 1), targets.flatten())

    def forward(self) -> Tensor:
        """Return the loss."""
        return self.loss(self.tokens[:, :-1], self.tokens[:, 1:])

    def step(self) -> None:
        """Take a training step."""
        self.forward().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()  # waits for the device
        self.adamw.append(seconds(self.optimizer.step, self.device))
        self.optimizer.zero_grad(set_to_none=True)

    def memory(self) -> dict[str, float]:
        """Return the memory columns, in MiB; runs a forward and a step."""
        kept = kept_for_backward(self.forward, self.model)[0]
        parameters = sum(p.nbytes for p in self.model.parameters())
        states = real_bytes(self.optimizer.state)
        if "cuda" in self.device:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            grown = torch.cuda.max_memory_allocated() - before
        else:
            with profile(profile_memory=True) as record:
                self.step()
            changes = sorted((e.start_ns(), e.nbytes()) for e in record.kineto_results.events()
                             if e.name() == "[memory]")
            grown = max(accumulate((size for _, size in changes), initial=0))
        return {"parameters": parameters / MIB, "gradients": parameters / MIB, "optimizer": states / MIB,
                "kept": kept / MIB, "peak": (parameters + states + grown) / MIB}


def bench_step(config: BenchConfig, device: str) -> tuple[str, list[dict]]:
    """Time steps of all variants; return the rows, and before them what else to say."""
    variants, rows = [Variant(name, config, device) for name in config.names()], []
    first = [seconds(v.step, device) for v in variants]
    memory = [v.memory() for v in variants]
    times = interleaved([v.step for v in variants], config.rounds, device)
    peak = peak_flops(TrainConfig(dtype=config.dtype), device)
    for name, v, (ms, x), start, mib in zip(config.names(), variants, times, first, memory, strict=True):
        speed = 1e3 * v.tokens[:, 1:].numel() / ms
        adamw = 1e3 * statistics.median(v.adamw[-config.rounds:])
        rows.append({"variant": name, "ms per step": ms, "x E0": x, "AdamW, ms": adamw,
                     "tokens/s": speed, "MFU, %": 100 * flops_per_token(v.model) * speed / peak,
                     **mib, "first step, s": start})
    return f"peak for MFU {peak / 1e12:.3g} TFLOP/s; memory in MiB", rows


# -----------------------------------------------------------------------------
# what backward keeps

def kept_for_backward(forward: Callable, model: GPT, layers: Iterable = ()) -> tuple[int, int]:
    """Return the bytes that autograd keeps of one forward() of the model: in all, and by `layers`.

    Parameters do not count, what is made of them does (weights cast or rounded). A storage counts
    once, for both where layers and others keep it. The layers get hooks, for eager models only.
    """
    inside, everything, theirs = [], {}, {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: inside.append(True))
        layer.register_forward_hook(lambda *_: inside.pop() and None)
    owned = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        key = t.untyped_storage()._cdata
        for kept in () if key in owned else (everything, theirs) if inside else (everything,):
            kept[key] = t  # kept alive, so that an address is not used twice
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return tuple(sum(t.untyped_storage().nbytes() for t in kept.values()) for kept in (everything, theirs))


def bench_memory(config: BenchConfig, device: str) -> tuple[str, list[dict]]:
    """Count what forward keeps for backward under each variant; return as bench_step does."""
    kept = {}
    for name in config.names():
        with FakeTensorMode():
            v = Variant(name, config, device)
            linears = [m for m in v.model.h.modules() if isinstance(m, QuantLinear)]
            kept[name] = kept_for_backward(v.forward, v.model, linears)
    return "eager", [{"variant": name, "linears, MiB": linear / MIB, "x E0, linear": linear / kept["E0"][1],
                      "everything, MiB": all_ / MIB, "x E0, all": all_ / kept["E0"][0]}
                     for name, (all_, linear) in kept.items()]


# -----------------------------------------------------------------------------
# the optimizer alone

OPTIMIZERS = {
    "fp32": {}, "power8 + power8 (adam8)": PRESETS["adam8"],
    "power8 + power8, v nearest": dict(m1bits=8, m2bits=8, m2round="nearest"),
    "power8 + power8, per_channel": PRESETS["adam8"] | dict(m1gran="per_channel", m2gran="per_channel"),
    "power8 + power8, blocks of 256": dict(m1bits=8, m2bits=8, mblock=256),
    "linear8 + power8": dict(m1bits=8, m1fmt="linear", m2bits=8),
    "linear8 + linear8": dict(m1bits=8, m1fmt="linear", m2bits=8, m2fmt="linear"),
    "dynamic8 + dynamic8": dict(m1bits=8, m1fmt="dynamic", m2bits=8, m2fmt="dynamic"),
    "power4 + power4 (adam4)": PRESETS["adam4"],
    "linear8 m, per_channel (S2)": dict(m1bits=8, m1fmt="linear", m1gran="per_channel"),
}


def peers() -> dict[str, Callable]:
    """Return the 8- and 4-bit AdamW of installed libraries. Raises: ValueError if there is none."""
    found = {}
    with suppress(ImportError):
        from torchao.optim import AdamW4bit, AdamW8bit
        found |= {"torchao AdamW8bit": AdamW8bit, "torchao AdamW4bit": AdamW4bit}
    with suppress(ImportError):
        import bitsandbytes
        found["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit
    if not found:
        raise ValueError("--peers needs a library: pip install torchao bitsandbytes")
    return found


def real_bytes(state: object) -> int:
    """Return the bytes of an optimizer's state, or of a tensor of it (a subclass: of its parts)."""
    if isinstance(state, dict):
        return sum(map(real_bytes, state.values()))
    if not isinstance(state, Tensor) or state.dim() == 0:
        return 0
    parts = state.__tensor_flatten__()[0] if hasattr(state, "__tensor_flatten__") else []
    return sum(real_bytes(getattr(state, part)) for part in parts) if parts else state.nbytes


def bench_optimizer(config: BenchConfig, device: str) -> tuple[str, list[dict]]:
    """Time AdamW under every format beside torch's fused one; return as bench_step does."""
    others = peers() if config.peers else {}
    model = Variant("E0", config, device).model
    parameters, elements, rows = list(model.parameters()), 0, []
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3 * torch.exp(torch.randn_like(p))
        elements += p.numel()
    fused = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    for name in [*OPTIMIZERS, *others]:
        if name in others:
            ours = others[name](parameters, lr=1e-6)
        else:
            optim = OptimConfig(**OPTIMIZERS[name])
            ours = AdamW(param_groups(model, optim), 1e-6, optim, compile=config.compile)
        first = seconds(ours.step, device)
        (base, _), (ms, x) = interleaved([fused.step, ours.step], config.rounds, device)
        rows.append({"moments": name, "bytes per parameter": real_bytes(ours.state) / elements,
                     "first step, s": first, "fused, ms": base, "this, ms": ms, "x fused": x})
    return f"{len(parameters)} tensors, {elements / 1e6:.1f}M parameters", rows


# -----------------------------------------------------------------------------
# one GEMM

def bench_gemm(config: BenchConfig, device: str) -> tuple[str, list[dict]]:
    """Time the GEMMs of a block's four linears in dtype and in int8; return as bench_step does."""
    def fastest(work):
        return min(seconds(work, device) for _ in range(5))
    dtype, size = getattr(torch, config.dtype), LARGE[device.split(":")[0]]
    big = torch.ones(size, size, dtype=dtype, device=device)
    codes, large = big.to(torch.int8), big.repeat(8, 1)
    rate = 2 * size**3 / fastest(lambda: big @ big)
    rate8 = 2 * size**3 / fastest(lambda: torch._int_mm(codes, codes.T))
    traffic = 2 * large.nbytes / fastest(large.clone)
    in_dtype, in_int8 = gemm, int8_gemm
    if config.compile:  # fuses the scales with what is around the GEMM
        in_dtype, in_int8 = (torch.compile(f, dynamic=False) for f in (gemm, int8_gemm))
    calls = 20 if "cuda" in device else 1  # a GPU is waited for once: the host is not what counts
    rounding, rows = Quantizer(8, (1, None)), []
    c, m = config.model.n_embd, config.batch_size * config.model.block_size
    for layer, n, k in (("c_attn", 3 * c, c), ("attn.c_proj", c, c), ("c_fc", 4 * c, c),
                        ("mlp.c_proj", c, 4 * c)):
        x, w, g = (torch.randn(s, dtype=dtype, device=device) for s in ((m, k), (n, k), (m, n)))
        for name, a, b in (("output", x, w), ("grad_input", g, w.T), ("grad_weight", g.T, x.T)):
            qa, qb = rounding.quantize(a), rounding.quantize(b)
            if name != "output":  # rounded in forward, met transposed
                qb = qb._replace(codes=qb.codes.T.contiguous().T)
            works = [partial(in_dtype, a, b, dtype), partial(in_int8, qa, qb, dtype),
                     partial(torch._int_mm, qa.codes.contiguous(), qb.codes.contiguous().T)]
            works = [lambda f=f: [f() for _ in range(calls)] for f in works]
            times = interleaved(works, config.rounds, device)
            plain, ours, alone = (ms / calls for ms, _ in times)
            ratio = times[1][1]
            (r, length), s = a.shape, b.shape[0]
            flops, out = 2 * r * s * length, r * s * dtype.itemsize
            roof, roof8 = (1e3 * max(flops / speed, ((r + s) * length * each + out) / traffic)
                           for speed, each in ((rate, dtype.itemsize), (rate8, 1)))
            rows.append({"linear": layer, "GEMM": name, "rows x inner x columns": f"{r} x {length} x {s}",
                         f"{config.dtype}, ms": plain, "roofline, ms": roof, "int8, ms": ours,
                         "int_mm alone, ms": alone,
                         "roofline 8, ms": roof8, f"x {config.dtype}": ratio})
    return (f"{rate / 1e12:.3g} TFLOP/s in {config.dtype}, {rate8 / 1e12:.3g} in int8, "
            f"{traffic / 1e9:.3g} GB/s"), rows


def main() -> None:
    """Print the table."""
    config = parse(BenchConfig, doc=__doc__)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler speaks of itself
    # Every variant compiles the same lines once more. Beyond a limit dynamo would go on eagerly.
    with one_line_errors(), torch._dynamo.config.patch(recompile_limit=64,
                                                       fail_on_recompile_limit_hit=True):
        device = choose_device(config.device)
        if device == "cpu":
            keep_freed_memory()
        config.dtype = config.dtype or ("bfloat16" if fast_bfloat16(device) else "float32")
        bench = {"step": bench_step, "memory": bench_memory, "optimizer": bench_optimizer,
                 "gemm": bench_gemm}[config.what]
        more, rows = bench(config, device)
        show(f"torch {torch.__version__}, {machine(device)}; {config.describe()}; {more}", rows, config.json)


if __name__ == "__main__":
    main()
