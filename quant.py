"""Quantization to integers and FP8, and the linear layer that is trained with it.

One idea carries this repository: a linear layer is three GEMMs with six operands, and a Recipe says what each
operand is rounded to. With M tokens, K inputs, N outputs, x (M, K), w (N, K) and g = dLoss/dy (M, N), every GEMM
is written as A @ B.T, its contraction on the last axis of both operands:

    GEMM          computes                      A            B            contraction
    output        y  = q(x)   @ q(w).T          x    (M, K)  w    (N, K)  K
    grad_input    dx = q(g)   @ q(w.T).T        g    (M, N)  w.T  (K, N)  N
    grad_weight   dw = q(g.T) @ q(x.T).T        g.T  (N, M)  x.T  (K, M)  M (tokens)

A quantizer maps a real tensor to integers and back, x ~ (q - zero_point) * scale (Jacob et al. 2018, eq. 1), or to FP8
numbers, e4m3 or e5m2, whose steps grow with them (4 or 5 bits of exponent; Micikevicius et al. 2022, arXiv 2209.05433).
The scale is dynamic: recomputed at each call, without gradient. What shares one is a tile, so granularity is its shape:

    granularity        tile of (rows, columns)   scales   for
    per_tensor         everything                1        W, A, G
    per_channel (W)    one row                   N        W: one scale per output
    per_token          one row                   M        A, G: one scale per token
    per_channel (A,G)  one column                K or N   A, G: one scale per feature
    per_block          1 x block of a row        ...      W, A, G: along the contraction of the GEMM
    per_row (G)        one row of A              M, N     G: of g in grad_input and of g.T in grad_weight, see `fold`

Where a scale is constant along the contraction it factors out: y = (codes_x @ codes_w.T) * scale_x * scale_w. Integers
up to 256 and FP8 numbers are exact in bfloat16, their products with a scale are not: the simulated GEMM so sees the
very codes that an int8 or FP8 GEMM would. Where the scale varies, the operand is dequantized first.

Vocabulary: `scale` multiplies to DEquantize, a reciprocal is `inv_scale`; `qmin`, `qmax` are inclusive; `amax` is a
tensor of maxima of |x|; `quantize` makes codes, integer or FP8, `fake_quantize` goes there and back.

What is real: the GEMMs are in high precision on rounded numbers ("simulated", int8.py has integer ones), but the layer
saves int8 or float8 codes for backward, one byte each (compiled, unless the float is kept for another layer anyway).
Sources of formulas, granularities and what is left alone: Chitsaz et al. 2024, arXiv 2407.11722 ("the paper"), and its
official code, chandar-lab/EfficientLLMs at d5b6153.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from support.checks import check_quant, check_quantizer, check_recipe

# The smallest normal number: some devices flush smaller ones to zero. The official code's floors,
# 1e-5 to 1e-9, lie inside the range of real gradients and moments and would round those to zero.
SCALE_FLOOR = torch.finfo(torch.float32).tiny
Format = Literal["int", "e4m3", "e5m2"]
Slot = Callable[[Tensor], Tensor] | None  # a quantizer; None: the operand stays untouched
Operand = Tensor | tuple  # of a GEMM: a matrix, or the NamedTuple of its codes and scales
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}  # largest numbers: 448 and 57344


@dataclass
class QuantConfig:
    """What each operand of the linear layers is rounded to (32 bits: untouched)."""
    wbits: int = 32  # bits of the weights: 2 to 8, or 32
    wfmt: Format = "int"  # number format of the weights; FP8 needs --wbits=8
    wgran: Literal["per_tensor", "per_channel", "per_block"] = "per_channel"  # what shares a scale in the weights
    abits: int = 32  # bits of the activations, the linear layers' inputs: 2 to 8, or 32
    afmt: Format = "int"  # number format of the activations; FP8 needs --abits=8
    agran: Literal["per_tensor", "per_token", "per_channel", "per_block"] = "per_token"  # ... in the activations
    asym: bool = False  # activations get a zero point (for ranges that are not centred on zero)
    asym_gelu: bool = False  # only the inputs behind GELU (mlp.c_proj's) get a zero point
    gbits: int = 32  # bits of the gradients of the linear layers' outputs: 2 to 8, or 32
    gfmt: Format = "int"  # number format of the gradients; FP8 needs --gbits=8
    ggran: Literal["per_tensor", "per_token", "per_channel", "per_block", "per_row"] = "per_token"  # ... in gradients
    ggemm: Literal["grad_weight", "grad_input", "both"] = "grad_weight"  # GEMMs of the quantized gradient
    rounding: Literal["nearest", "stochastic"] = "nearest"  # of gradients; W and A are always nearest
    wblock: int = 128  # elements along the contraction that share a scale, for every per_block
    split_qkv: bool = False  # q, k and v in c_attn's weight and gradient get scales of their own
    gemm: Literal["simulate", "int8"] = "simulate"  # in the compute dtype, or on integer units
    backward: Literal["ste", "fp"] = "ste"  # with the quantized x and w of forward, or the untouched ones
    quant_head: bool = False  # quantize lm_head too (it stays tied to the embedding)
    skip_blocks: tuple[int, ...] = ()  # transformer blocks left alone, from 0, or from the end: -1

    def __post_init__(self):
        check_quant(self)


# -----------------------------------------------------------------------------
# the quantizer, one pure function per step: tiles -> scale, zero_point -> quantize -> dequantize
# Legend: R rows, C columns, (tr, tc) the tile; scale and zero_point: fp32 (R/tr, 1, C/tc, 1).

class Quantized(NamedTuple):
    """A quantized matrix: x ~ (codes - zero_point) * scale, tile by tile."""
    codes: Tensor              # (R, C) int8 or float8
    scale: Tensor              # (R/tr, 1, C/tc, 1) fp32
    zero_point: Tensor | None  # like scale, integers in fp32; None: symmetric

    @property
    def T(self) -> "Quantized":
        """The transposed matrix, (C, R): a view, nothing is rounded again."""
        zero_point = None if self.zero_point is None else self.zero_point.permute(2, 3, 0, 1)
        return Quantized(self.codes.T, self.scale.permute(2, 3, 0, 1), zero_point)


def tiles(x: Tensor, tile: tuple[int | None, int | None]) -> Tensor:
    """View x (R, C) as tiles, (R/tr, tr, C/tc, tc); None is the whole axis. ValueError where one does not divide."""
    tr, tc = (size if t is None else t for t, size in zip(tile, x.shape, strict=True))
    if x.shape[0] % max(tr, 1) or x.shape[1] % max(tc, 1):
        raise ValueError(f"a tile of {tr} x {tc} does not divide a matrix of {tuple(x.shape)}; "
                         f"with per_block choose --wblock so that it divides")
    return x.unflatten(1, (-1, tc)).unflatten(0, (-1, tr))  # (R/tr, tr, C/tc, tc)


def largest_code(bits: int, fmt: str = "int") -> float:
    """Return qmax of the symmetric range: 2^(bits-1) - 1 for integers, 448 for e4m3, 57344 for e5m2."""
    return 2 ** (bits - 1) - 1 if fmt == "int" else torch.finfo(FLOAT8[fmt]).max


def symmetric_scale(t: Tensor, bits: int, fmt: str = "int") -> Tensor:
    """Return the scale that maps the largest |value| of each tile to qmax: nothing clips, and q(-x) = -q(x).

    Args: t (R/tr, tr, C/tc, tc) fp32 tiles; bits 2 to 8; fmt as Quantizer's. Returns: (R/tr, 1, C/tc, 1) fp32.
    At 8 bits, amax = 2.54 gives scale 0.02. Source: the paper's official code, but for the floor, see above.
    """
    amax = t.abs().amax(dim=(1, 3), keepdim=True)  # (R/tr, 1, C/tc, 1)
    return (amax / largest_code(bits, fmt)).clamp_min(SCALE_FLOOR)


def asymmetric_scale(t: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point) that map [min, max] of each tile to 2^bits - 1 codes from -2^(bits-1) on.

    scale = (max - min) / (2 qmax), zero_point = -round(min / scale + 2^(bits-1)), not clamped: a range that excludes
    zero costs no code. At 8 bits, [0, 2.54] gives scale 0.01 and zero point -128.
    Args, Returns: as symmetric_scale; the zero point is an integer in fp32.
    Source: the paper's official code. Deviation: the scale never falls below 2^-22 of max|x|, hardly more than fp32's
    own step (a constant tile would otherwise need an infinite zero point).
    """
    lo, hi = t.amin((1, 3), keepdim=True), t.amax((1, 3), keepdim=True)  # (R/tr, 1, C/tc, 1)
    floor = (torch.maximum(lo.abs(), hi.abs()) * 2.0**-22).clamp_min(SCALE_FLOOR)
    # halves first: max - min overflows where the two are near the ends of fp32
    scale = torch.maximum((hi * 0.5 - lo * 0.5) / (2 ** (bits - 1) - 1), floor)
    return scale, -torch.round(lo * (1.0 / scale) + 2 ** (bits - 1))


def round_stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """Round x up with probability x - floor(x), else down: 0.25 becomes 1 for noise < 0.25, else 0; the mean is x.

    Args: x, fp32; noise of the same shape, uniform in [0, 1). Source: Gupta et al. 2015, arXiv 1502.02551.
    """
    floor = torch.floor(x)
    return floor + (noise < x - floor).to(x.dtype)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, bits: int = 8,
             noise: Tensor | None = None, fmt: str = "int") -> Tensor:
    """Return the int8 codes of x, clamp(round(x / scale) + zero_point, qmin, qmax), or its float8 codes.

    At scale 0.02: 0.05 / 0.02 = 2.5 becomes 2 (half to even), 0.07 / 0.02 = 3.5 becomes 4. FP8 takes the even mantissa
    at a tie: in e4m3 at scale 1, where 16, 18 and 20 are neighbours, 17 becomes 16 and 19 becomes 20. inf saturates; a
    nan stays one in FP8, integers have no code for it (its tile's scale is then nan, see Quantizer).
    Args:
        x: any shape, fp32.  scale, zero_point: broadcast against x; None is the symmetric range [-qmax, qmax].
        noise: uniform in [0, 1) for stochastic rounding, None for round half to even.  fmt: as Quantizer's.
    """
    qmax = largest_code(bits, fmt)
    q = x * (1.0 / scale)  # as PyTorch's fake_quantize ops: one reciprocal per scale, no divisions
    if fmt != "int":
        assert zero_point is None and noise is None, f"{fmt}: no zero point, rounds to nearest"
        # clamp first: past the largest number some casts saturate, some give inf or nan
        return q.clamp(-qmax, qmax).to(FLOAT8[fmt])
    q = torch.round(q) if noise is None else round_stochastic(q, noise)
    # restricted range [-qmax, qmax], or with a zero point every code: [-qmax - 1, qmax]
    q = q.clamp(-qmax, qmax) if zero_point is None else (q + zero_point).clamp(-qmax - 1, qmax)
    return q.to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return (codes - zero_point) * scale in fp32; scale and zero_point broadcast against codes."""
    return (codes.float() if zero_point is None else codes.float() - zero_point) * scale


@dataclass(frozen=True)
class Quantizer:
    """A callable Tensor (R, C) -> Tensor of the same shape and dtype, rounded; it never knows which GEMM it serves.

    In every format one nan or inf makes its whole tile non-finite: the scale of the tile is then nan or inf.
    """
    bits: int = 8
    tile: tuple[int | None, int | None] = (None, None)  # (rows, columns) of one scale; None: all
    asym: bool = False
    rounding: str = "nearest"  # stochastic draws its noise from torch's default generator
    fold: bool = False  # take up the scales of the GEMM's other operand first, see `fold`
    fmt: str = "int"  # of the codes; e4m3 and e5m2 are symmetric, 8 bits, rounded to nearest

    def __post_init__(self):
        check_quantizer(self)

    def quantize(self, x: Tensor) -> Quantized:
        """Return the codes and scales of x (R, C). The arithmetic is fp32: in bf16 it would be off by up to a step."""
        t = tiles(x.float(), self.tile)  # (R/tr, tr, C/tc, tc)
        scale, zero_point = (asymmetric_scale(t, self.bits) if self.asym else
                             (symmetric_scale(t, self.bits, self.fmt), None))
        noise = torch.rand_like(t) if self.rounding == "stochastic" else None
        codes = quantize(t, scale, zero_point, self.bits, noise, self.fmt)
        return Quantized(codes.view(x.shape), scale, zero_point)

    def __call__(self, x: Tensor) -> Tensor:
        """Fake-quantize x (R, C): quantize, dequantize, cast back. 32 bits return x itself."""
        return x if self.bits >= 32 else restore(self.quantize(x)).to(x.dtype)


def restore(q: Quantized) -> Tensor:
    """Dequantize a whole matrix: (R, C) fp32."""
    tile = (q.codes.shape[0] // q.scale.shape[0], q.codes.shape[1] // q.scale.shape[2])
    return dequantize(tiles(q.codes, tile), q.scale, q.zero_point).reshape(q.codes.shape)


# -----------------------------------------------------------------------------
# the recipe: six operands, a quantizer for each

@dataclass(frozen=True)
class Recipe:
    """Which quantizer rounds which operand of which GEMM. A slot is any callable Tensor -> Tensor, or None: untouched.

    Each is given its operand as the table on top of this file writes it, contraction last. A callable with a method
    `quantize` that returns a NamedTuple of tensors, as Quantizer, is asked for that: these codes are kept.
    backward: where the x and w of the backward GEMMs come from.
        "ste"   forward's own, codes included: the classic straight-through estimator. Their two slots must be None.
        "fp"    the untouched ones, kept in their dtype, rounded in backward if their slots say so.
        "early" as "fp", but x.T is rounded in forward already, so that its codes are what is kept.
    """
    output_input: Slot = None             # x    (M, K)
    output_weight: Slot = None            # w    (N, K)
    grad_input_grad_output: Slot = None   # g    (M, N)
    grad_input_weight: Slot = None        # w.T  (K, N)
    grad_weight_grad_output: Slot = None  # g.T  (N, M)
    grad_weight_input: Slot = None        # x.T  (K, M)
    backward: Literal["ste", "fp", "early"] = "ste"
    engine: Callable | None = None  # computes A @ B.T in place of `gemm` below, with its arguments

    def __post_init__(self):
        check_recipe(self)


def make_recipe(config: QuantConfig, third: int | None = None) -> Recipe | None:
    """Translate the flags into a Recipe; None if nothing is quantized.

    The granularity words speak of the stored tensors w (N, K), x (M, K) and g (M, N). grad_weight is given g.T, where
    a row has become a column, so its tile is turned over; per_block and per_row follow the GEMM and are not.
    Args: third: rows of w (columns of g) in each of c_attn's q, k and v, where these are quantized apart.
    """
    block = (1, config.wblock)
    w_tile = {"per_tensor": (third, None), "per_channel": (1, None), "per_block": block}[config.wgran]
    a_tile = {"per_tensor": (None, None), "per_token": (1, None), "per_channel": (None, 1),
              "per_block": block}[config.agran]
    g_tile = {"per_tensor": (None, third), "per_token": (1, third), "per_channel": (None, 1),
              "per_block": block, "per_row": (1, None)}[config.ggran]
    w = Quantizer(config.wbits, w_tile, fmt=config.wfmt)
    a = Quantizer(config.abits, a_tile, config.asym, fmt=config.afmt)
    g = Quantizer(config.gbits, g_tile, rounding=config.rounding, fold=config.ggran == "per_row",
                  fmt=config.gfmt)
    g_t = g if config.ggran in ("per_block", "per_row") else replace(g, tile=g_tile[::-1])
    w, a, g, g_t = (q if q.bits < 32 else None for q in (w, a, g, g_t))
    if not (w or a or g):
        return None
    g, g_t = g if config.ggemm != "grad_weight" else None, g_t if config.ggemm != "grad_input" else None
    return Recipe(output_input=a, output_weight=w, grad_input_grad_output=g,
                  grad_weight_grad_output=g_t, backward=config.backward)


# -----------------------------------------------------------------------------
# the three GEMMs. An operand is a Tensor (R, C), or Quantized, or the NamedTuple of a foreign
# quantizer with a method `unpack()` to one of the two (and `T`, where backward="ste" reuses it).

def round_operand(quantizer: Callable | None, x: Tensor) -> Operand:
    """Apply one slot of a recipe to its operand (R, C): its codes and scales if it has any, else a tensor."""
    if hasattr(quantizer, "quantize") and getattr(quantizer, "bits", 8) < 32:
        return quantizer.quantize(x)
    return x if quantizer is None else quantizer(x)


def gemm(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """Compute A @ B.T in `dtype`: a (R, L), b (S, L) -> (R, S); scales that are constant along L are applied after."""
    (a, a_scale), (b, b_scale) = _factor(a, dtype), _factor(b, dtype)
    y = a @ b.T  # (R, S)
    y = y if a_scale is None else y * a_scale  # (R, S) * (R, 1), fp32 from here
    y = y if b_scale is None else y * b_scale.T  # (R, S) * (1, S)
    return y if y.dtype == dtype else y.to(dtype)  # torch 2.11, compiled: no gradient behind a .to that does nothing


def _factor(q: Operand, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Split an operand (R, L) into what enters the GEMM and the scale (R, 1) or (1, 1) applied after it, if any."""
    if not isinstance(q, (Tensor, Quantized)):
        q = q.unpack()
    if isinstance(q, Tensor):
        return q.to(dtype), None
    if q.zero_point is not None or q.scale.shape[2] > 1:  # does not factor out of the contraction
        return restore(q).to(dtype), None
    return q.codes.to(dtype), row_scale(q)  # exact: codes are small numbers


def row_scale(q: Quantized) -> Tensor:
    """Return the scale of each row of q (R, L), constant along L: fp32 (R, 1), or (1, 1) for all rows."""
    rows = q.codes.shape[0] // q.scale.shape[0]
    return (q.scale if len(q.scale) == 1 else q.scale.expand(-1, rows, 1, 1)).reshape(-1, 1)


def fold(quantizer: Callable | None, a: Tensor, b: Operand) -> tuple[Operand, Operand]:
    """Round the gradient a (R, L) of a GEMM A @ B.T; with quantizer.fold it first takes up scales of b (S, L) along L.

    Forward's scales of x and w, s per token or per output, lie along the contraction L in backward and do not factor
    out. But A @ (codes * s).T = (A * s) @ codes.T: the gradient takes them up before it is rounded, all scales are then
    per row, and x and w need not be rounded a second time.
    """
    folds = getattr(quantizer, "fold", False) and quantizer.bits < 32
    if folds and isinstance(b, Quantized) and b.scale.shape[2] > 1:
        assert b.zero_point is None, "QuantConfig refuses per_row with zero points"
        s = b.scale.expand(1, 1, -1, b.codes.shape[1] // b.scale.shape[2])  # (1, 1, L/tc, tc)
        a = a.float() * s.reshape(1, -1)  # (R, L) fp32
        b = Quantized(b.codes, torch.ones_like(b.scale[:, :, :1]), None)  # nothing left to apply
    return round_operand(quantizer, a), b


def linear_forward(x: Tensor, w: Tensor, recipe: Recipe) -> tuple[Tensor, Operand, Operand]:
    """Compute y = q(x) @ q(w).T for x (M, K), w (N, K) -> y (M, N) in x's dtype, and what backward needs of x and w."""
    qx, qw = round_operand(recipe.output_input, x), round_operand(recipe.output_weight, w)
    y = (recipe.engine or gemm)(qx, qw, x.dtype)
    if recipe.backward == "ste":
        return y, qx, qw
    return y, round_operand(recipe.grad_weight_input, x.T) if recipe.backward == "early" else x, w


def linear_backward(g: Tensor, x: Operand, w: Operand, recipe: Recipe,
                    needs: tuple[bool, bool] = (True, True)) -> tuple[Tensor | None, Tensor | None]:
    """Compute dx (M, K) and dw (N, K) from g (M, N) and what forward kept; dtypes as g; None for what nobody needs."""
    multiply, dx, dw = recipe.engine or gemm, None, None
    if needs[0]:
        w_t = round_operand(recipe.grad_input_weight, w.T)  # "ste" has none here: forward's w.T
        dx = multiply(*fold(recipe.grad_input_grad_output, g, w_t), g.dtype)  # (M, N) @ (K, N).T
    if needs[1]:  # "early": forward has rounded x.T
        x_t = x if recipe.backward == "early" else round_operand(recipe.grad_weight_input, x.T)
        dw = multiply(*fold(recipe.grad_weight_grad_output, g.T, x_t), g.dtype)  # (N, M) @ (K, M).T
    return dx, dw


class _QuantLinear(torch.autograd.Function):
    # Both halves of the table on top; between them waits what linear_forward returns: codes and
    # scales, or tensors. Autograd saves tensors only, so tuples are taken apart and rebuilt.
    @staticmethod
    def forward(ctx, x, w, recipe):
        y, *kept = linear_forward(x, w, recipe)
        ctx.recipe, ctx.w_dtype, ctx.kinds = recipe, w.dtype, [type(q) for q in kept]
        ctx.parts = [len(q) if isinstance(q, tuple) else 1 for q in kept]
        ctx.save_for_backward(*(t for q in kept for t in (q if isinstance(q, tuple) else (q,))))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        saved, n = ctx.saved_tensors, ctx.parts[0]
        x, w = (kind(*parts) if issubclass(kind, tuple) else parts[0]
                for kind, parts in zip(ctx.kinds, (saved[:n], saved[n:]), strict=True))
        dx, dw = linear_backward(g, x, w, ctx.recipe, ctx.needs_input_grad[:2])
        return dx, None if dw is None else dw.to(ctx.w_dtype), None


class QuantLinear(nn.Linear):
    """nn.Linear, trained through a Recipe; weight and bias stay fp32, the arithmetic runs in the dtype of the input.

    Args:
        recipe: what each operand is rounded to; None is nn.Linear bit for bit.
        reparam: maps the weight (N, K), before the recipe, to the one used; an nn.Module brings parameters of its own.
    Raises: ValueError for a float16 input, which cannot hold the sums of products of codes (127 * 127 * 5 > 65504).
    """
    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 recipe: Recipe | None = None, reparam: Slot = None):
        super().__init__(in_features, out_features, bias)
        self.recipe, self.reparam = recipe, reparam

    def used_weight(self) -> Tensor:
        """Return the weight (N, K) that the GEMMs are given, before the recipe rounds it."""
        return self.weight if self.reparam is None else self.reparam(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x (..., K) -> (..., N)."""
        w, bias = self.used_weight(), None if self.bias is None else self.bias.to(x.dtype)
        if self.recipe is None or x.numel() == 0:
            return F.linear(x, w.to(x.dtype), bias)
        if x.dtype == torch.float16:
            raise ValueError("QuantLinear overflows in float16; use bfloat16 or float32")
        recipe = self.recipe
        if recipe.backward == "early" and not torch.is_grad_enabled():  # nothing waits for backward
            recipe = replace(recipe, backward="fp")
        y = _QuantLinear.apply(x.reshape(-1, x.shape[-1]), w, recipe)  # (M, N)
        y = y if bias is None else y + bias  # outside: its gradient comes from the untouched g
        return y.view(*x.shape[:-1], -1)
