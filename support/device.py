"""The machine and the processes: which device, what it does fast, who takes part in a run."""

import contextlib
import ctypes
import math
import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# FLOP/s of dense bf16 GEMMs, from the data sheets; the first name that stands in the device's as words of its own.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
         "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def choose_device(device: str | None) -> str:
    """Return "cuda" or "cpu": the one asked for, or the GPU if there is one; fp32 GEMMs on a GPU run in TF32.

    Raises: ValueError if there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but this torch sees no GPU; use --device=cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


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

    def after_main(self, work: Callable[[], None]) -> None:
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
    """Say which folder to delete when a file of torch's compile cache is broken, as a kill while compiling leaves it.

    Raises: ValueError instead of what dynamo and Inductor raise.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # here, since it costs two seconds
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"torch.compile failed: {reason}; if a run was killed while it compiled, a file of its cache "
                         f"is broken: delete {cache_dir()}, or use --compile=False") from error


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: every step frees and asks for the same memory, and new pages cost faults.

    About 1.2 x the steps per second on one CPU (results/int8.md).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks, too, come from the heap ...
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: ... which never shrinks


def peak_flops(config: Any, device: str) -> float:
    """Return the device's FLOP/s in dense bf16 GEMMs from data sheets, or else as measured on one GEMM."""
    if config.dtype == "bfloat16" and "cuda" in device:
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAKS.items():
            if re.search(rf"\b{key}\b", name) and not re.search("Laptop|Mobile|Max-Q", name):
                return peak
    dtype = getattr(torch, config.dtype) if fast_bfloat16(device) else torch.float32  # emulated, it takes minutes
    size, best = 2048 if "cuda" in device else 1024, math.inf
    a = torch.randn(size, size, dtype=dtype, device=device)
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def resolve(config: Any, processes: Processes) -> None:
    """Replace every `auto` by what the device asks for, in place, and print each choice."""
    chosen = []
    for name, value in (("device", processes.device.split(":")[0]),
                        # On CPUs with bfloat16 units small models are faster in fp32 all the same.
                        ("dtype", "bfloat16" if "cuda" in processes.device and fast_bfloat16(processes.device)
                         else "float32"),
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
    tokens, c = config.batch_size * config.model.block_size, config.model
    need = 4 * max(12 * c.n_layer * c.n_embd**2 + c.block_size * c.n_embd, tokens * c.n_embd)  # bytes, at the least
    if hasattr(os, "sysconf") and need > (have := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise ValueError(f"weights or activations need more than {need / 2**30:,.0f} GiB, this machine has "
                         f"{have / 2**30:,.0f}; use a smaller --n_layer, --n_embd, --block_size or --batch_size")
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
