"""What each bit costs and buys: a training step, AdamW alone, one GEMM, or what backward keeps.

    python bench.py --n_layer=4 --n_embd=128 --n_head=4 --block_size=128      # the shape of tiny
    python bench.py --n_layer=2 --n_embd=768 --n_head=12 --block_size=512 --batch_size=4
    python bench.py --what=memory --dtype=bfloat16       # what backward keeps, GPT-2 small
    python bench.py --what=optimizer                     # AdamW alone on GPT-2 small's 148 tensors
    python bench.py --what=gemm --rounds=5               # the three GEMMs of its four linears, and their roofline

A variant is presets of train.py joined by +, as in w8a8+adam8; `plain` is the loop of nanoGPT on the same shape:
nn.Linear, autocast for bfloat16, F.cross_entropy on the full logits. Everything is interleaved in one process: a round
times each side once, so that a machine whose speed drifts drifts for all; a ratio is the median over rounds of
(this / the unquantized one) in the same round.

--what=step: forward, backward, clipping, AdamW. The memory columns, MiB: parameters, gradients and optimizer states as
their tensors count; `kept`, what forward leaves for backward (each storage once, parameters apart), in the compiled
model; `peak`, the most that is allocated at once in a step, by torch's allocator. They do not add up to it: gradients
come as what is kept goes, and the peak has temporaries. Our head computes its gradients in forward, so `kept` holds
these where `plain` keeps logits. Unlike train.py, nothing is told to be deterministic.

--what=memory counts `kept` on fake tensors: nothing is computed, so any size is counted in seconds. This is eager
mode, and tells whose it is; the compiler recomputes some of it.

--what=optimizer: random gradients under every format of optim.py, beside torch.optim.AdamW(fused=True).

--what=gemm: quantized operands at hand, scales applied after. The roofline is the longer of arithmetic and memory
traffic, at the rates that this device reached just before in a large GEMM and a large copy.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
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
from support.device import choose_device, fast_bfloat16, keep_freed_memory, peak_flops
from support.presets import PRESETS, SIZES
from train import TrainConfig

MIB = 2**20


@dataclass
class BenchConfig:
    """Measure, side by side."""
    what: Literal["step", "optimizer", "memory", "gemm"] = "step"  # a training step, AdamW alone, kept bytes, one GEMM
    variants: str = "E0,w8a8,int8-all,adam8"  # presets of train.py, joined by +; E0 is the unquantized one; plain
    rounds: int = 20  # repetitions that are counted
    batch_size: int = 8  # sequences
    vocab_size: int | None = None  # tokens; auto: 50257, for step 257
    compile: bool = True  # torch.compile
    device: Literal["cpu", "cuda"] | None = None  # auto: a GPU if there is one
    dtype: Literal["float32", "bfloat16"] | None = None  # of the activations; auto: bfloat16 where that is fast
    peers: bool = False  # optimizer: those of torchao and bitsandbytes too, whichever is installed
    json: bool = False  # print JSON instead of a table
    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self):
        idle = {"step": ("peers",), "optimizer": ("variants", "batch_size", "dtype"),
                "memory": ("rounds", "compile", "peers"),
                "gemm": ("variants", "vocab_size", "peers", "n_layer", "bias", "dropout")}
        for config in (self, self.model):
            refuse_idle(config, **{name: (False, f"with --what={self.what}") for name in idle[self.what]
                                   if hasattr(config, name)})
        for name in ("keep8", "stable_embedding"):
            if getattr(self.model, name) != getattr(GPTConfig, name):
                raise ValueError(f"--{name}={getattr(self.model, name)}: a variant says so itself, as in "
                                 "--variants=E0,keep8")
        if self.what == "memory" and "plain" in self.variants.split(","):
            raise ValueError(f"--variants={self.variants}: plain is timed only; drop it from --what=memory")
        if self.vocab_size is None:
            self.vocab_size = 257 if self.what == "step" else 50257
        if len(set(self.variants.split(","))) < len(self.variants.split(",")):
            raise ValueError(f"--variants={self.variants} names a variant twice")
        presets = [p for v in self.variants.split(",") if v != "plain" for p in v.split("+")]
        if "E0" not in self.variants.split(",") or any(p not in PRESETS or p in SIZES for p in presets):
            raise ValueError(f"--variants={self.variants} must hold E0, and else plain or experiments of train.py, "
                             "as in E0,w8a8,w8a8+adam8")
        if min(self.rounds, self.batch_size, self.vocab_size) < 1:
            raise ValueError("--rounds, --batch_size and --vocab_size must be at least 1")


def seconds(work: Callable, device: str) -> float:
    """Return the time that work() takes, with what it leaves running on a GPU."""
    start = time.perf_counter()
    work()
    if "cuda" in device:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(works: Iterable[Callable], rounds: int, device: str) -> list[list[float]]:
    """Return the times of each work, one per round, after one that does not count; a round runs each once."""
    times = [[seconds(work, device) for work in works] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*times[1:], strict=True)]


def ratio(times: list[float], base: list[float]) -> float:
    """Return the median over the rounds of times / base."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def show(title: str, rows: list[dict], as_json: bool) -> None:
    """Print the rows as a Markdown table under its title, or both as JSON."""
    if as_json:
        return print(json.dumps({"title": title, "rows": rows}, indent=1))
    print(title + "\n")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:  # four digits
        cells = [v if isinstance(v, str) else f"{v:,.{max(0, 4 - len(str(int(v))))}f}" for v in row.values()]
        print("| " + " | ".join(cells) + " |")


def machine(device: str) -> str:
    """Describe what the numbers were measured on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "CPU") if Path("/proc/cpuinfo").exists() else "CPU"
    return (f"torch {torch.__version__}, {torch.cuda.get_device_name() if 'cuda' in device else cpu}, "
            f"{torch.get_num_threads()} threads")


# -----------------------------------------------------------------------------
# a training step

class Variant:
    """One side of the comparison: a model, its loss and its optimizer."""

    def __init__(self, name: str, config: BenchConfig, device: str, compile: bool):
        flags = {k: v for preset in name.split("+") for k, v in PRESETS.get(preset, {}).items()}
        shape = flatten(config.model) | {f.name: flags[f.name] for f in fields(GPTConfig) if f.name in flags}
        train = build(TrainConfig, {**flags, **shape})
        linear = extensions.linears(flatten(train))
        if name == "plain":
            def linear(name, k, n, bias):
                return nn.Linear(k, n, bias)
        self.config, self.device = config, device
        dtype = torch.float32 if name == "plain" else getattr(torch, config.dtype)
        with torch.device(device):  # not .to(): fake tensors cannot be moved
            self.model = GPT(train.model, config.vocab_size, linear, dtype)
        loss = self._plain_loss if name == "plain" else self.model
        self.loss = torch.compile(loss, dynamic=False) if compile else loss
        self.optimizer = AdamW(param_groups(self.model, train.optim), train.learning_rate, train.optim, compile=compile)
        self.tokens = torch.randint(config.vocab_size, (config.batch_size, train.model.block_size + 1), device=device)
        self.adamw = []  # seconds of the optimizer in each step

    def _plain_loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            logits = self.model(idx)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.flatten())

    def step(self) -> None:
        """Take a training step."""
        self.loss(self.tokens[:, :-1], self.tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()  # waits for the device
        self.adamw.append(seconds(self.optimizer.step, self.device))
        self.optimizer.zero_grad(set_to_none=True)

    def memory(self) -> dict[str, float]:
        """Return the memory columns, in MiB; runs a forward and a step."""
        def forward():
            return self.loss(self.tokens[:, :-1], self.tokens[:, 1:])
        kept = kept_for_backward(forward, self.model)["all"]
        parameters = sum(p.nbytes for p in self.model.parameters())
        states = sum(t.nbytes for state in self.optimizer.state.values() for t in state.values() if t.dim())
        if "cuda" in self.device:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            grown = torch.cuda.max_memory_allocated() - before
        else:
            with profile(profile_memory=True) as record:
                self.step()
            changes = [(e.start_ns(), e.nbytes()) for e in record.kineto_results.events() if e.name() == "[memory]"]
            grown = total = 0
            for _, size in sorted(changes):
                total += size
                grown = max(grown, total)
        columns = {"parameters": parameters, "gradients": parameters, "optimizer": states, "kept": kept,
                   "peak": parameters + states + grown}
        return {name: size / MIB for name, size in columns.items()}


def bench_step(config: BenchConfig, device: str) -> tuple[str, list[dict]]:
    """Time steps of all variants; return title and rows."""
    names = sorted(config.variants.split(","), key=lambda name: name != "E0")
    variants, rows = [Variant(name, config, device, config.compile) for name in names], []
    first = [seconds(v.step, device) for v in variants]
    memory = [v.memory() for v in variants]
    times = interleaved([v.step for v in variants], config.rounds, device)
    peak = peak_flops(TrainConfig(dtype=config.dtype), device)
    for name, variant, mine, start, mib in zip(names, variants, times, first, memory, strict=True):
        speed = variant.tokens[:, 1:].numel() / statistics.median(mine)
        rows.append({"variant": name, "ms per step": statistics.median(mine) * 1e3, "x E0": ratio(mine, times[0]),
                     "AdamW, ms": statistics.median(variant.adamw[-config.rounds:]) * 1e3, "tokens/s": speed,
                     "MFU, %": 100 * variant.model.flops_per_token() * speed / peak, **mib, "first step, s": start})
    m = config.model
    return (f"{machine(device)}, {config.dtype}, compile={config.compile}; n_layer {m.n_layer}, n_embd {m.n_embd}, "
            f"n_head {m.n_head}, {config.batch_size} x {m.block_size} tokens, vocabulary {config.vocab_size}; medians "
            f"of {config.rounds} rounds; peak for MFU {peak / 1e12:.3g} TFLOP/s; memory in MiB"), rows


# -----------------------------------------------------------------------------
# what backward keeps

def kept_for_backward(forward: Callable[[], Tensor], model: GPT, apart: bool = False) -> dict[str, int]:
    """Return the bytes that autograd keeps of one forward() of the model: {"all": n}, and "linear" where `apart`.

    Parameters do not count, what is made of them does (weights cast or rounded). "linear" counts all that the linears
    of the blocks keep, also where attention keeps the same storage; in "all" a storage counts once. `apart` puts hooks
    on the layers for good, and is for eager models.
    """
    inside, kept = [], {"linear": {}, "all": {}} if apart else {"all": {}}
    for layer in model.h.modules() if apart else ():
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(lambda *_: inside.append(True))
            layer.register_forward_hook(lambda *_: inside.pop() and None)
    owned = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        for where in ["linear", "all"] if inside else ["all"]:
            if storage._cdata not in owned:
                kept[where][storage._cdata] = t  # kept alive, so that an address is not used twice
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return {where: sum(t.untyped_storage().nbytes() for t in tensors.values()) for where, tensors in kept.items()}


def bench_memory(config: BenchConfig, device: str) -> tuple[str, list[dict]]:
    """Count what forward keeps for backward under each variant; return title and rows."""
    rows, m = [], config.model
    for name in sorted(config.variants.split(","), key=lambda name: name != "E0"):
        with FakeTensorMode():
            v = Variant(name, config, device, compile=False)
            kept = kept_for_backward(lambda v=v: v.model(v.tokens[:, :-1], v.tokens[:, 1:]), v.model, apart=True)
        row = {"variant": name}
        for column, where in (("linears, MiB", "linear"), ("everything, MiB", "all")):
            row[column] = kept[where] / MIB
            row[f"x E0, {where}"] = row[column] / (rows or [row])[0][column]
        rows.append(row)
    return (f"n_layer {m.n_layer}, n_embd {m.n_embd}, {config.batch_size} x {m.block_size} tokens, {config.dtype}, "
            f"eager, torch {torch.__version__}"), rows


# -----------------------------------------------------------------------------
# the optimizer alone

OPTIMIZERS = {
    "fp32": {}, "power8 + power8 (adam8)": PRESETS["adam8"],
    "power8 + power8, v nearest": dict(m1bits=8, m2bits=8, m2round="nearest"),
    "power8 + power8, per_channel": dict(m1bits=8, m2bits=8, m1gran="per_channel", m2gran="per_channel"),
    "linear8 + power8": dict(m1bits=8, m1fmt="linear", m2bits=8),
    "linear8 + linear8": dict(m1bits=8, m1fmt="linear", m2bits=8, m2fmt="linear"),
    "dynamic8 + dynamic8": dict(m1bits=8, m1fmt="dynamic", m2bits=8, m2fmt="dynamic"),
    "power4 + power4 (adam4)": PRESETS["adam4"],
    "linear8 m, per_channel (S2)": dict(m1bits=8, m1fmt="linear", m1gran="per_channel"),
}


def peers() -> dict[str, Callable]:
    """Return the 8- and 4-bit AdamW of the libraries that are installed. Raises: ValueError if there is none."""
    found = {}
    try:
        import torchao.optim
        found |= {f"torchao {name}": getattr(torchao.optim, name) for name in ("AdamW8bit", "AdamW4bit")}
    except ImportError:
        pass
    try:
        import bitsandbytes
        found["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit
    except ImportError:
        pass
    if not found:
        raise ValueError("--peers: neither torchao nor bitsandbytes is installed; pip install torchao bitsandbytes")
    return found


def bench_optimizer(config: BenchConfig, device: str) -> tuple[str, list[dict]]:
    """Time AdamW under every format beside torch's fused AdamW; return title and rows."""
    others = peers() if config.peers else {}
    model = GPT(config.model, config.vocab_size, extensions.linears(flatten(config.model))).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3 * torch.exp(torch.randn_like(p))
    fused, rows = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), []
    elements = sum(p.numel() for p in model.parameters())
    for name in [*OPTIMIZERS, *others]:
        if name in others:
            ours = others[name](model.parameters(), lr=1e-6)
        else:
            optim = OptimConfig(**OPTIMIZERS[name])
            ours = AdamW(param_groups(model, optim), 1e-6, optim, compile=config.compile)
        first = seconds(ours.step, device)
        size = sum(real_bytes(t) for state in ours.state.values() for t in state.values())
        a, b = interleaved([fused.step, ours.step], config.rounds, device)
        rows.append({"moments": name, "bytes per parameter": size / elements, "first step, s": first,
                     "fused, ms": statistics.median(a) * 1e3, "this, ms": statistics.median(b) * 1e3,
                     "x fused": ratio(b, a)})
        del ours
    return (f"{len(list(model.parameters()))} tensors, {elements / 1e6:.1f}M parameters, {machine(device)}, medians of "
            f"{config.rounds} rounds"), rows


def real_bytes(t: object) -> int:
    """Return the bytes of a tensor of the optimizer's state; of a tensor subclass, those of its parts."""
    if not isinstance(t, Tensor) or t.dim() == 0:
        return 0
    names = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else []
    return sum(real_bytes(getattr(t, name)) for name in names) if names else t.nbytes


# -----------------------------------------------------------------------------
# one GEMM

def bench_gemm(config: BenchConfig, device: str) -> tuple[str, list[dict]]:
    """Time the three GEMMs of a block's four linears in dtype and in int8; return title and rows."""
    def fastest(work):
        return min(seconds(work, device) for _ in range(5))
    dtype, size = getattr(torch, config.dtype), 8192 if "cuda" in device else 2048
    big = torch.ones(size, size, dtype=dtype, device=device)
    codes = big.to(torch.int8)
    rate = 2 * size**3 / fastest(lambda: big @ big)
    rate8 = 2 * size**3 / fastest(lambda: torch._int_mm(codes, codes))
    large = big.repeat(8, 1)
    traffic = 2 * large.nbytes / fastest(large.clone)

    def in_int8(a, b):
        return int8_gemm(a, b, dtype)

    def in_dtype(a, b):
        return gemm(a, b, dtype)
    if config.compile:  # fuses the scales with what is around the GEMM
        in_int8, in_dtype = (torch.compile(f, dynamic=False) for f in (in_int8, in_dtype))
    rows, c, m = [], config.model.n_embd, config.batch_size * config.model.block_size
    rounding = Quantizer(8, (1, None))
    for layer, n, k in (("c_attn", 3 * c, c), ("attn.c_proj", c, c), ("c_fc", 4 * c, c), ("mlp.c_proj", c, 4 * c)):
        x, w, g = (torch.randn(shape, dtype=dtype, device=device) for shape in ((m, k), (n, k), (m, n)))
        for name, a, b in (("output", x, w), ("grad_input", g, w.T), ("grad_weight", g.T, x.T)):
            # As training has them: x and w were rounded in forward, contiguous; backward meets transposed views.
            qa = rounding.quantize(a)
            qb = rounding.quantize(b)._replace(codes=rounding.quantize(b.T).codes.T) if name != "output" else \
                rounding.quantize(b)
            plain, ours = interleaved([partial(in_dtype, a, b), partial(in_int8, qa, qb)], config.rounds, device)
            (r, length), s = a.shape, b.shape[0]
            flops, out = 2 * r * s * length, r * s * dtype.itemsize
            roof, roof8 = (max(flops / speed, ((r + s) * length * each + out) / traffic)
                           for speed, each in ((rate, dtype.itemsize), (rate8, 1)))
            rows.append({"linear": layer, "GEMM": name, "rows x inner x columns": f"{r} x {length} x {s}",
                         f"{config.dtype}, ms": statistics.median(plain) * 1e3, "roofline, ms": roof * 1e3,
                         "int8, ms": statistics.median(ours) * 1e3, "roofline 8, ms": roof8 * 1e3,
                         f"x {config.dtype}": ratio(ours, plain)})
    return (f"{machine(device)}; {rate / 1e12:.3g} TFLOP/s in {config.dtype}, {rate8 / 1e12:.3g} in int8, "
            f"{traffic / 1e9:.3g} GB/s; compile={config.compile}, medians of {config.rounds} rounds"), rows


def main() -> None:
    """Print the table."""
    config = parse(BenchConfig, presets={}, doc=__doc__)
    with one_line_errors():
        device = choose_device(config.device)
        if device == "cpu":
            keep_freed_memory()
        config.dtype = config.dtype or ("bfloat16" if fast_bfloat16(device) else "float32")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler speaks of itself
        # Every variant compiles the same lines once more. Beyond a limit dynamo would go on eagerly, with a log line.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        bench = {"step": bench_step, "memory": bench_memory, "optimizer": bench_optimizer, "gemm": bench_gemm}
        show(*bench[config.what](config, device), config.json)


if __name__ == "__main__":
    main()
