"""extensions/groups.py: what labels find is what a person would write down, and what can be cut out of a model."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from extensions.grid import LearnedGrid
from extensions.groups import compress, cut, find_groups, gpt_groups, lowest, measures, saliency
from model import GPT, GPTConfig, quant_linears
from quant import QuantConfig


def written(config):
    """Return GPT-2's groups as a person writes them: {(parameter, axis): rows or columns of each group}, by kind."""
    kinds, size = {"heads": [], "hidden": []}, config.n_embd // config.n_head
    for i in range(config.n_layer):
        heads, hidden = config.widths(i)
        made = [[part * heads * size + head * size + j for part in range(3) for j in range(size)]
                for head in range(heads)]  # q, k and v are fused
        used = [[head * size + j for j in range(size)] for head in range(heads)]
        units = [[j] for j in range(hidden)]
        for kind, name, rows, columns in (("heads", f"h.{i}.attn.c_attn", made, used),
                                          ("hidden", f"h.{i}.mlp.c_fc", units, units)):
            places = {(f"{name}.weight", 0): rows, (f"{name}.bias", 0): rows,
                      (f"h.{i}.{'attn' if kind == 'heads' else 'mlp'}.c_proj.weight", 1): columns}
            kinds[kind].append({k: v for k, v in places.items() if config.bias or not k[0].endswith("bias")})
    return kinds


@pytest.mark.parametrize("config", [
    GPTConfig(3, 4, 32, 8), GPTConfig(1, 1, 8, 1, keep8="both", dropout=0.0),
    GPTConfig(2, 4, 32, 8, bias=False, untied_head=True, stable_embedding=True, dropout=0.1),
    GPTConfig(2, 4, 32, 8, heads=(1, 3), hidden=(45, 1))], ids=["GPT-2", "smallest", "variant", "pruned"])
def test_labels_find_what_is_written(config):
    found = gpt_groups(config, 50)
    assert {kind: [{k: v.tolist() for k, v in g.places.items()} for g in blocks] for kind, blocks in found.items()} \
        == written(config)
    assert not any(g.dead.any() or g.marked.any() for blocks in found.values() for g in blocks)


class Branches(nn.Module):
    """Two branches that are added, one that is gated, a residual: what another architecture may have."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.alone, self.out, self.norm = nn.Linear(4, 3, bias=False), nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x):
        y = (F.relu(self.a(x)) + torch.tanh(self.b(x))) * F.silu(self.gate(x))
        x = x + self.c(y)
        return self.norm(x + self.out(F.dropout(self.alone(x), 0.5, self.training)))


def test_another_architecture():
    """a, b, gate and c share their units; what is added to the residual stream stays; dead groups can be cut."""
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(5, 4)
    tied, alone = find_groups(model, torch.zeros(2, 4))
    both = [(name, 0) for n in ("a", "b", "gate") for name in (f"{n}.weight", f"{n}.bias")]
    assert set(tied.places) == {*both, ("c.weight", 1)}
    assert set(alone.places) == {("alone.weight", 0), ("out.weight", 1)}
    for g in (tied, alone):
        assert all(index.tolist() == [[j] for j in range(len(g.dead))] for index in g.places.values())
    tied.dead[[0, 4]], alone.dead[1] = True, True
    for g in (tied, alone):
        for name, rows in g.rows(g.dead).items():
            model.state_dict()[name][rows] = 0
    assert tied.numbers(model.state_dict()).shape == (6, 15)  # of three rows and biases
    state, small = cut(model.state_dict(), [tied, alone]), Branches().eval()
    for name, module in small.named_children():
        for key in module.state_dict():
            setattr(module, key, nn.Parameter(state[f"{name}.{key}"]))
    assert small.a.weight.shape == (4, 4) and small.c.weight.shape == (4, 4) and small.out.weight.shape == (4, 2)
    assert torch.allclose(small(x), model(x), atol=1e-6)


@pytest.mark.parametrize("what", [lambda x: torch.sigmoid(x), lambda x: torch.sigmoid(input=x), lambda x: x + 1.0,
                                  lambda x: x.softmax(-1)])
def test_what_has_no_rule_is_refused(what):
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return what(self.a(x))
    with pytest.raises(ValueError, match="does to channels is not known; add a rule"):
        find_groups(Unknown(), torch.zeros(1, 4))


@given(st.lists(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=4),
       st.data())
def test_lowest(blocks, data):
    """One after the other by hand: exactly so many, the lowest ones, never the last of a block."""
    for block in blocks:
        block[0] = (block[0][0], False)  # of each block one is alive
    scores = torch.tensor([float(s) for block in blocks for s, _ in block])
    gone = [torch.tensor([g for _, g in block]) for block in blocks]
    least = sum(int(g.sum()) for g in gone)
    total = data.draw(st.integers(least, sum(len(g) - 1 for g in gone)))
    chosen = lowest(scores, gone, total)
    after = [g | c for g, c in zip(gone, chosen, strict=True)]
    assert not any((g & c).any() for g, c in zip(gone, chosen, strict=True)) and not any(a.all() for a in after)
    assert sum(int(a.sum()) for a in after) == total
    left, taken = [g.clone() for g in gone], []
    for s, i, j in sorted((s, i, j) for i, block in enumerate(blocks) for j, (s, g) in enumerate(block) if not g):
        if len(taken) + least < total and int((~left[i]).sum()) > 1:
            left[i][j] = True
            taken.append(s)
    assert sorted(taken) == sorted(torch.cat([s[c] for s, c in zip(scores.split([len(g) for g in gone]), chosen,
                                                                   strict=True)]).tolist())


def test_saliency():
    """Five measures, number by number; each counts by its share of the L2 norm over the groups."""
    x, v = (torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    x[3] = 0.0  # a dead group
    by_hand = []
    for a, b in zip(x.tolist(), v.tolist(), strict=True):
        size, other = (sum(t * t for t in row) ** 0.5 for row in (a, b))
        dot = sum(s * t for s, t in zip(a, b, strict=True))
        by_hand.append([size, size / 6, dot / (size * other) + 1 if size else 1.0, abs(dot), dot**2 / 2])
    by_hand = torch.tensor(by_hand, dtype=torch.float64).T
    torch.testing.assert_close(measures(x, v), by_hand)
    norms = by_hand.square().sum(1).sqrt()
    torch.testing.assert_close(saliency(measures(x, v)), sum(by_hand[i] / norms[i] for i in range(5)) / 5)
    assert torch.equal(measures(torch.zeros(2, 3), torch.zeros(2, 3))[2], torch.ones(2))


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [{}, dict(bias=False), dict(heads=(2, 3), hidden=(45, 128), untied_head=True)])
def test_masked_is_compressed(shape, dtype, error):
    """Random masks and bits, garbage in dead columns: the same logits, and fewer parameters by the predicted count."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = GPT(GPTConfig(2, 4, 32, 16, **shape), 50, quant_linears(QuantConfig(), 2), dtype).eval()
        groups, weights = gpt_groups(model.config, 50), dict(model.named_parameters())
        predicted = 0
        for kind, blocks in groups.items():
            for g in blocks:
                g.dead = torch.rand(len(g.dead)) < 0.5
                g.dead[0] = False
                predicted += int(g.dead.sum()) * (3 * 8 * (32 + model.config.bias) + 8 * 32 if kind == "heads"
                                                  else 32 + model.config.bias + 32)
        with torch.no_grad():
            for p in weights.values():
                p.add_(torch.randn_like(p) * 0.1)
            for g in (g for blocks in groups.values() for g in blocks):
                for (name, axis), index in g.places.items():
                    which = index[g.dead].flatten()
                    weights[name].index_fill_(axis, which, 0.0 if axis == 0 else 1e3)
            for name, layer in model.named_modules():
                if name.startswith("h.") and isinstance(layer, torch.nn.Linear):
                    layer.reparam = LearnedGrid(layer.weight.clamp(-1, 1), 1.0)
                    layer.reparam.project(*[float(torch.randint(2, 9, ()))] * 2)
            small, idx = compress(model, groups).eval(), torch.randint(50, (2, 16))
            masked, cut = model(idx), small(idx)
        assert (masked - cut).abs().max() <= error * masked.abs().max() and masked.std() > 0.1
        assert sum(p.numel() for p in weights.values()) - sum(p.numel() for p in small.parameters()) == predicted > 0
        assert all(".reparam" not in name for name in small.state_dict())
    finally:
        torch.set_default_dtype(before)
