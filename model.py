"""GPT-2, small to XL, with its own names.

The model takes its linear layer as an argument: `linear(name, in_features, out_features, bias)` is called for the four
linears of each block and for lm_head, and returns any module of that shape. `quant_linears(config, n_layer)` makes the
quantized ones; lm_head shares its weight with the embedding under every recipe (but with --untied_head). Parameters
are fp32; activations run in `model.dtype`, and each layer casts its own parameters: no autocast, so that dtypes are
those that are written down.
Sources: Radford et al. 2019 (GPT-2); the layout and the initialisation follow the released model, and nanoGPT.
Legend: B batch, T time, C channels (n_embd), V vocabulary (padded), M = B T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from int8 import int8_gemm, keep8
from quant import QuantConfig, Quantized, QuantLinear, Recipe, gemm, linear_backward, make_recipe, round_operand
from support.checks import check_model

# Elements of fp32 logits alive at once (512 MiB); a longer batch goes through the head in chunks.
MAX_LOGITS = 2**27
Linear = Callable[[str, int, int, bool], nn.Module]  # (name, in_features, out_features, bias) ->


@dataclass
class GPTConfig:
    """The shape of the GPT-2."""
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    block_size: int = 1024  # context length in tokens
    dropout: float = 0.0  # on embeddings, attention and residuals; the paper has 0.1
    bias: bool = True  # biases in linears and LayerNorms, as GPT-2
    untied_head: bool = False  # lm_head has a weight of its own, as in the paper's quantized runs
    stable_embedding: bool = False  # 2110.02861: Xavier-uniform embedding and a LayerNorm behind it
    keep8: Literal["none", "gelu", "attn", "both"] = "none"  # keeps inputs for backward in 8 bits
    heads: tuple[int, ...] = ()  # attention heads of each block, if pruned; empty: n_head each
    hidden: tuple[int, ...] = ()  # hidden units of each MLP, if pruned; empty: 4 n_embd each

    def __post_init__(self):
        check_model(self)

    def widths(self, block: int) -> tuple[int, int]:
        """Return (attention heads, hidden units) of a block. A head keeps its size, n_embd / n_head, when others go."""
        return (self.heads[block] if self.heads else self.n_head,
                self.hidden[block] if self.hidden else 4 * self.n_embd)


def layer_recipe(config: QuantConfig, name: str, in_features: int, out_features: int) -> Recipe | None:
    """Return the recipe of the linear layer `name`. ValueError if --wblock does not divide its sizes."""
    if config.asym_gelu:
        config = replace(config, asym=name.endswith("mlp.c_proj"), asym_gelu=False)
    in_blocks = "per_block" in (config.wgran, config.agran)
    out_blocks = config.ggran == "per_block" and config.ggemm != "grad_weight"  # dx contracts N
    for size, what, blocks in ((in_features, "in_features", in_blocks), (out_features, "out_features", out_blocks)):
        if blocks and size % config.wblock:
            raise ValueError(f"--wblock={config.wblock} must divide {what}={size} of {name}; "
                             f"try {math.gcd(size, config.wblock)}")
    recipe = make_recipe(config, out_features // 3 if config.split_qkv and name.endswith("c_attn") else None)
    return replace(recipe, engine=int8_gemm) if config.gemm == "int8" else recipe


def quant_linears(config: QuantConfig, n_layer: int,
                  recipe_for: Callable[[str, int, int], Recipe | None] | None = None) -> Linear:
    """Return the factory of a GPT's linear layers: QuantLinear, each with the recipe that its place asks for.

    Args: recipe_for: (name, in_features, out_features) -> recipe, where an extension has one of its own.
    Raises: ValueError for --skip_blocks that names no block, or (from the factory) where nothing is quantized.
    """
    for i in config.skip_blocks:
        if not -n_layer <= i < n_layer:
            raise ValueError(f"--skip_blocks={i} names no block; with --n_layer={n_layer} they are "
                             f"0 to {n_layer - 1}, and -1 to {-n_layer} from the end")
    skipped = ",".join(map(str, config.skip_blocks))
    idle = skipped and not recipe_for and min(config.wbits, config.abits, config.gbits) == 32
    recipe_for = recipe_for or partial(layer_recipe, config)
    spared = tuple(f"h.{i % n_layer}." for i in config.skip_blocks) + (() if config.quant_head else ("lm_head",))

    def linear(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
        if idle:  # not any earlier: an extension may replace this factory by one of its own
            raise ValueError(f"--skip_blocks={skipped} has no effect without --wbits, --abits or "
                             "--gbits below 32; drop it or add that")
        recipe = None if name.startswith(spared) else recipe_for(name, in_features, out_features)
        return QuantLinear(in_features, out_features, bias, recipe)
    return linear


# -----------------------------------------------------------------------------
# loss: lm_head and cross-entropy in one function, so that the fp32 logits never exist all at once

def _rows(q: Tensor | tuple, start: int, stop: int) -> Tensor | Quantized:
    """Take rows of a (quantized) matrix whose scales are per row or shared by all rows."""
    if not isinstance(q, (Tensor, Quantized)):
        q = q.unpack()
    if isinstance(q, Tensor):
        return q[start:stop]
    assert len(q.scale) in (1, len(q.codes)), "a tile of some rows cannot be cut into chunks of tokens"
    cut = [t if t is None or len(t) == 1 else t[start:stop] for t in (q.scale, q.zero_point)]
    return Quantized(q.codes[start:stop], *cut)


class Teacher(NamedTuple):
    """What another model says of the same tokens, and how much that counts: see linear_cross_entropy."""
    x: Tensor | None = None  # (M, C'), its last hidden states, in the compute dtype; any width C'
    w: Tensor | None = None  # (V, C'), its head
    temperature: float = 1.0
    soft: float = 0.0  # share in the loss, 0 to 1


class _LinearCrossEntropy(torch.autograd.Function):
    # Forward has the softmax of each chunk at hand and computes the gradients right there: keeping
    # the logits for backward costs (M, V) numbers, recomputing them a GEMM. Seen in Liger Kernel.
    @staticmethod
    def forward(ctx, x, w, targets, vocab_size, recipe, needs_grad, *teacher):
        # (1) operands x (M, C) and w (V, C), rounded once for all chunks
        recipe = recipe or Recipe()
        if recipe.backward == "early":  # nothing waits for backward here: the same as "fp"
            recipe = replace(recipe, backward="fp")
        qx, qw = round_operand(recipe.output_input, x), round_operand(recipe.output_weight, w)
        kx, kw = (qx, qw) if recipe.backward == "ste" else (x, w)  # what the backward GEMMs use
        tokens, teacher = torch.arange(len(w), device=w.device), Teacher(*teacher)  # (V,)
        valid = targets >= 0  # (M,)
        scale = 1.0 / valid.sum().clamp_min(1)  # of a mean over the valid targets
        # (2) chunks of m tokens, whole blocks where the gradient shares scales along the tokens
        block = getattr(recipe.grad_weight_grad_output, "tile", (None, None))[1] or 1
        block = math.lcm(block, 8) if recipe.engine else block  # a GPU's int8 GEMM: multiples of 8
        chunks = math.ceil(x.shape[0] * w.shape[0] / MAX_LOGITS)
        size = max(math.ceil(x.shape[0] / chunks) // block, 1) * block
        loss, dxs, dw = torch.zeros((), device=x.device), [], None
        for start in range(0, x.shape[0], size):
            stop = min(start + size, x.shape[0])
            t, v = targets[start:stop].clamp_min(0), valid[start:stop]  # (m,)
            # (3) loss of a chunk: logsumexp minus the target's logit
            logits = (recipe.engine or gemm)(_rows(qx, start, stop), qw, x.dtype)  # (m, V)
            padding = tokens >= vocab_size  # (V,)
            logits = logits.float().masked_fill(padding, -math.inf)  # fp32; no padding
            lse = logits.logsumexp(1)  # (m,)
            nll = lse - logits.gather(1, t[:, None])[:, 0]  # (m,)
            if teacher.x is not None:  # KL(p || q) at a temperature, p the teacher's and q the student's
                _, _, heat, soft = teacher
                y = gemm(teacher.x[start:stop], teacher.w, x.dtype).float()  # (m, V)
                y = y.masked_fill(padding, -math.inf)
                log_p, log_q = F.log_softmax(y / heat, 1), F.log_softmax(logits / heat, 1)
                kl = (log_p.exp() * (log_p - log_q).masked_fill(padding, 0.0)).sum(1)  # (m,)
                nll = soft * heat**2 * kl + (1 - soft) * nll
            loss = loss + (nll * v).sum()
            # (4) its gradients: dloss/dlogits = softmax - one_hot, then the two GEMMs of backward
            if needs_grad:
                one_hot = tokens == t[:, None]  # (m, V), never stored when compiled
                g = (logits - lse[:, None]).exp() - one_hot.float()
                if teacher.x is not None:
                    g = soft * heat * (log_q.exp() - log_p.exp()) + (1 - soft) * g
                g = g * (v * scale)[:, None]
                dx, part = linear_backward(g.to(x.dtype), _rows(kx, start, stop), kw, recipe)
                dxs.append(dx)  # (m, C)
                dw = part.float() if dw is None else dw + part.float()  # (V, C), summed in fp32
        if needs_grad:
            ctx.save_for_backward(torch.cat(dxs), dw.to(w.dtype))
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors  # of the mean loss: all that is left is the chain rule
        return dx * g, dw * g, *[None] * 8


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int,
                         recipe: Recipe | None = None, teacher: Teacher | None = None) -> Tensor:
    """Return mean cross-entropy of the logits x @ w.T, in nats per target.

    With a teacher, y its logits and z ours: soft T^2 KL(softmax(y / T) || softmax(z / T)) + (1 - soft) cross-entropy.
    Args:
        x: (M, C) in the compute dtype.  w: (V, C), fp32; rows from vocab_size on are padding and get no probability.
        targets: (M,) int64, negative ones ignored.  recipe: rounds the head's operands, the gradient chunk by chunk.
    """
    needs_grad, teacher = torch.is_grad_enabled(), teacher or Teacher()
    return _LinearCrossEntropy.apply(x, w, targets, vocab_size, recipe, needs_grad, *teacher)


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
    def __init__(self, config: GPTConfig, linear: Linear, block: int):
        super().__init__()
        self.dropout, self.keep8 = config.dropout, config.keep8 in ("attn", "both")
        self.n_head, self.head_size = config.widths(block)[0], config.n_embd // config.n_head
        width = self.n_head * self.head_size  # C, unless heads were pruned
        self.c_attn = linear(f"h.{block}.attn.c_attn", config.n_embd, 3 * width, config.bias)
        self.c_proj = linear(f"h.{block}.attn.c_proj", width, config.n_embd, config.bias)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """Mix x (B, T, C) over time, and with the tokens before it: past, see `mix`."""
        qkv = self.c_attn(x)  # (B, T, 3 width)
        y = keep8(self.mix, qkv, self.head_size) if self.keep8 and past is None else self.mix(qkv, past)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def mix(self, qkv: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """Attend: q, k and v side by side (B, T, 3 width) -> (B, T, width); past: [] or [k, v] of before, updated."""
        B, T, width = *qkv.shape[:2], qkv.shape[2] // 3
        q, k, v = (t.view(B, T, self.n_head, self.head_size).transpose(1, 2)
                   for t in qkv.split(width, dim=2))  # (B, heads, T, head size) each
        if past:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, heads, T with the past, head size)
            assert T == 1, f"{T} tokens at once behind others need a mask"
        if past is not None:
            past[:] = k, v
        causal = past is None or T == k.shape[2]  # else one token, which sees them all
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
        return y.transpose(1, 2).reshape(B, T, width)  # the heads side by side again


gelu = partial(F.gelu, approximate="tanh")  # GPT-2's


class MLP(nn.Module):
    """Two linears around a GELU."""
    def __init__(self, config: GPTConfig, linear: Linear, block: int):
        super().__init__()
        self.dropout, self.keep8 = config.dropout, config.keep8 in ("gelu", "both")
        hidden = config.widths(block)[1]
        self.c_fc = linear(f"h.{block}.mlp.c_fc", config.n_embd, hidden, config.bias)
        self.c_proj = linear(f"h.{block}.mlp.c_proj", hidden, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) token by token."""
        x = self.c_fc(x)  # (B, T, hidden)
        x = keep8(gelu, x) if self.keep8 else gelu(x)
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """One pre-norm transformer block."""
    def __init__(self, config: GPTConfig, linear: Linear, block: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, linear, block)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, linear, block)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """Add attention and MLP to the residual stream x (B, T, C)."""
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: forward(idx, targets) is the loss, forward(idx) the logits.

    Args:
        config: the shape.  vocab_size: number of tokens; the matrix is padded to a multiple of 64 rows.
        linear: makes the linear layers, see quant_linears.  dtype: of the activations, float32 or bfloat16.
    """
    def __init__(self, config: GPTConfig, vocab_size: int, linear: Linear, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.vocab_size, self.dtype = config, vocab_size, dtype
        # embeddings: tokens and positions
        padded = math.ceil(vocab_size / 64) * 64  # GEMMs like multiples of 64: 50257 -> 50304
        self.wte = nn.Embedding(padded, config.n_embd)  # (V, C)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # (T, C)
        self.ln_e = LayerNorm(config.n_embd, bias=config.bias) if config.stable_embedding else nn.Identity()
        # the residual stream runs through the blocks
        self.h = nn.ModuleList(Block(config, linear, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)
        # head: the weight it made of its own is dropped where it is tied, quantized or not
        self.lm_head = linear("lm_head", config.n_embd, padded, False)
        if not config.untied_head:
            self.lm_head.weight = self.wte.weight
        self._initialise()

    def _initialise(self) -> None:
        """Normal(0, 0.02), zero biases; projections into the residual stream shrink with its 2 n_layer additions."""
        own = ((n, p) for n, p in self.named_parameters() if ".reparam." not in n)  # they did already
        for name, p in own:
            if p.dim() == 2:
                shrink = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if self.config.stable_embedding:
            nn.init.xavier_uniform_(self.wte.weight)
        self.start_reparams()

    def start_reparams(self) -> None:
        """Let the reparams that have a method `start(weight)` begin from the weights as they are now."""
        for layer in self.modules():
            if hasattr(getattr(layer, "reparam", None), "start"):
                layer.reparam.start(layer.weight)

    def hidden(self, idx: Tensor, cache: list[list] | None = None) -> Tensor:
        """Return the last hidden states (B, T, C), in self.dtype, of the tokens idx (B, T).

        Args: cache: one list a block, [] at first, then keys and values of the tokens seen, which idx goes on from.
        """
        seen = cache[0][0].shape[2] if cache and cache[0] else 0
        T = seen + idx.shape[1]
        assert T <= self.config.block_size, f"{T} tokens, a context of {self.config.block_size}"
        x = self.ln_e(self.wte(idx)) + self.wpe(torch.arange(seen, T, device=idx.device))  # (B, T, C)
        x = F.dropout(x.to(self.dtype), self.config.dropout, self.training)  # fp32 until here
        for block, past in zip(self.h, cache or [None] * len(self.h), strict=True):
            x = block(x, past)
        return self.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None, teacher: Teacher | None = None) -> Tensor:
        """Return the mean loss in nats per token for targets (B, T), negative ones ignored; else logits (B, T, V)."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        head = self.lm_head
        w, recipe = (head.used_weight(), head.recipe) if isinstance(head, QuantLinear) else (head.weight, None)
        x, targets = x.flatten(0, 1), targets.flatten()
        return linear_cross_entropy(x, w, targets, self.vocab_size, recipe, teacher)

    def next_logits(self, idx: Tensor, cache: list[list] | None = None) -> Tensor:
        """Return the fp32 logits (B, vocab_size) of what follows idx (B, T); a cache, see `hidden`, saves the past."""
        if cache is not None and idx.shape[1] <= self.config.block_size:
            x = self.hidden(idx[:, cache[0][0].shape[2] if cache[0] else 0:], cache)
        else:  # a window that slides gives every token another position
            x = self.hidden(idx[:, -self.config.block_size:])
        return self.lm_head(x[:, -1:])[:, 0, :self.vocab_size].float()
