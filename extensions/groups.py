"""What can be cut out of a model: groups of rows and columns, found by sending labels through it.

A group is a smallest set of rows and columns that can go together: without them the model runs, and computes what it
did if these rows were zero. The model itself says which these are; that is the first claim of GETA (Qu et al. 2025,
arXiv 2502.16638). To read it off, the model is run once on labels instead of numbers: an activation holds the names of
its channels, and what an operation does to a channel, it does to its label.

    linear                   columns have the labels of the input; each row, with its bias, makes a new one
    embedding                each column makes a new label
    view, split, transpose   move labels as they would move numbers
    GELU, ReLU, dropout      pass them on: f(0) = 0
    + and *                  tie the two that meet: one cannot go without the other
    attention                ties all labels of a head, in q, k and v: heads keep their size
    LayerNorm, in- and output    fix them: a mean over all channels, a shape that others rely on
    anything else            is refused

What is tied is a group, unless it is fixed. In GPT-2 these are the heads (rows of q, k and v, which are fused in
c_attn; columns of attn.c_proj) and the hidden units of the MLPs; the residual stream, which runs through LayerNorms,
is fixed. To find the groups of another model takes no more than rules for its operations; extensions/prune.py, which
has its groups from here, also expects that a group has rows in one matrix only.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig, quant_linears
from quant import QuantConfig

MOVES = {"view", "reshape", "flatten", "split", "chunk", "transpose", "permute", "__get__"}
PASSES = {"gelu", "relu", "silu", "tanh", "dropout"}
TINY = torch.finfo(torch.float32).tiny


@dataclass
class Groups:
    """G groups of one shape, as the heads of a block, and what has become of them."""
    places: dict[tuple[str, int], Tensor]  # {(parameter, axis): (G, n) int64}, its rows or columns
    marked: Tensor  # (G,) bool: to be zero soon
    dead: Tensor  # (G,) bool: zero

    def rows(self, which: Tensor) -> dict[str, Tensor]:
        """Return {parameter: (rows,) int64}: rows of weights, and biases, of the groups `which`, (G,) bool."""
        places = self.places.items()
        return {name: index[which].flatten() for (name, axis), index in places if axis == 0}

    def numbers(self, state: dict[str, Tensor]) -> Tensor:
        """Return what the rows of each group hold in `state`, {parameter: tensor}: (G, numbers)."""
        places = self.places.items()
        return torch.cat([state[name][index].flatten(1) for (name, axis), index in places if axis == 0], 1)


class _Labels(TorchFunctionMode):
    """Runs a model on labels, whole numbers as floats. 0 is fixed; parent leads from a label to one it is tied to."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.parent, self.places = [0], {}  # {(parameter, axis): (size,) labels}

    def root(self, label: int) -> int:
        """Return the label that stands for all that this one is tied to."""
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]  # half the way next time
        return label

    def tie(self, labels: Tensor) -> None:
        """Tie the labels in each row of (n, m) to each other."""
        for row in labels.long().tolist():
            roots = sorted({self.root(label) for label in row})
            for other in roots[1:]:
                self.parent[other] = roots[0]  # the smallest: 0 stays a root

    def new(self, shape: tuple[int, ...], *places: tuple[Tensor, int]) -> Tensor:
        """Return an activation (..., n) of n new labels, those of rows (axis 0) or columns (1) of parameters."""
        first, n = len(self.parent), shape[-1]
        assert first + n < 2**24, "labels must be exact in float32"
        self.parent += range(first, first + n)
        for p, axis in places:
            self.place(p, axis, torch.arange(first, first + n)[:, None])
        return torch.arange(first, first + n, dtype=torch.float32).expand(shape)

    def place(self, p: Tensor, axis: int, labels: Tensor) -> None:
        """Give an axis of a parameter these labels (size, m), tied to those it has already (as a tied head)."""
        mine = self.places.setdefault((self.names[id(p)], axis), labels[:, 0])
        self.tie(torch.cat([mine[:, None], labels], 1))

    def fix(self, x: Tensor) -> None:
        """Fix the labels of an activation."""
        self.tie(nn.functional.pad(x.reshape(1, -1), (1, 0)))

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        """Do to labels what `func` does to channels."""
        name, given = func.__name__, (*args, *(kwargs or {}).values())
        x = given[0] if given else None
        tensors = [t for t in given if isinstance(t, Tensor) and id(t) not in self.names]
        if name == "to":  # another dtype: the same channels, the same parameter
            return x
        if name == "embedding":
            return self.new((*x.shape, given[1].shape[1]), (given[1], 1))
        if name in MOVES or not any(t.is_floating_point() for t in tensors):  # no activation in it
            return func(*args, **(kwargs or {}))
        if name == "linear":
            self.place(given[1], 1, x.reshape(-1, x.shape[-1]).T)  # (columns, positions)
            rows = [(p, 0) for p in given[1:] if p is not None]  # and the bias
            return self.new((*x.shape[:-1], len(given[1])), *rows)
        if name in ("add", "mul") and isinstance(given[1], Tensor):
            self.tie(torch.stack([t.flatten() for t in torch.broadcast_tensors(*given[:2])], 1))
        elif name == "scaled_dot_product_attention":  # q, k, v: (B, heads, T, head size)
            self.tie(torch.cat([t.transpose(0, 1).flatten(1) for t in given[:3]], 1))
            return given[2]
        elif name == "layer_norm":
            self.fix(x)
        elif name not in PASSES:
            raise ValueError(f"what {name} does to channels is not known; add a rule to groups.py")
        return x


def find_groups(model: nn.Module, *inputs: Tensor) -> list[Groups]:
    """Return a model's groups, those of one shape together. A float input must be zeros: its channels are fixed."""
    labels, found, shapes = _Labels(model), {}, {}
    with torch.no_grad(), labels:
        output = model(*inputs)
    labels.fix(output)
    for place, its in labels.places.items():  # {label that stands for a group: {place: indices}}
        for i, label in enumerate(its.long().tolist()):
            found.setdefault(labels.root(label), {}).setdefault(place, []).append(i)
    found.pop(0, None)  # what is fixed
    for group in found.values():
        shape = tuple((place, len(index)) for place, index in group.items())
        shapes.setdefault(shape, []).append(group)
    return [Groups({place: torch.tensor([g[place] for g in same]) for place, _ in shape},
                   *torch.zeros(2, len(same), dtype=torch.bool)) for shape, same in shapes.items()]


def gpt_groups(config: GPTConfig, vocab_size: int) -> dict[str, list[Groups]]:
    """Return the groups of a GPT of this shape, block by block, by GPTConfig's names for how many there are."""
    with torch.device("meta"):  # a model without numbers
        linear = quant_linears(QuantConfig(), config.n_layer)
        model = GPT(replace(config, keep8="none"), vocab_size, linear)
    found = find_groups(model, torch.zeros(1, 1, dtype=torch.long))
    heads = [".attn." in name for g in found for name, _ in list(g.places)[:1]]
    return {"heads": [g for g, is_head in zip(found, heads, strict=True) if is_head],
            "hidden": [g for g, is_head in zip(found, heads, strict=True) if not is_head]}


def measures(x: Tensor, v: Tensor) -> Tensor:
    """Return five measures of G groups of n numbers x that move along -v, (G, n) each: (5, G). The first is |x|.

    Source: the saliency of QASSO's released code.
    """
    size, dot = x.norm(dim=1), (x * v).sum(1)  # (G,)
    cosine = dot / (size * v.norm(dim=1)).clamp_min(TINY)
    return torch.stack([size, size / x.shape[1], cosine + 1, dot.abs(), dot.square() / 2])


def saliency(measured: Tensor) -> Tensor:
    """Return the score (G,) of the measures (5, G): their mean, each divided by its L2 norm over the groups."""
    return (measured / measured.norm(dim=1, keepdim=True).clamp_min(TINY)).mean(0)


def lowest(scores: Tensor, gone: list[Tensor], total: int) -> list[Tensor]:
    """Choose the groups of lowest score until `total` are gone or chosen, but never the last one of a block.

    Args: scores: of the groups of all blocks, one behind the other.  gone: (G,) bool for each block.
    Returns: as gone, True where chosen now.
    """
    sizes, order = [len(g) for g in gone], scores.clone()
    for mine, g in zip(order.split(sizes), gone, strict=True):  # views
        best = mine.masked_fill(g, -torch.inf).argmax()
        mine[g], mine[best] = torch.inf, torch.inf
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order.argsort(stable=True)[:total - sum(int(g.sum()) for g in gone)]] = True
    return list(chosen.split(sizes))


def cut(state: dict[str, Tensor], groups: list[Groups]) -> dict[str, Tensor]:
    """Return the state {parameter: tensor} without the rows and columns of dead groups."""
    state = dict(state)
    for g in groups:
        for (name, axis), index in g.places.items():
            left = index[~g.dead].flatten().sort().values.to(state[name].device)
            state[name] = state[name].index_select(axis, left)
    return state


@torch.no_grad()
def compress(model: GPT, groups: dict[str, list[Groups]]) -> GPT:
    """Return a plain GPT of the same function: without the dead groups, its weights as their grids round them."""
    state = {name: t for name, t in model.state_dict().items() if ".reparam." not in name}
    state |= {f"{name}.weight": layer.used_weight() for name, layer in model.named_modules()
              if getattr(layer, "reparam", None) is not None}
    left = {kind: tuple(int((~g.dead).sum()) for g in blocks) for kind, blocks in groups.items()}
    config = replace(model.config, **left)
    small = GPT(config, model.vocab_size, quant_linears(QuantConfig(), config.n_layer), model.dtype)
    small.load_state_dict(cut(state, sum(groups.values(), [])))
    return small.to(model.wte.weight.device)
