"""AdamW whose two moments are really stored in 8 or 4 bits.

Adam keeps two running means per parameter, m of the gradient and v of its square: 8 bytes in fp32, twice the weights.
Here they are codes of one byte, or half a byte, and one fp32 scale per block, row or tensor. A step of one tensor:

    (1) read    m, v = decode(codes) * scale                    what the last step has left
    (2) update  m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    (3) step    p = (1 - lr wd) p - lr' m / (sqrt(v) + eps')    with the FRESH moments, rounded only when stored
    (4) store   scale = max|x| / top         codes = encode(x / scale)

That order is the paper's (2407.11722). lr' = lr sqrt(1 - b2^t) / (1 - b1^t) and eps' = eps sqrt(1 - b2^t) hold the bias
correction (Kingma and Ba 2015, end of section 2). A format is a code book, the value of code k in units of the scale:

    linear    k              the paper's. Fine for m. FAILS for v: a small v becomes 0 while its m does not, and
                             m / sqrt(v) explodes (updates of thousands of lr). Kept because that is a result.
    dynamic   a tiny float   2110.02861 and bitsandbytes: 7 decades, each with twice the codes of the one below.
    power     k^2            fine near zero, where most values are. v has no code for zero: it cannot vanish before its
                             m does. 4-bit v: k, since large updates come from a v that is rounded down. The default.

Decay moves v by 1 - b2 of itself a step, often less than half a code. Rounded to nearest such a v stays where it is,
too large: sqrt(v), which divides the step, by 1.3 on average after 20,000 steps with b2 = 0.999
(results/optimizer.md). So power's v is rounded up or down at random, right on average.

The class at the end is bookkeeping: which tensor is stored how, and state_dict. 32 bits is torch's own AdamW.

Shapes: a tensor is n rows of B elements: its own rows (per_channel), else blocks of the flattened tensor. Codes are
uint8 (n, B), or (n, B/2) for 4 bits: element j of the first half of a row in the low bits, j of the second half above.
With 4 bits everything else comes in halves too, (n, B/2) each: one loop over B/2 bytes then does it all.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from math import inf, sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from quant import SCALE_FLOOR

MIN_SIZE = 4096  # elements; smaller tensors keep fp32 moments (2110.02861, section 2)
PIECE = 2**20  # elements at a time where a step has temporaries: they stay in the cache, and small

Bits = Literal[4, 8, 32]
Format = Literal["power", "dynamic", "linear"]
Granularity = Literal["per_tensor", "per_channel", "per_block"]
Rounding = Literal["nearest", "stochastic"]


@dataclass
class OptimConfig:
    """AdamW and how its moments are stored."""
    weight_decay: float = 0.1  # of matrices; vectors have none
    beta1: float = 0.9  # Adam's first moment
    beta2: float = 0.95  # Adam's second moment; the paper has 0.999
    m1bits: Bits = 32  # bits of the first moment; 32 and 32 is torch's AdamW
    m1fmt: Format = "power"  # code book of the first moment
    m1gran: Granularity = "per_block"  # what shares a scale in the first moment
    m1round: Rounding = "nearest"  # rounding of the stored first moment
    m2bits: Bits = 32  # bits of the second moment
    m2fmt: Format = "power"  # code book of the second moment; linear is the paper's failing case
    m2gran: Granularity = "per_block"  # what shares a scale in the second moment
    m2round: Rounding | None = None  # of the stored second moment; auto: stochastic with power, else nearest
    mblock: int | None = None  # elements of a block; auto: 256, or 128 with 4 bits
    mfloor: bool = False  # linear scales never below 1e-8, as in the paper's code
    membed32: bool = False  # embeddings keep fp32 moments, as in both papers

    def __post_init__(self):
        if not 0 <= self.weight_decay < inf:
            raise ValueError(f"--weight_decay={self.weight_decay} must be at least 0, and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must lie in [0, 1)")
        both = [i for i in (1, 2) if getattr(self, f"m{i}bits") < 32]
        for i in (1, 2):
            if getattr(self, f"m{i}bits") not in (4, 8, 32):
                raise ValueError(f"--m{i}bits={getattr(self, f'm{i}bits')}: every format has 8 and 4; use 8, 4 or 32")
            for name in ("fmt", "gran", "round"):
                value, default = (getattr(x, f"m{i}{name}") for x in (self, OptimConfig))
                older = (name, value) == ("round", "nearest")  # checkpoints from before m2round had auto
                if i not in both and value != default and not older:
                    raise ValueError(f"--m{i}{name}={value} has no effect with --m{i}bits=32; drop it or use 8 or 4")
            if i in both and getattr(self, f"m{i}fmt") == "dynamic" and getattr(self, f"m{i}round") == "stochastic":
                raise ValueError(f"--m{i}round=stochastic: dynamic rounds to nearest; use --m{i}fmt=power or linear")
        grans = {getattr(self, f"m{i}gran") for i in both}
        if len(grans) > 1:
            raise ValueError(f"--m1gran={self.m1gran}, --m2gran={self.m2gran}: both moments share their rows; "
                             "give both the same")
        if self.mblock is not None and ("per_channel" in grans or not both or self.mblock < 2 or self.mblock % 2):
            raise ValueError(f"--mblock={self.mblock} must be even, and needs a moment in 8 or 4 bits that is not "
                             "per_channel")
        if self.mfloor and "linear" not in {getattr(self, f"m{i}fmt") for i in both}:
            raise ValueError("--mfloor has no effect without a linear format; drop it or add --m2fmt=linear")
        if self.membed32 and not both:
            raise ValueError("--membed32 has no effect without a moment in 8 or 4 bits; drop it or add --m1bits=8")

    def formats(self) -> dict:
        """Return what a param_group records, plain values: {"m1": Moment's fields, "m2": same, "block": elements}."""
        def moment(bits: int, fmt: str, gran: str, rounding: str) -> tuple:
            return (32,) if bits == 32 else (bits, fmt, gran, rounding, self.mfloor and fmt == "linear")

        m2round = self.m2round or ("stochastic" if self.m2fmt == "power" else "nearest")
        return {"m1": moment(self.m1bits, self.m1fmt, self.m1gran, self.m1round),
                "m2": moment(self.m2bits, self.m2fmt, self.m2gran, m2round),
                "block": self.mblock or (128 if 4 in (self.m1bits, self.m2bits) else 256)}


class Moment(NamedTuple):
    """How one moment is stored. Plain constants: torch.compile builds them into the code."""
    bits: int = 32
    fmt: str = "power"
    gran: str = "per_block"
    rounding: str = "nearest"
    floor: bool = False  # the paper's 1e-8
    second: bool = False  # v, which is never negative, or m


# -----------------------------------------------------------------------------
# code books. k is the code without its sign; fp32 tensors of any shape.

def first_last(moment: Moment) -> tuple[int, int]:
    """Return the smallest and the largest k. m gives half of its codes to the negatives."""
    half = 2 ** (moment.bits - 1)
    if moment.fmt == "linear":
        return 0, half - 1  # for v as well: the paper's quantizer is symmetric and wastes half of the codes
    if moment.fmt == "dynamic":
        return 0, 2 * half - 1 if moment.second else half  # for m, k = 128 is 1.0, and there is no -1.0
    return (1, 2 * half) if moment.second else (0, half - 1)


def decades(moment: Moment) -> list[tuple[float, float, float, float]]:
    """Return (t, x, slope, offset) of each decade of the dynamic book, the lowest first: level = slope * t - offset.

    Decade i = 0 .. bits - 2 is 10^(i - bits + 1) (1, 10], cut into n = 2^i equal bins (v: 2^(i+1)) whose middles are
    the levels: t = k + 1/2 (v: k + 3/2) is n, n + 1, ... 2n at the bins' edges. So level(k) and its inverse are
    piecewise linear, and need no table; (t, x) is where a decade begins.
    Source: 2110.02861, section 1.3, and bitsandbytes' create_dynamic_map.
    """
    lines = []
    for i in range(moment.bits - 1):
        n, start = 2 ** (i + moment.second), 10.0 ** (i - moment.bits + 1)
        lines.append((n, start, 9 * start / n, 8 * start))
    return lines


def is_square(moment: Moment) -> bool:
    """Return whether level(k) = k^2."""
    return moment.fmt == "power" and not (moment.second and moment.bits == 4)


def level(k: Tensor, moment: Moment) -> Tensor:
    """Return the value of k in units of the scale. power: 0 1 4 9 ...; dynamic of m: 0 5.5e-7 3.25e-6 7.75e-6 ... 1."""
    if moment.fmt != "dynamic":
        return k * k if is_square(moment) else k
    t = k + (1.5 if moment.second else 0.5)
    (_, _, before, offset), *higher = decades(moment)
    y = t * before - offset
    for start, _, slope, _ in higher:
        y, before = y + torch.relu(t - start) * (slope - before), slope
    return torch.where(k < first_last(moment)[1], torch.relu(y), 1.0)  # 0 and 1, outside the decades


def nearest_dynamic(x: Tensor, moment: Moment) -> Tensor:
    """Return the k of the dynamic level nearest to x in [0, 1]; the middle of two goes up."""
    *lower, (n, above, slope, offset) = decades(moment)
    top = (1 + slope * (2 * n - 0.5) - offset) / 2  # the middle of the last two levels
    t = (x + offset) * (1 / slope)
    for _, start, slope, offset in reversed(lower):
        t, above = torch.where(x < above, (x + offset) * (1 / slope), t), start
    n = decades(moment)[0][0]
    # Middles of a decade are its bins' edges, integer t. That of two decades lies a fifth of a bin above the edge.
    early = (t - t.floor() < 0.2) & (t.int() & (t.int() - 1) == 0) & (t >= n + 1)
    k = t.floor() - early.float() - (1 if moment.second else 0) + (x >= top).float()
    return torch.where(x < (slope * (n + 0.5) - offset) / 2, 0.0, k)


def decode(codes: Tensor, scale: Tensor, moment: Moment) -> Tensor:
    """Return the fp32 moment of uint8 codes (n, B); scale (n, 1) or (1, 1)."""
    if moment.second:
        return level(codes.float() + first_last(moment)[0], moment) * scale
    k = codes.float() - (2 ** (moment.bits - 1) - 1)  # a code is a rank: that of m = 0 is 127, or 7 with 4 bits
    if is_square(moment):
        return k * k.abs() * scale  # as below, but compiled copysign is a function call per 16 elements
    return (k if moment.fmt == "linear" else torch.where(k < 0, -1.0, 1.0) * level(k.abs(), moment)) * scale


def encode(x: Tensor, scale: Tensor, moment: Moment, noise: Tensor | None = None) -> Tensor:
    """Return the uint8 codes of the fp32 moment x (n, B), the inverse of `decode`.

    Args:
        x, scale: |x| / scale at most the largest level, as `new_scale` makes it.
        noise: uniform in (0, 1), (n, 1) or x's shape: x goes to one of the two codes around it so that
            decode(encode(x)) is x on average. A change of v smaller than half a code is then not lost for ever. (Below
            the smallest code of power's v there is none: such an x always becomes that code.) None is 1/2: to the
            nearest, ties away from zero.

    Example: power m in 8 bits, x / scale = 6.4 lies between 4 and 9 -> k = 2, code 129.
    """
    first, last = first_last(moment)
    zero = -first if moment.second else 2 ** (moment.bits - 1) - 1  # a code is a rank: that of m = 0 is 127, or 7
    scaled = (x if moment.second else x.abs()) * _keep(1 / scale)
    if moment.fmt == "dynamic":
        k = nearest_dynamic(scaled, moment)
    else:
        noise, product = (0.5, 0.25) if noise is None else (noise, _keep(noise * (1 - noise)))
        # Rounded down below. k^2 becomes (k + 1)^2 from k^2 + (1 - noise) (2k + 1) on: (k + 1 - noise)^2 + product.
        k = (root(torch.relu(scaled - product)) if is_square(moment) else scaled) + noise
    k = (k if moment.second else torch.where(x < 0, -1.0, 1.0) * k.floor()) + zero
    # The conversion drops v's fraction; what lies below its smallest code, in (-1, 0), becomes 0. The clamp is for -1
    # in dynamic, which has no code, and for a largest level come out an ulp too large. (By way of int32: straight from
    # the float, compiled code would clamp once more.)
    return k.to(torch.int32).clamp(0, last + zero).to(torch.uint8)


def new_scale(parts: list[Tensor], moment: Moment) -> Tensor:
    """Return the scale (n, 1), for per_tensor (1, 1), that maps max|x| of the rows [x | ...] to the largest level.

    Adding the floor is max(scale, floor) for every scale that matters, without its branch.
    """
    last = float(first_last(moment)[1])
    top = 1.0 if moment.fmt == "dynamic" else last * last if is_square(moment) else last
    x = reduce(torch.maximum, parts if moment.second else [x.abs() for x in parts])
    scale = x.amax((0, 1) if moment.gran == "per_tensor" else 1, keepdim=True) * (1 / top)
    return scale.clamp(min=1e-8) if moment.floor else scale + SCALE_FLOOR


def root(x: Tensor) -> Tensor:
    """Return the correctly rounded square root (fp32).

    Eager torch takes MKL's, which is one ulp off in 0.6 % of the cases; through fp64 it agrees with compiled code.
    """
    return x.sqrt() if torch.compiler.is_compiling() else x.double().sqrt().float()


def _keep(x: Tensor) -> Tensor:
    """Return x (n, 1); compiled, Inductor then computes it once per row: as_strided needs it in memory.

    Inlined instead, each vector of 16 elements would divide again, which cost a tenth of the step on a CPU.
    """
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() and x.device.type == "cpu" else x


def hash_noise(key: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return two numbers in (0, 1) per row, (n, 1), one for each moment; key: int32 (seed, number of the first row).

    The elements of a row, both halves of it, share theirs. Each is still its value on average, only the errors within a
    row are no longer independent; and the hash costs next to nothing.
    A hash of (seed, row) instead of a generator: the same on every rank, after a resume, in every piece of a tensor
    and in compiled code. It is murmur3's finalizer; either half gives 15 bits: k + noise is then exact for k below 256.
    """
    row = torch.arange(n, dtype=torch.int32, device=key.device)[:, None] + key[1]
    h = row * -1640531535 + key[0]
    h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387
    h = h ^ ((h >> 16) & 0xFFFF)
    return tuple(_keep(((bits & 0x7FFF).float() + 0.5) / 2**15) for bits in (h, h >> 16))


# -----------------------------------------------------------------------------
# one step of one tensor: the four lines at the top of this file

Parts = list[Tensor]  # a tensor of rows, [(n, B)], or its left and right half, [(n, B/2), (n, B/2)]


def adamw_update(ps: Parts, gs: Parts, codes1: Parts, codes2: Parts, scales: Tensor, hyper: Tensor,
                 key: Tensor | None, m1: Moment, m2: Moment) -> None:
    """Update parameter, codes and scales in place.

    Args:
        ps, gs: parameter and gradient, any float dtype; in halves if a moment has 4 bits.
        codes1, codes2: of m and v. uint8 codes, in parts like ps; 4 bits: one (n, B/2) that packs both halves; 32 bits:
            the fp32 moment itself, in parts like ps.
        scales: fp32 (n, 2), or (1, 2) for per_tensor: a column for m, one for v.
        hyper: fp32 (7,): 1 - lr wd, lr', beta1, 1 - beta1, beta2, 1 - beta2, eps' (see the top). A tensor, so that a
            new learning rate is new data and not new code.
        key: see hash_noise; None if both moments are rounded to nearest.

    A gradient element that is inf, nan or beyond 2^63 (its square would overflow) counts as zero: it cannot poison its
    block. Whether such a step should be taken at all is for the training loop to say.
    """
    decay, lr, beta1, rest1, beta2, rest2, eps = hyper.unbind()
    gs = [torch.where(g.float().abs() < 2.0**63, g.float(), 0.0) for g in gs]  # fp32 from here
    ms = [beta1 * m + rest1 * g for m, g in zip(_read(codes1, scales[:, :1], m1), gs, strict=True)]
    vs = [beta2 * v + rest2 * (g * g) for v, g in zip(_read(codes2, scales[:, 1:], m2), gs, strict=True)]
    for p, m, v in zip(ps, ms, vs, strict=True):
        p.copy_(decay * p.float() - lr * (m / (root(v) + eps)))
    noise1, noise2 = (None, None) if key is None else hash_noise(key, len(gs[0]))
    _write(ms, codes1, scales[:, :1], m1, noise1)
    _write(vs, codes2, scales[:, 1:], m2, noise2)


def _read(codes: Parts, scale: Tensor, moment: Moment) -> Parts:
    """Return the stored moment in fp32."""
    if moment.bits == 32:
        return codes
    return [decode(c, scale, moment) for c in ([codes[0] & 15, codes[0] >> 4] if moment.bits == 4 else codes)]


def _write(xs: Parts, codes: Parts, scale: Tensor, moment: Moment, noise: Tensor | None) -> None:
    """Store the fresh moment in place."""
    if moment.bits < 32:
        fresh = new_scale(xs, moment)
        scale.copy_(fresh)
        xs = [encode(x, fresh, moment, noise if moment.rounding == "stochastic" else None) for x in xs]
    if moment.bits == 4:
        xs = [xs[0] | (xs[1] << 4)]
    for c, x in zip(codes, xs, strict=True):
        c.copy_(x)


@lru_cache
def compiled_update(m1: Moment, m2: Moment):
    """Return adamw_update compiled for two formats.

    The options keep Inductor from putting m and v in memory between their maximum and their codes: it computes them
    twice instead, and a step is two passes over its inputs, without temporaries. dynamic is too long for that.
    """
    options = {"realize_reads_threshold": 1000, "realize_opcount_threshold": 100000}
    options = {} if "dynamic" in (m1.fmt, m2.fmt) else options

    def update(*args) -> None:
        adamw_update(*args, m1=m1, m2=m2)
    update.__code__ = update.__code__.replace()  # one of its own: dynamo refuses a ninth graph for one code object
    return torch.compile(update, fullgraph=True, options=options)


# -----------------------------------------------------------------------------
# the optimizer: which tensor is stored how, state_dict, and nothing numerical

def param_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Return AdamW's groups: matrices; embeddings; vectors, which do not decay and keep fp32 moments.

    A tied lm_head is the embedding's own tensor and counts as one. Frozen parameters are left out.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    params = [p for p in model.parameters() if p.requires_grad]
    fp32 = {"m1": (32,), "m2": (32,)}
    groups = [{"params": [p for p in params if p.dim() >= 2 and id(p) not in tables]},
              {"params": [p for p in params if id(p) in tables], **(fp32 if config.membed32 else {})},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, **fp32}]
    return [group for group in groups if group["params"]]


class AdamW(torch.optim.Optimizer):
    """AdamW with the moments stored as `config` says; lr, betas, eps, weight_decay as in torch.optim.AdamW.

    A group may override any of lr, betas, eps, weight_decay, m1, m2, block (see OptimConfig.formats). state[p] has
    plain tensors: step; exp_avg and exp_avg_sq, codes (n, B) or (n, B/2), or the fp32 moment; scales (n, 2). Tensors
    with two fp32 moments are stepped by torch's own fused AdamW, which keeps a nan.

    Args:
        params: parameters or groups, as `param_groups` makes them.
        lr: learning rate; stays a float, set group["lr"] at every step as you like.
        config: formats and hyper-parameters.
        eps: added to the root of v.
        seed: of stochastic rounding; give every rank the same.
        compile: False runs the same arithmetic eagerly (about 20 times slower on a CPU).
    """

    def __init__(self, params: Iterable, lr: float, config: OptimConfig | None = None, *, eps: float = 1e-8,
                 seed: int = 0, compile: bool = True):
        config = config or OptimConfig()
        self.seed, self.compile = seed, compile
        super().__init__(params, dict(lr=lr, betas=(config.beta1, config.beta2), eps=eps,
                                      weight_decay=config.weight_decay, **config.formats()))

    def __getstate__(self) -> dict:  # for copies and pickles; torch's keeps only what it knows
        return {**super().__getstate__(), "seed": self.seed, "compile": self.compile}

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step with the gradients in p.grad; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = -1  # counts all parameters: the noise of one does not depend on the gradients of others
        keys = lru_cache(partial(_keys, self.seed, sum(len(group["params"]) for group in self.param_groups)))
        for group in self.param_groups:
            plain, hyper = [], lru_cache(partial(_hyper, group))
            for p in group["params"]:
                index += 1
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError(f"a {tuple(p.shape)} parameter has a sparse gradient: use "
                                     "nn.Embedding(sparse=False)")
                state = self._state(p, group)
                if _is_plain(p, group):
                    plain.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
                else:
                    state["step"] += 1
                    t, (m1, m2, *_) = int(state["step"]), _layout(p, group)
                    key = keys(t, p.device)[index].data if "stochastic" in (m1.rounding, m2.rounding) else None
                    self._update(p, group, state, hyper(t, p.device), key)
            if plain:  # 32 bits is not an imitation: torch's own fused AdamW
                params, grads, m, v, steps = map(list, zip(*plain, strict=True))
                beta1, beta2 = group["betas"]
                torch_adamw(params, grads, m, v, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
                            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
        return loss

    def _update(self, p: Tensor, group: dict, state: dict, hyper: Tensor, key: Tensor | None) -> None:
        """Lay p out as rows, in halves if need be, and hand them to adamw_update."""
        m1, m2, n, width = _layout(p, group)
        flat, grad = (_whole_rows(z, n * width) for z in (p, p.grad))
        part = width // 2 if 4 in (m1.bits, m2.bits) else width
        args = [rows.view(n, -1, part).unbind(1) for rows in (flat, grad, state["exp_avg"], state["exp_avg_sq"])]
        args.append([state["scales"]])
        update = compiled_update(m1, m2) if self.compile else partial(adamw_update, m1=m1, m2=m2)
        temporaries = len(state["scales"]) == n and (not self.compile or "dynamic" in (m1.fmt, m2.fmt))
        rows = max(1, PIECE // width if temporaries else n)
        for first in range(0, n, rows):
            # .data forgets what a view is a view of: dynamo guards on that and would compile again for every rank of p.
            *piece, (scales,) = [[z[first:first + rows].data for z in zs] for zs in args]
            if self.compile:
                for z in sum(piece, [scales]):
                    torch._dynamo.maybe_mark_dynamic(z, 0)  # one graph for any n; B is a constant while it can be
            if key is not None:
                key[1] = first
            update(*piece, scales, hyper, key)
        if flat.data_ptr() != p.data_ptr():
            p.copy_(flat[:p.numel()].view(p.shape))

    def _state(self, p: Tensor, group: dict) -> dict:
        """Return state[p], made on first use."""
        if not self.state[p]:
            self.state[p] = _new_state(p, group)
        return self.state[p]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load codes and scales bit for bit.

        Raises: ValueError for a state of another format or shape, naming both. (torch would cast every tensor to the
        dtype of its parameter, codes to floats, and notice nothing.)
        """
        if any(g.get("amsgrad") or g.get("maximize") for g in state_dict["param_groups"]):
            raise ValueError("the optimizer state has amsgrad or maximize, which are not here; start it afresh")
        theirs, ours = ([[tuple(g.get(m, (32,))) for m in ("m1", "m2")] + [len(g["params"])] for g in groups]
                        for groups in (state_dict["param_groups"], self.param_groups))
        if theirs != ours:
            raise ValueError(f"the optimizer state was written with [m1, m2, tensors] = {theirs}, this optimizer has "
                             f"{ours}; use the flags it was written with, or start the optimizer afresh")
        fresh = {}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if key not in state_dict["state"]:
                    continue
                stored, fresh[p] = state_dict["state"][key], _new_state(p, group)
                for name in sorted(fresh[p].keys() | stored.keys()):
                    theirs, ours = (_kind(s.get(name)) for s in (stored, fresh[p]))
                    if theirs != ours:
                        raise ValueError(f"{name} of a {tuple(p.shape)} parameter: the state has {theirs}, this "
                                         f"optimizer needs {ours}")
                    fresh[p][name].copy_(stored[name])
        groups = [{**{k: mine[k] for k in ("m1", "m2", "block")}, **saved}  # torch's own AdamW has no formats to say
                  for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(fresh)

    @torch.no_grad()
    def to_torch_state_dict(self) -> dict:
        """Return a state_dict with fp32 moments that torch.optim.AdamW of the same groups loads and continues."""
        ours = self.state_dict()
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        state = {}
        for key, stored in ours["state"].items():
            p, group = params[key]
            state[key] = {"step": stored["step"].clone()}
            for i, (moment, name) in enumerate(zip(_layout(p, group)[:2], ("exp_avg", "exp_avg_sq"), strict=True)):
                x = stored[name]
                if moment.bits < 32:
                    x = torch.cat(_read([x], stored["scales"][:, i:i + 1], moment), 1)
                state[key][name] = x.reshape(-1)[: p.numel()].view(p.shape).clone()
        groups = [{k: v for k, v in g.items() if k not in ("m1", "m2", "block")} for g in ours["param_groups"]]
        return {"state": state, "param_groups": groups}

    def describe(self) -> tuple[float, str]:
        """Return (bytes per parameter, one line): what is stored how, as the real tensors count (makes the state)."""
        kinds = {}
        for group in self.param_groups:
            for p in group["params"]:
                size = sum(t.nbytes for name, t in self._state(p, group).items() if name != "step")
                name = "+".join("fp32" if m.bits == 32 else f"{m.fmt}{m.bits}" for m in _layout(p, group)[:2])
                kind = kinds.setdefault(name, [0, 0, 0])
                kind[:] = kind[0] + 1, kind[1] + p.numel(), kind[2] + size
        parts = [f"{k} {n} tensors, {e / 1e6:.2f}M elements, {b / 1e6:.2f} MB" for k, (n, e, b) in kinds.items()]
        elements, size = (sum(kind[i] for kind in kinds.values()) for i in (1, 2))
        each = size / elements
        return each, f"optimizer state: {each:.3f} bytes per parameter ({'; '.join(parts)}); fp32 has 8"


def _hyper(group: dict, t: int, device: torch.device) -> Tensor:
    """Return adamw_update's `hyper` for step t."""
    beta1, beta2 = group["betas"]
    debias = sqrt(1 - beta2**t)
    return torch.tensor([1 - group["lr"] * group["weight_decay"], group["lr"] * debias / (1 - beta1**t),
                         beta1, 1 - beta1, beta2, 1 - beta2, group["eps"] * debias], device=device)


def _keys(seed: int, n: int, t: int, device: torch.device) -> Tensor:
    """Return hash_noise's key of each of n parameters at step t: int32 (n, 2)."""
    seeds = np.random.SeedSequence((seed, t)).generate_state(n).view(np.int32)
    return torch.tensor(np.stack([seeds, np.zeros_like(seeds)], 1), device=device)


def _layout(p: Tensor, group: dict) -> tuple[Moment, Moment, int, int]:
    """Return (m1, m2, n, B): how p's moments are stored, as n rows of B elements; the last one perhaps incomplete.

    Raises: ValueError for 4 bits and rows of odd length.
    """
    return _layout_of(p.shape, tuple(group["m1"]), tuple(group["m2"]), group["block"])


@lru_cache(None)
def _layout_of(shape: torch.Size, m1: tuple, m2: tuple, block: int) -> tuple[Moment, Moment, int, int]:
    """See _layout; asked for every tensor at every step."""
    m1, m2 = (Moment(), Moment()) if shape.numel() < MIN_SIZE else (Moment(*m1), Moment(*m2))
    stored = [m for m in (m1, m2) if m.bits < 32]
    n, width = -(-shape.numel() // block), block
    if any(m.gran == "per_channel" for m in stored):
        n = shape[0] if len(shape) >= 2 else 1
        width = shape.numel() // n
        if width % 2 and any(m.bits == 4 for m in stored):
            raise ValueError(f"4-bit codes are packed in pairs, and the rows of a {tuple(shape)} parameter have "
                             f"{width} elements; use per_block")
    return m1, m2._replace(second=True), n, width


def _is_plain(p: Tensor, group: dict) -> bool:
    """Return whether torch's fused AdamW does the step: fp32, all of it."""
    m1, m2, *_ = _layout(p, group)
    return p.dtype == torch.float32 and m1.bits == m2.bits == 32


def _whole_rows(z: Tensor, size: int) -> Tensor:
    """Return z flat and contiguous, a view where it can be; a copy filled with zeros if the last block needs it."""
    return F.pad(z.reshape(-1), (0, size - z.numel())) if z.numel() < size else z.reshape(-1)


def _new_state(p: Tensor, group: dict) -> dict:
    """Return the state of p before the first step: codes and scales of zero."""
    if _is_plain(p, group):
        return {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p)}
    state, (*moments, n, width) = {"step": torch.zeros(())}, _layout(p, group)
    for name, m in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        if m.bits == 32:
            state[name] = torch.zeros(n, width, device=p.device)
            continue
        zero = 0 if m.second else 2 ** (m.bits - 1) - 1
        state[name] = torch.full((n, width * m.bits // 8), zero * (17 if m.bits == 4 else 1), dtype=torch.uint8,
                                 device=p.device)
    per_tensor = any(m.gran == "per_tensor" for m in moments if m.bits < 32)
    state["scales"] = torch.zeros(1 if per_tensor else n, 2, device=p.device)
    return state


def _kind(t: Tensor | None) -> str:
    """Describe a tensor of the state for an error message."""
    return "nothing" if t is None else f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
