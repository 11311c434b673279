"""The machine and the processes: which device, what it does fast, who takes part in a run."""

import contextlib
import ctypes
import os
import re
import shutil
import sys
import sysconfig
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# FLOP/s of dense bf16 GEMMs, from the data sheets; the first name that stands in the device's as words of its own.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
         "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def choose_device(device: str | None) -> str:
    """Return "cuda" or "cpu", as asked for or else as there is (ValueError if not); fp32 GEMMs on a GPU run in TF32."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but this torch sees no GPU; use --device=cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    torch.set_float32_matmul_precision("high")
    return "cuda"


class Processes:
    """Who takes part: rank, world size and device of this process, from torchrun's variables if they are there."""

    def __init__(self, device: str | None):
        self.device = choose_device(device)
        self.rank, self.world, local_rank, local_world = (
            int(os.environ.get(name, default)) for name, default in (
                ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        self.main = self.rank == 0  # the process that prints and writes
        if self.device == "cuda":
            if local_world > (gpus := torch.cuda.device_count()):
                raise ValueError(f"--nproc_per_node={local_world} exceeds the {gpus} GPU(s) of this machine")
            self.device = f"cuda:{local_rank}"
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

    def after_main(self, work: Callable[[], None]) -> None:
        """Run `work` on the main process while the others wait; all of them raise if it fails."""
        error = None  # raised only when all know of it
        try:
            if self.main:
                work()
        except Exception as raised:  # whatever it is, the others must not wait for ever
            error = raised
        if self.sum([float(error is not None)])[0]:
            raise error or ValueError("another process failed")


def fast_bfloat16(device: str) -> bool:
    """Tell whether the device multiplies bfloat16 matrices in hardware (emulated, it is much slower than fp32)."""
    if "cuda" in device:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def can_compile() -> bool:
    """Tell whether torch.compile finds what it needs to build kernels: a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and Path(sysconfig.get_path("include"), "Python.h").exists()


@contextlib.contextmanager
def explain_compile_errors() -> Iterator[None]:
    """Turn what dynamo and Inductor raise into a ValueError: a kill while compiling leaves a broken cache to delete."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # costs two seconds
        reason = " ".join(str(error).split())[:150]
        raise ValueError(
            f"torch.compile failed: {reason}; if a run was killed while it compiled, a file of its cache "
            f"is broken: delete {cache_dir()}, or use --compile=False") from error


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees and the next asks for: about 1.2 x the speed on one CPU (results/int8.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks, too, come from the heap ...
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: ... which never shrinks


def machine(device: str) -> str:
    """Name what numbers are measured on: the GPU, or the CPU and how many threads."""
    if "cuda" in device:
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{cpu}, {torch.get_num_threads()} threads"


def peak_flops(config: Any, device: str) -> float:
    """Return the device's FLOP/s in dense bf16 GEMMs from data sheets, or else as measured on one GEMM."""
    if config.dtype == "bfloat16" and "cuda" in device:
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAKS.items():
            if re.search(rf"\b{key}\b", name) and not re.search(r"Laptop|Mobile|Max-Q|Ti\b", name):
                return peak
    dtype = getattr(torch, config.dtype) if fast_bfloat16(device) else torch.float32
    size = 2048 if "cuda" in device else 1024
    a = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1))  # item() waits


def flops_per_token(model: Any) -> float:
    """Return the FLOPs of training on a token, as nanoGPT: 6 per weight in a GEMM, 12 C T a block for attention."""
    weights = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    weights -= model.wte.weight.numel() if model.config.untied_head else 0
    width = sum(b.attn.n_head * b.attn.head_size for b in model.h)  # n_layer C, unless pruned
    return 6 * weights + 12 * width * model.config.block_size


def resolve(config: Any, processes: Processes) -> None:
    """Replace every `auto` by what the device asks for, in place, and print each choice."""
    chosen, c, cuda = [], config.model, "cuda" in processes.device

    def choose(reason: str = "", **values) -> None:
        vars(config).update(values)
        chosen.append(", ".join(f"{name}={value}" for name, value in values.items()) + reason)
    autos = {"device": processes.device.split(":")[0],
             # On CPUs with bfloat16 units small models are faster in fp32 all the same.
             "dtype": "bfloat16" if cuda and fast_bfloat16(processes.device) else "float32",
             "deterministic": not cuda, "lr_decay_iters": config.max_iters}
    for name in (name for name in autos if getattr(config, name) is None):
        choose(**{name: autos[name]})
    # A run shorter than its warm-up is all warm-up.
    if config.warmup_iters > config.lr_decay_iters:
        choose(" (the whole run)", warmup_iters=config.lr_decay_iters)
    # More processes than micro-batches: smaller micro-batches, one for each.
    accumulation, world = config.gradient_accumulation_steps, processes.world
    if (split := world // accumulation) > 1 and world % accumulation == config.batch_size % split == 0:
        choose(" (one micro-batch each, the same global batch)",
               batch_size=config.batch_size // split, gradient_accumulation_steps=world)
    if config.compile and not can_compile():
        choose(" (no C++ compiler, or no Python.h beside it: install g++ and python3-dev)", compile=False)
    if config.gradient_accumulation_steps % world:
        raise ValueError(f"--gradient_accumulation_steps={accumulation} (micro-batches over all "
                         f"processes) must be a multiple of the {world} processes")
    # What cannot fit is refused here, not by the kernel later: weights, or one layer's activations.
    tokens = config.batch_size * c.block_size
    need = 4 * max(12 * c.n_layer * c.n_embd**2 + c.block_size * c.n_embd, tokens * c.n_embd)
    if hasattr(os, "sysconf") and need > (have := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise ValueError(
            f"weights or activations need more than {need / 2**30:,.0f} GiB, this machine has "
            f"{have / 2**30:,.0f}; use a smaller --n_layer, --n_embd, --block_size or --batch_size")
    quant = config.quant
    if quant.ggran == "per_block" and quant.ggemm != "grad_input" and tokens % quant.wblock:
        raise ValueError(f"--wblock={quant.wblock} must divide the {tokens} tokens of a micro-batch "
                         "(grad_weight sums over them)")
    processes.print("chosen: " + ", ".join(chosen))
    if config.device == "cpu":
        keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time
        # inductor otherwise times kernels, and may choose others in the next run
        if "cuda" in config.device:
            torch._inductor.config.deterministic = True
