"""The loop, through its real command line: reproducible, resumable, parallel, and clear about bad input.

Runs that must die or form a group live in processes forked from a server that has imported torch already.
"""

import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, column, read, same

import eval as evaluation
import extensions
import train
from support import device
from support.checkpoint import load_checkpoint, save_checkpoint
from support.config import build
from support.presets import PRESETS, SIZES, load_config

W8A8 = ["--wbits=8", "--abits=8"]
RANDOM = [*W8A8, "--gbits=8", "--rounding=stochastic", "--dropout=0.1",  # all that draws random numbers
          "--m1bits=8", "--m1round=stochastic", "--m2bits=4", "--m2round=stochastic"]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Train once for all tests of this file: finished(name, *flags) is the folder of that run."""
    folder = tmp_path_factory.mktemp("finished")

    def finished(name, *flags):
        if not (folder / name).exists():
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                argv = ["train.py", *SMALL, f"--data_dir={data}", f"--out_dir={folder / name}", *flags]
                patch.setattr(sys, "argv", argv)
                train.main()
        return folder / name
    return finished


def child(argv, variables):
    """Be a process of its own that trains, and leaves with the exit code."""
    os.environ.update(variables)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    train.main()


def spawn(argv, target=child, **variables):
    """Start a process from a server that has imported torch: milliseconds instead of seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    process = context.Process(target=target, args=(argv, variables))
    process.start()
    return process


# -----------------------------------------------------------------------------
# one run

def test_a_run_from_start_to_report(run, tmp_path):
    """The files, the lines of log.jsonl and the report are what README says, and the loss falls."""
    code, out, err = run(tmp_path / "a", *W8A8, "--max_iters=40", "--eval_interval=20", "--learning_rate=1e-2")
    lines = read(tmp_path / "a")
    assert code == 0 and not err
    assert lines[0]["torch"] == torch.__version__
    assert lines[0]["device"] == device.machine("cuda" if torch.cuda.is_available() else "cpu")  # which one it is
    assert lines[0]["config"]["wbits"] == 8 and lines[-1] == {"status": "finished", "step": 40}
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 41))
    assert set(training[0]) == {"step", "tokens", "loss", "lr", "grad_norm"}
    assert training[0]["tokens"] == 2 * 4 * 32
    evaluations = {line["step"]: line for line in lines if "val_loss" in line}
    first, last = evaluations[0], evaluations[40]
    assert list(evaluations) == [0, 20, 40] and first["val_loss"] == pytest.approx(math.log(257), abs=0.3)
    # byte-level tokens: one byte each, and one end-of-text token per document
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / math.log(2), rel=1e-2)
    assert last["val_loss"] < first["val_loss"] - 1.5
    assert f"val_loss {last['val_loss']:.4f}" in out and "unigram entropy" in out and "sample:" in out
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl"]


def test_the_same_seed_is_the_same_run(run, finished, tmp_path):
    a = finished("random", *RANDOM)
    run(tmp_path / "b", *RANDOM), run(tmp_path / "c", *RANDOM, "--seed=1")
    assert read(a)[1:] == read(tmp_path / "b")[1:] and read(a)[1:] != read(tmp_path / "c")[1:]
    assert same(load_checkpoint(a), load_checkpoint(tmp_path / "b"))


@pytest.mark.parametrize("flags, error", [
    (["--batch_size=8", "--gradient_accumulation_steps=1"], 1e-3),  # per-token scales do not mix sequences
    (["--dtype=bfloat16"], 0.03)], ids=["accumulation", "bf16"])
def test_the_same_run_to_rounding(flags, error, run, finished, tmp_path):
    """8 sequences at once are 2 x 4; bfloat16 activations over fp32 weights follow fp32."""
    run(tmp_path / "b", *W8A8, *flags)
    a, b = column(finished("w8a8", *W8A8), "loss"), column(tmp_path / "b", "loss")
    assert a == pytest.approx(b, abs=error) and a != b
    assert all(t.dtype == torch.float32 for t in load_checkpoint(tmp_path / "b")["model"].values())


@pytest.mark.parametrize("schedule, rates", [
    ("cosine", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 60: 0.55, 110: 0.1, 1000: 0.1}),
    ("wsd", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 87: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 1000: 0.1})])
def test_learning_rate(schedule, rates):
    """A warm-up that never is 0; a cosine, or the peak and in the last fifth a straight line; then min_lr."""
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110, schedule=schedule)
    assert {step: train.learning_rate(step, config) for step in rates} == pytest.approx(rates)


@pytest.mark.parametrize("name", [name for name in PRESETS | extensions.PRESETS if name not in SIZES])
def test_every_preset_runs(name, run, tmp_path):
    flags = (PRESETS | extensions.PRESETS)[name]
    code, _, err = run(tmp_path / "a", f"--preset=tiny,{name}", "--n_layer=2", "--max_iters=1", "--sample_tokens=0")
    assert code == 0, err
    recorded = read(tmp_path / "a")[0]["config"]
    assert {k: recorded[k] for k in flags} == flags


def test_sizes_are_gpt2s():
    for name, values in SIZES.items():
        config = build(train.TrainConfig, values)
        small = name.startswith(("tiny", "laptop", "width", "gpu"))
        assert small or config.batch_size * config.gradient_accumulation_steps == 512


def test_no_compiler_is_said_aloud(run, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "can_compile", lambda: False)
    code, out, _ = run(tmp_path / "a", "--compile=True", "--max_iters=1")
    assert code == 0 and "compile=False (no C++ compiler" in out


@pytest.mark.parametrize("kind", ["checkpoint", "hugging face"])
def test_init_from(kind, run, call, finished, tmp_path):
    """--init_from takes weights and shape of a checkpoint or a Hugging Face folder, and begins at step 0."""
    source = theirs = finished("plain", "--max_iters=2")
    if kind == "hugging face":
        pytest.importorskip("safetensors")
        source = tmp_path / "hf"
        assert call(evaluation.main, f"--ckpt={theirs}", f"--export={source}")[0] == 0
    small = [flag for flag in SMALL if not flag.startswith(("--n_", "--block_size"))]
    small += [f"--init_from={source}", "--max_iters=1"]
    assert run(tmp_path / "b", "--keep8=both", small=small)[0] == 0
    assert column(tmp_path / "b", "val_loss")[0] == column(theirs, "val_loss")[-1]
    config = load_checkpoint(tmp_path / "b")["config"]
    assert config["n_layer"] == 1 and config["keep8"] == "both"
    assert run(tmp_path / "c", "--block_size=16", small=small)[0] == 0
    assert len(load_checkpoint(tmp_path / "c")["model"]["wpe.weight"]) == 16
    code, _, err = run(tmp_path / "d", "--n_layer=3", small=small)
    assert code == 2 and "--n_layer=3 does not fit the weights of --init_from" in err and "which have 1" in err


# -----------------------------------------------------------------------------
# stopping and going on

@pytest.mark.parametrize("number, at", [(signal.SIGINT, 2), (signal.SIGTERM, 3)])  # 2: with an evaluation due
def test_signal_then_resume_is_bitwise(number, at, run, finished, signals, tmp_path):
    """A run stopped by a signal says how to go on; resumed, it is the run that was never stopped: weights and log."""
    whole, cut = finished("random", *RANDOM), tmp_path / "cut"
    signals(number, at)
    code, out, _ = run(cut, *RANDOM)
    assert code == 128 + number and "--resume" in out and read(cut)[-1]["status"] == "interrupted"
    signals()
    with open(cut / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # as a crash would leave it
    assert run(cut, "--resume", small=[])[0] == 0 and read(cut)[1:] == read(whole)[1:]
    for name in ("ckpt.pt", "ckpt_best.pt"):
        assert same(load_checkpoint(cut / name), load_checkpoint(whole / name))


def test_sigkill_at_random_points(run, data, tmp_path):
    """Killed again and again without warning and resumed each time, the run ends bitwise like the undisturbed one."""
    flags, cut = [*RANDOM, "--max_iters=150", "--eval_interval=3"], tmp_path / "cut"
    run(tmp_path / "whole", *flags)
    rng, kills, step = np.random.default_rng(0), 0, 0
    for _ in range(40):
        resume = ["--resume"] if (cut / "ckpt.pt").exists() else []
        if resume:
            step = load_checkpoint(cut)["step"]  # whole, whenever the kill came
        process = spawn([*SMALL, *flags, f"--data_dir={data}", f"--out_dir={cut}", *resume])
        process.join(rng.uniform(0.2, 0.8) if kills < 6 and step < 60 else 60)  # not behind the last checkpoint
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 3
    assert read(cut)[1:] == read(tmp_path / "whole")[1:]
    assert same(load_checkpoint(cut), load_checkpoint(tmp_path / "whole"))


@pytest.mark.parametrize("gpu, flags, layers", [
    (True, [], 4), (True, ["--init_from=scratch"], 4),
    (True, ["--dataset=shakespeare"], 12), (False, ["--dataset=shakespeare"], 4),
    (True, ["--dataset=shakespeare", "--device=cpu"], 4), (True, ["--preset=gpt2"], 12)])
def test_the_size_fits_device_and_data(monkeypatch, gpu, flags, layers):
    """Without a size: tiny for a CPU, and for the standard library, which is no food for GPT-2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    assert load_config(train.TrainConfig, PRESETS, "")[0].model.n_layer == layers


def test_resume_refuses_another_run(run, tmp_path):
    """A resumed run keeps its configuration; what would make it another run is an error, a larger max_iters is not."""
    def refused(message, *flags, out=tmp_path / "a"):
        code, _, err = run(out, "--resume", *flags, small=[])
        assert code == 2 and message in err
    run(tmp_path / "a", "--max_iters=2", "--lr_decay_iters=4")
    refused("--wbits=8 differs from the 32 this run began with", "--wbits=8")
    refused("has finished its 2 steps")
    refused("no checkpoint", out=tmp_path / "none")
    old = load_checkpoint(tmp_path / "a")
    del old["config"]["gemm"]  # as if written before that flag existed
    save_checkpoint(tmp_path / "a" / "ckpt.pt", old)
    refused("--m1bits=8 differs from the 32 this run began with", "--m1bits=8")
    assert run(tmp_path / "a", "--resume", "--max_iters=4", small=[])[0] == 0
    assert load_checkpoint(tmp_path / "a")["step"] == 4
    run(tmp_path / "b", "--max_iters=2", "--min_lr=0")  # behind the schedule's end nothing would train
    code, _, err = run(tmp_path / "b", "--resume", "--max_iters=3", small=[])
    assert code == 2 and "from step 2 (--lr_decay_iters) the learning rate would be --min_lr=0" in err


def test_a_signal_in_the_last_step_changes_nothing(run, signals, tmp_path):
    """A run that is told to stop when it is over is a finished run, with its last evaluation and report."""
    signals(signal.SIGTERM, 6)
    code, out, _ = run(tmp_path / "a")
    assert code == 0 and "sample:" in out and read(tmp_path / "a")[-1]["status"] == "finished"


# -----------------------------------------------------------------------------
# several processes

def group(argv, world, target=child, **variables):
    """Train with `world` processes over gloo; return their exit codes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = [spawn(argv, target, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **variables) for rank in range(world)]
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def one_and_two(run, data, folder, *flags):
    """Return the logs of 30 steps by one process and by two, and hold them to the same lines; twice evaluated."""
    flags = [*flags, "--max_iters=30", "--eval_interval=15", "--eval_tokens=480"]  # 15 windows
    assert run(folder / "one", *flags)[0] == 0
    assert group([*SMALL, *flags, f"--data_dir={data}", f"--out_dir={folder / 'two'}"], 2) == [0, 0]
    one, two = read(folder / "one")[1:], read(folder / "two")[1:]
    assert [set(line) for line in one] == [set(line) for line in two]
    assert one[0]["val_loss"] == pytest.approx(two[0]["val_loss"], rel=1e-6)
    return [[line[key] for line in log for key in ("loss", "val_loss") if key in line] for log in (one, two)]


def test_two_processes_follow_one(run, data, tmp_path):
    """The same global batch over two processes: the same losses, and before training the same validation loss."""
    one, two = one_and_two(run, data, tmp_path, "--preset=int8-all,keep8")
    assert one == pytest.approx(two, abs=1e-3)


def child_that_keeps_its_weights(argv, variables):
    """Train as one rank and write what this rank holds at the end."""
    finished = train.Run.train

    def then_save(self, log):
        result = finished(self, log)
        held = [self.raw.state_dict(), self.optimizer.state_dict()]
        torch.save(held, f"{variables['WEIGHTS']}/{self.processes.rank}.pt")
        return result
    train.Run.train = then_save
    child(argv, variables)


def test_ranks_hold_identical_weights(data, tmp_path):
    """After training, with dropout and stochastic rounding, every rank has the same weights, codes and scales."""
    argv = [*SMALL, *RANDOM, f"--data_dir={data}", f"--out_dir={tmp_path / 'a'}"]
    assert group(argv, 2, child_that_keeps_its_weights, WEIGHTS=str(tmp_path)) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same(*ranks)
    assert any(state["exp_avg"].dtype == torch.uint8 for state in ranks[0][1]["state"].values())
    codes = group([*argv, "--gradient_accumulation_steps=3"], 2)  # does not divide over them
    assert 2 in codes and 0 not in codes  # the other one may miss who has left first


def test_the_global_batch_is_the_same_at_any_world_size():
    config = build(train.TrainConfig, dict(batch_size=3, gradient_accumulation_steps=4, block_size=8))
    tokens = np.arange(10_000, dtype=np.uint16)

    def step(world):
        rows = []
        for rank in range(world):
            processes = type("P", (), {"rank": rank, "world": world, "device": "cpu"})
            batches = train.Batches(tokens, config, processes)
            for micro in range(batches.mine):
                x, y = batches.get(7, micro)
                assert torch.equal(x[:, 1:], y[:, :-1]) and x.shape == (3, 8)
                rows += x[:, 0].tolist()
        return rows
    assert step(1) == step(2) == step(4) and len(set(step(1))) == 12


@pytest.mark.parametrize("world, batch, accumulation, becomes", [
    (2, 8, 1, (4, 2)), (4, 8, 2, (4, 4)), (1, 8, 1, (8, 1)), (2, 8, 4, (8, 4))])
def test_a_micro_batch_is_split_over_processes(world, batch, accumulation, becomes):
    """More processes than micro-batches: each gets a smaller one, and the global batch stays what it was."""
    config = build(train.TrainConfig, dict(batch_size=batch, gradient_accumulation_steps=accumulation))
    processes = type("P", (), {"world": world, "device": "cpu", "print": staticmethod(print)})
    device.resolve(config, processes)
    assert (config.batch_size, config.gradient_accumulation_steps) == becomes


def test_torchrun(data, tmp_path):
    """The README's torchrun line in its smallest form."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *SMALL,
               *W8A8, f"--data_dir={data}", f"--out_dir={tmp_path / 'a'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "a")[-1]["status"] == "finished" and done.stdout.count("sample:") == 1


# -----------------------------------------------------------------------------
# bad input: one line says what is wrong and what is allowed, exit code 2, nothing written

@pytest.mark.parametrize("flags, message", [
    # a typo; a value that no flag, or no operand of the recipe, has
    ("--wbit=8", "unknown argument --wbit=8; did you mean --wbits?"),
    ("--preset=w8a9", "--preset=w8a9: did you mean w8a8?"),
    ("--wbits=9", "--wbits=9 is not supported: use 2 to 8, or 32"),
    ("--agran=per_row", "argument --agran: invalid choice: 'per_row'"),
    ("--m1bits=5", "argument --m1bits: invalid choice: 5"),
    ("--max_iters=1e3", "invalid int value: '1e3'"),
    ("--wbits=--", "wbits"),
    # out of range
    ("--learning_rate=-1", "--learning_rate=-1.0 must be at least 0"),
    ("--learning_rate=nan", "--learning_rate=nan must be at least 0"),
    ("--seed=-1", "--seed=-1 must be at least 0"),
    ("--seed=100000000000000000000", "--seed"),
    ("--schedule=wsd --wsd_decay=0", "--wsd_decay=0.0 must lie in (0, 1]"),
    ("--heads=1,2", "--heads=1,2 must be 1 numbers (n_layer) from 1 to 2"),
    ("--out_dir=", "is empty"),
    # no effect, or a contradiction
    ("--agran=per_tensor", "--agran=per_tensor has no effect without --abits below 32"),
    ("--wsd_decay=0.5", "--wsd_decay=0.5 has no effect without --schedule=wsd"),
    ("--preset=fp8 --gemm=int8", "--wfmt=e4m3 does not fit --gemm=int8"),
    ("--learning_rate=1e-4", "--min_lr=0.0003 exceeds --learning_rate=0.0001"),
    # the shape of the model, of the data, of the machine
    ("--wbits=8 --wgran=per_block --wblock=100", "--wblock=100 must divide in_features=32"),
    ("--gbits=8 --ggran=per_block --wblock=48", "--wblock=48 must divide the 128 tokens"),
    ("--wbits=8 --skip_blocks=1", "--skip_blocks=1 "),
    ("--block_size=1000000", "use a smaller --block_size"),
    ("--n_layer=100000000000000000000", "this machine has"),
    ("--batch_size=1000000000", "this machine has"),
    ("--device=cuda", "--device=cuda, but this torch sees no GPU"),
    # what is not there
    ("--dataset=nothing", "there is no prepared dataset in"),
    ("--init_from=nowhere", "nowhere"),
    ("--resume", "there is no checkpoint"),
    ("--wandb", "pip install wandb"),
])
def test_bad_flags(flags, message, run, tmp_path, monkeypatch):
    if "--device=cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = run(tmp_path / "a", *flags.split())
    *usage, line = err.splitlines()
    assert code == 2 and message in line and all(text.startswith("usage:") for text in usage)
    assert not [*tmp_path.glob("a/*")]
