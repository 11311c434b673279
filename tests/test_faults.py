"""What goes wrong outside of our code: damage, crashes, divergence, two runs at once, and whatever a person types.

Nothing of it may end in a traceback, train on as if nothing were, or replace what was good.
"""

import io
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, SMALL, column, read, same

import bench
import eval as evaluation
import extensions
import prepare_data
import train
from support import device
from support.checkpoint import load_checkpoint
from support.config import _owners, differences, one_line_errors, parse
from support.device import explain_compile_errors
from support.lock import lock
from support.log import Log, read_log
from support.presets import PRESETS


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A finished run of four steps, not to be written to."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sys.argv", ["train.py", *SMALL, f"--data_dir={data}", f"--out_dir={out}", "--max_iters=4",
                                   "--lr_decay_iters=6"])
        train.main()
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")


def one_line(err, message):
    """Tell whether the errors are one line with this message, perhaps after a usage line."""
    *usage, line = err.splitlines()
    return message in line and all(text.startswith("usage:") for text in usage)


# -----------------------------------------------------------------------------
# one out_dir, one run; asked and chosen

def test_a_second_run_in_the_same_folder_is_refused(run, copy, tmp_path):
    """While one run holds out_dir, or has left a checkpoint, another is refused, and changes nothing."""
    with lock(tmp_path / "a", ""):
        for flags in ([], ["--resume=auto"]):
            code, _, err = run(tmp_path / "a", *flags)
            assert code == 2 and one_line(err, "another run trains in --out_dir")
        assert not list((tmp_path / "a").iterdir())
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    code, _, err = run(copy, "--max_iters=2")
    assert code == 2 and one_line(err, "holds another run")
    assert before == {p.name: p.read_bytes() for p in copy.iterdir()}


@pytest.mark.parametrize("resume", ["--resume", "--resume=auto"])
def test_a_requeued_job_goes_on(resume, run, signals, tmp_path):
    """The command line that began a run, all of it, goes on with it, though the run has changed what it was asked."""
    _, out, _ = run(tmp_path / "whole", "--warmup_iters=100")
    assert "warmup_iters=6 (the whole run)" in out
    signals(signal.SIGTERM, 3)
    flags = ["--warmup_iters=100"] + [resume] * (resume == "--resume=auto")  # which starts where there is nothing yet
    assert run(tmp_path / "cut", *flags)[0] == 128 + signal.SIGTERM
    signals()
    assert run(tmp_path / "cut", "--warmup_iters=100", resume)[0] == 0
    assert read(tmp_path / "cut")[1:] == read(tmp_path / "whole")[1:]
    assert same(*(load_checkpoint(tmp_path / name)["optimizer"] for name in ("cut", "whole")))
    code, out, err = run(tmp_path / "cut", "--warmup_iters=100", resume)
    assert code == (0 if resume == "--resume=auto" else 2) and "has finished its 6 steps" in out + err


# -----------------------------------------------------------------------------
# divergence is a result, and never replaces what was good

def test_divergence_in_training(run, tmp_path):
    code, out, err = run(tmp_path / "a", "--learning_rate=1e30", "--min_lr=1e30", "--grad_clip=0", "--warmup_iters=0")
    assert code == 3 and "diverged at step 1" in out and not err
    assert read(tmp_path / "a")[-1] == {"status": "diverged", "step": 1}
    assert all(t.isfinite().all() for t in load_checkpoint(tmp_path / "a")["model"].values())


@pytest.mark.parametrize("what", ["loss", "weight", "last weight"])
def test_divergence_noticed_elsewhere(what, run, tmp_path, monkeypatch):
    """A validation loss or a weight that is not finite is never a checkpoint or "finished", and log.jsonl is JSON."""
    at = 6 if what == "last weight" else 4  # at an evaluation in the middle, and at the last one
    if what == "loss":
        losses = iter([1.0, 1.0, math.nan])
        monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    else:
        step = train.Run.train_step

        def spoilt(self):
            result = step(self)
            if self.step == at:
                self.raw.wpe.weight.data[-1, 0] = math.inf
            return result
        monkeypatch.setattr(train.Run, "train_step", spoilt)
    code, out, _ = run(tmp_path / "a")
    assert code == 3 and f"diverged at step {at}" in out
    assert read(tmp_path / "a")[-1] == {"status": "diverged", "step": at}
    assert "NaN" not in (tmp_path / "a" / "log.jsonl").read_text()
    assert load_checkpoint(tmp_path / "a")["step"] == at - 2


def test_evaluating_a_diverged_model(copy, call):
    checkpoint = load_checkpoint(copy)
    checkpoint["model"]["h.0.mlp.c_fc.weight"][0, 0] = math.nan
    torch.save(checkpoint, copy / "ckpt.pt")
    code, _, err = call(evaluation.main, f"--ckpt={copy}")
    assert code == 2 and one_line(err, "h.0.mlp.c_fc.weight holds values that are not finite")


# -----------------------------------------------------------------------------
# damage

def test_every_flipped_bit_of_a_tensor_is_noticed(copy):
    """One bit anywhere in the 40 largest tensors: refused (the zip has checksums that torch does not compare)."""
    whole = (copy / "ckpt.pt").read_bytes()
    with zipfile.ZipFile(copy / "ckpt.pt") as archive:
        records = sorted(archive.infolist(), key=lambda r: -r.file_size)[:40]
    rng = random.Random(0)
    for record in records:
        header = record.header_offset
        start = header + 30 + int.from_bytes(whole[header + 26:header + 28], "little") \
            + int.from_bytes(whole[header + 28:header + 30], "little")
        damaged = bytearray(whole)
        damaged[start + rng.randrange(record.file_size)] ^= 1 << rng.randrange(8)
        (copy / "ckpt.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(copy)


WRONG = [None, {}, "x", torch.zeros(3)]


def edits(checkpoint):
    """Yield (name, copy of the checkpoint with one thing missing or of another type)."""
    for key in checkpoint:
        yield f"without {key}", {k: v for k, v in checkpoint.items() if k != key}
        for wrong in WRONG:
            if type(wrong) is not type(checkpoint[key]):
                yield f"{key}={wrong!r}", {**checkpoint, key: wrong}
    for key in ("n_layer", "dataset", "lr_decay_iters"):
        for place in ("config", "asked"):
            inner = checkpoint[place]
            yield f"{place} without {key}", {**checkpoint, place: {k: v for k, v in inner.items() if k != key}}
            for wrong in WRONG[:3]:
                if inner[key] is not wrong and not (key == "dataset" and wrong == "x"):
                    yield f"{place}.{key}={wrong!r}", {**checkpoint, place: {**inner, key: wrong}}
    name = next(iter(checkpoint["model"]))
    state = checkpoint["optimizer"]["state"]
    yield "a tensor less", {**checkpoint, "model": {k: v for k, v in checkpoint["model"].items() if k != name}}
    yield "a moment less", {**checkpoint, "optimizer": {**checkpoint["optimizer"], "state": {
        k: v for k, v in state.items() if k != 3}}}
    yield "half a moment", {**checkpoint, "optimizer": {**checkpoint["optimizer"], "state": {
        **state, 3: {"step": state[3]["step"]}}}}
    yield "no groups", {**checkpoint, "optimizer": {"state": state}}
    yield "other data", {**checkpoint, "data": "0"}


def test_edited_checkpoints(copy, run, call):
    """Whatever is missing or of another type: resume and eval.py work, or say what is wrong in one line."""
    checkpoint, refused = load_checkpoint(copy), 0
    for name, edited in edits(checkpoint):
        torch.save(edited, copy / "ckpt.pt")
        code, _, err = call(evaluation.main, f"--ckpt={copy}", "--sample_tokens=0", "--device=cpu")
        assert code in (0, 2) and "Traceback" not in err, (name, err)
        code, _, err = run(copy, "--resume", "--max_iters=5", small=[])
        fits = code == 0 and re.match(r"(config|asked)[ .]", name)  # what has a default, or a value of its type
        assert fits or code == 2 and err.count("\n") <= 2, (name, err)
        assert "Traceback" not in err, (name, err)
        refused += code == 2
    assert refused > 40


@pytest.mark.parametrize("damage", [
    lambda text: text + "\0" * 512, lambda text: text + "garbage\n[1, 2]\n3\n", lambda text: text[:-20],
    lambda text: "", lambda text: None, lambda text: text.replace("}\n{", "}{")], ids=range(6))
def test_a_damaged_log_stops_nobody(damage, copy, run):
    """A log with zeros, garbage, lists, a cut line, or none at all: a sound run resumes, its new lines are whole."""
    text = damage((copy / "log.jsonl").read_text())
    (copy / "log.jsonl").unlink()
    if text is not None:
        (copy / "log.jsonl").write_text(text)
    code, _, err = run(copy, "--resume", "--max_iters=6", small=[])
    assert code == 0, err
    assert [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()] == read_log(copy / "log.jsonl")
    assert column(copy, "loss")[-2:] and column(copy, "status")[-1] == "finished"


# -----------------------------------------------------------------------------
# errors for the user, and errors of ours

@pytest.mark.parametrize("command, code, message", [
    ("train.py --n_embd=66", 2, "must divide --n_embd=66"), ("bench.py --rounds=0", 2, "at least 1"),
    ("eval.py --prompt=x --sample_tokens=0", 2, "--prompt=x has no effect"), ("train.py --help", 0, "--wbits")])
def test_a_bad_command_line_does_not_wait_for_torch(command, code, message):
    """Refused, and --help, without importing torch or numpy, which takes two seconds of CPU time."""
    command = [sys.executable, "-X", "importtime", *command.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and message in done.stdout + done.stderr and "Traceback" not in done.stderr
    imported = re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE)
    assert "argparse" in imported and not {"torch", "numpy"} & set(imported)


@pytest.mark.parametrize("flags", [
    "--preset w8a8 --agran=per_tensor", "--preset=w8a8 --agran=per_tensor", "--n-embd=64 --n-head 16 --wbits 8"])
def test_a_good_command_line_is_not_refused_early(flags):
    """Spelt with blanks, with a preset that a flag needs, with sizes of tiny: it gets as far as the data."""
    command = [sys.executable, "train.py", *flags.split(), "--device=cpu", "--dataset=nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and one_line(done.stderr, "there is no prepared dataset")


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA GeForce RTX 4090", 165e12),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA RTX A1000", None)])
def test_peaks_go_by_the_whole_name(name, peak, monkeypatch):
    """MFU takes a data sheet's number for that very card; for others, laptops' too, it measures."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: (_ for _ in ()).throw(LookupError))  # measuring begins
    monkeypatch.setattr(device, "fast_bfloat16", lambda device: True)
    config = train.TrainConfig(dtype="bfloat16")
    with nullcontext() if peak else pytest.raises(LookupError):
        assert device.peak_flops(config, "cuda:0") == peak


def test_a_broken_compile_cache_is_named(capsys):
    with pytest.raises(SystemExit), one_line_errors(), explain_compile_errors():
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, OSError("x.so: file too short"), None)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "file too short" in err and "delete /" in err and "--compile=False" in err


def test_a_terminal_without_the_character(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    evaluation.show("caf\u00e9")
    stream.flush()
    assert stream.buffer.getvalue() == b"caf?\n"


def test_only_what_we_raise_is_one_line(capsys):
    """A ValueError that we raise is for the user; one from a library or from Python is a bug, with traceback."""
    for quiet in (False, True):  # True: but one process of a group
        with pytest.raises(SystemExit) as end, one_line_errors(quiet):
            prepare_data.get_tokenizer("nonsense")
        said = "" if quiet else "error: unknown tokenizer 'nonsense'; use bytes or gpt2\n"
        assert end.value.code == 2 and capsys.readouterr().err == said
    for work in (lambda: torch.zeros(3).view(2), lambda: int("x"), lambda: json.loads("{")):
        with pytest.raises((ValueError, RuntimeError)), one_line_errors():
            work()
    with pytest.raises(SystemExit), one_line_errors():
        raise MemoryError
    assert "not enough memory" in capsys.readouterr().err


def test_nan_is_no_json(tmp_path):
    log = Log(train.TrainConfig(out_dir=str(tmp_path)), 0, True)
    with pytest.raises(ValueError, match="JSON"):
        log.write(loss=math.nan)


def test_the_last_preset_wins():
    tiny, small, last = (parse(train.TrainConfig, [f"--preset={names}"], PRESETS)
                         for names in ("gpt2,tiny", "tiny,gpt2", "gpt2,w8a8,E0"))
    assert tiny.model.n_layer == 4 and set(differences(small)) == set(differences(last)) == {"preset"}


PROGRAMS = {"train": (train.main, train.TrainConfig), "eval": (evaluation.main, evaluation.EvalConfig),
            "bench": (bench.main, bench.BenchConfig), "prepare": (prepare_data.main, prepare_data.PrepareConfig)}
VALUES = ["", "0", "1", "-1", "8", "3", "1e-3", "nan", "inf", "1e999", "9" * 30, "True", "none", "auto", "x",
          "--", "-", "per_tensor", "int8", "w8a8", ",", "1,2", "../..", "\u00e9", "a b", "nowhere/at/all", "4"]


def test_fuzz_of_command_lines(call, tmp_path, monkeypatch, pytestconfig):
    """Random flags, random values: a program refuses them in one line, or would begin; never a traceback.

    Programs stop where they would begin to work. `--fuzz=1000` tries more.
    """
    class Begins(SystemExit):
        pass

    def begins(*_, **__):
        raise Begins(0)
    for module, name in ((train.Run, "__init__"), (evaluation, "load_checkpoint"), (prepare_data, "prepare"),
                         (bench, "show"), (bench, "bench_step"), (bench, "bench_memory"), (bench, "bench_optimizer"),
                         (bench, "bench_gemm")):
        monkeypatch.setattr(module, name, begins)
    monkeypatch.chdir(tmp_path)
    rng, refused = random.Random(1), 0
    for _ in range(pytestconfig.getoption("fuzz")):
        main, cls = PROGRAMS[rng.choice(list(PROGRAMS))]
        names = [*_owners(cls), "nonsense"]
        flags = [f"--{name}" + rng.choice(["", "=" + rng.choice(VALUES)])
                 for name in rng.choices(names, k=rng.randint(1, 4))]
        if rng.random() < 0.3:
            flags.append("--preset=" + rng.choice([*PRESETS, *extensions.PRESETS]))
        code, _, err = call(main, *flags)
        assert code in (0, 2) and "Traceback" not in err, flags
        if code == 2:
            refused += 1
            assert re.search(r"error: .+", err.splitlines()[-1]), (flags, err)
    assert refused
