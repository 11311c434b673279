"""Validation loss: one number, whatever the batch size, the processes and the file that prints it."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

import eval as evaluation
import train
from eval import bits_per_byte, evaluate, sample, unigram_entropy, val_windows
from model import GPT, GPTConfig, quant_linears
from prepare_data import DataConfig, PrepareConfig, prepare
from quant import QuantConfig

RECIPES = [{}, {"wbits": 8, "abits": 8}, {"wbits": 4, "abits": 4, "agran": "per_tensor"},
           {"abits": 4, "agran": "per_channel"}, {"abits": 8, "asym": True}]


def gpt(quant):
    """A small GPT with weights large enough for quantization to show."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(2, 2, 32, 16, dropout=0.5), 100, quant_linears(QuantConfig(**quant)))
    for p in model.parameters():
        p.data.mul_(5)
    return model


def windows(n=7):
    """n windows of random tokens."""
    return val_windows(np.random.default_rng(0).integers(0, 100, 16 * n + 1).astype(np.uint16), 16)


@pytest.mark.parametrize("quant", RECIPES)
def test_the_loss_is_one_number(quant):
    """At batch sizes 1, 3, 7 and 100, in training mode or not, evaluate is the mean of F.cross_entropy over windows."""
    model = gpt(quant)
    found = [evaluate(model, windows(), size) for size in (1, 3, 7, 100)]
    model.eval()
    by_hand = [torch.nn.functional.cross_entropy(model(torch.tensor(w[None, :-1]))[0, :, :100], torch.tensor(w[1:]))
               for w in windows()]
    assert found == pytest.approx([torch.stack(by_hand).mean().item()] * 4, rel=1e-6)
    model.train()
    evaluate(model, windows(), 3)
    assert model.training


def rank_loss(rank, world, port, results):
    """Evaluate as one of several processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    results[rank] = evaluate(gpt({"wbits": 8, "abits": 8}), windows(), 2)


def test_the_loss_is_the_same_on_two_processes():
    """Seven windows over two ranks: both get the number of one process."""
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = multiprocessing.get_context("spawn").Manager().dict()
    multiprocessing.spawn(rank_loss, (2, port, results), nprocs=2)
    alone = evaluate(gpt({"wbits": 8, "abits": 8}), windows(), 2)
    assert [results[0], results[1]] == pytest.approx([alone, alone], rel=1e-6)


def test_windows():
    """Windows do not overlap but for the one token that is target there and input here; eval_tokens spreads them."""
    tokens = np.arange(103, dtype=np.uint16)
    all_of_them = val_windows(tokens, 10)
    assert all_of_them.shape == (10, 11) and (all_of_them[:, 0] == np.arange(0, 100, 10)).all()
    assert (val_windows(tokens, 10, 50)[:, 0] == [0, 20, 40, 60, 80]).all()
    assert len(val_windows(tokens, 10, 10**9)) == 10 and len(val_windows(tokens, 10, 1)) == 1
    with pytest.raises(ValueError, match="103 tokens, and one window needs 104"):
        val_windows(tokens, 103)


def test_entropy_and_bits():
    """Four equally frequent tokens have ln 4 nats; 2 ln 2 nats per token at 4 bytes a token are half a bit per byte."""
    assert unigram_entropy(np.array([0, 1, 2, 3] * 5)) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([7] * 5)) == 0
    assert bits_per_byte(2 * math.log(2), {"tokens": 10, "bytes": 40}) == pytest.approx(0.5)


def test_sample_continues_the_prompt():
    """A sample begins with its prompt, depends on the seed only, and leaves the model in training mode."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(1, 2, 32, 16, dropout=0.5), 257, quant_linears(QuantConfig()))
    texts = [sample(model, "bytes", "def f", 30, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("def f") and model.training


def test_eval_prints_what_train_logged(tmp_path, monkeypatch, capsys):
    """`eval.py --ckpt=` prints the number of the run's last evaluation, `off` another one; an error is one line."""
    text = tmp_path / "a.txt"
    text.write_text("to be or not to be\n" * 500)
    prepare(PrepareConfig(input=str(text), val_input=str(text), tokenizer="bytes", processes=1,
                          data=DataConfig("text", str(tmp_path))))

    def call(main, *flags):
        monkeypatch.setattr(sys, "argv", ["x.py", *flags])
        try:
            main()
        except SystemExit as leave:
            return leave.code, capsys.readouterr()
        return 0, capsys.readouterr()
    call(train.main, "--preset=tiny", "--wbits=2", "--abits=2", "--n_layer=1", "--n_embd=32", "--block_size=32",
         "--max_iters=10", "--warmup_iters=0", "--learning_rate=1e-2", "--compile=False", "--dataset=text",
         f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out", "--eval_tokens=999", "--device=cpu", "--dtype=float32")
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    logged = [line for line in logged if "val_loss" in line][-1]
    code, shown = call(evaluation.main, f"--ckpt={tmp_path}/out", "--sample_tokens=5", "--device=cpu")
    assert code == 0
    assert f"val_loss {logged['val_loss']:.4f} nats per token, {logged['val_bpb']:.4f} bits" in shown.out
    _, off = call(evaluation.main, f"--ckpt={tmp_path}/out", "--quantizers=off", "--sample_tokens=0", "--device=cpu")
    assert "quantizers off" in off.out and f"val_loss {logged['val_loss']:.4f} " not in off.out
    for flags, message in ((["--ckpt=nowhere"], "no checkpoint"), (["--dataset=other"], "no prepared dataset"),
                           (["--batch_size=0"], "--batch_size=0")):
        code, shown = call(evaluation.main, f"--ckpt={tmp_path}/out", "--device=cpu", *flags)
        assert code == 2 and message in shown.err.splitlines()[-1]
