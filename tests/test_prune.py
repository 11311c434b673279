"""extensions/prune.py: the rule goes downhill, constraints hold after every step, cutting changes no logit."""

import signal
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, column, read, same
from hypothesis import given
from hypothesis import strategies as st
from test_train import child, group

import eval as evaluation
import train
from extensions import prune
from extensions.grid import unpack_weights
from extensions.groups import lowest
from extensions.prune import PruneConfig, PruneRun, forget
from model import quant_linears
from quant import QuantConfig
from support.checkpoint import load_checkpoint, model_from
from support.huggingface import load_hf

KEPT = [f for f in SMALL if not f.startswith(("--n_", "--block_size", "--max_iters", "--eval_interval"))]
# joint: steps 6 to 13 (from 0) in two periods of 4; 8 heads and 256 units in 2 blocks
FLAGS = [*KEPT, "--stages=2,4,8,4", "--periods=2", "--eval_interval=5", "--learning_rate=1e-2"]


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    """The checkpoint of a GPT of two blocks that has trained a little: dense(*flags) is its folder."""
    def dense(*flags):
        folder = tmp_path_factory.getbasetemp() / "-".join(["dense", *flags])
        if not folder.exists():
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(sys, "argv", ["train.py", *SMALL, f"--data_dir={data}", f"--out_dir={folder}",
                                            "--n_layer=2", "--n_head=4", "--sample_tokens=0", *flags])
                train.main()
        return folder
    return dense


@pytest.fixture
def pruned(run, dense):
    """Run extensions/prune.py in this process: pruned(out_dir, *flags) -> (exit code, stdout, stderr)."""
    def pruned(out, *flags, small=FLAGS, source=()):
        begin = [f"--init_from={dense(*source)}"] if small else []
        return run(out, *begin, *flags, small=small, main=prune.main)
    return pruned


# -----------------------------------------------------------------------------
# the rule, and the schedule

def draw(rng, n):
    """Return what `forget` is given for n marked numbers: R as a rounding to d leaves it."""
    x, d = torch.from_numpy(rng.normal(size=n) * 0.05), 10 ** rng.uniform(-4, -1)
    fine = d * rng.uniform(0.05, 1)
    return x, d, torch.round(x / d) - x / d, torch.from_numpy(rng.normal(size=n)), 10 ** rng.uniform(-5, -1), fine


@given(seed=st.integers(0, 2**32), n=st.integers(1, 30), left=st.integers(1, 100), agree=st.floats(-1, 1),
       against=st.floats(0, 30), orthogonal=st.booleans())
def test_forgetting_goes_downhill(seed, n, left, agree, against, orthogonal):
    """v.(-lr v - gamma (c + d R)) < 0; gamma <= 1 / steps left, equal where nothing speaks against it; d in range."""
    c, d, R, v, lr, fine = draw(np.random.default_rng(seed), n)
    v = v + agree * 30 * c - against * R  # c.v of either sign; R.v mostly negative
    v = v - c * (c @ v) / (c @ c) if orthogonal and n > 1 else v  # c.v nearly 0, of either sign
    coarse, s = d * 10, 1 / left
    lr = lr * 1e-3 if orthogonal else lr  # then d of the rule lies below its range, and gamma must pay for that
    gamma, new = forget(c, R, v, lr, s, coarse, fine)
    assert 0 < gamma <= s and fine <= new <= coarse
    assert float(v @ (-lr * v - gamma * (c + new * R))) < 0
    if c @ v >= 0 and R @ v >= 0:
        assert gamma == s and new == coarse  # in the last step 1: all of it
    if c @ v < 0:  # what is taken uphill is less than a thousandth of the step
        assert gamma * -(c @ v) <= 0.0010001 * lr * (v @ v)
    if c @ v >= 0 and R @ v < 0 and new > fine / 0.8:
        assert gamma == s and new * gamma * -(R @ v) <= 0.9 * lr * (v @ v)


def test_where_the_rule_ends():
    """Nothing to forget, no step, fixed bits: no nan, no endless loop. With R at the new d it may go uphill, rarely."""
    one, zero = torch.ones(3), torch.zeros(3)
    assert forget(zero, zero, one, 0.1, 0.5, 2.0, 1.0) == (0.0, 2.0)
    assert forget(one, -one, zero, 0.1, 0.5, 2.0, 1.0) == (0.5, 2.0)
    gamma, d = forget(one, -0.5 * one, 1e-20 * one, 1e-6, 1.0, 1.0, 1.0)
    assert d == 1.0 and 0 < gamma < 1e-15
    assert 0 < forget(-one, one, 1e-25 * one, 1e-6, 1.0, 2.0, 1.0)[0] < 1e-30  # in float32 |v|^2 would be 0
    rng, uphill = np.random.default_rng(0), 0
    for _ in range(3000):
        c, d, R, v, lr, fine = draw(rng, 20)
        gamma, new = forget(c, R, v, lr, 0.1, d * 10, fine)
        uphill += float(v @ (-lr * v - gamma * new * torch.round(c / new))) >= 0
    assert 0 < uphill <= 30


def test_stages():
    config = PruneConfig(stages=(3, 4, 6, 2), periods=2, bits=(4, 8))
    assert config.max_iters == 15
    assert [config.at(step)[0] for step in range(15)] == [16] * 3 + [12] * 2 + [8] * 10
    assert [config.at(step)[1:] for step in range(6, 14)] == [
        (-1, 0), (0, 3), (0, 2), (0, 1), (1, 3), (1, 2), (1, 1), (-1, 0)]


# -----------------------------------------------------------------------------
# a run

def watch(patch, bits=(4, 8)):
    """Check every constraint after every step of the runs to come; return what was seen of each step."""
    seen, after_step = [], PruneRun.after_step

    def watched(self):
        after_step(self)
        high = self.config.at(self.step)[0]
        b = [float(grid.bits()) for grid in self.grids.values()]
        assert all(bits[0] - 1e-3 <= x <= high + 1e-3 for x in b), b
        dead = {kind: [g.dead.clone() for g in blocks] for kind, blocks in self.groups.items()}
        for kind, blocks in self.groups.items():
            for i, g in enumerate(blocks):
                assert not g.dead.all() and not (g.dead & g.marked).any()
                assert not any(self.weights[name][rows].any() for name, rows in g.rows(g.dead).items())
                assert not seen or not (seen[-1]["dead"][kind][i] & ~g.dead).any()  # once dead, always
        counts = {kind: [sum(int(getattr(g, what).sum()) for g in blocks) for what in ("dead", "marked")]
                  for kind, blocks in self.groups.items()}
        seen.append({"step": self.step, "bits": b, "dead": dead, **counts})
    patch.setattr(PruneRun, "after_step", watched)
    return seen


@pytest.mark.parametrize("flags, heads, hidden", [
    ([], 4, 128), (["--sparsity=0.37", "--bits=2,5"], 3, 95), (["--forget=False"], 4, 128),
    (["--score=magnitude", "--m1bits=8", "--m2bits=8"], 4, 128), (["--score=random", "--sparsity=0.75"], 6, 192),
    (["--sparsity=0", "--bits=6,6", "--keep8=both"], 0, 0), (["--quant_lr=10"], 4, 128)])
def test_constraints_hold_after_every_step(flags, heads, hidden, pruned, tmp_path, monkeypatch):
    """Bits in range, dead rows zero for good, no empty block; exactly K of each kind; at last whole, constant bits."""
    low, high = map(int, dict(f.lstrip("-").split("=") for f in flags).get("bits", "4,8").split(","))
    seen = watch(monkeypatch, (low, high))
    code, out, err = pruned(tmp_path / "a", *flags)
    assert code == 0, err
    at_once = "--forget=False" in flags
    for i, line in enumerate(seen):
        begun, over = (min(max((i - start) // 4, 0), 2) for start in (2, 5))  # periods, after step i
        for kind, K in (("heads", heads), ("hidden", hidden)):
            marked, dead = K * begun // 2, K * over // 2
            assert line[kind] == ([marked, 0] if at_once else [dead, marked - dead]), line
    whole = [line["bits"] for line in seen[13:]]
    assert all(b == pytest.approx(list(map(round, whole[0])), abs=1e-3) for b in whole)
    last = [line for line in read(tmp_path / "a") if "packed_bytes" in line][0]
    assert last["sparsity"] == pytest.approx({"heads": heads / 8, "hidden": hidden / 256})
    assert list(last["bits"].values()) == list(map(round, whole[0])) and len(whole) == 5


def test_marks_are_the_lowest(pruned, tmp_path, monkeypatch):
    """By magnitude: the norms of rows and biases before the step, of all blocks together; then `lowest` chooses."""
    asked, mark = [], PruneRun.mark
    monkeypatch.setattr(prune, "lowest", lambda *args: asked.append(args) or lowest(*args))

    def watched(self, blocks, v, period, total):
        mark(self, blocks, v, period, total)
        (scores, _, count), size = asked[-1], 8 if "attn" in str(blocks[0].places) else 1
        name = "attn.c_attn" if size == 8 else "mlp.c_fc"
        sums = [torch.cat([self.before[f"h.{i}.{name}.weight"], self.before[f"h.{i}.{name}.bias"][:, None]], 1)
                .square().sum(1).view(-1, 4 if size == 8 else 128, size).sum((0, 2)) for i in range(2)]  # q, k, v
        torch.testing.assert_close(scores, torch.cat(sums).sqrt())
        chosen = lowest(scores, [g.dead for g in blocks], total)
        assert count == total and all(torch.equal(g.marked, c) for g, c in zip(blocks, chosen, strict=True))
    monkeypatch.setattr(PruneRun, "mark", watched)
    assert pruned(tmp_path / "a", "--score=magnitude")[0] == 0 and [args[2] for args in asked] == [2, 64, 4, 128]


def test_marked_rows_fade(pruned, tmp_path, monkeypatch):
    """Beside the step they lose gamma Q(x), biases gamma bias; the rule for gamma and d sees the right numbers."""
    asked, fade = [], PruneRun.fade

    def rule(*args):
        asked.append(args)
        return 0.25, args[-2]  # a gamma of ours, and the largest d
    monkeypatch.setattr(prune, "forget", rule)

    def watched(self, g, v, lr, left):
        after = {name: p.detach().clone() for name, p in self.weights.items()}  # the step, before anything fades
        name = next(iter(g.places))[0].removesuffix(".weight")
        grid = self.raw.get_submodule(name).reparam
        old, rows = grid.d.item(), g.places[f"{name}.weight", 0][g.marked].flatten()
        x, bias = (self.before[f"{name}.{what}"][rows] for what in ("weight", "bias"))
        fade(self, g, v, lr, left)
        # (1) what the rule was asked
        c, R, direction, rate, s, coarse, fine = asked[-1]
        step = torch.cat([(self.before[f"{name}.{what}"] - after[f"{name}.{what}"])[rows].flatten()
                          for what in ("weight", "bias")])
        torch.testing.assert_close(lr * direction, step, rtol=1e-3, atol=1e-7)
        clipped = x.sign() * x.abs().clamp(max=grid.q_m) ** grid.t
        torch.testing.assert_close(c, torch.cat([clipped.flatten(), bias]))
        torch.testing.assert_close(R[:x.numel()], (torch.round(clipped / old) - clipped / old).flatten())
        assert not R[x.numel():].any() and len(R) == len(c) and rate == lr and s == 1 / left
        most, least = (float(grid.q_m**grid.t) / (2**(b - 1) - 1) for b in (4, 8))
        assert [coarse, fine] == pytest.approx([most, least])
        # (2) what was done: marked rows and no others
        assert grid.d.item() == pytest.approx(coarse)
        for what, taken in (("weight", grid(x)), ("bias", bias)):
            after[f"{name}.{what}"][rows] -= 0.25 * taken
        assert all(torch.allclose(p, after[name], rtol=0, atol=1e-7) for name, p in self.weights.items()
                   if ".reparam." not in name) and float(grid(x).detach().abs().max()) > 1e-3
    monkeypatch.setattr(PruneRun, "fade", watched)
    assert pruned(tmp_path / "a")[0] == 0 and 16 <= len(asked) <= 32


def test_files(pruned, run, call, tmp_path):
    """compressed.pt is the model of the logged loss, for eval.py, --init_from and Hugging Face; packed.pt its codes."""
    pytest.importorskip("safetensors")
    out = tmp_path / "a"
    code, text, err = pruned(out, "--eval_tokens=2048")
    assert code == 0, err
    last = [line for line in read(out) if "packed_bytes" in line][0]
    sizes = {name: (out / f"{name}.pt").stat().st_size for name in ("compressed", "packed")}
    assert {name: last[f"{name}_bytes"] for name in sizes} == sizes and all(f"{n:,}" in text for n in sizes.values())
    assert last["val_loss"] == column(out, "val_loss")[-1] and "sample:" in text
    # the codes are the weights; every weight is on a grid of as many bits as was said
    compressed, packed = load_checkpoint(out / "compressed.pt"), torch.load(out / "packed.pt")
    assert same(unpack_weights(packed), compressed) and sizes["packed"] < sizes["compressed"]
    for name, bits in last["bits"].items():
        assert len(compressed["model"][name].unique()) <= 2**bits - 1 and packed["packed"][name]["bits"] == bits
    small = model_from(compressed, quant_linears(QuantConfig(), 2)).eval()
    assert sum(p.numel() for p in small.parameters()) == last["parameters"] < last["parameters_before"]
    # evaluated, gone on from, exported
    printed = call(evaluation.main, f"--ckpt={out}/compressed.pt", "--sample_tokens=20")[1]
    assert f"val_loss {last['val_loss']:.4f} nats" in printed
    flags = [f"--init_from={out}/compressed.pt", "--max_iters=1", "--eval_tokens=2048"]
    code, _, err = run(tmp_path / "b", *flags, small=KEPT)
    assert code == 0 and column(tmp_path / "b", "val_loss")[0] == pytest.approx(last["val_loss"], abs=1e-6), err
    code, _, err = pruned(tmp_path / "c", f"--init_from={out}/compressed.pt", "--sparsity=0.2")
    assert code == 0 and sum([x for x in read(tmp_path / "c") if "packed_bytes" in x][0]["heads"]) == 3, err
    code, printed, err = call(evaluation.main, f"--ckpt={out}/compressed.pt", f"--export={tmp_path}/hf")
    assert code == 0 and "zeros for what was pruned: no smaller" in printed, err
    full, idx = load_hf(tmp_path / "hf"), torch.arange(24)[None]
    assert not full["config"]["heads"] and full["model"]["h.0.mlp.c_fc.weight"].shape == (128, 32)
    plain = model_from(full, quant_linears(QuantConfig(), 2)).eval()
    assert torch.allclose(plain(idx)[..., :257], small(idx)[..., :257], atol=1e-5)
    # ckpt.pt is for --resume: eval.py does not take it for the model that it is not
    code, _, err = call(evaluation.main, f"--ckpt={out}")
    assert code == 2 and "trained with extensions/prune.py, which eval.py does not know" in err
    assert call(evaluation.main, f"--ckpt={out}", "--quantizers=off", "--sample_tokens=0")[0] == 0


@pytest.mark.parametrize("at", [1, 4, 7, 9, 12, 16])
def test_resume_is_bitwise_in_each_stage(at, pruned, signals, tmp_path, whole):
    """Stopped in warm-up, projection, both periods, their first steps and later ones, cool-down: the same run."""
    signals(signal.SIGTERM, at)
    code, out, err = pruned(tmp_path / "cut")
    assert code == 143 and "python program.py --resume" in out, err
    signals()
    code, _, err = pruned(tmp_path / "cut", "--resume", small=[])
    assert code == 0, err
    lines = [[{k: v for k, v in line.items() if not k.endswith("_bytes")} for line in read(out)[1:]]
             for out in (tmp_path / "cut", whole)]  # the files hold the name of out_dir
    assert [line for line in lines[0] if (set(line), line["step"]) != ({"step", "bits"}, at)] == lines[1]
    assert not (whole / "ckpt_best.pt").exists()
    for name in ("ckpt.pt", "compressed.pt"):
        assert same(load_checkpoint(tmp_path / "cut" / name), load_checkpoint(whole / name))


def test_killed_at_the_end(pruned, tmp_path, monkeypatch):
    """Cut off while it writes the last files, a run is not over: resumed, it makes them."""
    with monkeypatch.context() as patch:
        patch.setattr(prune, "pack_weights", lambda *_: sys.exit(9))
        assert pruned(tmp_path / "a", "--quant_lr=0.3")[0] == 9
    assert not (tmp_path / "a/packed.pt").exists() and load_checkpoint(tmp_path / "a")["step"] < 18
    assert pruned(tmp_path / "a", "--resume", small=[])[0] == 0
    assert (tmp_path / "a/packed.pt").exists() and (ckpt := load_checkpoint(tmp_path / "a"))["step"] == 18
    scales = [group.get("lr_scale", 1.0) for group in ckpt["optimizer"]["param_groups"]]
    assert set(scales) == {1.0, 0.3}


@pytest.fixture(scope="module")
def whole(dense, data, tmp_path_factory):
    """The run of FLAGS, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "a"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["x", *FLAGS, f"--data_dir={data}", f"--out_dir={out}", f"--init_from={dense()}"])
        prune.main()
    return out


def rank(argv, variables):
    """Prune as one of several processes, and keep which groups were marked or dead after each step."""
    history, after_step = [], PruneRun.after_step

    def kept(self):
        after_step(self)
        history.append([(g.marked.clone(), g.dead.clone()) for blocks in self.groups.values() for g in blocks])
        torch.save([history, self.raw.state_dict()], f"{variables['KEPT']}/{self.processes.rank}.pt")
    PruneRun.after_step, main = kept, train.main
    train.main = lambda *args: main(*(args or (PruneConfig, PruneRun, "")))  # what child calls
    child(argv, variables)


def test_two_processes_are_one(whole, dense, data, tmp_path):
    """The same marks at each step on both ranks, identical weights, and the losses of one process."""
    argv = [*FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path / 'two'}", f"--init_from={dense()}"]
    assert group(argv, 2, rank, KEPT=str(tmp_path)) == [0, 0]
    assert same(*(torch.load(tmp_path / f"{i}.pt") for i in range(2)))
    for key in ("loss", "val_loss"):
        assert column(tmp_path / "two", key) == pytest.approx(column(whole, key), abs=2e-3)


def test_compiled(pruned, tmp_path):
    """The model compiled with its grids has the losses of the eager one, to rounding."""
    for name in ("False", "True"):
        flags = [f"--compile={name}", "--stages=1,2,2,1", "--periods=1"]
        assert pruned(tmp_path / name, *flags, source=["--n_layer=1"])[0] == 0
    eager, compiled = (column(tmp_path / name, "loss") for name in ("False", "True"))
    assert compiled == pytest.approx(eager, abs=1e-3) and compiled != eager  # Inductor's GELU is another


def test_without_biases(pruned, tmp_path):
    assert pruned(tmp_path / "a", source=["--bias=False"])[0] == 0
    assert not any(name.endswith("c_fc.bias") for name in load_checkpoint(tmp_path / "a" / "compressed.pt")["model"])


@pytest.mark.parametrize("flags, message", [
    ("--sparsity=1", "--sparsity=1.0 must lie in [0, 1)"), ("--sparsity=-0.1", "must lie in [0, 1)"),
    ("--sparsity=nan", "must lie in [0, 1)"), ("--sparsity=0.9", "--sparsity=0.9 takes 7 of 8 heads, and each of 2 "
                                               "blocks keeps one: 0.75 is the most"),
    *((f"--bits={bits}", f"--bits={bits} must be two numbers") for bits in ("4", "4,8,16", "8,4", "1,8", "4,17")),
    ("--stages=1,2,4", "--stages=1,2,4 must be four numbers of steps"),
    ("--stages=2,4,7,4", "multiples of --periods=2"),
    ("--stages=2,0,8,4", "positive multiples"), ("--stages=-2,4,8,4", "must be four numbers"),
    ("--periods=0", "multiples of --periods=0"), ("--quant_lr=-1", "--quant_lr=-1.0 must be at least 0"),
    ("--sparsity=0 --score=random", "--score=random has no effect without --sparsity above 0"),
    ("--sparsity=0 --forget=False", "--forget=False has no effect without --sparsity above 0"),
    ("--init_from=scratch", "--init_from=scratch: pruning begins with a trained model"),
    ("--max_iters=9", "--max_iters is the sum of --stages"), ("--max-iters=9", "--max_iters is the sum of --stages"),
    ("--wbits=8", "h.0.attn.c_attn is quantized by other flags (--wbits"), ("--abits=8", "is quantized by other flags"),
    ("--wbits=2 --quant_head --skip_blocks=0,1", "lm_head is quantized by other flags"),
    ("--lsq_bits=4", "is quantized by other flags"), ("--n_layer=3", "--n_layer=3 does not fit the weights of")])
def test_bad_flags(flags, message, pruned, tmp_path):
    code, _, err = pruned(tmp_path / "a", *flags.split())
    assert code == 2 and message in err.splitlines()[-1] and not (tmp_path / "a").exists(), err


def test_refused_when_resumed(whole, call):
    """Another sparsity is another run; train.py does not take it for one of its own."""
    for main, flags, message in ((prune.main, ["--sparsity=0.3"], "differs from the 0.5 this run began with"),
                                 (prune.main, [], "has finished its 18 steps"), (train.main, [], "unknown option")):
        code, _, err = call(main, "--resume", f"--out_dir={whole}", *flags)
        assert code == 2 and message in err
