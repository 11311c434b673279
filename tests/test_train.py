"""The loop, through its real command line: reproducible, resumable, parallel, and clear about bad input.

Runs that must die or form a group live in processes forked from a server that has imported torch already.
"""

import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, column, read, same

import extensions
import train
from support import device
from support.checkpoint import load_checkpoint, save_checkpoint
from support.config import build, flatten
from support.presets import PRESETS, SIZES

W8A8 = ["--wbits=8", "--abits=8"]
RANDOM = [*W8A8, "--gbits=8", "--rounding=stochastic", "--dropout=0.1",  # all that draws random numbers
          "--m1bits=8", "--m1round=stochastic", "--m2bits=4", "--m2round=stochastic"]


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
    assert lines[0]["config"]["wbits"] == 8 and lines[-1] == {"status": "finished", "step": 40}
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 41))
    assert set(training[0]) == {"step", "tokens", "loss", "lr", "grad_norm"} and training[0]["tokens"] == 2 * 4 * 32
    evaluations = {line["step"]: line for line in lines if "val_loss" in line}
    assert list(evaluations) == [0, 20, 40] and evaluations[0]["val_loss"] == pytest.approx(math.log(257), abs=0.3)
    # byte-level tokens: one byte each, and one end-of-text token per document
    assert evaluations[40]["val_bpb"] == pytest.approx(evaluations[40]["val_loss"] / math.log(2), rel=1e-2)
    assert evaluations[40]["val_loss"] < evaluations[0]["val_loss"] - 1.5
    assert f"val_loss {evaluations[40]['val_loss']:.4f}" in out and "unigram entropy" in out and "sample:" in out
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl"]


def test_the_same_seed_is_the_same_run(run, tmp_path):
    """Twice the same command: every number the same; another seed: another run."""
    run(tmp_path / "a", *RANDOM), run(tmp_path / "b", *RANDOM), run(tmp_path / "c", *RANDOM, "--seed=1")
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert a[1:] == b[1:] and a[1:] != c[1:]
    assert same(*(load_checkpoint(tmp_path / name) for name in "ab"))


def test_accumulation_is_a_larger_batch(run, tmp_path):
    """8 sequences at once or 2 x 4 are the same step, to rounding (per-token scales do not mix sequences)."""
    run(tmp_path / "a", *W8A8)
    run(tmp_path / "b", *W8A8, "--batch_size=8", "--gradient_accumulation_steps=1")
    a, b = (column(tmp_path / name, "loss") for name in "ab")
    assert a == pytest.approx(b, abs=1e-3)


def test_learning_rate():
    """Linear warm-up that never is 0, the peak at its end, the cosine's middle and end, and min_lr after that."""
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    lrs = [train.learning_rate(step, config) for step in (0, 9, 10, 60, 110, 1000)]
    assert lrs == pytest.approx([1 / 11, 10 / 11, 1.0, 0.55, 0.1, 0.1])


def test_wsd():
    """The same warm-up, then the peak until a fifth of the run is left, then a straight line to min_lr."""
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=100, schedule="wsd")
    lrs = [train.learning_rate(step, config) for step in (0, 9, 10, 79, 80, 90, 100, 1000)]
    assert lrs == pytest.approx([1 / 11, 10 / 11, 1.0, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_bf16_follows_fp32(run, tmp_path):
    """bfloat16 activations over fp32 weights give nearly the losses of fp32, and fp32 checkpoints."""
    run(tmp_path / "a", *W8A8), run(tmp_path / "b", *W8A8, "--dtype=bfloat16")
    a, b = (column(tmp_path / name, "loss") for name in "ab")
    assert a == pytest.approx(b, abs=0.03) and a != b
    assert all(t.dtype == torch.float32 for t in load_checkpoint(tmp_path / "b")["model"].values())


@pytest.mark.parametrize("name", [name for name in PRESETS | extensions.PRESETS if name not in SIZES])
def test_every_preset_runs(name, run, tmp_path):
    """Each experiment of the paper takes steps and is in the config that log.jsonl records."""
    flags = (PRESETS | extensions.PRESETS)[name]
    assert run(tmp_path / "a", f"--preset=tiny,{name}", "--max_iters=2", "--eval_interval=9")[0] == 0
    recorded = read(tmp_path / "a")[0]["config"]
    assert {k: recorded[k] for k in flags} == flags


def test_sizes_are_gpt2s():
    """The presets of sizes are valid configs, and those of the released models keep 512 sequences a step."""
    for name, values in SIZES.items():
        config = build(train.TrainConfig, values)
        assert name in ("tiny", "laptop", "gpu") or config.batch_size * config.gradient_accumulation_steps == 512


def test_compiled_run_follows_eager(run, tmp_path):
    """torch.compile changes roundings only: 6 steps of W8A8 to 1e-4."""
    run(tmp_path / "a", *W8A8), run(tmp_path / "b", *W8A8, "--compile=True")
    a, b = (column(tmp_path / name, "loss") for name in "ab")
    assert a == pytest.approx(b, abs=1e-4)
    torch.compiler.reset()


def test_no_compiler_is_said_aloud(run, tmp_path, monkeypatch):
    """Without a C++ compiler the run is eager, and says so."""
    monkeypatch.setattr(device, "can_compile", lambda: False)
    code, out, _ = run(tmp_path / "a", "--compile=True", "--max_iters=1")
    assert code == 0 and "compile=False (no C++ compiler" in out


@pytest.mark.parametrize("kind", ["checkpoint", "hugging face"])
def test_init_from(kind, run, call, tmp_path):
    """--init_from takes weights and shape of a checkpoint or a Hugging Face folder, and begins at step 0."""
    import eval as evaluation
    run(tmp_path / "a", "--max_iters=2")
    source = tmp_path / "a"
    if kind == "hugging face":
        pytest.importorskip("safetensors")
        source = tmp_path / "hf"
        assert call(evaluation.main, f"--ckpt={tmp_path / 'a'}", f"--export={source}")[0] == 0
    small = [flag for flag in SMALL if not flag.startswith(("--n_", "--block_size"))]
    code, _, _ = run(tmp_path / "b", f"--init_from={source}", "--max_iters=1", "--keep8=both", small=small)
    assert code == 0 and column(tmp_path / "b", "val_loss")[0] == column(tmp_path / "a", "val_loss")[-1]
    assert (config := load_checkpoint(tmp_path / "b")["config"])["n_layer"] == 1 and config["keep8"] == "both"
    code, _, _ = run(tmp_path / "c", f"--init_from={source}", "--max_iters=1", "--block_size=16", small=small)
    assert code == 0 and len(load_checkpoint(tmp_path / "c")["model"]["wpe.weight"]) == 16
    code, _, err = run(tmp_path / "d", f"--init_from={source}", "--n_layer=3", small=small)
    assert code == 2 and "--n_layer=3 does not fit the weights of --init_from" in err and "which have 1" in err


# -----------------------------------------------------------------------------
# stopping and going on

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [2, 3])  # with an evaluation due, and between two
def test_signal_then_resume_is_bitwise(number, at, run, tmp_path, monkeypatch):
    """A run stopped by a signal says how to go on; resumed, it is the run that was never stopped: weights and log."""
    run(tmp_path / "whole", *RANDOM)
    step = train.Run.train_step

    def interrupted(self):
        if self.step == at - 1:
            os.kill(os.getpid(), number)
        return step(self)
    monkeypatch.setattr(train.Run, "train_step", interrupted)
    code, out, _ = run(tmp_path / "cut", *RANDOM)
    assert code == 128 + number and "--resume" in out and read(tmp_path / "cut")[-1]["status"] == "interrupted"
    monkeypatch.setattr(train.Run, "train_step", step)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # as a crash would leave it
    code, _, _ = run(tmp_path / "cut", "--resume", small=[])
    assert code == 0 and read(tmp_path / "cut")[1:] == read(tmp_path / "whole")[1:]
    for name in ("ckpt.pt", "ckpt_best.pt"):
        assert same(load_checkpoint(tmp_path / "cut" / name), load_checkpoint(tmp_path / "whole" / name))


def test_sigkill_at_random_points(run, data, tmp_path):
    """Killed again and again without warning and resumed each time, the run ends bitwise like the undisturbed one."""
    flags = [*RANDOM, "--max_iters=60", "--eval_interval=3"]
    run(tmp_path / "whole", *flags)
    argv = [*SMALL, *flags, f"--data_dir={data}", f"--out_dir={tmp_path / 'cut'}"]
    rng, kills = np.random.default_rng(0), 0
    for _ in range(40):
        resume = ["--resume"] if (tmp_path / "cut" / "ckpt.pt").exists() else []
        if resume:
            load_checkpoint(tmp_path / "cut")  # whole, whenever the kill came
        process = spawn(argv + resume)
        process.join(rng.uniform(0.3, 1.2) if kills < 10 else 60)
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 3
    assert read(tmp_path / "cut")[1:] == read(tmp_path / "whole")[1:]
    assert same(load_checkpoint(tmp_path / "cut"), load_checkpoint(tmp_path / "whole"))


def test_resume_refuses_another_run(run, data, tmp_path):
    """A resumed run keeps its configuration; what would make it another run is an error, a larger max_iters is not."""
    run(tmp_path / "a", "--max_iters=2", "--lr_decay_iters=4")
    code, _, err = run(tmp_path / "a", "--resume", "--wbits=8", small=[])
    assert code == 2 and "--wbits=8 differs from the 32 this run began with" in err
    code, _, err = run(tmp_path / "a", "--resume", small=[])
    assert code == 2 and "has finished its 2 steps" in err
    old = load_checkpoint(tmp_path / "a")
    del old["config"]["gemm"]  # as if written before that flag existed
    save_checkpoint(tmp_path / "a" / "ckpt.pt", old)
    code, _, err = run(tmp_path / "a", "--resume", "--m1bits=8", small=[])
    assert code == 2 and "--m1bits=8 differs from the 32 this run began with" in err
    code, _, _ = run(tmp_path / "a", "--resume", "--max_iters=4", small=[])
    assert code == 0 and load_checkpoint(tmp_path / "a")["step"] == 4
    code, _, err = run(tmp_path / "none", "--resume", small=[])
    assert code == 2 and "no checkpoint" in err


def test_a_signal_in_the_last_step_changes_nothing(run, tmp_path, monkeypatch):
    """A run that is told to stop when it is over is a finished run, with its last evaluation and report."""
    step = train.Run.train_step

    def last(self):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)
    monkeypatch.setattr(train.Run, "train_step", last)
    code, out, _ = run(tmp_path / "a")
    assert code == 0 and "sample:" in out and read(tmp_path / "a")[-1]["status"] == "finished"


def test_a_run_shorter_than_its_warmup_can_be_resumed(run, tmp_path, monkeypatch):
    """The warm-up is cut to the run, said aloud, and the run resumes."""
    flags = ["--warmup_iters=100", "--max_iters=4"]
    _, out, _ = run(tmp_path / "whole", *flags)
    assert "warmup_iters=4 (the whole run)" in out
    step = train.Run.train_step
    monkeypatch.setattr(train.Run, "train_step", lambda self: os.kill(os.getpid(), signal.SIGTERM) or step(self))
    assert run(tmp_path / "cut", *flags)[0] == 128 + signal.SIGTERM
    monkeypatch.setattr(train.Run, "train_step", step)
    assert run(tmp_path / "cut", "--resume", small=[])[0] == 0
    assert read(tmp_path / "cut")[1:] == read(tmp_path / "whole")[1:]


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


@pytest.mark.parametrize("flags", [[], ["--preset=int8-all,keep8"]], ids=str)
def test_two_processes_follow_one(flags, run, data, tmp_path):
    """The same global batch over two processes: the same losses for 50 steps, and the same validation loss."""
    flags = [*W8A8, *flags, "--max_iters=50", "--eval_interval=25"]
    run(tmp_path / "one", *flags)
    assert group([*SMALL, *flags, f"--data_dir={data}", f"--out_dir={tmp_path / 'two'}"], 2) == [0, 0]
    one, two = read(tmp_path / "one")[1:], read(tmp_path / "two")[1:]
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        for key in {"loss", "val_loss"} & set(a):
            assert a[key] == pytest.approx(b[key], abs=1e-3)


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
    assert same(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"))


def test_the_global_batch_is_the_same_at_any_world_size():
    """1, 2 and 4 processes read the same sequences in a step, each of them once."""
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
    """The README's torchrun line in its smallest form, and a batch that does not divide over the ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *SMALL,
               *W8A8, f"--data_dir={data}", f"--out_dir={tmp_path / 'a'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "a")[-1]["status"] == "finished" and done.stdout.count("sample:") == 1
    command[-1] = f"--out_dir={tmp_path / 'b'}"
    failed = subprocess.run([*command, "--gradient_accumulation_steps=3"], cwd=ROOT, capture_output=True, text=True,
                            timeout=300)
    assert failed.returncode != 0 and failed.stderr.count("error: --gradient_accumulation_steps=3") == 1


# -----------------------------------------------------------------------------
# bad input: one line, exit code 2, nothing lost

@pytest.mark.parametrize("flags, message", [
    (["--wbit=8"], "unknown argument --wbit=8; did you mean --wbits?"),
    (["--preset=w8a9"], "--preset=w8a9: did you mean w8a8?"),
    (["--wbits=9"], "--wbits=9 is not supported: use 2 to 8, or 32"),
    (["--agran=per_row"], "argument --agran: invalid choice: 'per_row'"),
    (["--agran=per_tensor"], "--agran=per_tensor has no effect without --abits below 32"),
    (["--wbits=8", "--wgran=per_block", "--wblock=100"], "--wblock=100 must divide in_features=32"),
    (["--gbits=8", "--ggran=per_block", "--wblock=48"], "--wblock=48 must divide the 128 tokens"),
    (["--wbits=8", "--skip_blocks=1"], "--skip_blocks=1 "),
    (["--n_head=3"], "--n_head=3 must divide --n_embd=32"),
    (["--dataset=nothing"], "there is no prepared dataset in"),
    (["--device=cuda"], "--device=cuda, but this torch sees no GPU"),
    (["--learning_rate=-1"], "--learning_rate=-1.0 must be at least 0"),
    (["--learning_rate=nan"], "--learning_rate=nan must be at least 0"),
    (["--beta2=1"], "--beta2=1.0 must lie in [0, 1)"),
    (["--m1bits=5"], "argument --m1bits: invalid choice: 5"),
    (["--m2fmt=linear"], "--m2fmt=linear has no effect "),
    (["--schedule=wsd", "--wsd_decay=0"], "--wsd_decay=0.0 must lie in (0, 1]"),
    (["--wsd_decay=0.5"], "--wsd_decay=0.5 has no effect without --schedule=wsd"),
    (["--heads=1,2"], "--heads=1,2 must be 1 numbers (n_layer) from 1 to 2"),
    (["--wbits=8", "--gemm=int8"], "--gemm=int8 has no effect without --wbits and --abits below 32"),
    (["--preset=int8", "--asym"], "--asym=True does not fit --gemm=int8"),
    (["--preset=fp8", "--gemm=int8"], "--wfmt=e4m3 does not fit --gemm=int8"),
    (["--preset=fp8", "--gbits=4"], "--gbits=4 does not fit --gfmt=e5m2"),
    (["--afmt=e4m3"], "--afmt=e4m3 has no effect without --abits below 32"),
    (["--block_size=1000000"], "use a smaller --block_size"),
    (["--init_from=nowhere"], "nowhere"),
    (["--seed=-1"], "--seed=-1 must be at least 0"),
    (["--max_iters=1e3"], "invalid int value: '1e3'"),
])
def test_bad_flags(flags, message, run, tmp_path):
    """One line says what is wrong and what is allowed; no traceback, exit code 2, nothing written."""
    if "--device=cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, _, err = run(tmp_path / "a", *flags)
    *usage, line = err.splitlines()
    assert code == 2 and message in line and all(text.startswith("usage:") for text in usage)
    assert not (tmp_path / "a").exists()


def test_out_dir_of_another_run(run, tmp_path):
    """A second run into the same folder is refused, and leaves the first one as it was."""
    run(tmp_path / "a", "--max_iters=2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    code, _, err = run(tmp_path / "a", "--max_iters=2")
    assert code == 2 and "holds another run" in err
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "train.bin").write_bytes(b"\0\0" * 9), "18 bytes, expected"),
    (lambda f: (f / "val.bin").write_bytes((f / "val.bin").read_bytes()[:-2] + b"\1\0"), "checksum differs"),
    (lambda f: (f / "meta.json").write_text("{}"), "meta.json: "),
    (lambda f: (f / "train.bin").unlink(), "train.bin: "),
])
def test_damaged_data(damage, message, run, data, tmp_path):
    """Truncated, changed and missing shards are found before training begins."""
    shutil.copytree(data / "text", tmp_path / "data" / "text")
    damage(tmp_path / "data" / "text")
    code, _, err = run(tmp_path / "a", f"--data_dir={tmp_path / 'data'}")
    assert code == 2 and message in err and err.count("\n") == 1


def test_missing_tracker(run, tmp_path, monkeypatch):
    """A tracker that is not installed is an error that names the command."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = run(tmp_path / "a", "--wandb")
    assert code == 2 and "pip install wandb" in err


def test_flatten_of_the_whole_config_is_plain():
    """What the checkpoint stores can be read with weights_only, and no two dataclasses share a flag."""
    assert all(isinstance(v, (str, int, float, bool, tuple, type(None))) for v in flatten(train.TrainConfig()).values())
