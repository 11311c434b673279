"""Prune heads and hidden units of a GPT-2 while its weights learn their bits (GETA, Qu et al. 2025, arXiv 2502.16638).

One run makes a trained model smaller in two ways: exactly K groups (heads, hidden units: extensions/groups.py) become
zero and are cut out; and the weights of the blocks' linears end on grids of b bits each, b within --bits, whose step d,
range q_m and exponent t are learned (extensions/grid.py):

    x~ = sgn(x) min(|x|, q_m)^t      Q(x) = d round(x~ / d)      b = log2(q_m^t / d + 1) + 1
    d(b) = q_m^t / (2^(b - 1) - 1)   v = (w before - w after) / lr, the direction of a step of AdamW

QASSO, the optimizer, is what happens around that step, in four stages; after every step d(b_u) <= d <= d(b_l):

    warm-up      b_u = 16
    projection   b_u falls from 16 to its target, in equal periods
    joint        each period marks the groups of lowest score; with each step marked rows lose gamma Q(x), and at the
                 end of the period they are zero for good. gamma and d come from the rule `forget`
    cool-down    b is rounded and stays; q_m and t still learn

Weights only, simulated arithmetic; embeddings, LayerNorms, biases stay fp32. What was cut is really gone. out_dir gets
ckpt.pt, to go on; compressed.pt, a plain GPT with its weights on the grid; packed.pt, the same as codes of b bits, read
by grid.unpack_weights. Ours: heads and units are ranked apart; no block loses its last; gamma is bounded; d, q_m and t
do not decay, d is projected from the first step on. Not here: activation quantizers, counts of BOPs.

    python -m extensions.prune --init_from=out --sparsity=0.5 --bits=4,8 --out_dir=out-pruned --learning_rate=1e-3
    python eval.py --ckpt=out-pruned/compressed.pt
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import train
from extensions.grid import START, LearnedGrid, pack_weights
from extensions.groups import Groups, compress, gpt_groups, lowest, measures, saliency
from model import GPT
from optim import AdamW
from quant import QuantLinear
from support.checkpoint import load_weights, save_checkpoint
from support.config import flatten, one_line_errors, refuse_idle
from support.log import Log, read_log

ETA, ZETA, BETA = 0.999, 0.9, 0.8  # of the forget rule, as in the released code


@dataclass
class PruneConfig(train.TrainConfig):
    """Pruning and learned bits; --max_iters is the sum of the stages."""
    sparsity: float = 0.5  # share of the heads, and of the hidden units, that go; 0: only quantize
    bits: tuple[int, ...] = (4, 8)  # lowest and highest bits of a layer, 2 to 16
    stages: tuple[int, ...] = (100, 400, 1000, 1000)  # steps: warm-up, projection, joint, cool-down
    periods: int = 10  # of the projection, and of the joint stage
    quant_lr: float = 0.1  # learning rate of d, q_m and t, times that of the weights
    score: Literal["saliency", "magnitude", "random"] = "saliency"  # the groups of lowest score go
    forget: bool = True  # marked groups fade over their period; False: they are zero at once

    def __post_init__(self):
        bits, stages = (",".join(map(str, numbers)) for numbers in (self.bits, self.stages))
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"--sparsity={self.sparsity} must lie in [0, 1)")
        if len(self.bits) != 2 or not 2 <= self.bits[0] <= self.bits[1] <= START:
            raise ValueError(f"--bits={bits} must be two numbers, lowest and highest, 2 to {START}")
        four = len(self.stages) == 4 and min(self.stages) >= 0 < self.periods
        if not four or any(n % self.periods or not n for n in self.stages[1:3]):
            raise ValueError(f"--stages={stages} must be four numbers of steps, the second and the "
                             f"third positive multiples of --periods={self.periods}")
        if not 0 <= self.quant_lr < float("inf"):
            raise ValueError(f"--quant_lr={self.quant_lr} must be at least 0, and finite")
        pruning = (self.sparsity > 0, "without --sparsity above 0")
        refuse_idle(self, score=pruning, forget=pruning)
        self.max_iters = sum(self.stages)
        super().__post_init__()

    def at(self, step: int) -> tuple[float, int, int]:
        """Return b_u after the step; of a step in the joint stage its period, and the steps left in it, else -1, 0."""
        warm, projection, joint, _ = self.stages
        fallen = min(max((step - warm) * self.periods // projection + 1, 0), self.periods)
        i, length = step - warm - projection, joint // self.periods
        period, left = (i // length, length - i % length) if 0 <= i < joint else (-1, 0)
        return START - (START - self.bits[1]) * fallen / self.periods, period, left


def forget(c: Tensor, R: Tensor, v: Tensor, lr: float, s: float,
           most: float, least: float) -> tuple[float, float]:
    """Return (gamma, d): marked numbers lose gamma Q(x) = gamma (c + d R) beside their step -lr v.

    They are such that v.(-lr v - gamma (c + d R)) < 0: on the whole they still move against v.
    Args:
        c, R, v: x~, round(x~ / d) - x~ / d at the old d, and the direction, (n,); a bias x has c = x, R = 0.
        lr: learning rate.  s: 1 / steps left, the largest gamma.  most, least: range of d, in the paper d(b_l), d(b_u).
    Source: QASSO. min(s, ...) is ours: where c.v is a small negative number gamma would have no bound. In the Q(x) that
    is taken R is at the new d; the inequality is for the old one.
    """
    c, R, v = c.double(), R.double(), v.double()  # products of tiny numbers must not underflow
    cv, Rv, vv = (float(a @ v) for a in (c, R, v))
    gamma = 0.0 if not c.any() else s if cv >= 0 else min(s, (1 - ETA) * lr * vv / -cv)
    d = most if Rv >= 0 or gamma == 0 else min(most, ZETA * ETA * lr * vv / (gamma * -Rv))
    while d < least:
        gamma, d = gamma * BETA, d / BETA
    return gamma, min(d, most)


# -----------------------------------------------------------------------------
# the run: QASSO around the optimizer step

class PruneRun(train.Run):
    """A run whose model has grids and groups; it ends with a smaller one, which is evaluated, written and sampled."""
    needs = ("prune",)  # the grids in ckpt.pt

    def make_model(self) -> GPT:
        """Give the linears of the blocks their grids, and find the groups."""
        config = self.config
        if self.source is None:
            raise ValueError("--init_from=scratch: pruning begins with a trained model; "
                             "name one, as --init_from=out")
        model, self.grids = super().make_model(), {}  # by the weight's name
        for name, layer in model.named_modules():
            if not isinstance(layer, QuantLinear):
                continue
            if layer.recipe is not None or layer.reparam is not None:
                raise ValueError(f"{name} is quantized by other flags (--wbits, --abits, --gbits, "
                                 "an extension's); weights learn their bits here: drop those")
            if name != "lm_head":
                layer.reparam = self.grids[f"{name}.weight"] = LearnedGrid(layer.weight, config.quant_lr)
        if config.resume:  # the weights once more, now with the grids
            load_weights(model, self.source["model"], "checkpoint")
        self.groups, self.going = gpt_groups(config.model, model.vocab_size), {}  # by kind
        for kind, blocks in self.groups.items():
            total = sum(len(g.dead) for g in blocks)
            self.going[kind], most = round(config.sparsity * total), total - len(blocks)
            if self.going[kind] > most:
                raise ValueError(f"--sparsity={config.sparsity} takes {self.going[kind]} of {total} "
                                 f"{kind}, and each of {len(blocks)} blocks keeps one: "
                                 f"{most / total:.4g} is the most")
        return model

    def make_optimizer(self) -> AdamW:
        """Hook QASSO to AdamW's step, before and after it."""
        self.weights, optimizer = dict(self.raw.named_parameters()), super().make_optimizer()
        optimizer.register_step_pre_hook(lambda *_: self.before_step())
        optimizer.register_step_post_hook(lambda *_: self.after_step())
        return optimizer

    def before_step(self) -> None:
        """Keep the rows of all groups as they are; only the joint stage asks for them."""
        joint = self.config.at(self.step)[2] > 0
        rows = [name for blocks in self.groups.values() for g in blocks for name in g.rows(g.dead) if joint]
        self.before = {name: self.weights[name].detach().clone() for name in rows}

    @torch.no_grad()
    def after_step(self) -> None:
        """Project the bits; in the joint stage, mark groups and let them fade. All ranks do the same."""
        config, lr = self.config, self.optimizer.param_groups[0]["lr"]
        high, period, left = config.at(self.step)
        # (1) bits in range, before anything reads them
        for grid in self.grids.values():
            grid.project(config.bits[0], high)
        # (2) the first step of a period marks groups, and each of its steps takes its share of them
        v = {n: (x - self.weights[n]) / (lr or 1.0) for n, x in self.before.items()}
        if left == config.stages[2] // config.periods:
            for kind, blocks in self.groups.items():
                self.mark(blocks, v, period, self.going[kind] * (period + 1) // config.periods)
        for g in sum(self.groups.values(), []):
            if g.marked.any() and config.forget:
                self.fade(g, v, lr, left)
            g.dead |= g.marked & (left == 1 or not config.forget)
            g.marked &= ~g.dead
            for name, rows in g.rows(g.dead).items():  # whatever AdamW does
                self.weights[name][rows] = 0.0
        # (3) the end of the joint stage: bits become whole
        for grid in self.grids.values() if left == 1 and period == config.periods - 1 else ():
            grid.whole.copy_(grid.bits().round())
            grid.project(*config.bits)

    def mark(self, blocks: list[Groups], v: dict[str, Tensor], period: int, total: int) -> None:
        """Mark the groups of lowest score, so many that at the end of this period `total` are dead."""
        measured = [measures(g.numbers(self.before), g.numbers(v)) for g in blocks]
        measured = torch.cat(measured, 1).cpu()  # (5, groups of all blocks)
        generator = torch.Generator().manual_seed(self.config.seed + period)
        scores = {"saliency": saliency(measured), "magnitude": measured[0],
                  "random": torch.rand(measured.shape[1], generator=generator)}[self.config.score]
        for g, chosen in zip(blocks, lowest(scores, [g.dead for g in blocks], total), strict=True):
            g.marked |= chosen

    def fade(self, g: Groups, v: dict[str, Tensor], lr: float, left: int) -> None:
        """Set the layer's d, and take gamma Q(x) from marked rows, gamma x from their biases; x is from before."""
        rows = g.rows(g.marked)  # of the weight, and of the bias if there is one
        x, direction = ({n: t[n][index] for n, index in rows.items()} for t in (self.before, v))
        weight = next(iter(rows))
        grid = self.grids[weight]
        c, k = grid.codes(x[weight])
        R = {n: torch.zeros_like(t) for n, t in x.items()} | {weight: k - c / grid.d}
        most, least = (float(grid.step(bits)) for bits in self.config.bits)
        parts = (torch.cat([t.flatten() for t in p.values()]) for p in (x | {weight: c}, R, direction))
        gamma, d = forget(*parts, lr, 1 / left, most, least)
        grid.d.fill_(d)
        x[weight] = grid.d * grid.codes(x[weight])[1]  # Q(x)
        for name, index in rows.items():
            self.weights[name][index] -= gamma * x[name]

    def extra_state(self) -> dict:
        """Return which groups are marked or dead."""
        return {kind: [[g.marked, g.dead] for g in blocks] for kind, blocks in self.groups.items()}

    def load_extra_state(self, state: dict) -> None:
        """Take it up."""
        for kind, blocks in self.groups.items():
            for g, (marked, dead) in zip(blocks, state[kind], strict=True):
                g.marked, g.dead = marked, dead

    def evaluated_model(self) -> GPT:
        """Return the model as it is; when the run is over, the smaller one."""
        return compress(self.raw, self.groups) if self.step == self.config.max_iters else self.raw

    def checkpoint(self, log: Log, best: bool = False) -> bool:
        """Write ckpt.pt. There is no best one: what has the smallest loss has lost the least."""
        return super().checkpoint(log)

    def before_checkpoint(self, log: Log) -> None:
        """Write the other files first, so that a kill loses none of them."""
        self.processes.after_main(lambda: self.write(log))

    def write(self, log: Log) -> None:
        """Log the bits; when the run is over write compressed.pt and packed.pt, and log what they are worth."""
        if self.step < self.config.max_iters:
            return log.write(step=self.step, bits={n: float(g.bits()) for n, g in self.grids.items()})
        # (1) the files
        out, small = Path(self.config.out_dir), self.evaluated_model().cpu()  # as a whole: a tied head stays tied
        bits = {name: int(grid.whole) for name, grid in self.grids.items()}
        left = {kind: getattr(small.config, kind) for kind in self.groups}
        flat = {name: self.flat[name] for name in flatten(train.TrainConfig())}
        checkpoint = {"config": flat | left, "vocab_size": small.vocab_size, "step": self.step,
                      "model": small.state_dict(), "extensions": []}
        packed = pack_weights(checkpoint, {n: (g.d.detach().cpu(), bits[n]) for n, g in self.grids.items()})
        save_checkpoint(out / "compressed.pt", checkpoint)
        save_checkpoint(out / "packed.pt", packed)
        # (2) what they are; the loss is the one just logged, of this smaller model
        loss = [line["val_loss"] for line in read_log(out / "log.jsonl") if "val_loss" in line][-1]
        before = sum(p.numel() for name, p in self.weights.items() if ".reparam." not in name)
        facts = {"parameters": sum(p.numel() for p in small.parameters()), "parameters_before": before,
                 "compressed_bytes": (out / "compressed.pt").stat().st_size,
                 "packed_bytes": (out / "packed.pt").stat().st_size}
        gone = {kind: 1 - sum(n) / sum(len(g.dead) for g in self.groups[kind]) for kind, n in left.items()}
        log.write(step=self.step, val_loss=loss, **facts, **left, sparsity=gone, bits=bits)
        log.say("\n".join(f"{name}: {n:,}" for name, n in facts.items()))
        log.say("\n".join(f"{kind} left: {n}, {gone[kind]:.1%} gone" for kind, n in left.items()))
        log.say("bits: " + ", ".join(f"{n.removesuffix('.weight')} {b}" for n, b in bits.items()))


def main() -> None:
    """Prune, from the command line to the exit code."""
    with one_line_errors(quiet=int(os.environ.get("LOCAL_RANK", 0)) > 0):
        if any(arg.replace("-", "_").startswith("__max_iters") for arg in sys.argv):
            raise ValueError("--max_iters is the sum of --stages: give these")
    train.main(PruneConfig, PruneRun, __doc__)


if __name__ == "__main__":
    sys.argv[0] = "-m extensions.prune"  # as messages are to call it
    main()
