"""AdamW whose two moments are really stored in 8 or 4 bits.

Adam keeps two running means per parameter: m1 of the gradient and m2 of its square (m and v below). In fp32 they are
8 bytes, twice the weights. Here they are codes of a byte, or half a byte, and a scale per block, row or tensor:

    (1) read    m, v = decode(codes) * scale                    what the last step has left
    (2) update  m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    (3) step    p = (1 - lr wd) p - lr' m / (sqrt(v) + eps')    with the FRESH moments
    (4) store   scale = max|x| / top         codes = encode(x / scale)

That order is the paper's (2407.11722). lr' = lr sqrt(1 - b2^t) / (1 - b1^t) and eps' = eps sqrt(1 - b2^t) hold the
bias correction (Kingma and Ba 2015, end of section 2). A format is a code book, the levels of codes (x scale):

    linear   k        the paper's. Fine for m. FAILS for v: a small v becomes 0 while its m does not,
                      and m / sqrt(v) explodes (thousands of lr). Kept because that is a result.
    dynamic  a table  2110.02861 and bitsandbytes: 7 decades, each with twice the levels of the last.
    power    k |k|    fine near 0, where most values are. v has no code for 0: it cannot vanish
                      before its m does. 4-bit v: k, since a v rounded down makes large updates.

Decay moves v by 1 - b2 of itself a step, often less than half a code. Rounded to nearest such a v stays where it is,
too large (results/optimizer.md). So power's v is rounded up or down at random, right on average.

A tensor is stored as n rows of B elements: its own (per_channel), or blocks of it flattened. Its state: step; exp_avg
and exp_avg_sq, the codes of m and v, uint8 (n, B), or (n, B/2) for 4 bits, two to a byte; scales, fp32 (n, 2), for
per_tensor (1, 2), a column for m, one for v. A 32-bit moment is fp32 (n, B); with two of them, all is torch's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from math import sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from quant import SCALE_FLOOR
from support.checks import check_optim

MIN_SIZE = 4096  # elements; smaller tensors keep fp32 moments (2110.02861, section 2)
PIECE = 2**20  # elements a step takes at a time: their fp32 moments stay small, and in the cache

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
    m2round: Rounding | None = None  # of the second; auto: stochastic with power, else nearest
    mblock: int = 64  # elements of a block
    mfloor: bool = False  # max|x| of a linear scale never below 1e-8, as in the paper's code
    membed32: bool = False  # embeddings keep fp32 moments, as in both papers

    def __post_init__(self):
        check_optim(self)

    def formats(self) -> dict:
        """Return what a param_group records: m1 and m2, fields of a Moment, and block, elements."""
        def moment(bits, fmt, gran, rounding):
            return (bits, fmt, gran, rounding, self.mfloor and fmt == "linear") if bits < 32 else (32,)
        m2round = self.m2round or ("stochastic" if self.m2fmt == "power" else "nearest")
        return {"m1": moment(self.m1bits, self.m1fmt, self.m1gran, self.m1round),
                "m2": moment(self.m2bits, self.m2fmt, self.m2gran, m2round), "block": self.mblock}


class Moment(NamedTuple):
    """How one moment is stored. Plain constants: torch.compile builds them into the code."""
    bits: int = 32
    fmt: str = "power"
    gran: str = "per_block"
    rounding: str = "nearest"
    floor: bool = False  # the paper's 1e-8
    second: bool = False  # v, which is never negative, or m


# -----------------------------------------------------------------------------
# code books: which level a code stands for. Codes are ranks: a larger code is a larger level.

def ranks(moment: Moment) -> tuple[int, int, bool]:
    """Return (first k, last k, is the level k |k| or else k): code = k - first. Not for dynamic."""
    half, power = 2 ** (moment.bits - 1), moment.fmt == "power"
    if moment.second and power:
        return 1, 2 * half, moment.bits == 8
    # The paper's quantizer is symmetric: linear v wastes half of its codes.
    return (0 if moment.second else 1 - half), half - 1, power


def dynamic_levels(moment: Moment) -> list[float]:
    """Return dynamic's levels: 0, 1, and the middles of equal bins of (0.1, 1], (0.01, 0.1], ...

    A decade has twice the bins of the one below; v, without signs, twice those of m. m has no -1.
    Example: 8-bit m is -0.993 ... -7.75e-6 -3.25e-6 -5.5e-7 0 5.5e-7 3.25e-6 7.75e-6 ... 0.993 1.
    Source: 2110.02861, section 1.3, and bitsandbytes' create_dynamic_map.
    """
    levels = [0.0, 1.0]
    for decade in range(moment.bits - 1):
        bins, upper = 2 ** (decade + moment.second), 10.0 ** (decade - moment.bits + 2)
        middles = [upper * (0.1 + 0.9 * (j + 0.5) / bins) for j in range(bins)]
        levels += middles if moment.second else middles + [-x for x in middles]
    return sorted(levels)


def decode(codes: Tensor, scale: Tensor, moment: Moment) -> Tensor:
    """Return the fp32 moment of uint8 codes (n, B); scale (n, 1) or (1, 1)."""
    if moment.fmt == "dynamic":
        return torch.tensor(dynamic_levels(moment), device=codes.device)[codes.int()] * scale
    first, _, square = ranks(moment)
    k = codes.float() + first
    return (k * k.abs() if square else k) * scale


def encode(x: Tensor, scale: Tensor, moment: Moment, noise: Tensor | None = None) -> Tensor:
    """Return the uint8 codes of the fp32 moment x (n, B), the inverse of `decode`.

    noise, uniform in (0, 1), (n, 1) or (n, B): x is rounded up or down, to x on average (power's v
    only up to its smallest code). None is 1/2: to nearest, ties away from zero; in dynamic ties go up.
    Example: power m in 8 bits, x / scale = 6.4 lies between 4 and 9 -> k = 2, code 129.
    """
    inv_scale = 1 / scale
    if moment.fmt == "dynamic":
        middles = torch.tensor([(a + b) / 2 for a, b in pairwise(dynamic_levels(moment))], device=x.device)
        return torch.bucketize(x * inv_scale, middles, right=True).to(torch.uint8)
    # k becomes k + 1 from k + 1 - noise on. k^2 becomes (k + 1)^2 from k^2 + (1 - noise) (2k + 1) on, and that is
    # (k + 1 - noise)^2 + noise (1 - noise): the same once the root is taken.
    first, last, square = ranks(moment)
    noise, product = (0.5, 0.25) if noise is None else (noise, noise * (1 - noise))
    size = x.abs() * inv_scale
    k = (root(torch.relu(size - product)) if square else size) + noise
    k = torch.where(x < 0, -1.0, 1.0) * k.floor()
    # The clamp is for v below its smallest code, and for a largest level come out an ulp too large. (By way of int32:
    # straight from the float to uint8, compiled code would clamp once more.)
    return (k - first).to(torch.int32).clamp(0, last - first).to(torch.uint8)


def new_scale(x: Tensor, moment: Moment) -> Tensor:
    """Return the scale (n, 1), for per_tensor (1, 1), that maps max|x| to the largest level."""
    _, last, square = ranks(moment)
    top = 1 if moment.fmt == "dynamic" else last**2 if square else last
    amax = x.abs().amax((0, 1) if moment.gran == "per_tensor" else 1, keepdim=True)
    amax = amax.clamp(min=1e-8) if moment.floor else amax
    return amax * (1 / top) + SCALE_FLOOR  # never zero; adding it changes no scale that matters


def root(x: Tensor) -> Tensor:
    """Return the correctly rounded square root; eager torch's, MKL's, is an ulp off at times."""
    return x.sqrt() if torch.compiler.is_compiling() else x.double().sqrt().float()


def hash_noise(key: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return two numbers in (0, 1) per row, (n, 1) each. key: int32 (seed, number of first row).

    A row's elements share theirs: each is right on average. The hash is murmur3's finalizer, cheap
    and the same on every rank, after a resume, in every piece of a tensor and in compiled code.
    """
    # int32 arithmetic wraps around. Half a hash gives 15 bits: k + noise is then exact for k below 256.
    row = torch.arange(n, dtype=torch.int32, device=key.device)[:, None] + key[1]
    h = row * -1640531535 + key[0]
    h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387
    h = h ^ ((h >> 16) & 0xFFFF)
    return tuple(((bits & 0x7FFF).float() + 0.5) / 2**15 for bits in (h, h >> 16))


# -----------------------------------------------------------------------------
# one step of one tensor: the four lines at the top of this file

def adamw_update(p: Tensor, g: Tensor, codes1: Tensor, codes2: Tensor, scales: Tensor,
                 hyper: Tensor, key: Tensor | None, m1: Moment, m2: Moment) -> None:
    """Update parameter, codes and scales in place.

    p and g (n, B) have any float dtype. hyper (7,) is a tensor: a new learning rate is no new code.
    key: see hash_noise. An element of g that is inf, nan or beyond 2^63 (its square would overflow)
    counts as zero: it cannot poison its block. Whether to step at all is for the training loop.
    """
    decay, lr, beta1, rest1, beta2, rest2, eps = hyper.unbind()
    g = torch.where(g.float().abs() < 2.0**63, g.float(), 0.0)  # fp32 from here
    noise1, noise2 = (None, None) if key is None else hash_noise(key, len(g))
    # (1) read what the last step has left
    m = unpack(codes1, scales[:, :1], m1)
    v = unpack(codes2, scales[:, 1:], m2)
    # (2) update the running means
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    # (3) step with the fresh moments
    p.copy_(decay * p.float() - lr * (m / (root(v) + eps)))
    # (4) store: here, and only here, something is rounded
    pack(m, codes1, scales[:, :1], m1, noise1)
    pack(v, codes2, scales[:, 1:], m2, noise2)


def unpack(codes: Tensor, scale: Tensor, moment: Moment) -> Tensor:
    """Return the stored moment, fp32 (n, B). Low halves of bytes are the first half of a row."""
    if moment.bits == 32:
        return codes
    if moment.bits == 4:
        shifts = torch.tensor([[0], [4]], dtype=torch.uint8, device=codes.device)
        codes = ((codes[:, None] >> shifts) & 15).flatten(1)  # (n, B/2) -> (n, 2, B/2) -> (n, B)
    return decode(codes, scale, moment)


def pack(x: Tensor, codes: Tensor, scale: Tensor, moment: Moment, noise: Tensor | None) -> None:
    """Store the fresh moment x in place: its new scale and its codes, the inverse of `unpack`."""
    if moment.bits < 32:
        fresh = new_scale(x, moment)
        scale.copy_(fresh)
        x = encode(x, fresh, moment, noise if moment.rounding == "stochastic" else None)
    if moment.bits == 4:
        low, high = x.chunk(2, 1)  # (n, B/2) each
        x = low | (high << 4)
    codes.copy_(x)


@lru_cache
def compiled_update(m1: Moment, m2: Moment):
    """Return adamw_update compiled for two formats."""
    def update(*args) -> None:
        adamw_update(*args, m1=m1, m2=m2)
    # Dynamo counts graphs (8 at most) by code object, and learns what varies by its name. With one for all formats
    # it takes even the bits for a variable: 4 bits ran 1.7 times slower after 8, and dynamic did not compile.
    update.__code__ = update.__code__.replace(co_name=f"update_{m1}_{m2}")
    return torch.compile(update, fullgraph=True)


# -----------------------------------------------------------------------------
# the optimizer: which tensor is stored how, state_dict, and nothing numerical

def param_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Return AdamW's groups: matrices; embeddings; vectors, no decay and fp32 moments; reparams.

    Frozen ones are left out. A layer's `reparam`, a module that maps the weight to the one used,
    has few, sensitive parameters: no decay, fp32 moments, lr_scale, a factor of the learning rate.
    """
    fp32 = {"m1": (32,), "m2": (32,)}
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}  # and tied heads
    reparams = [getattr(m, "reparam", None) for m in model.modules()]
    lr_scale = {p: float(getattr(r, "lr_scale", 1.0))
                for r in reparams if isinstance(r, nn.Module) for p in r.parameters()}
    params = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in params if p not in lr_scale]
    groups = [{"params": [p for p in rest if p.dim() >= 2 and p not in tables]},
              {"params": [p for p in rest if p in tables], **(fp32 if config.membed32 else {})},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, **fp32}]
    for scale in sorted(set(lr_scale.values())):
        mine = [p for p in params if lr_scale.get(p) == scale]
        groups.append({"params": mine, "weight_decay": 0.0, **fp32, "lr_scale": scale})
    return [group for group in groups if group["params"]]


def layout(p: Tensor, group: dict) -> tuple[Moment, Moment, int, int]:
    """Return (m1, m2, n, B): p is stored as n rows of B elements, the last one filled up."""
    if p.is_complex():
        raise ValueError(f"a {tuple(p.shape)} parameter is complex; use its torch.view_as_real")
    m1, m2 = (Moment() if p.numel() < MIN_SIZE else Moment(*group[m]) for m in ("m1", "m2"))
    n, width = -(-p.numel() // group["block"]), group["block"]
    if "per_channel" in (m1.gran, m2.gran):
        n = p.shape[0] if p.dim() >= 2 else 1
        width = p.numel() // n
    if width % 2 and 4 in (m1.bits, m2.bits):
        raise ValueError(f"a {tuple(p.shape)} parameter has rows of {width}, and 4-bit codes "
                         "are packed in pairs; use per_block")
    return m1, m2._replace(second=True), n, width


def new_state(p: Tensor, group: dict) -> dict:
    """Return the state of p before the first step: scales of zero, so the codes mean zero too."""
    m1, m2, n, width = layout(p, group)
    zero = partial(torch.zeros, device=p.device)
    if m1.bits == m2.bits == 32 and p.dtype == torch.float32:  # torch's own state
        return {"step": zero(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    m, v = (zero(n, width) if bits == 32 else zero(n, width * bits // 8, dtype=torch.uint8)
            for bits in (m1.bits, m2.bits))
    scales = zero(1 if "per_tensor" in (m1.gran, m2.gran) else n, 2)
    return {"step": torch.zeros(()), "exp_avg": m, "exp_avg_sq": v, "scales": scales}


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW, but with the moments stored as `config` says.

    A group may override lr, betas, eps, weight_decay, m1, m2, block; its other keys are kept. lr is
    a float: set group["lr"] at every step. With torch's own state the step is torch's too, fused,
    and keeps a nan. seed: of stochastic rounding, one for all ranks. compile=False: eager and slow.
    """

    def __init__(self, params: Iterable, lr: float, config: OptimConfig | None = None, *,
                 eps: float = 1e-8, seed: int = 0, compile: bool = True):
        config = config or OptimConfig()
        self.seed, self.compile = seed, compile
        super().__init__(params, dict(lr=lr, betas=(config.beta1, config.beta2), eps=eps,
                                      weight_decay=config.weight_decay, **config.formats()))

    def add_param_group(self, group: dict) -> None:
        """Add a group, as torch does. Raises: ValueError for what cannot be stored."""
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            layout(p, self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step with the gradients in p.grad; parameters without one are left alone."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        index = -1  # counts all: the noise of one does not depend on the gradients of others
        for group in self.param_groups:
            plain = []  # for torch's own AdamW, all at once: 32 bits is not an imitation
            for p in group["params"]:
                index += 1
                state = self.state[p] = self.state[p] or new_state(p, group)
                if p.grad is None or p.numel() == 0:
                    continue
                if p.grad.is_sparse:
                    raise ValueError("a gradient is sparse: use nn.Embedding(sparse=False)")
                if "scales" in state:
                    self._update(p, group, state, index)
                else:
                    plain.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
            if plain:
                params, grads, m, v, steps = map(list, zip(*plain, strict=True))
                torch_adamw(params, grads, m, v, [], steps, fused=True, amsgrad=False,
                            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
        return loss

    def _update(self, p: Tensor, group: dict, state: dict, index: int) -> None:
        """Lay p out as rows and hand them to adamw_update, a piece at a time."""
        m1, m2, n, width = layout(p, group)
        update = compiled_update(m1, m2) if self.compile else partial(adamw_update, m1=m1, m2=m2)
        # The constants of this step, and a seed that no other tensor or step has.
        state["step"] += 1
        t, lr, (beta1, beta2) = int(state["step"]), group["lr"], group["betas"]
        debias = sqrt(1 - beta2**t)
        hyper = torch.tensor([1 - lr * group["weight_decay"], lr * debias / (1 - beta1**t), beta1,
                              1 - beta1, beta2, 1 - beta2, group["eps"] * debias], device=p.device)
        seed = np.random.SeedSequence((self.seed, t)).generate_state(index + 1).view(np.int32)[-1]
        # Rows: views where that can be; copies if p is not contiguous or its last row is to be filled up.
        flat, grad, more = p.flatten(), p.grad.flatten(), n * width - p.numel()
        if more:
            flat, grad = (nn.functional.pad(z, (0, more)) for z in (flat, grad))
        tensors = flat.view(n, width), grad.view(n, width), state["exp_avg"], state["exp_avg_sq"], state["scales"]
        # Pieces of rows, so that temporaries are small; one scale for all rows needs all of them at once.
        rows = max(1, PIECE // width) if len(state["scales"]) == n else n
        noisy = "stochastic" in (m1.rounding, m2.rounding)
        for first in range(0, n, rows):
            # .data forgets what a view is a view of: dynamo guards on that, and would compile again.
            piece = [z[first:first + rows].data for z in tensors]
            if self.compile:
                for z in piece:  # one graph for any n; B is a constant while it can be
                    torch._dynamo.maybe_mark_dynamic(z, 0)
            key = torch.tensor([seed, first], dtype=torch.int32, device=p.device) if noisy else None
            update(*piece, hyper, key)
        if flat.data_ptr() != p.data_ptr():  # it was a copy
            p.copy_(flat[:p.numel()].view(p.shape))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load codes and scales bit for bit. Raises: ValueError for another format or shape."""
        try:
            groups, states = self._checked(state_dict)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is not the state_dict of an optimizer: {error!r}") from error
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(states)

    def _checked(self, state_dict: dict) -> tuple[list[dict], dict]:
        """Return (param_groups, {p: state}) of a state_dict; torch would cast codes to floats."""
        saved_groups, saved_states = state_dict["param_groups"], dict(state_dict["state"])
        # The formats and the number of tensors of each group. (torch's AdamW has fp32 moments.)
        theirs, ours = ([(g.get("m1", (32,)), g.get("m2", (32,)), len(g["params"])) for g in groups]
                        for groups in (saved_groups, self.param_groups))
        if theirs != ours:
            raise ValueError(f"the state has m1, m2, tensors {theirs}; this optimizer has {ours}: "
                             "use the flags it was written with, or start afresh")
        groups, states = [], {}
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            if saved.get("amsgrad") or saved.get("maximize"):
                raise ValueError("a state with amsgrad or maximize does not fit; start afresh")
            needed = {key: saved[key] for key in ("lr", "betas", "eps", "weight_decay", "params")}
            groups.append({**group, **saved, **needed})  # others, as lr_scale, may be missing
            for p, key in zip(group["params"], saved["params"], strict=True):
                if not saved_states:  # written before the first step
                    continue
                stored, states[p] = saved_states.get(key, {}), new_state(p, group)
                theirs, ours = ({name: f"{t.dtype} {tuple(t.shape)}" for name, t in state.items()}
                                for state in (stored, states[p]))
                if theirs != ours:
                    raise ValueError(f"a {tuple(p.shape)} parameter: the state has {theirs}, this "
                                     f"optimizer needs {ours}")
                for name, t in states[p].items():
                    t.copy_(stored[name])
        return groups, states
