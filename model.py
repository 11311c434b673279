"""GPT-2, small to XL, with its own names, and the files it is kept in.

The model takes its linear layer as an argument: `linear(name, in_features, out_features, bias)` is called for the four
linears of each block and for lm_head, and returns any module of that shape. `quant_linears(config)` makes the quantized
ones; lm_head shares its weight with the embedding under every recipe.

Parameters are fp32; activations run in `model.dtype`, and each layer casts its own parameters. No autocast: a custom
autograd function should see the dtypes that are written down.

    python model.py --ckpt=out/ckpt.pt --export=out/hf     # Hugging Face's GPT-2 layout: config.json, model.safetensors

Sources: Radford et al. 2019 (GPT-2); the layout and the initialisation follow the released model, and nanoGPT.
Legend: B batch, T time, C channels (n_embd), V vocabulary (padded), M = B T tokens.
"""

import json
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from int8 import int8_gemm
from quant import (
    QuantConfig,
    Quantized,
    QuantLinear,
    Recipe,
    gemm,
    keep8,
    linear_backward,
    make_recipe,
    round_operand,
)
from support.config import build, one_line_errors, parse

MAX_LOGITS = 2**27  # elements of fp32 logits alive at once (512 MiB); a longer batch goes through the head in chunks


@dataclass
class GPTConfig:
    """The shape of the GPT-2."""
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    block_size: int = 1024  # context length in tokens
    dropout: float = 0.0  # on embeddings, attention and residuals; the paper has 0.1
    bias: bool = True  # biases in linears and LayerNorms, as GPT-2
    stable_embedding: bool = False  # 2110.02861: Xavier-uniform token embedding and a LayerNorm behind it
    keep8: Literal["none", "gelu", "attn", "both"] = "none"  # what keeps its inputs for backward in 8 bits

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"--n_head={self.n_head} must divide --n_embd={self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout={self.dropout} must lie in [0, 1)")
        if self.dropout and self.keep8 in ("attn", "both"):
            raise ValueError(f"--keep8={self.keep8} runs attention again in backward, where dropout would draw other "
                             "numbers; use --dropout=0 or --keep8=gelu")


Linear = Callable[[str, int, int, bool], nn.Module]  # (name, in_features, out_features, bias) -> layer


def check_skip_blocks(config: QuantConfig, n_layer: int) -> None:
    """Refuse blocks that the model does not have: the flag could not take effect."""
    for i in config.skip_blocks:
        if not 0 <= i < n_layer:
            raise ValueError(f"--skip_blocks={i} names no block; with --n_layer={n_layer} they are 0 to {n_layer - 1}")


def quant_linears(config: QuantConfig) -> Linear:
    """Return the factory of a GPT's linear layers: QuantLinear, each with the recipe that its place asks for."""
    def linear(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
        high_precision = {f"h.{i}" for i in config.skip_blocks} | (set() if config.quant_head else {"lm_head"})
        if name in high_precision or ".".join(name.split(".")[:2]) in high_precision:
            return QuantLinear(in_features, out_features, bias)
        forward_block = config.wgran == "per_block" or config.agran == "per_block"
        if forward_block and in_features % config.wblock:
            raise ValueError(f"--wblock={config.wblock} must divide in_features={in_features} of {name}; "
                             f"try {math.gcd(in_features, config.wblock)}")
        if config.ggran == "per_block" and config.ggemm != "grad_weight" and out_features % config.wblock:
            raise ValueError(f"--wblock={config.wblock} must divide out_features={out_features} of {name}; "
                             f"try {math.gcd(out_features, config.wblock)}")
        third = out_features // 3 if config.split_qkv and name.endswith("c_attn") else None
        recipe = make_recipe(config, third)
        if config.gemm == "int8":
            recipe = replace(recipe, engine=int8_gemm)
        return QuantLinear(in_features, out_features, bias, recipe)
    return linear


# -----------------------------------------------------------------------------
# loss: the head and the cross-entropy as one function, so that the full fp32 logits never exist at once

def _rows(q: Tensor | Quantized, start: int, stop: int) -> Tensor | Quantized:
    """Take rows of a (quantized) matrix whose scales are per row or shared by all rows."""
    if isinstance(q, Tensor):
        return q[start:stop]
    cut = [t if t is None or len(t) == 1 else t[start:stop] for t in (q.scale, q.zero_point)]
    return Quantized(q.codes[start:stop], *cut)


class _LinearCrossEntropy(torch.autograd.Function):
    # Forward has the softmax of each chunk at hand, so it computes the gradients right there, with the loss: keeping
    # or recomputing the logits for backward would cost (M, V) numbers or one more GEMM. Seen in Liger Kernel.
    @staticmethod
    def forward(ctx, x, w, targets, vocab_size, recipe, needs_grad):
        recipe = recipe or Recipe()
        qx, qw = round_operand(recipe.output_input, x), round_operand(recipe.output_weight, w)
        kx, kw = (qx, qw) if recipe.backward == "ste" else (x, w)  # what the backward GEMMs use
        valid = targets >= 0  # (M,)
        scale = 1.0 / valid.sum().clamp_min(1)
        padding = torch.arange(len(w), device=w.device) >= vocab_size  # (V,) columns that are no token
        loss, dxs, dw = torch.zeros((), device=x.device), [], None
        chunks = math.ceil(x.shape[0] * w.shape[0] / MAX_LOGITS)
        size = math.ceil(x.shape[0] / chunks)
        blocks = getattr(recipe.grad_weight_grad_output, "tile", (None, None))[1] or 1  # along the tokens
        blocks = math.lcm(blocks, 8) if recipe.engine else blocks  # a GPU's integer GEMM takes multiples of 8
        size = max(size // blocks, 1) * blocks  # whole blocks in every chunk
        for start in range(0, x.shape[0], size):
            stop = min(start + size, x.shape[0])
            t, v = targets[start:stop].clamp_min(0), valid[start:stop]  # (m,)
            logits = (recipe.engine or gemm)(_rows(qx, start, stop), qw, x.dtype)
            logits = logits.float().masked_fill(padding, -math.inf)  # (m, V) fp32
            lse = logits.logsumexp(1)  # (m,)
            loss = loss + ((lse - logits.gather(1, t[:, None])[:, 0]) * v).sum()
            if needs_grad:
                one_hot = torch.arange(len(w), device=w.device) == t[:, None]  # (m, V), never stored when compiled
                g = ((logits - lse[:, None]).exp() - one_hot.float()) * (v * scale)[:, None]
                dx, dw_part = linear_backward(g.to(x.dtype), _rows(kx, start, stop), kw, recipe)
                dxs.append(dx)
                dw = dw_part.float() if dw is None else dw + dw_part.float()  # (V, C) fp32
        if needs_grad:
            ctx.save_for_backward(torch.cat(dxs), dw.to(w.dtype))
        return loss * scale

    @staticmethod
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        return dx * g, dw * g, None, None, None, None


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int,
                         recipe: Recipe | None = None) -> Tensor:
    """Return mean cross-entropy of the logits x @ w.T, in nats per target.

    Args:
        x: (M, C) in the compute dtype.  w: (V, C), fp32; rows from vocab_size on are padding and get no probability.
        targets: (M,) int64; negative ones are left out of the mean.
        recipe: rounds the head's operands (`--quant_head`); what a gradient quantizer sees is one chunk of tokens.
    """
    return _LinearCrossEntropy.apply(x, w, targets, vocab_size, recipe, torch.is_grad_enabled())


# -----------------------------------------------------------------------------
# the model

class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with fp32 parameters on activations of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x (..., C)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention; the scores are not quantized."""

    def __init__(self, config: GPTConfig, linear: Linear, name: str):
        super().__init__()
        self.n_head, self.dropout, self.keep8 = config.n_head, config.dropout, config.keep8 in ("attn", "both")
        self.c_attn = linear(f"{name}.c_attn", config.n_embd, 3 * config.n_embd, config.bias)
        self.c_proj = linear(f"{name}.c_proj", config.n_embd, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, T, C) over time."""
        qkv = self.c_attn(x)  # (B, T, 3C)
        y = keep8(self.mix, qkv, x.shape[2] // self.n_head) if self.keep8 else self.mix(qkv)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def mix(self, qkv: Tensor) -> Tensor:
        """Attend: q, k and v side by side (B, T, 3C) -> (B, T, C)."""
        B, T, C = *qkv.shape[:2], qkv.shape[2] // 3
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, heads, T, C/heads)
                   for t in qkv.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return y.transpose(1, 2).reshape(B, T, C)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation."""
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Two linears around a GELU."""

    def __init__(self, config: GPTConfig, linear: Linear, name: str):
        super().__init__()
        self.dropout, self.keep8 = config.dropout, config.keep8 in ("gelu", "both")
        self.c_fc = linear(f"{name}.c_fc", config.n_embd, 4 * config.n_embd, config.bias)
        self.c_proj = linear(f"{name}.c_proj", 4 * config.n_embd, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) token by token."""
        x = self.c_fc(x)  # (B, T, 4C)
        return F.dropout(self.c_proj(keep8(gelu, x) if self.keep8 else gelu(x)), self.dropout, self.training)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: GPTConfig, linear: Linear, name: str):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, linear, f"{name}.attn")
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, linear, f"{name}.mlp")

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and MLP to the residual stream x (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: forward(idx, targets) is the loss, forward(idx) the logits.

    Args:
        config: the shape.  vocab_size: number of tokens; the matrix is padded to a multiple of 64 rows.
        linear: makes the linear layers; `quant_linears(QuantConfig(...))`.
        dtype: of the activations, torch.float32 or torch.bfloat16.
    """

    def __init__(self, config: GPTConfig, vocab_size: int, linear: Linear, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.vocab_size, self.dtype = config, vocab_size, dtype
        padded = math.ceil(vocab_size / 64) * 64  # GEMMs like multiples of 64: 50257 -> 50304
        self.wte = nn.Embedding(padded, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.ln_e = LayerNorm(config.n_embd, bias=config.bias) if config.stable_embedding else nn.Identity()
        self.h = nn.ModuleList(Block(config, linear, f"h.{i}") for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = linear("lm_head", config.n_embd, padded, False)
        self.lm_head.weight = self.wte.weight  # tied, quantized or not
        self._initialise()

    def _initialise(self) -> None:
        """Normal(0, 0.02), zero biases; projections into the residual stream shrink with its 2 n_layer additions."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if self.config.stable_embedding:
            nn.init.xavier_uniform_(self.wte.weight)

    def hidden(self, idx: Tensor) -> Tensor:
        """Return the last hidden states (B, T, C), in self.dtype, of the tokens idx (B, T)."""
        T = idx.shape[1]
        assert T <= self.config.block_size, f"{T} tokens exceed the context of {self.config.block_size}"
        x = self.ln_e(self.wte(idx)) + self.wpe(torch.arange(T, device=idx.device))  # (B, T, C) fp32
        x = F.dropout(x.to(self.dtype), self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the mean loss in nats per token for targets (B, T), negative ones ignored; else logits (B, T, V)."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        recipe = getattr(self.lm_head, "recipe", None)
        return linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.vocab_size, recipe)

    @torch.no_grad()
    def generate(self, idx: Tensor, new_tokens: int, temperature: float = 0.8, top_k: int = 50,
                 seed: int = 0) -> Tensor:
        """Extend the tokens idx (B, T) by `new_tokens` samples; the same seed gives the same text."""
        generator, was_training = torch.Generator().manual_seed(seed), self.training
        self.eval()  # dropout draws from another generator
        for _ in range(new_tokens):
            x = self.hidden(idx[:, -self.config.block_size:])[:, -1:]  # (B, 1, C)
            logits = self.lm_head(x)[:, 0, :self.vocab_size].float().cpu() / temperature  # (B, V)
            least = logits.topk(min(top_k, self.vocab_size)).values[:, -1:]
            probs = logits.masked_fill(logits < least, -math.inf).softmax(-1)
            idx = torch.cat((idx, torch.multinomial(probs, 1, generator=generator).to(idx.device)), 1)
        self.train(was_training)
        return idx

    def flops_per_token(self) -> float:
        """Return the FLOPs of training on one token: 6 per weight in a GEMM, 12 L C T for attention (as nanoGPT)."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


# -----------------------------------------------------------------------------
# checkpoints: plain torch.save of tensors and plain Python values

def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that its final name only ever holds a whole file: write beside it, then rename.

    Raises: OSError (a full disk); the file that was there before stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # what torch's writer hid
        raise OSError(f"could not write {path}: {reason}; the checkpoint before it is untouched") from error


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint on the CPU. Code in it is never executed (weights_only).

    Raises: FileNotFoundError, or ValueError if the file is truncated or no checkpoint of nanoQPT.
    """
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; python train.py --out_dir={path.parent} makes one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds something else than tensors and plain values; "
                         "it was not loaded, since it might run code") from None
    except Exception as error:  # garbage makes torch's reader raise anything: KeyError, struct.error, an empty EOFError
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise ValueError(f"{path} is truncated or not a checkpoint ({reason}); "
                         "if ckpt_best.pt lies beside it, copy that over it") from None
    if not isinstance(checkpoint, dict) or not {"config", "vocab_size", "model"} <= set(checkpoint):
        raise ValueError(f"{path} is not a checkpoint of nanoQPT: it lacks config, vocab_size or model")
    return checkpoint


def own(cls: type, flat: dict):
    """Build `cls` from those of the flat values that are its fields."""
    return build(cls, {f.name: flat[f.name] for f in fields(cls) if f.name in flat})


def load_weights(model: GPT, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights (name -> tensor) into the model; the embedding's padding rows may be missing.

    Raises: ValueError that names the first tensor that is missing, unknown or of another shape.
    """
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    weights = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    for name in sorted(set(state) ^ set(weights)):
        raise ValueError(f"{source}: tensor {name} is {'missing' if name in state else 'unknown'}; "
                         "it holds a model of another shape (n_layer, bias)")
    for name, tensor in weights.items():
        rows = model.vocab_size if name == "wte.weight" and len(tensor) == model.vocab_size else len(state[name])
        if state[name][:rows].shape != tensor.shape:
            raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, the model {tuple(state[name].shape)}; "
                             "n_embd, block_size or the vocabulary differ")
        with torch.no_grad():
            state[name][:rows].copy_(tensor)


def model_from(checkpoint: dict, quant: QuantConfig | None = None, dtype: torch.dtype = torch.float32) -> GPT:
    """Rebuild the model of a checkpoint, on the CPU; `quant` replaces the quantizers it was trained with."""
    flat = checkpoint["config"]
    quant = own(QuantConfig, flat) if quant is None else quant
    shape = own(GPTConfig, flat)
    check_skip_blocks(quant, shape.n_layer)
    model = GPT(shape, checkpoint["vocab_size"], quant_linears(quant), dtype)
    load_weights(model, checkpoint["model"], "checkpoint")
    return model


# -----------------------------------------------------------------------------
# Hugging Face's layout: the same names, but its Conv1D keeps the four linears as (in, out)

HF_FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "n_inner": None,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}  # what is not a choice here
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _safetensors():
    """Import the optional dependency, or say how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("Hugging Face's files need safetensors: pip install safetensors") from None
    return safetensors


def load_hf(path: Path, block_size: int | None = None) -> tuple[GPTConfig, int, dict[str, Tensor]]:
    """Read a GPT-2 in Hugging Face's layout: (config, vocab_size, weights in our layout).

    Args: path: a folder with model.safetensors and config.json, as Hugging Face keeps them; block_size may shorten
        the context.
    Raises: FileNotFoundError, ValueError.
    """
    for name in ("config.json", "model.safetensors"):
        if not (path / name).exists():
            raise FileNotFoundError(f"--init_from={path}: there is no {name} in it; the released GPT-2 is at "
                                    "https://huggingface.co/openai-community/gpt2/tree/main")
    try:
        hf = json.loads((path / "config.json").read_text())
        weights = _safetensors().torch.load_file(path / "model.safetensors")
        config, vocab_size = GPTConfig(hf["n_layer"], hf["n_head"], hf["n_embd"], hf["n_positions"]), hf["vocab_size"]
        for key, ours in HF_FIXED.items():
            if hf.get(key, ours) != ours:
                raise ValueError(f"{key}={hf[key]}, here it is {ours}")
    except (ValueError, TypeError, KeyError, _safetensors().SafetensorError) as error:
        raise ValueError(f"--init_from={path}: not a GPT-2 in Hugging Face's layout ({error})") from None
    weights = {k.removeprefix("transformer."): v.float() for k, v in weights.items()}
    weights = {k: v.T if k.endswith(TRANSPOSED) else v for k, v in weights.items()
               if not k.endswith((".attn.bias", ".attn.masked_bias")) and k != "lm_head.weight"}  # masks; tied
    if block_size and block_size < config.block_size:
        config.block_size = block_size
        weights["wpe.weight"] = weights["wpe.weight"][:block_size]
    return config, vocab_size, weights


def export_hf(model: GPT, folder: Path) -> None:
    """Write config.json and model.safetensors that `transformers` reads as GPT2LMHeadModel; fp32, padding rows cut."""
    if not model.config.bias:
        raise ValueError("a model trained with --bias=False does not fit Hugging Face's GPT-2, which has biases")
    if model.config.stable_embedding:
        raise ValueError("a model trained with --stable_embedding does not fit Hugging Face's GPT-2, which has no "
                         "LayerNorm behind the embedding")
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    state["wte.weight"] = state["wte.weight"][:model.vocab_size]
    state = {f"transformer.{k}": (v.T if k.endswith(TRANSPOSED) else v).contiguous() for k, v in state.items()}
    c = model.config
    try:
        _safetensors().torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except _safetensors().SafetensorError as error:
        (folder / "model.safetensors").unlink(missing_ok=True)
        raise OSError(f"could not write {folder}/model.safetensors: {error}") from error
    (folder / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size,
        "vocab_size": model.vocab_size, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "bos_token_id": model.vocab_size - 1, "eos_token_id": model.vocab_size - 1}, indent=1))


@dataclass
class ExportConfig:
    """Turn a checkpoint into Hugging Face's layout."""
    ckpt: str = "out"  # a checkpoint, or the out_dir of a run
    export: str = ""  # folder to write


def main() -> None:
    """Export a checkpoint."""
    config = parse(ExportConfig, doc=__doc__)
    with one_line_errors():
        if not config.export:
            raise ValueError("--export= names the folder to write; it is missing")
        export_hf(model_from(load_checkpoint(Path(config.ckpt))), Path(config.export))
        print(f"wrote {config.export}/model.safetensors and config.json")


if __name__ == "__main__":
    main()
