"""From train.py's command line to its config: presets, and what a run takes from the one it goes on from."""

import sys
from pathlib import Path
from typing import Any

import torch

from model import GPTConfig
from prepare_data import DataConfig
from support.checkpoint import load_checkpoint
from support.config import build, flatten, parse
from support.huggingface import load_hf

# A preset is a dict of differences from the defaults; --preset=a,b composes them from left to right. Every size names
# the same flags, so that the last one of --preset=tiny,gpt2 wins.
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16,
            gradient_accumulation_steps=32, learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000,
            beta2=0.95, max_iters=600000, eval_interval=1000, eval_tokens=2**20, log_interval=10)
LAPTOP = dict(n_layer=4, n_head=4, n_embd=64, block_size=128, batch_size=16,
              gradient_accumulation_steps=1, learning_rate=1.6e-2, min_lr=0.0, warmup_iters=100,
              beta2=0.99, max_iters=2250, eval_interval=375, eval_tokens=2**17, log_interval=25)
SIZES = {
    # minutes on two cores of a laptop
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=8,
                 gradient_accumulation_steps=1, learning_rate=3e-3, min_lr=3e-4, warmup_iters=100,
                 beta2=0.99, max_iters=2000, eval_interval=500, eval_tokens=2**16, log_interval=50),
    # sweep.py's scales: 65,000, 229,000 and 491,000 parameters, and 23M (GPT-2's vocabulary), 20 tokens for each. Rates
    # for E0, seed 1: laptop 3e-3, 6e-3, 1e-2, 1.6e-2, 2.4e-2: 1.537, 1.470, 1.454, 1.447, 1.618; laptop-small 1.6e-2,
    # 2.4e-2, 3.6e-2: 2.108, 2.098, 2.166; laptop-large 4e-3, 5.5e-3, 8e-3, 1.2e-2: 1.200, 1.178, 1.191, 1.208; gpu is
    # not tuned yet.
    "laptop": LAPTOP, "laptop-small": LAPTOP | dict(n_head=2, n_embd=32, learning_rate=2.4e-2, max_iters=625,
                                                    eval_interval=125),
    "laptop-large": LAPTOP | dict(n_head=6, n_embd=96, learning_rate=5.5e-3, max_iters=4790, eval_interval=479),
    # a ladder for one GPU: 0.23M, 0.85M and 3.3M parameters, as many steps each; rates: results/gpu.md
    **{f"width-{width}": LAPTOP | dict(n_embd=width, batch_size=batch, learning_rate=rate, eval_interval=1125,
                                       eval_tokens=2**18)
       for width, batch, rate in ((64, 16, 1e-2), (128, 60, 1e-2), (256, 228, 3e-3))},
    "gpu": GPT2 | dict(n_layer=6, n_head=5, n_embd=320, block_size=512, batch_size=32, dataset="openwebtext",
                       gradient_accumulation_steps=4, learning_rate=2e-3, min_lr=0.0, warmup_iters=200,
                       max_iters=7200, eval_interval=600, eval_tokens=2**20, log_interval=10),
    "gpt2": GPT2,  # 124M; medium 350M, large 774M, xl 1558M
    "gpt2-medium": GPT2 | dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=3e-4, min_lr=3e-5),
    "gpt2-large": GPT2 | dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4,
                              min_lr=2.5e-5, batch_size=8, gradient_accumulation_steps=64),
    "gpt2-xl": GPT2 | dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4, min_lr=2e-5,
                           batch_size=4, gradient_accumulation_steps=128),
    # arXiv 2407.11722: 300,000 steps of 512 x 1024 tokens
    "paper": GPT2 | dict(dataset="openwebtext", max_iters=300000, min_lr=0.0, warmup_iters=1000,
                         beta2=0.999, dropout=0.1, seed=42, dtype="bfloat16"),
}
PRESETS = SIZES | {
    "w8a8": dict(wbits=8, abits=8),  # the paper's: weights per_channel, activations per_token
    # the same on integer units (int8.py): the forward GEMM, or all three
    "int8": dict(wbits=8, abits=8, gemm="int8"),
    "int8-all": dict(wbits=8, abits=8, gbits=8, ggran="per_row", ggemm="both", gemm="int8"),
    # 2209.05433: precision forward, range for gradients. A row-wise scaled FP8 GEMM could run all three.
    "fp8": dict(wbits=8, wfmt="e4m3", abits=8, afmt="e4m3", gbits=8, gfmt="e5m2", ggran="per_row", ggemm="both"),
    "keep8": dict(keep8="both"),  # GELU and attention keep their inputs for backward in 8 bits
    "adam8": dict(m1bits=8, m2bits=8),  # Adam's moments (optim.py)
    "adam4": dict(m1bits=4, m2bits=4),
    # 2110.02861: its code book, and its stable embedding layer
    "adam8-dynamic": dict(m1bits=8, m1fmt="dynamic", m2bits=8, m2fmt="dynamic", stable_embedding=True, membed32=True),
    # the paper's experiments by their ids in README
    "E0": dict(wbits=32, abits=32, gbits=32, m1bits=32, m2bits=32),
    "W1": dict(wbits=8, wgran="per_tensor"), "W2": dict(wbits=8),
    "W3": dict(wbits=4, wgran="per_tensor"), "W4": dict(wbits=4),
    "A1": dict(abits=8, agran="per_tensor"), "A2": dict(abits=8),
    "A3": dict(abits=4, agran="per_tensor"), "A4": dict(abits=4),
    "A5": dict(abits=4, asym=True), "A6": dict(abits=4, agran="per_channel"),
    "G1": dict(gbits=8, ggran="per_tensor", split_qkv=True), "G2": dict(gbits=8, split_qkv=True),
    "G3": dict(gbits=4, split_qkv=True), "G5": dict(gbits=8, ggemm="grad_input", split_qkv=True),
    **{name: {f"m{m}bits": bits, f"m{m}fmt": "linear", f"m{m}gran": f"per_{gran}", "membed32": True}
       for name, m, bits, gran in (
           ("S1", 1, 8, "tensor"), ("S2", 1, 8, "channel"), ("S3", 1, 4, "tensor"),
           ("S4", 1, 4, "channel"), ("S6", 2, 8, "channel"), ("S6-per_tensor", 2, 8, "tensor"))},
    "C1": dict(wbits=8, abits=8), "C2": dict(wbits=8, abits=8, gbits=8, split_qkv=True),
    # the fewest bits whose mean loss lay within 0.5 % of E0's, at one small size: results/best.md, row bits28-6
    "best": dict(wbits=6, abits=6, asym=True, gbits=4, split_qkv=True, m1bits=4, m2bits=8),
}
# A resumed run takes these from the command line, and everything else from its checkpoint.
FREE_ON_RESUME = {"preset", "out_dir", "resume", "max_iters", "log_interval", "sample_tokens",
                  "device", "compile", "deterministic", "wandb", "data_dir"}


def load_config(config_class: type, presets: dict[str, dict], doc: str) -> tuple[Any, dict | None]:
    """Read train.py's command line: the config, and what --resume or --init_from names (None without them)."""
    source = {}

    def base(given: dict) -> dict:
        """Return what stands in for the defaults: what a run to resume was asked. Else complete what was given."""
        out = Path(given.get("out_dir", config_class.out_dir))
        auto = "resume" in given and given["resume"] is None
        if auto:  # start, or go on if there is something to go on with
            given["resume"] = (out / "ckpt.pt").exists()
        if given.get("resume"):
            written = (out / "ckpt.pt").stat().st_mtime_ns if (out / "ckpt.pt").exists() else 0
            source.update(load_checkpoint(out, resume=True), written=written, auto=auto)
            return {**source["asked"], "device": None}
        names = [name for name in given.get("preset", "").split(",") if name]
        if not SIZES.keys() & names:  # the size that fits the device and the data
            large = torch.cuda.is_available() and given.get("device") != "cpu" and (
                given.get("dataset", DataConfig.dataset) != DataConfig.dataset
                or given.get("init_from", "scratch") != "scratch")
            given["preset"] = ",".join(["gpt2" if large else "tiny", *names])
        if given.get("init_from", "scratch") != "scratch":
            path = Path(given["init_from"])
            hf = path.is_dir() and not (path / "ckpt.pt").exists()
            source.update(load_hf(path) if hf else load_checkpoint(path))
            take_shape(given, source["config"])
        return {}

    config = parse(config_class, presets=presets, doc=doc, base=base)
    return go_on(config, source) if config.resume else config, source or None


def take_shape(given: dict, theirs: dict) -> None:
    """Put the shape of the weights of --init_from into the flags given; only the context may be shorter."""
    for name in ("n_layer", "n_head", "n_embd", "bias", "untied_head", "stable_embedding", "heads", "hidden",
                 "block_size"):
        fixed = theirs.get(name, getattr(GPTConfig, name))
        mine = given.setdefault(name, fixed)
        if mine != fixed and not (name == "block_size" and mine < fixed):
            raise ValueError(f"--{name}={mine} does not fit the weights of --init_from={given['init_from']}, "
                             f"which have {fixed}; drop the flag")


def go_on(config: Any, source: dict) -> Any:
    """Return a resumed run's config: what it was asked, and chose by itself; refuse what would make it another run."""
    flat, asked = flatten(config), source["asked"]
    for name, value in flat.items():
        began = asked.get(name, value)  # a flag that is younger than the checkpoint
        if name not in FREE_ON_RESUME and value != began:
            raise ValueError(f"--{name}={value} differs from the {'auto' if began is None else began} this run "
                             "began with, and would make it another run; choose another --out_dir")
    if source["step"] >= config.max_iters:
        finished = f"the run in {config.out_dir} has finished its {source['step']} steps"
        if source["auto"]:
            print(finished)
            sys.exit(0)
        began = source["config"]
        more = began["min_lr"] or began["lr_decay_iters"] > source["step"]
        raise ValueError(finished + "; a larger --max_iters goes on" * bool(more))
    source["asked"] = flat  # with the free flags of today
    chosen = {name: value for name, value in source["config"].items() if name not in FREE_ON_RESUME}
    return build(type(config), {**flat, **chosen})
