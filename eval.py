"""What a trained model is worth: validation loss, bits per byte, and a sample of text.

Validation loss has one definition, for train.py too: the validation split is cut into fixed, non-overlapping windows of
block_size tokens; the loss is the mean over all their tokens, in nats. It is the same, to rounding, at any batch size,
on any device and at any number of processes, and the uncompiled model computes it here and in train.py. Bits per byte
is the loss divided by ln 2 and by the bytes a token stands for: with it, tokenizers compare.

    python eval.py --ckpt=out                       # as trained
    python eval.py --ckpt=out --quantizers=off      # the same weights without their quantizers
    python eval.py --ckpt=out --recipe=W4,abits=8   # under others: post-training quantization
    python eval.py --ckpt=out --ptq                 # the loss under the paper's grid of weights and activations
    python eval.py --ckpt=out --export=out/hf       # no evaluation: for transformers' GPT2LMHeadModel.from_pretrained
    python eval.py --ckpt=out --export=out/w8.safetensors    # 8-bit weights as codes, one byte each; --ckpt reads it
    python eval.py --hf=DIR --dataset=openwebtext   # weights from Hugging Face

Extensions have more to offer: their flags are the last ones of --help.
"""

if __name__ == "__main__":  # first: a bad command line is refused before torch is imported
    import support.early  # noqa: F401

import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import extensions
from model import GPT
from prepare_data import DataConfig, get_tokenizer, open_dataset
from quant import QuantConfig, QuantLinear
from support.checkpoint import load_checkpoint, model_from
from support.codes import export_codes, load_codes, with_codes
from support.config import differences, flatten, one_line_errors, own, parse, refuse_idle
from support.device import choose_device
from support.huggingface import export_hf, load_hf
from support.presets import PRESETS, SIZES


@dataclass
class EvalConfig:
    """Evaluate a checkpoint."""
    ckpt: str = "out"  # a checkpoint, or the out_dir of a run
    hf: str = ""  # or a folder in Hugging Face's GPT-2 layout, instead of a checkpoint
    quantizers: Literal["trained", "off"] = "trained"  # those of training, or none
    recipe: str = ""  # others, after the fact: presets and flags with commas, as W4,abits=8
    ptq: bool = False  # the loss under the paper's grid of 8- and 4-bit weights and activations
    dataset: str | None = None  # the data to evaluate on; auto: the run's own
    data_dir: str | None = None  # where the shards lie; auto: where the run found them
    eval_tokens: int | None = None  # validation tokens used, 0: all; auto: as in training
    batch_size: int = 16  # sequences at a time
    device: Literal["cpu", "cuda"] | None = None  # auto: a GPU if there is one
    dtype: Literal["float32", "bfloat16"] | None = None  # of the activations; auto: as trained
    prompt: str = ""  # the sample continues this text; empty: a document begins
    sample_tokens: int = 300  # length of the sample
    temperature: float = 0.8  # of the sample; 0: always the likeliest token
    top_k: int = 50  # the sample draws from so many of the likeliest tokens; 0: from all
    seed: int = 0  # of the sample
    export: str = ""  # only write the weights: to this folder, in Hugging Face's layout, or to NAME.safetensors
    more: extensions.EvalConfig = field(default_factory=extensions.EvalConfig)

    def __post_init__(self):
        for name in ("batch_size", "eval_tokens", "sample_tokens", "seed", "temperature", "top_k"):
            low = int(name == "batch_size")
            if not low <= (getattr(self, name) or 0) < 2**53:  # None: auto
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {low}, and finite")
        # flags that would be ignored: of a sample that is not drawn, or next to one that leaves them no work
        refuse_idle(self, **{name: (self.sample_tokens > 0, "without --sample_tokens above 0")
                             for name in ("prompt", "temperature", "top_k")})
        other = next(iter(differences(self.more)), "")  # what an extension does instead
        ours = [f.name for f in fields(self) if f.name != "more"]
        used = ("ckpt", "hf", "quantizers", "recipe", "batch_size", "device", "dtype")
        refuse_idle(self, **{name: (not other, f"with --{other}") for name in ours if name not in used})
        refuse_idle(self, **{name: (not self.export, "with --export")
                             for name in ours if name not in ("ckpt", "export")})
        refuse_idle(self, quantizers=(not self.recipe, "with --recipe"))
        refuse_idle(self, **{name: (not self.ptq, "with --ptq") for name in (
            "quantizers", "recipe", "prompt", "sample_tokens", "temperature", "top_k", "seed")})
        refuse_idle(self, ckpt=(not self.hf, "with --hf"), quantizers=(not self.hf, "with --hf"))
        if self.hf and not (self.dataset or other):
            raise ValueError(f"--hf={self.hf} needs --dataset=NAME: data in the tokens of GPT-2")


# after training, as in the paper: weights in 8 or 4 bits, activations in 32, 8 or 4
PTQ = [",".join(filter(None, (w, a)))
       for w in ("", "W2", "W1", "W4", "W3") for a in ("", "A2", "A1", "A4", "A3")]


def recipe_flags(text: str) -> dict:
    """Return the flat flags of --recipe. Raises: ValueError for what is neither a preset nor flag=value."""
    presets, flags = {k: v for k, v in (PRESETS | extensions.PRESETS).items() if k not in SIZES}, {}
    parts = list(filter(None, text.split(",")))
    for part in (part for part in parts if "=" not in part):
        if part not in presets:
            raise ValueError(f"--recipe={text}: {part!r} is no preset of a recipe; use some of {', '.join(presets)}, "
                             "or flags of quant.py as wbits=4")
        flags |= presets[part]
    ours = {f.name for f in fields(QuantConfig)}
    config = parse(QuantConfig, [f"--{part}" for part in parts if "=" in part],
                   base=lambda given: {k: v for k, v in flags.items() if k in ours})
    flags |= flatten(config)
    forward = min(config.wbits, config.abits) < 32 or extensions.active(flags)
    if not forward and parts not in ([], ["E0"]):
        raise ValueError(f"--recipe={text} changes nothing in a trained model: it quantizes no weight "
                         "or activation; use E0 for none")
    return flags


# -----------------------------------------------------------------------------
# validation loss

def val_windows(tokens: np.ndarray, block_size: int, eval_tokens: int = 0) -> np.ndarray:
    """Return the windows of tokens (len,) uint16, (n, block_size + 1) int64: about eval_tokens in all, 0: every one."""
    count = (len(tokens) - 1) // block_size
    if count < 1:
        raise ValueError(f"the validation split has {len(tokens)} tokens, and one window needs "
                         f"{block_size + 1}; use a smaller --block_size or more data")
    wanted = min(count, max(1, eval_tokens // block_size)) if eval_tokens else count
    starts = np.arange(wanted) * count // wanted * block_size  # (n,) evenly spread
    return np.stack([tokens[i:i + block_size + 1] for i in starts]).astype(np.int64)


def shares_scales(model: GPT) -> bool:
    """Tell whether tokens share a scale, so that their values depend on the batch; without tiles: perhaps, so yes."""
    layers = (m for m in model.modules() if isinstance(m, QuantLinear) and m.recipe)
    inputs = (layer.recipe.output_input for layer in layers)
    return any(q is not None and getattr(q, "tile", (None, None))[0] != 1 for q in inputs)


@torch.no_grad()
def evaluate(model: GPT, windows: np.ndarray, batch_size: int) -> float:
    """Return the mean loss over the windows (n, T+1), nats per token; under torch.distributed, of all ranks' shares."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = model.wte.weight.device
    batch_size = 1 if shares_scales(model) else batch_size  # or the loss would depend on it
    was_training = model.training
    model.eval()  # no dropout
    total = torch.zeros((), dtype=torch.float64)  # sum of the windows' mean losses
    mine = windows[rank::world]  # every world-th one
    for batch in (mine[i:i + batch_size] for i in range(0, len(mine), batch_size)):
        batch = torch.from_numpy(batch).to(device)  # (b, T+1)
        total += model(batch[:, :-1], batch[:, 1:]).double().cpu() * len(batch)
    model.train(was_training)
    if world > 1:  # one number for all ranks
        total = total.to(device)
        dist.all_reduce(total)
    return total.item() / len(windows)


def bits_per_byte(loss: float, split: dict) -> float:
    """Turn nats per token into bits per byte of text. Args: split: meta.json's entry, with `tokens` and `bytes`."""
    return loss / math.log(2) * split["tokens"] / split["bytes"]


def unigram_entropy(tokens: np.ndarray) -> float:
    """Return the entropy of the token frequencies, nats: the loss of a model that knows these and nothing else."""
    p = np.bincount(tokens) / len(tokens)  # (V,) probabilities
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


# -----------------------------------------------------------------------------
# samples

@torch.no_grad()
def generate(model: GPT, idx: Tensor, new_tokens: int, temperature: float = 0.8, top_k: int = 50,
             seed: int = 0, cached: bool = False) -> Tensor:
    """Extend the tokens idx (B, T) by `new_tokens` samples; the same seed gives the same text.

    Args:
        temperature: 0 takes the likeliest token.  top_k: draw from so many of the likeliest tokens, 0: from all.
        cached: keep keys and values. Not where tokens share scales: old ones would change with every new one.
    """
    generator, was_training = torch.Generator().manual_seed(seed), model.training
    model.eval()  # dropout draws from another generator
    cache = [[] for _ in model.h] if cached else None
    for _ in range(new_tokens):
        logits = model.next_logits(idx, cache).cpu() / (temperature or 1.0)  # (B, V)
        most = min(top_k or model.vocab_size, model.vocab_size) if temperature else 1
        least = logits.topk(most).values[:, -1:]  # (B, 1): less likely tokens get probability 0
        probs = logits.masked_fill(logits < least, -math.inf).softmax(-1)
        new = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
        idx = torch.cat((idx, new.to(idx.device)), 1)
    model.train(was_training)
    return idx


def sample(model: GPT, tokenizer_name: str, prompt: str = "", new_tokens: int = 300, seed: int = 0,
           temperature: float = 0.8, top_k: int = 50) -> str:
    """Return the prompt and its continuation; an empty prompt stands for the start of a document."""
    tokenizer = get_tokenizer(tokenizer_name)
    ids = [tokenizer.eot_token] + tokenizer.encode_ordinary(prompt)  # what begins a document
    idx = torch.tensor([ids], device=model.wte.weight.device)  # (1, T)
    cached = not shares_scales(model)
    out = generate(model, idx, new_tokens, temperature, top_k, seed, cached)[0].tolist()
    return tokenizer.decode(out[1:])  # without the end-of-text token


def show(text: str) -> None:
    """Print a sample; what the terminal has no character for, becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))


def open_hf(path: Path, flag: str = "--hf") -> dict:
    """Return what load_checkpoint would, for a folder in Hugging Face's layout, which `flag` names."""
    try:
        source = load_hf(path)
    except (ValueError, OSError) as error:
        raise type(error)(str(error).replace("--init_from", flag)) from None
    flags = {"data_dir": DataConfig.data_dir, "eval_tokens": 0, "dtype": "float32"}
    return {**source, "config": flags | source["config"], "step": 0, "extensions": []}


def main() -> None:
    """Print validation loss and a sample of a checkpoint, export it, or do what an extension has to offer."""
    config = parse(EvalConfig, doc=__doc__)
    with one_line_errors():
        # (1) the model; without quantizers, all flags of recipes and extensions are at their defaults
        source = config.hf or config.ckpt
        trained = config.quantizers == "trained" and not config.recipe
        checkpoint = open_hf(Path(config.hf)) if config.hf else load_codes(Path(config.ckpt)) \
            if config.ckpt.endswith(".safetensors") else load_checkpoint(Path(config.ckpt))
        flat = checkpoint["config"]  # {flag: value} of the training run
        for name in set(checkpoint["extensions"]) - set(extensions.EXTENSIONS) if trained else ():
            raise ValueError(f"{config.ckpt} was trained with extensions/{name}.py, which eval.py does not know; "
                             "evaluate what that program wrote for it, or --quantizers=off: the weights without")
        used = flat if trained else {"n_layer": flat["n_layer"], **recipe_flags(config.recipe)}
        dtype = config.dtype or flat["dtype"]

        def build(used: dict) -> GPT:
            linear = extensions.linears(used)
            if trained and not config.ptq and "codes" in checkpoint:
                linear = with_codes(linear, checkpoint["codes"])
            model = model_from(checkpoint, linear, getattr(torch, dtype), own_recipe=not config.recipe)
            extensions.at_step(used, model, checkpoint["step"])
            return model
        model = build(used)
        # (2) export, and nothing else
        if config.export.endswith(".safetensors"):
            return print(export_codes(model, Path(config.export), checkpoint))
        if config.export:
            files = export_hf(model, Path(config.export), flat)
            note = "" if "vocab.json" in files else "; no tokenizer, transformers has none for these tokens"
            note += "; zeros for what was pruned: no smaller" if model.config.heads or model.config.hidden else ""
            return print(f"wrote {config.export}: {', '.join(files)}{note}")
        device = choose_device(config.device)
        model.to(device)
        recipe = differences(own(QuantConfig, used)) | differences(own(extensions.Config, used))
        meta = {"source": source, "step": checkpoint["step"], "recipe": recipe,
                "quantizers": config.recipe or config.quantizers, "device": device, "dtype": dtype}
        if extensions.evaluate(config.more, model, config.batch_size, shares_scales(model), meta):
            return None
        # (3) the data it was trained on, or others of the same vocabulary
        dataset, data_dir = config.dataset or flat["dataset"], config.data_dir or flat["data_dir"]
        _, val, meta = open_dataset(DataConfig(dataset, data_dir))
        if meta["vocab_size"] != checkpoint["vocab_size"]:
            raise ValueError(f"the data has {meta['vocab_size']} tokens, the checkpoint "
                             f"{checkpoint['vocab_size']}; choose the --dataset it was trained on "
                             f"({flat.get('dataset', 'unknown')})")
        # (4) what it is worth
        eval_tokens = flat["eval_tokens"] if config.eval_tokens is None else config.eval_tokens
        windows = val_windows(val, model.config.block_size, eval_tokens)
        if config.ptq:
            print(f"{source} at step {checkpoint['step']}, quantized after training; nats per token, "
                  f"{dtype}, {device}")
            for recipe in PTQ:
                model = build({"n_layer": flat["n_layer"], **recipe_flags(recipe)}).to(device)
                loss = evaluate(model, windows, config.batch_size)
                print(f"{recipe or 'E0':8} {loss:.4f}", flush=True)
            return None
        loss = evaluate(model, windows, config.batch_size)
        bpb, tokens = bits_per_byte(loss, meta["val"]), windows.size - len(windows)
        quantizers = config.recipe or config.quantizers
        print(f"{source} at step {checkpoint['step']}, quantizers {quantizers}, {model.dtype}, {device}")
        print(f"val_loss {loss:.4f} nats per token, {bpb:.4f} bits per byte "
              f"({tokens:,} tokens; unigram entropy {unigram_entropy(val):.4f} nats)")
        if config.sample_tokens:
            print("-" * 80)
            show(sample(model, meta["tokenizer"], config.prompt, config.sample_tokens, config.seed,
                        config.temperature, config.top_k))


if __name__ == "__main__":
    main()
