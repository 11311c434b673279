"""bench.py: what it counts is what is there; its command line runs, small and uncompiled."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import bench
from bench import BenchConfig, Variant, interleaved, kept_for_backward, real_bytes, show
from model import GPTConfig
from support.device import flops_per_token

SHAPE = dict(n_layer=1, n_head=2, n_embd=64, block_size=16)


def config(**flags):
    """Return a small, uncompiled configuration."""
    small = dict(variants="E0", batch_size=2, dtype="float32", compile=False, model=GPTConfig(**SHAPE))
    return BenchConfig(**small | flags)


def test_interleaved(monkeypatch):
    """A round runs each work once, one more does not count; a machine ten times as slow changes no ratio."""
    calls, times = [], iter([9, 9, 1.0, 2.0, 10.0, 20.0, 10.0, 22.0])
    monkeypatch.setattr(bench, "seconds", lambda work, device: work() or next(times))
    found = interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 3, "cpu")
    assert calls == ["a", "b"] * 4 and found == [(10e3, 1.0), (20e3, 2.0)]


def test_show(capsys):
    show("title", [{"name": "a", "ms": 1234.5, "x": 0.5361}], False)
    assert capsys.readouterr().out == "title\n\n| name | ms | x |\n|---|---|---|\n| a | 1,234 | 0.536 |\n"


def test_kept_for_backward_by_hand():
    """A GELU keeps its input, a parameter is not counted, a storage counts once, and for its layer too."""
    model, x = torch.nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)
    for forward, numbers in ((lambda: F.gelu(x), 32), (lambda: F.gelu(x) + torch.tanh(x[:2]).sum(), 32 + 16),
                             (lambda: x * model.weight[0], 32), (lambda: (x * x).sum(), 32)):
        assert kept_for_backward(forward, model) == (numbers * 4, 0)
    assert kept_for_backward(lambda: F.gelu(model(x)), model, [model]) == (32 * 4 + 32 * 4, 32 * 4)


def test_fake_tensors_count_what_real_ones_do():
    c = config(what="memory", variants="w8a8,E0,w8a8+keep8,lsq4", vocab_size=60, compile=True)
    first, *_ = rows = bench.bench_memory(c, "cpu")[1]
    assert len(rows) == 4 and first["variant"] == "E0" and first["x E0, linear"] == first["x E0, all"] == 1
    for row in rows:
        v = Variant(row["variant"], c, "cpu")
        kept = kept_for_backward(v.forward, v.model, [m for m in v.model.h.modules() if isinstance(m, torch.nn.Linear)])
        assert kept == (row["everything, MiB"] * 2**20, row["linears, MiB"] * 2**20)


def test_memory_of_a_step():
    """Of the peak, parameters, optimizer and what is kept are there at once; a variant takes its presets' model."""
    plain, small = Variant("E0", config(), "cpu"), Variant("w8a8+keep8+adam8", config(), "cpu")
    a, b = (v.step() or v.memory() for v in (plain, small))
    size = sum(p.numel() for p in plain.model.parameters()) * 4 / 2**20
    assert a["parameters"] == a["gradients"] == a["optimizer"] / 2 == size and small.model.config.keep8 == "both"
    assert b["optimizer"] < 0.35 * a["optimizer"] and b["kept"] < a["kept"]
    assert all(mib["peak"] > mib["parameters"] + mib["optimizer"] + mib["kept"] for mib in (a, b))
    # AdamW needs no memory in fp32: the peak lies in backward, where less than two of the largest tensor come and go
    assert a["peak"] < a["parameters"] + a["optimizer"] + a["kept"] + a["gradients"] + 2 * 320 * 64 * 4 / 2**20


def test_compiled_keeps_less(monkeypatch):
    """README: compiled, W8A8 keeps clearly less than E0, though not as codes."""
    # what is kept is decided before code is generated, which takes a minute: this backend leaves that out
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    c = config(batch_size=16, compile=True, model=GPTConfig(**SHAPE | {"block_size": 64}))
    variants = Variant("E0", c, "cpu"), Variant("w8a8", c, "cpu")
    a, b = (kept_for_backward(v.forward, v.model)[0] for v in variants)
    assert b < 0.75 * a


def test_real_bytes_of_states():
    class Packed(torch.Tensor):  # as torchao keeps a moment: a float to look at, codes and scales inside
        codes, scale = torch.zeros(8, dtype=torch.uint8), torch.zeros(1)
        __tensor_flatten__ = lambda _: (["codes", "scale"], None)  # noqa: E731
    state = {"step": 3, "scalar": torch.zeros(()), "codes": torch.zeros(5, dtype=torch.int8),
             "packed": torch.zeros(8).as_subclass(Packed)}
    assert real_bytes({"a parameter": state}) == 5 + 8 + 4


def test_step_rows(monkeypatch):
    """tokens/s and MFU follow from the times: 2 x 16 tokens in 4 ms against a peak of 1 TFLOP/s."""
    monkeypatch.setattr(bench, "seconds", lambda work, device: work() or 4e-3)
    monkeypatch.setattr(bench, "peak_flops", lambda config, device: 1e12)
    row = bench.bench_step(config(rounds=2), "cpu")[1][0]
    assert row["tokens/s"] == pytest.approx(8000) and row["ms per step"] == row["AdamW, ms"] == 4 and row["x E0"] == 1
    assert row["MFU, %"] == pytest.approx(100 * 8000 / 1e12 * flops_per_token(Variant("E0", config(), "cpu").model))


@pytest.mark.parametrize("what, column, count, flags", [
    ("step", "peak", 3, "--batch_size=2 --rounds=1 --compile=False --variants=E0,plain,lsq4+adam8"),
    ("optimizer", "x fused", len(bench.OPTIMIZERS), "--vocab_size=60 --rounds=1 --compile=False"),
    ("memory", "linears, MiB", 4, "--batch_size=2 --dtype=bfloat16"),
    ("gemm", "roofline 8, ms", 12, "--batch_size=2 --rounds=1 --compile=False --dtype=float32")])
def test_command_line(what, column, count, flags, call, monkeypatch):
    monkeypatch.setitem(bench.LARGE, "cpu", 256)
    shape = [f"--{k}={v}" for k, v in SHAPE.items() if (what, k) != ("gemm", "n_layer")]
    code, out, err = call(bench.main, f"--what={what}", *shape, *flags.split(), "--device=cpu", "--json")
    assert code == 0 and len(rows := json.loads(out)["rows"]) == count and all(row[column] > 0 for row in rows), err


@pytest.mark.parametrize("flags, words", [
    ("--variants=w8a8", "must hold E0"), ("--variants=E0,w8a8+gpt2", "must hold E0"),
    ("--variants=E0,plain+w8a8", "must hold E0"), ("--variants=E0,E0", "none twice"), ("--peers", "--peers"),
    ("--variants=E0,lsq4+w8a8 --n_layer=1", "the weights twice"), ("--keep8=both", "a variant says so itself"),
    ("--n_layer=1 --heads=6", "--heads=(6,) has no effect"), ("--what=memory --variants=E0,plain", "plain is no"),
    ("--what=gemm --n_layer=7", "--n_layer=7 has no effect"),
    ("--what=optimizer --variants=E0", "no effect with --what=optimizer"), ("--rounds=0", "at least 1")])
def test_bad_flags_are_one_line(flags, words, call):
    code, out, err = call(bench.main, *flags.split())
    assert code == 2 and words in err.splitlines()[-1] and len(err.splitlines()) <= 2 and not out
