"""What every test shares: one thread, hypothesis without a deadline, a small data set, programs run in this process.

A run here is a GPT-2 with one block of 32 channels for a few steps, uncompiled unless said otherwise.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the numbers do not depend on the machine
settings.register_profile("nanoqpt", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("nanoqpt")

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--preset=tiny", "--dataset=text", "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32",
         "--batch_size=4", "--gradient_accumulation_steps=2", "--max_iters=6", "--eval_interval=2", "--log_interval=1",
         "--eval_tokens=512", "--warmup_iters=2", "--sample_tokens=10", "--compile=False", "--device=cpu",
         "--dtype=float32"]


def pseudo_text(documents=80, lines=40):
    """Return made-up program text, about 100 kB, from a seeded grammar: the same whatever the repository holds."""
    rng = random.Random(0)
    syllables = [c + v for c in "bcdfglmnprst" for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]
    shapes = ["def {}({}, {}):", "    {} = {}[{}]", "    if {} > {}: {}()", "    return {} + {} * {}", "# {} {} {}."]

    def line():
        return rng.choice(shapes).format(*(words[int(300 * rng.random() ** 3)] for _ in range(3)))  # some are frequent
    return "\n<|endoftext|>\n".join("\n".join(line() for _ in range(lines)) for _ in range(documents))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with the dataset `text`: bytes of the pseudo text, for training and validation."""
    from prepare_data import DataConfig, PrepareConfig, prepare
    folder = tmp_path_factory.mktemp("data")
    source = folder / "source.txt"
    source.write_text(pseudo_text())
    prepare(PrepareConfig(input=str(source), val_input=str(source), tokenizer="bytes", processes=1,
                          data=DataConfig("text", str(folder))))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a program's main in this process: call(main, *flags) -> (exit code, stdout, stderr)."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def call(main, *flags):
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, flags)])
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code
        return code, *capsys.readouterr()
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(call, data):
    """Run train.py in this process: run(out_dir, *flags) -> (exit code, stdout, stderr)."""
    import train

    def run(out, *flags, small=SMALL, main=train.main):
        return call(main, *small, f"--data_dir={data}", f"--out_dir={out}", *flags)
    return run


@pytest.fixture
def signals(monkeypatch):
    """signals(number, step): a signal comes in that step; signals(): none does any more."""
    import train
    train_step = train.Run.train_step

    def signals(number=None, at=0):
        def interrupted(self):
            if number and self.step == at - 1:
                os.kill(os.getpid(), number)
            return train_step(self)
        monkeypatch.setattr(train.Run, "train_step", interrupted)
    return signals


def read(out):
    """Read log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu")} for line in lines]


def column(out, key):
    """Return what log.jsonl says of one key, line by line."""
    return [line[key] for line in read(out) if key in line]


def same(a, b):
    """Compare checkpoints bit for bit, the folder's name apart."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a if k not in ("out_dir", "resume", "asked"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def pytest_addoption(parser):
    """Let --fuzz=N choose how many random command lines are tried."""
    parser.addoption("--fuzz", type=int, default=80)
