"""extensions/distill.py: the loss against torch's on full logits in float64, runs from start to end, and bad input."""

import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, column, read, same
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_model import Largest
from test_points import naive
from test_train import group

import eval as evaluation
import extensions
import model as model_py
import train
from extensions import distill
from extensions.points import Student, matrices, unpack
from model import Teacher, linear_cross_entropy, quant_linears
from quant import QuantConfig
from support.checkpoint import load_checkpoint, model_from, save_checkpoint

PLAIN = quant_linears(QuantConfig(), 1)


# -----------------------------------------------------------------------------
# the loss

def operands(M=37, V=64, vocab=50, seed=0, valid=0.8):
    """Draw x (M, 16), w (V, 16), a wider teacher's (M, 24), (V, 24), and targets, a fifth of them ignored."""
    g = torch.Generator().manual_seed(seed)
    x, w, tx, tw = (torch.randn(n, c, generator=g) * 0.7 for n, c in ((M, 16), (V, 16), (M, 24), (V, 24)))
    t = torch.randint(vocab, (M,), generator=g)
    return x, w, tx, tw, torch.where(torch.rand(M, generator=g) < valid, t, -1)


def fused(x, w, t, teacher, vocab=50):
    """Return loss, dx, dw."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = linear_cross_entropy(x, w, t, vocab, None, teacher)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def oracle(x, w, t, tx, tw, T, soft, vocab=50):
    """Return the same of torch's own losses on full logits in float64."""
    x, w, tx, tw = (z.double().requires_grad_() for z in (x, w, tx, tw))
    z, y, seen = x @ w[:vocab].T, (tx @ tw[:vocab].T).detach(), t >= 0
    kl = F.kl_div(F.log_softmax(z / T, 1), F.softmax(y / T, 1), reduction="none").sum(1)
    ce = F.cross_entropy(z, t.clamp_min(0), reduction="none")
    loss = ((soft * T**2 * kl + (1 - soft) * ce) * seen).sum() / max(1, seen.sum())
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


@given(M=st.integers(1, 40), rows=st.integers(1, 45), seed=st.integers(0, 999), T=st.sampled_from([1.0, 2.0, 4.0]),
       soft=st.sampled_from([0.0, 0.7, 1.0]), valid=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=60)
@example(M=37, rows=5, seed=0, T=2.0, soft=0.7, valid=0.5)  # 8 chunks, the last of 2 rows
def test_loss_equals_torch_in_float64(M, rows, seed, T, soft, valid):
    """The loss and both gradients, with ignored targets, padding and any chunks; soft=0 changes no bit."""
    x, w, tx, tw, t = operands(M, seed=seed, valid=valid)
    loud = torch.cat((tw[:50], tw[50:] * 0 + 1e4))  # padding rows may hold anything
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_py, "MAX_LOGITS", rows * len(w))
        ours = fused(x, w, t, Teacher(tx, loud, T, soft))
        assert soft or same(ours, fused(x, w, t, None))
    for a, b in zip(ours, oracle(x, w, t, tx, tw, T, soft), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_what_the_soft_loss_must_not_depend_on():
    """A teacher that is the student: zero, and no gradient. A batch twice, or more padding rows: the same loss."""
    x, w, tx, tw, t = operands(valid=1.0)
    assert not any(part.any() for part in fused(x, w, t, Teacher(x, w, 3.0, 1.0)))
    once, *_ = fused(x, w, t, Teacher(tx, tw, 2.0, 1.0))
    assert once > 0.5  # a mean over the vocabulary, too, would be 50 times smaller
    twice, *_ = fused(x.repeat(2, 1), w, t.repeat(2), Teacher(tx.repeat(2, 1), tw, 2.0, 1.0))
    padded, *_ = fused(x, F.pad(w, (0, 0, 0, 640)), t, Teacher(tx, F.pad(tw, (0, 0, 0, 640)), 2.0, 1.0))
    assert twice.item() == pytest.approx(once.item(), rel=1e-6) == padded.item()


def test_neither_logits_matrix_ever_exists(monkeypatch):
    monkeypatch.setattr(model_py, "MAX_LOGITS", 10 * 64)
    x, w, tx, tw, t = operands(M=80)
    with Largest() as seen:
        fused(x, w, t, Teacher(tx, tw, 2.0, 0.7))
    assert 10 * 64 <= seen.elements < 80 * 64 / 2


# -----------------------------------------------------------------------------
# runs

@pytest.fixture(scope="module")
def house(data, tmp_path_factory):
    """A folder with a teacher, wider, with a longer context and quantizers of its own, and its student `kd`."""
    out = tmp_path_factory.mktemp("house")
    wide = ["--n_embd=48", "--block_size=48", "--wbits=4", "--abits=8", "--quant_head"]
    for name, main, flags in (("teacher", train.main, wide), ("kd", distill.main, [f"--teacher={out}/teacher"])):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as leave:
            flags = [*SMALL, *flags, "--max_iters=12", "--learning_rate=1e-2", f"--data_dir={data}"]
            patch.setattr(sys, "argv", ["program.py", *flags, f"--out_dir={out}/{name}"])
            main()
        assert leave.value.code == 0
    return out


def flags_of(method, house):
    return [f"--teacher={house}/teacher", "--warmup_iters=0", *{
        "none": [], "uniform": ["--method=uniform", "--levels=5", "--bucket=64", "--abits=8"],
        "points": [f"--init_from={house}/kd", "--method=points", "--levels=4", "--allocate"]}[method]]


@pytest.fixture
def student(run, house):
    """Run distill.py in this process: student(out_dir, method, *flags) -> (exit code, stdout, stderr)."""
    return lambda out, method, *flags: run(out, *flags_of(method, house), *flags, main=distill.main)


def test_killed_at_the_end(student, run, call, house, tmp_path, monkeypatch):
    """Cut off while it writes the last files, a run is not over: resumed, it makes them."""
    with monkeypatch.context() as patch:
        patch.setattr(distill, "pack", lambda _: sys.exit(9))
        assert student(tmp_path, "uniform")[0] == 9
    assert load_checkpoint(tmp_path)["step"] < 6 and not column(tmp_path, "result")
    assert run(tmp_path, "--resume", small=[], main=distill.main)[0] == 0
    assert load_checkpoint(tmp_path)["step"] == 6 and column(tmp_path, "result")[0]["bytes"].keys() == {
        "fp32", "quantized.pt", "packed.pt", "huffman.pt"}


@pytest.mark.parametrize("method", ["none", "uniform", "points"])
def test_a_run(method, student, run, call, house, data, signals, tmp_path):
    """Stopped and resumed it is bitwise the run that was not; its last line and its files say what was evaluated."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, err = student(whole, method)
    assert code == 0, err
    signals(signal.SIGTERM, 3)
    assert student(parts, method)[0] == 143
    signals()
    assert run(parts, "--resume", small=[], main=distill.main)[0] == 0
    state = load_checkpoint(whole)
    assert read(whole)[1:] == read(parts)[1:] and same(state, load_checkpoint(parts))
    result, last = column(whole, "result")[0], column(whole, "val_loss")[-1]
    files = {path.name: path.stat().st_size for path in whole.glob("*.pt") if "ckpt" not in path.name}
    assert result["bytes"] == {"fp32": 4 * read(whole)[0]["parameters"], **files}
    assert all(f"{name} {size:,}" in out for name, size in files.items())
    if method == "none":
        model = model_from(state, PLAIN)
        windows = evaluation.val_windows(np.fromfile(data / "text" / "val.bin", "<u2"), 32, 512)
        with torch.no_grad():
            for w in matrices(model).values():
                w.copy_(naive(w, torch.arange(4) / 3, 0)[0])
        expected = evaluation.evaluate(model, windows, 16)
        assert result["val_loss"]["levels=4,bucket=0"] == pytest.approx(expected, abs=1e-5)
        assert result["val_loss"]["w"] == last and len(result["val_loss"]) == 7 and not files
        return
    # eval.py reads Q(w), and does not take w for it; unpacked, the other two files are the same
    assert result["val_loss"]["Q(w)"] == last != result["val_loss"]["w"]
    code, printed, _ = call(evaluation.main, f"--ckpt={whole}/quantized.pt", "--sample_tokens=0")
    assert code == 0 and f"val_loss {last:.4f} nats" in printed
    code, _, err = call(evaluation.main, f"--ckpt={whole}")
    assert code == 2 and "was trained with extensions/distill.py" in err
    quantized = load_checkpoint(whole / "quantized.pt")
    quantized["model"].pop("lm_head.weight")
    packed, huffed = (load_checkpoint(whole / name) for name in ("packed.pt", "huffman.pt"))
    assert same(unpack(packed), quantized) and same(unpack(huffed), quantized)
    for stored, name in ((packed, "packed.pt"), (huffed, "huffman.pt")):
        assert 0 < files[name] - sum(t.nbytes for t in stored["model"].values()) < 8000  # flags and names
        assert len(stored["model"]) == 4
    w, q = (model["wte.weight"] for model in (state["model"], quantized["model"]))
    assert not torch.equal(w, q) and len(q.flatten()[:64].unique()) <= max(packed["levels"])
    # bits a weight: ceil(log2 s), and 64 a bucket
    sizes = [w.numel() for w in matrices(model_from(quantized, PLAIN)).values()]
    codes = sum(math.ceil(math.log2(s)) * n for s, n in zip(packed["levels"], sizes, strict=True)) / sum(sizes)
    bucket = 64 if method == "uniform" else 256
    assert result["bits"]["codes"] == pytest.approx(codes, abs=1e-3) and result["bits"]["huffman"] < codes
    assert result["bits"]["scales"] == pytest.approx(64 * sum(-(-n // bucket) for n in sizes) / sum(sizes))
    start = load_checkpoint(house / "kd")["model"]
    if method == "points":  # w stays, the points move; some matrices have more of them
        assert same(state["model"], start) and sum(packed["levels"]) == 6 * 4 and len(set(packed["levels"])) > 1
        first = Student(model_from(load_checkpoint(house / "kd"), PLAIN), packed["levels"], 256, True).points
        assert ((state["extra"]["points"] - first).abs() > 1e-6).float().mean() > 0.9
    else:  # trained weights are not on the points
        assert all((p != quantized["model"][name]).any() == (p.dim() == 2)
                   for name, p in state["model"].items() if name != "lm_head.weight")


def test_without_a_teacher_and_a_method_it_is_train_py(run, tmp_path, monkeypatch):
    flags = ["--wbits=8", "--abits=8", "--dropout=0.1", "--m1bits=8", "--m1round=stochastic"]
    monkeypatch.setattr(extensions, "losses", lambda _, gpt: {"penalty": gpt.wpe.weight.square().sum()})
    assert run(tmp_path / "a", *flags)[0] == run(tmp_path / "b", *flags, "--soft=0", main=distill.main)[0] == 0
    a, b = (load_checkpoint(tmp_path / name) for name in "ab")
    assert same({**a, "config": 0}, {**b, "config": 0})
    assert read(tmp_path / "a")[1:] == [line for line in read(tmp_path / "b")[1:] if "result" not in line]
    assert list(column(tmp_path / "b", "result")[0]["val_loss"]) == ["w"]  # its recipe rounds the weights already


@pytest.mark.parametrize("kind", ["checkpoint", "hugging face"])
def test_the_teacher_is_what_it_was_trained_to_be(kind, run, call, house, tmp_path, monkeypatch):
    """Each loss of a run is torch's, of the teacher's full logits (its head is rounded), and the student's at Q(w)."""
    teacher, losses = house / "teacher", distill.Run.loss
    if kind == "hugging face":
        pytest.importorskip("safetensors")
        assert call(evaluation.main, f"--ckpt={teacher}", f"--export={tmp_path}/hf")[0] == 0
        teacher = tmp_path / "hf"

    def checked(self, x, y):
        loss, terms = losses(self, x, y)
        assert not self.teacher.training and (self.teacher.lm_head.recipe is None) == (kind == "hugging face")
        z, t = (model(x).detach().flatten(0, 1)[:, :257] for model in (self.evaluated_model(), self.teacher))
        kl = F.kl_div(F.log_softmax(z / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
        expected = 0.9 * 16 * kl + 0.1 * F.cross_entropy(z, y.flatten())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        return loss, terms
    monkeypatch.setattr(distill.Run, "loss", checked)
    code, _, err = run(tmp_path / "a", f"--teacher={teacher}", "--soft=0.9", "--temperature=4", "--method=uniform",
                       main=distill.main)
    assert code == 0, err


def test_allocation_follows_the_gradient_of_five_micro_batches(student, data, tmp_path, monkeypatch):
    def checked(self, levels):
        norms, twin = gradient_norms(self, levels), Student(self.raw, levels, 256, True).rounded()
        windows = evaluation.val_windows(np.fromfile(data / "text" / "train.bin", "<u2"), 32, 5 * 4 * 32)
        for batch in torch.from_numpy(windows).view(5, 4, 33):
            twin(batch[:, :-1], batch[:, 1:]).backward()
        assert norms == pytest.approx([w.grad.norm().item() for w in matrices(twin).values()], rel=1e-4)
        assert not any(p.grad is not None for p in self.raw.parameters())
        return norms
    gradient_norms = distill.Run.gradient_norms
    monkeypatch.setattr(distill.Run, "gradient_norms", checked)
    code, out, err = student(tmp_path / "a", "points", "--max_iters=1", "--soft=0", "--teacher=")
    assert code == 0 and "points: {'wte.weight': " in out, err


@pytest.mark.parametrize("method", ["uniform", "points"])
def test_compiled_equals_eager(method, student, tmp_path, monkeypatch):
    """Compiled (aot_eager: Inductor takes minutes), student and teacher are what they are uncompiled."""
    compile, calls = torch.compile, []

    def aot_eager(*args, **options):
        calls.append(args)
        return compile(*args, **options, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", aot_eager)
    for name in ("True", "False"):
        flags = [f"--compile={name}", "--max_iters=3", "--gradient_accumulation_steps=1"]
        assert student(tmp_path / name, method, *flags)[0] == 0
    compiled, eager = (column(tmp_path / name, "loss") for name in ("True", "False"))
    assert compiled == pytest.approx(eager, rel=1e-5) and len(calls) >= 2


def child(argv, variables):
    """Be a process of its own that distills, and leaves with the exit code."""
    os.environ.update(variables)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.argv = ["distill.py", *argv]
    distill.main()


@pytest.mark.parametrize("method", ["uniform", "points"])
def test_two_processes_follow_one(method, student, data, house, tmp_path):
    assert student(tmp_path / "one", method)[0] == 0
    argv = [*SMALL, *flags_of(method, house), f"--data_dir={data}", f"--out_dir={tmp_path / 'two'}"]
    assert group(argv, 2, child) == [0, 0]
    for key in ("loss", "val_loss"):
        assert column(tmp_path / "one", key) == pytest.approx(column(tmp_path / "two", key), abs=1e-3)
    one, two = (load_checkpoint(tmp_path / name / "packed.pt") for name in ("one", "two"))
    assert one["levels"] == two["levels"]


# -----------------------------------------------------------------------------
# bad input, one line each

@pytest.mark.parametrize("flags, words", [
    ("", "--teacher= is empty; name a checkpoint, or do without: --soft=0"),
    ("--teacher=nowhere", "there is no checkpoint nowhere/ckpt.pt"),
    ("--teacher=tests", "--teacher=tests: there is no config.json in it"),
    ("--teacher=OUT", "which is the student's; choose another"),
    ("--teacher=OUT/ckpt.pt", "which is the student's; choose another"),
    ("--teacher=TEACHER --block_size=64", "has a context of 48 tokens; --block_size=64 must not be more"),
    ("--teacher=OTHER", "has a vocabulary of 50, the data one of 257"),
    ("--teacher=MASTERS", "name the file that it wrote for use (quantized.pt)"),
    *((f"--method=uniform --levels={s}", f"--levels={s} must be 2 to 256") for s in (1, 257)),
    *((f"--method=uniform --bucket={k}", f"--bucket={k} must be at least 2, or 0") for k in (1, -1)),
    *((f"--soft={x}", f"--soft={x} must lie in [0, 1]") for x in (-0.1, 1.1, "nan")),
    *((f"--temperature={x}", f"--temperature={x} must be above 0") for x in (0.0, -1.0, "inf", "nan")),
    ("--soft=0 --method=uniform --wbits=8", "those of h.0.attn.c_attn; drop one"),
    ("--soft=0 --method=uniform --lsq_bits=4", "those of h.0.attn.c_attn; drop one"),
    ("--method=points", "--init_from=scratch must name a trained student"),
    ("--soft=0 --teacher=TEACHER", "has no effect without --soft above 0"),
    ("--soft=0 --temperature=3", "has no effect without --soft above 0"),
    ("--levels=4", "has no effect without --method=uniform or points"),
    ("--bucket=4", "has no effect without --method=uniform or points"),
    ("--method=uniform --allocate", "has no effect without --method=points"),
    ("--method=points --init_from=INIT --allocate --levels=2", "--allocate=True has no effect without"),
    ("--method=points --init_from=INIT --m2bits=8", "--m2bits=8 has no effect with --method=points")])
def test_bad_flags(flags, words, run, house, tmp_path):
    for name, changes in (("OTHER", dict(vocab_size=50)), ("MASTERS", dict(extensions=["distill"]))):
        if name in flags:
            save_checkpoint(tmp_path / f"{name}.pt", load_checkpoint(house / "teacher") | changes)
            flags = flags.replace(name, f"{tmp_path}/{name}.pt")
    flags = flags.replace("TEACHER", f"{house}/teacher").replace("INIT", f"{house}/kd").replace("OUT", f"{tmp_path}/a")
    code, _, err = run(tmp_path / "a", *flags.split(), main=distill.main)
    *usage, line = err.splitlines()
    assert code == 2 and words in line and all(text.startswith("usage:") for text in usage), err
    assert not [*tmp_path.glob("a/*")]


def test_another_teacher_is_another_run(student, run, house, tmp_path):
    """A run does not go on with a teacher that has changed, nor with another method; --help shows our flags."""
    save_checkpoint(tmp_path / "t.pt", state := load_checkpoint(house / "kd"))  # a context as long as ours
    student(tmp_path / "a", "none", f"--teacher={tmp_path}/t.pt", "--max_iters=2")
    state["model"]["h.0.mlp.c_fc.weight"] += 1e-3
    save_checkpoint(tmp_path / "t.pt", state)
    code, _, err = run(tmp_path / "a", "--resume", "--max_iters=4", small=[], main=distill.main)
    assert code == 2 and "began with another --teacher=" in err
    assert run(tmp_path / "c", "--max_iters=2")[0] == 0
    resume = ["--resume", "--max_iters=4", "--soft=0"]  # a run of train.py
    code, _, err = run(tmp_path / "c", *resume, "--method=uniform", small=[], main=distill.main)
    assert code == 2 and "or --method than uniform" in err
    assert run(tmp_path / "c", *resume, small=[], main=distill.main)[0] == 0
    code, out, _ = run(tmp_path / "b", "--help", main=distill.main)
    assert code == 0 and "distill.py: Distillation, into few-bit weights" in out and "--allocate" in out
