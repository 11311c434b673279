"""Few-bit weights: each is one of s points, stretched over its bucket (Polino et al. 2018, arXiv 1802.05668).

    Q(w) = alpha p[i(w)] + beta     alpha = max - min, beta = min of a bucket: k weights in a row (section 2)
                                    i(w) = index of the point p_j nearest to (w - beta) / alpha, ties to the upper one
    dL/dw = dL/dQ                   straight through (Algorithm 1)
    dL/dp_j = sum alpha dL/dQ       over the weights with i(w) = j (Algorithm 2): i(w), alpha, beta are constants

Points 0, 1/(s-1), ..., 1 make it uniform quantization; else each matrix has points of its own, which begin as quantiles
and are trained. Zero is in general no level. Every matrix of a GPT is quantized, the embeddings too, and a tied head as
the embedding it is; vectors stay fp32. extensions/distill.py trains such a Student and writes its files.
Ours: Adam's moments follow a point that passes another (the authors' code has SGD, and sorts after each step).
"""

import copy

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from model import GPT, GPTConfig, Teacher, quant_linears
from quant import QuantConfig
from support.codes import huffman, pack_bits, unhuffman, unpack_bits
from support.config import own

MOST = 256  # points of a matrix: an index is a byte at most


# -----------------------------------------------------------------------------
# Q(w). Legend: a matrix w is cut, row after row, into n buckets of k weights; s points, sorted.

def scaled(w: Tensor, bucket: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x = (w - beta) / alpha in [0, 1] (n, k), alpha and beta (n, 1), of a matrix w. bucket: k; 0: all of w.

    A bucket may cross rows; the last one is filled with copies of the last weight. In buckets of 2, [3, 1, 2] has
    x = [1, 0], [0, 0], alpha = 2, 1 (what a constant bucket gets), beta = 1, 2.
    """
    flat, k = w.flatten(), min(bucket or w.numel(), w.numel())
    t = torch.cat((flat, flat[-1:].expand(-len(flat) % k))).view(-1, k)  # (n, k)
    beta = t.amin(1, keepdim=True)  # (n, 1)
    alpha = t.amax(1, keepdim=True) - beta
    alpha = torch.where(alpha < 1e-10, 1.0, alpha)
    return (t - beta) / alpha, alpha, beta


def nearest(x: Tensor, points: Tensor) -> Tensor:
    """Return the index of the point (s,) nearest to each x, int64; with points [0, 1], 0.49 has 0 and 0.5 has 1."""
    middles = (points[1:] + points[:-1]) / 2
    return torch.bucketize(x, middles, right=True)  # the number of middles up to x


def quantize(w: Tensor, points: Tensor, bucket: int) -> Tensor:
    """Return Q(w) of a matrix w, for points (s,); both get their gradients, see the top of the file."""
    with torch.no_grad():
        x, alpha, beta = scaled(w, bucket)
        i = nearest(x, points)  # (n, k)
    q = (points[i] * alpha + beta).flatten()[:w.numel()].view(w.shape)
    return q + (w - w.detach())  # the bracket is 0, its gradient is 1


def bits_for(s: int) -> int:
    """Return ceil(log2 s), the bits of an index of s points."""
    return (s - 1).bit_length()


def share_out(norms: list[float], s: int) -> list[int]:
    """Return the number of points of each matrix, s on average: s/2, and more by its gradient's norm; 2 to 256.

    By largest remainders: for norms [2, 1] and s = 5, [6, 4]: 2 each, and 6 shared as 4 and 2. Source: section 4.
    """
    norms = torch.tensor(norms, dtype=torch.float64).clamp_min(1e-30)  # (matrices,)
    low = max(2, s // 2)
    rest, room, share = len(norms) * (s - low), MOST - low, torch.zeros_like(norms)
    for _ in norms:  # whoever is full leaves what is over to the others
        full = share >= room
        share = torch.where(full, room, (rest - room * full.sum()) * norms / norms[~full].sum())
    counts = share.floor().long()
    counts[(share - counts).argsort(descending=True, stable=True)[:rest - counts.sum()]] += 1
    return (low + counts).tolist()


def matrices(gpt: GPT) -> dict[str, nn.Parameter]:
    """Return what is quantized, by name."""
    return {name: p for name, p in gpt.named_parameters() if p.dim() == 2}


class Student(nn.Module):
    """A GPT that computes with Q(w) and keeps w: (idx, targets) -> loss, as train.Run wants its objective.

    Args: levels: the number of points of each matrix.  trained: they begin as quantiles and get gradients. Freeze w
    then: compiled (torch 2.13, CPU), the embedding loses its part of the gradient where w and the points both get one.
    """

    def __init__(self, gpt: GPT, levels: list[int], bucket: int, trained: bool = False):
        super().__init__()
        self.gpt, self.levels, self.bucket, points = gpt, levels, bucket, []
        for w, s in zip(matrices(gpt).values(), levels, strict=True):
            points.append(np.linspace(0, 1, s))
            if trained:  # the quantiles, 0 to 100 %, of the matrix's x
                x = scaled(w.detach(), bucket)[0].flatten()[:w.numel()]
                points[-1] = np.quantile(x.cpu().numpy(), points[-1])
        points = torch.from_numpy(np.concatenate(points)).to(w)  # fp32, on w's device
        self.points = nn.Parameter(points, requires_grad=trained)  # of all matrices: (sum of levels,)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each matrix w and its points (s,), by name; sorted, because a step may move one past another."""
        points = (part.sort().values for part in self.points.split(self.levels))
        return {name: (w, next(points)) for name, w in matrices(self.gpt).items()}

    def weights(self) -> dict[str, Tensor]:
        """Return Q(w) of each matrix, by name."""
        return {name: quantize(*pair, self.bucket) for name, pair in self.pairs().items()}

    def forward(self, idx: Tensor, targets: Tensor, teacher: Teacher | None = None) -> Tensor:
        """Return the GPT's loss at Q(w); w is not overwritten."""
        return torch.func.functional_call(self.gpt, self.weights(), (idx, targets, teacher))

    @torch.no_grad()
    def rounded(self) -> GPT:
        """Return a GPT that holds Q(w)."""
        model = copy.deepcopy(self.gpt)
        for name, q in self.weights().items():
            model.get_parameter(name).copy_(q)
        return model


# -----------------------------------------------------------------------------
# files: few tensors, because torch.save spends some 280 bytes on each

@torch.no_grad()
def pack(student: Student) -> dict[str, Tensor]:
    """Return what Q(w) is made from: "vectors", "points", "scales", and the indices twice: "codes" and "huffman"."""
    scales, indices, codes = [], [], []
    for w, points in student.pairs().values():
        x, *scale = scaled(w, student.bucket)
        scales.append(torch.cat(scale, 1))  # (n, 2): alpha, beta
        indices.append(nearest(x, points).flatten()[:w.numel()])
        codes.append(pack_bits(indices[-1], bits_for(len(points))))
    vectors = [p for p in student.gpt.parameters() if p.dim() < 2]
    parts = {"vectors": vectors, "scales": scales, "codes": codes,
             "points": [points for _, points in student.pairs().values()]}
    tensors = {name: torch.cat(part).cpu() for name, part in parts.items()}
    return tensors | {"huffman": huffman(indices)}


def unpack(stored: dict) -> dict:
    """Return the checkpoint in quantized.pt, bit for bit, from that in packed.pt or huffman.pt."""
    with torch.device("meta"):  # names and shapes
        shape = own(GPTConfig, stored["config"])
        gpt = GPT(shape, stored["vocab_size"], quant_linears(QuantConfig(), shape.n_layer))
    left, model = dict(stored["model"]), {}

    def take(name: str, n: int) -> Tensor:
        part, left[name] = left[name][:n], left[name][n:]
        return part
    if "huffman" in left:
        left["indices"] = unhuffman(left["huffman"])
    for (name, w), s in zip(matrices(gpt).items(), stored["levels"], strict=True):
        n, bits = w.numel(), bits_for(s)
        k = min(stored["bucket"] or n, n)
        i = take("indices", n) if "huffman" in left else \
            unpack_bits(take("codes", -(-n * bits // 8)), bits, n)
        alpha, beta = take("scales", -(-n // k)).repeat_interleave(k, 0)[:n].unbind(1)  # (n,) each
        model[name] = (take("points", s)[i] * alpha + beta).view(w.shape)
    model |= {name: take("vectors", len(p)) for name, p in gpt.named_parameters() if p.dim() < 2}
    facts = {key: stored[key] for key in ("config", "vocab_size", "step", "extensions")}
    return facts | {"model": model}
