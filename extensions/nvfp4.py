"""Pre-training in NVFP4: all six operands of a linear layer in four bits (NVIDIA 2025, arXiv 2509.25149).

A number is e2m1, +-{0 .5 1 1.5 2 3 4 6}. 16 neighbours along the contraction share a scale in e4m3, the matrix an outer
one in fp32 (appendix B): x ~ q * scale * outer. The recipe (section 4), for every linear but those of the last blocks:

    GEMM          A                                   B
    output        x    1 x 16, nearest                w    16 x 16, nearest
    grad_input    g    1 x 16, stochastic             w.T  16 x 16, nearest: the codes of forward, transposed
    grad_weight   g.T  rotated, 1 x 16, stochastic    x.T  rotated, 1 x 16, nearest

Rotated: by a random Hadamard transform along the tokens, (g.T H)(x.T H).T = g.T x, which spreads outliers. Stochastic
rounding has no bias, but where the rounded scale lets a number clip. The last 15 % of the blocks, head, embeddings and
sums stay in high precision; late in the run everything may, or the forward GEMMs alone.

    python train.py --preset=tiny,nvfp4    # ablations: nvfp4-norht, -nosr, -no2d, -naive, -srall, -all (blocks)
    python train.py --preset=tiny,nvfp4 --schedule=wsd --switch_iter=1600 --switch=forward

Simulated exactly: bfloat16 holds q * scale, and quant.gemm multiplies the very operands of FP4 units. Real: what waits
for backward is packed, 0.5625 bytes an activation, and a GPU with FP4 units (Blackwell) is given packed operands
everywhere; none has run this yet. All tokens of a micro-batch share the outer scale: evaluation goes window by window,
each micro-batch has scales, each process noise of its own. TransformerEngine and torchao agree on the format bit for
bit; "ours" marks departures.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT, Linear, quant_linears
from quant import Operand, QuantConfig, Quantized, Recipe, gemm, restore, round_stochastic, tiles
from support.config import own, refuse_idle

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; 8 to 15 are their negatives
BLOCK = 16  # elements along the contraction that share a scale
FLT_MAX = torch.finfo(torch.float32).max
# One vector for all layers and steps, TransformerEngine's; other sizes of the transform repeat or cut it (ours).
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@dataclass
class Config:
    """Linear layers in NVFP4."""
    nvfp4: bool = False  # all three GEMMs in NVFP4
    rht: int = 16  # size of the Hadamard transform of grad_weight's operands, 2 to 128; 0: none
    w2d: bool = True  # weights in blocks of 16 x 16, else 1 x 16
    sr: Literal["grad", "none", "all"] = "grad"  # which operands are rounded stochastically
    sr_room: float = 1.0  # headroom of their scales, 1 to 2; 1.0625 lets nothing clip: no bias
    spare: float = 0.15  # share of the blocks, the last ones, in high precision; or --skip_blocks
    switch_iter: int | None = None  # step from which on GEMMs are in high precision; auto: never
    switch: Literal["all", "forward"] = "all"  # which GEMMs that concerns

    def __post_init__(self):
        refuse_idle(self, **{f.name: (self.nvfp4, "without --nvfp4") for f in fields(self)})
        refuse_idle(self, sr_room=(self.sr != "none", "with --sr=none"),
                    switch=(self.switch_iter is not None, "without --switch_iter"))
        for name, fits, allowed in (
                ("rht", self.rht in (0, 2, 4, 8, 16, 32, 64, 128), "a power of two from 2 to 128, or 0"),
                ("sr_room", 1 <= self.sr_room <= 2, "from 1 to 2"),
                ("spare", 0 <= self.spare < 1, "from 0 to below 1"),
                ("switch_iter", self.switch_iter is None or self.switch_iter > 0, "at least 1, or auto: never")):
            if not fits:
                raise ValueError(f"--{name}={getattr(self, name)} must be {allowed}")


PRESETS = {"nvfp4": dict(nvfp4=True)}
PRESETS |= {f"nvfp4-{name}": dict(nvfp4=True, **flags) for name, flags in {
    "norht": dict(rht=0), "nosr": dict(sr="none"), "no2d": dict(w2d=False), "srall": dict(sr="all"),
    "naive": dict(rht=0, sr="none", w2d=False), "all": dict(spare=0.0)}.items()}


# -----------------------------------------------------------------------------
# the format, from a matrix (R, C) to codes and two scales

class Packed(NamedTuple):
    """A matrix in NVFP4 as it is stored: 0.5625 bytes an element, with blocks of 16 x 16 0.5039."""
    codes: Tensor  # (R, C/2) uint8: two codes a byte, the even column in the low half
    scale: Tensor  # (R/rows, C/16) e4m3, of a block of rows x 16; rows is 1 or 16
    outer: Tensor  # () fp32

    def unpack(self) -> Quantized:
        """Return the matrix as quant.gemm takes it: q * scale (R, C), exact in bf16; the outer scale factors out."""
        q = unpack(self.codes)  # (R, C)
        t = tiles(q, (len(q) // len(self.scale), BLOCK)) * self.scale.to(q.dtype)[:, None, :, None]
        return Quantized(t.view(q.shape), self.outer.view(1, 1, 1, 1), None)


def pack(codes: Tensor) -> Tensor:
    """Put two codes, 0 to 15, into a byte: (R, C) -> (R, C/2) uint8. Columns [1, 15] become 0xf1."""
    codes = codes.to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(codes: Tensor) -> Tensor:
    """Return the numbers of packed codes: (R, C/2) uint8 -> (R, C) bf16. 0xf1 becomes [0.5, -6]."""
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)], dtype=torch.bfloat16, device=codes.device)
    return levels[torch.stack((codes & 15, codes >> 4), -1).flatten(1).int()]


def scales(t: Tensor, room: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (scale, inv_scale, outer) of the blocks of a matrix, t (n, rows * 16) fp32: (n, 1), (n, 1) and ().

    The largest number becomes 6 * 448. inv_scale is that of the ROUNDED scale: where it fell, numbers clip, unless room
    is 17/16. Source: eq. B.1 to B.3. Ours: room; outer, and with it the whole matrix, shows what is not finite.
    """
    amax = t.abs().amax(1, keepdim=True)  # (n, 1)
    most = amax.amax()  # ()
    # not 2688 / most: torch makes that a reciprocal, then a product, off by one bit
    enc = (torch.full_like(most, 6 * 448) / most).clamp_max(FLT_MAX)
    enc = torch.where((most == 0) | (enc == 0), 1.0, enc)
    scale = (amax * (enc * (1 / 6)) * room).clamp_max(448).to(torch.float8_e4m3fn)
    inv_scale = (1.0 / (scale.float() * (1.0 / enc))).clamp_max(FLT_MAX)
    return scale, inv_scale, torch.where(most.isfinite(), 1.0 / enc, most)


def e2m1(y: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round y, fp32, to e2m1: (q, code), fp32 both. 0.25 becomes 0, 0.75 becomes 1, 5 becomes 4: even codes at a tie.

    Args: noise: of y's shape, uniform in [0, 1), for stochastic rounding between the two neighbours of y.
    """
    a = y.abs().clamp_max(6)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))  # between neighbours
    k = torch.round(a / step) if noise is None else round_stochastic(a / step, noise)
    code = k + torch.where(a < 2, 0.0, torch.where(a < 4, 2.0, 4.0)) + y.signbit() * 8.0
    return torch.copysign(k * step, y), code


def rotate(x: Tensor, d: int) -> Tensor:
    """Return x (R, C) @ diag(H, H, ...), fp32, with the orthogonal H = diag(SIGNS) H_d / sqrt(d), H_d Sylvester's.

    At d = 16 a lone 8 becomes sixteen +-2.
    """
    rows = [[SIGNS[i % len(SIGNS)] * (-1) ** (i & j).bit_count() for j in range(d)] for i in range(d)]
    h = torch.tensor(rows, dtype=torch.float32, device=x.device) / math.sqrt(d)  # (d, d)
    return (x.float().unflatten(1, (-1, d)) @ h).flatten(1)


def _round(t: Tensor, stochastic: bool, room: float, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    # blocks (n, rows * 16) -> packed codes, or q * scale in bf16; scale e4m3 (n, 1); outer fp32 ()
    scale, inv_scale, outer = scales(t := t.float(), room)
    q, code = e2m1(t * inv_scale, torch.rand_like(t) if stochastic else None)
    return pack(code) if packed else (q * scale.float()).to(torch.bfloat16), scale, outer


@cache
def _compiled(*how) -> Callable:  # _round for itself, for any shape; all of these share dynamo's limit
    many = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    return many(torch.compile(lambda t: _round(t, *how), dynamic=True))


def _fp4(x: Tensor, rht: int, rows: int, stochastic: bool, room: float, packed: bool,
         compiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    # x (R, C) -> codes (R, C/2), or q * scale (R, C); scale (R/rows, C/16); outer ()
    t = tiles(rotate(x, rht) if rht else x, (rows, BLOCK)).transpose(1, 2)  # (R/rows, C/16, rows, 16)
    how, grid = (stochastic, room, packed), t.shape[:2]
    t = t.flatten(2).flatten(0, 1)  # (n, rows * 16)
    codes, scale, outer = _compiled(*how)(t) if compiled else _round(t, *how)
    return codes.view(*grid, rows, -1).transpose(1, 2).flatten(2).flatten(0, 1), scale.view(grid), outer


# To a compiled model all that is one operator: inlined, it would be compiled six times a layer.
@torch.library.custom_op("nanoqpt::nvfp4", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _fp4_op(x: Tensor, rht: int, rows: int, stochastic: bool, room: float,
            packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _fp4(x, rht, rows, stochastic, room, packed, compiled=True)


_fp4_op.register_fake(_fp4)  # shapes and dtypes


@dataclass(frozen=True)
class NVFP4:
    """A slot of a recipe: rounds (R, C), contraction last. No `tile`: so eval.py knows that tokens share scales."""
    rows: int = 1  # of a block of rows x 16
    stochastic: bool = False  # noise comes from torch's default generator; compiled, another stream of it
    room: float = 1.0  # headroom of the scales
    rht: int = 0  # size of the Hadamard transform before; 0: none
    keep: bool = False  # pack it, since it waits for backward; in simulation all else costs time only

    def quantize(self, x: Tensor) -> Packed | Quantized:
        """Return codes and scales: packed if kept or for FP4 units, else the operand of the simulated GEMM."""
        packed = self.keep or fp4_units(x.device)
        rounding = _fp4_op if torch.compiler.is_compiling() else _fp4
        codes, scale, outer = rounding(x, self.rht, self.rows, self.stochastic, self.room, packed)
        return Packed(codes, scale, outer) if packed else Quantized(codes, outer.view(1, 1, 1, 1), None)

    def __call__(self, x: Tensor) -> Tensor:
        """Round x (R, C) and return it in its dtype; where it is rotated, the rotated one."""
        q = self.quantize(x)
        return restore(q.unpack() if isinstance(q, Packed) else q).to(x.dtype)


# -----------------------------------------------------------------------------
# the GEMM on FP4 units

@torch.compiler.assume_constant_result
def fp4_units(device: torch.device) -> bool:
    """Tell whether the device multiplies NVFP4 in hardware: a GPU of compute capability 10 (Blackwell) or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def swizzle(scale: Tensor, rows: int) -> Tensor:
    """Order the scales (R/n, C/16) of a matrix of R rows as cuBLAS wants them, flat: one a row, in zero-padded tiles.

    In a tile of 128 x 4, row r and column c lie at (r % 32) * 16 + (r // 32) * 4 + c; tiles follow row by row.
    """
    s = scale.view(torch.uint8).repeat_interleave(rows // len(scale), 0)  # (R, C/16)
    s = F.pad(s, (0, -s.shape[1] % 4, 0, -s.shape[0] % 128))
    s = s.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32))  # (tile row, r // 32, r % 32, tile column, c)
    return s.permute(0, 3, 2, 1, 4).flatten().view(torch.float8_e4m3fn)


@torch.library.custom_op("nanoqpt::nvfp4_mm", mutates_args=())
def _fp4_mm(a: list[Tensor], b: list[Tensor], dtype: torch.dtype) -> Tensor:
    # A @ B.T of the parts of two Packed; an operator, since Inductor 2.13 asserts on swizzles
    levels = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    (a, *a_scales), (b, *b_scales) = ((codes.view(torch.float4_e2m1fn_x2), swizzle(scale, len(codes)), outer)
                                      for codes, scale, outer in (a, b))  # (R, L/2), (S, L/2)
    return F.scaled_mm(a, b.T, a_scales, levels, b_scales, levels, order, order, output_dtype=dtype)


_fp4_mm.register_fake(lambda a, b, dtype: a[0].new_empty(len(a[0]), len(b[0]), dtype=dtype))


def nvfp4_gemm(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """Compute A @ B.T, a (R, L), b (S, L) -> (R, S) in `dtype`: an engine of quant.Recipe."""
    if not (isinstance(a, Packed) and isinstance(b, Packed) and fp4_units(a.codes.device)):
        return gemm(a, b, dtype)  # simulated, or one operand is in high precision
    return _fp4_mm(list(a), list(b), dtype)


# -----------------------------------------------------------------------------
# the recipe, where it applies, and until when

def make_recipe(config: Config) -> Recipe:
    """Return the table on top of this file."""
    everywhere = config.sr == "all"
    x = NVFP4(stochastic=everywhere, room=config.sr_room if everywhere else 1.0)
    w = replace(x, rows=BLOCK if config.w2d else 1)
    g = NVFP4(stochastic=config.sr != "none", room=config.sr_room)
    return Recipe(output_input=x, output_weight=w, grad_input_grad_output=g, grad_input_weight=w,
                  grad_weight_grad_output=replace(g, rht=config.rht),
                  grad_weight_input=replace(x, rht=config.rht, keep=True), backward="early", engine=nvfp4_gemm)


def linears(config: Config, flat: dict, linear: Linear) -> Linear:
    """Make the linears in NVFP4, but for those of some blocks; say which, and what multiplies them."""
    if not config.nvfp4:
        return linear
    # (1) what does not go together
    quant, n = own(QuantConfig, flat), flat["n_layer"]
    for name in ("wbits", "abits", "gbits"):
        if getattr(quant, name) < 32:
            raise ValueError(f"--nvfp4 with --{name}={getattr(quant, name)} rounds twice; drop one")
    if quant.skip_blocks and config.spare != Config.spare:
        raise ValueError(f"--spare={config.spare} has no effect with --skip_blocks; drop one")
    tokens, size = flat.get("batch_size", 0) * flat.get("block_size", 0), max(BLOCK, config.rht)
    if tokens % size:
        raise ValueError(f"--nvfp4 with --rht={config.rht} needs multiples of {size} tokens in a micro-batch, not "
                         f"{tokens}; change --batch_size or --block_size")
    # (2) which blocks stay in high precision
    spared = quant.skip_blocks or tuple(range(n - math.ceil(config.spare * n - 1e-9), n))
    if len({i % n for i in spared}) == n:
        raise ValueError(f"--nvfp4 has no effect with all {n} blocks in high precision; use --spare=0")
    before = make_recipe(config)
    after = None if config.switch == "all" else replace(before, output_input=None, output_weight=None)
    factory = quant_linears(replace(quant, skip_blocks=spared), n, lambda *_: before)

    def make(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
        layer = factory(name, in_features, out_features, bias)
        if layer.recipe and (in_features % BLOCK or out_features % BLOCK):
            raise ValueError(f"--nvfp4 needs multiples of {BLOCK}, {name} is {in_features} x {out_features}; "
                             "change --n_embd, --heads or --hidden")
        layer.before_and_after = layer.recipe, layer.recipe and after  # at_step chooses
        return layer
    # (3) on stderr, since a program may print JSON; one process speaks for all
    if os.environ.get("RANK", "0") == "0":
        units = flat.get("device") != "cpu" and torch.cuda.is_available() and fp4_units(torch.device("cuda"))
        print(f"nvfp4: blocks in high precision: {', '.join(str(i % n) for i in spared) or 'none'} of {n}; GEMMs",
              "on FP4 units" if units else "simulated: only Blackwell GPUs have FP4 units", file=sys.stderr)
    return make


def at_step(config: Config, model: GPT, step: int) -> None:
    """Give each layer its recipe of this step. The objects are the same at every step, or all would be recompiled."""
    for layer in model.modules() if config.switch_iter else ():
        if hasattr(layer, "before_and_after"):
            layer.recipe = layer.before_and_after[step >= config.switch_iter]
