"""bench.py: what it counts is what is there; its command line runs, small and uncompiled."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bench
from bench import (
    BenchConfig,
    Variant,
    bench_gemm,
    bench_memory,
    bench_step,
    interleaved,
    kept_for_backward,
    ratio,
    real_bytes,
    show,
)
from model import GPTConfig
from quant import Quantized

SHAPE = dict(n_layer=1, n_head=2, n_embd=64, block_size=16)
FLAGS = [f"--{k}={v}" for k, v in SHAPE.items()] + ["--batch_size=2", "--rounds=1", "--compile=False", "--device=cpu",
                                                     "--dtype=float32"]


def run(*flags):
    """Run bench.py as a user does: (exit code, what it printed, the errors)."""
    done = subprocess.run([sys.executable, "bench.py", *flags], cwd=Path(bench.__file__).parent, capture_output=True,
                          text=True)
    return done.returncode, done.stdout, done.stderr


def test_interleaved_runs_each_once_a_round():
    calls = []
    times = interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 3, "cpu")
    assert calls == ["a", "b"] * 4 and [len(t) for t in times] == [3, 3]  # one round does not count


def test_ratio_is_taken_within_rounds():
    """A machine that slows down tenfold in the middle changes both sides, and not the ratio."""
    assert ratio([2.0, 20.0, 22.0], [1.0, 10.0, 10.0]) == 2.0


def test_show(capsys):
    show("title", [{"name": "a", "ms": 1234.5, "x": 0.5361}], False)
    assert "| a | 1,234 | 0.536 |" in capsys.readouterr().out
    show("title", [{"name": "a", "ms": 1234.5}], True)
    assert json.loads(capsys.readouterr().out) == {"title": "title", "rows": [{"name": "a", "ms": 1234.5}]}


def test_kept_for_backward_by_hand():
    """A GELU keeps its input, a bias nothing, a parameter is not counted, and a storage counts once."""
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.h, self.weight = torch.nn.ModuleList(), torch.nn.Parameter(torch.randn(8))
    model, x = Model(), torch.randn(4, 8, requires_grad=True)
    assert kept_for_backward(lambda: F.gelu(x), model) == {"all": 4 * 8 * 4}
    assert kept_for_backward(lambda: F.gelu(x) + torch.tanh(x[:2]).sum(), model)["all"] == 32 * 4 + 16 * 4
    assert kept_for_backward(lambda: x * model.weight, model)["all"] == 32 * 4  # for the weight's gradient
    assert kept_for_backward(lambda: (x * x).sum(), model)["all"] == 32 * 4


def test_fake_tensors_count_what_real_ones_do():
    config = BenchConfig(what="memory", variants="E0,w8a8,w8a8+keep8", batch_size=2, dtype="float32", vocab_size=60,
                         model=GPTConfig(**SHAPE))
    for row in bench_memory(config, "cpu")[1]:
        v = Variant(row["variant"], config, "cpu", compile=False)
        kept = kept_for_backward(lambda v=v: v.model(v.tokens[:, :-1], v.tokens[:, 1:]), v.model, apart=True)
        assert kept == {"linear": row["linears, MiB"] * 2**20, "all": row["everything, MiB"] * 2**20}


def test_memory_of_a_step():
    """Of the peak, parameters, optimizer and what is kept are there at once; a variant takes its presets' model."""
    config = BenchConfig(variants="E0", batch_size=2, dtype="float32", model=GPTConfig(**SHAPE))
    plain, small = (Variant(name, config, "cpu", compile=False) for name in ("E0", "w8a8+keep8+adam8"))
    for v in (plain, small):
        v.step()
    a, b = plain.memory(), small.memory()
    elements = sum(p.numel() for p in plain.model.parameters())
    assert a["parameters"] == a["gradients"] == elements * 4 / 2**20 and a["optimizer"] == 2 * a["parameters"]
    assert b["optimizer"] < 0.35 * a["optimizer"] and b["kept"] < a["kept"]
    for mib in (a, b):
        assert mib["peak"] > mib["parameters"] + mib["optimizer"] + mib["kept"]
    # AdamW's own step needs no memory in fp32, so the peak lies in forward and backward: two tensors as large as the
    # largest, the gradient of the embedding or the logits, are more than is alive there for a moment.
    assert a["peak"] < a["parameters"] + a["optimizer"] + a["kept"] + a["gradients"] + 2 * 320 * 64 * 4 / 2**20
    assert small.model.config.keep8 == "both"


def test_compiled_keeps_less():
    """README: compiled, W8A8 keeps clearly less than E0, though not as codes; the peak of the step falls with it."""
    config = BenchConfig(variants="E0,w8a8", batch_size=16, dtype="float32",
                         model=GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=64))
    plain, small = (Variant(name, config, "cpu", compile=True) for name in ("E0", "w8a8"))
    for v in (plain, small):
        v.step()
    a, b = plain.memory(), small.memory()
    assert b["kept"] < 0.75 * a["kept"] and b["peak"] < a["peak"]


def test_real_bytes_of_states():
    class Packed(torch.Tensor):  # as torchao keeps a moment: a float to look at, codes and scales inside
        def __tensor_flatten__(self):
            return ["codes", "scale"], None
    packed = torch.zeros(8).as_subclass(Packed)
    packed.codes, packed.scale = torch.zeros(8, dtype=torch.uint8), torch.zeros(1)
    assert real_bytes(packed) == 8 + 4
    assert real_bytes(3) == 0 and real_bytes(torch.zeros(())) == 0 and real_bytes(torch.zeros(5, dtype=torch.int8)) == 5


def test_gemm_rows(monkeypatch):
    """With known times: which side is which, and the roofline, on which arithmetic decides for one and traffic not."""
    times = {"float32": 3e-3, "int8": 1e-3}

    def seconds(work, device):
        work()
        if isinstance(work, partial):
            return times["int8" if isinstance(work.args[0], Quantized) else "float32"]
        return {True: 0.5}.get(work.__name__ == "clone", 0.01)  # the large copy, the large GEMMs
    monkeypatch.setattr(bench, "seconds", seconds)
    config = BenchConfig(what="gemm", batch_size=2, rounds=3, compile=False, dtype="float32",
                         model=GPTConfig(n_head=2, n_embd=64, block_size=16))
    rows = bench_gemm(config, "cpu")[1]
    assert len(rows) == 12 and rows[0]["rows x inner x columns"] == "32 x 64 x 192"
    rate, traffic = 2 * 2048**3 / 0.01, 2 * 8 * 2048**2 * 4 / 0.5
    for row in rows:
        r, k, s = map(int, row["rows x inner x columns"].split(" x "))
        assert row["float32, ms"] == 3 and row["int8, ms"] == 1 and row["x float32"] == pytest.approx(1 / 3)
        for column, size in (("roofline, ms", 4), ("roofline 8, ms", 1)):
            expected = max(2 * r * k * s / rate, ((r + s) * k * size + r * s * 4) / traffic)
            assert row[column] == pytest.approx(1e3 * expected)


def test_step_rows(monkeypatch):
    """tokens/s and MFU follow from the times: 2 x 16 tokens in 4 ms against a peak of 1 TFLOP/s."""
    monkeypatch.setattr(bench, "seconds", lambda work, device: work() or 4e-3)
    monkeypatch.setattr(bench, "peak_flops", lambda config, device: 1e12)
    config = BenchConfig(variants="E0", batch_size=2, rounds=2, compile=False, dtype="float32",
                         model=GPTConfig(**SHAPE))
    row = bench_step(config, "cpu")[1][0]
    flops = Variant("E0", config, "cpu", compile=False).model.flops_per_token()
    assert row["tokens/s"] == pytest.approx(8000) and row["ms per step"] == row["AdamW, ms"] == 4 and row["x E0"] == 1
    assert row["MFU, %"] == pytest.approx(100 * flops * 8000 / 1e12)


@pytest.mark.parametrize("what, column", [("step", "peak"), ("memory", "linears, MiB"), ("optimizer", "x fused"),
                                          ("gemm", "roofline 8, ms")])
def test_command_line(what, column):
    idle = {"step": (), "optimizer": ("batch_size", "dtype"), "memory": ("rounds", "compile"),
            "gemm": ("n_layer",)}[what]
    flags = [f for f in FLAGS if not f.startswith(tuple(f"--{name}=" for name in idle))]
    code, out, err = run(f"--what={what}", *flags, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and len(rows) >= 4 - (what == "memory") and all(row[column] > 0 for row in rows), err


@pytest.mark.parametrize("flags, words", [
    (["--variants=w8a8"], "must hold E0"), (["--variants=E0,w8a8+gpt2"], "must hold E0"),
    (["--what=optimizer", "--variants=E0"], "has no effect with --what=optimizer"), (["--peers"], "--peers"),
    (["--what=memory", "--variants=E0,plain"], "plain"), (["--rounds=0"], "at least 1"),
    (["--variants=E0,E0"], "twice"), (["--keep8=both"], "a variant says so itself"),
    (["--what=gemm", "--n_layer=7"], "--n_layer=7 has no effect")])
def test_bad_flags_are_one_line(flags, words):
    code, out, err = run(*flags)
    assert code == 2 and words in err and "Traceback" not in err and not out
