"""Validation loss: one number, whatever the batch size and the file that prints it.

(On two processes: test_train.py.)
"""

import math

import numpy as np
import pytest
import torch
from conftest import column

import eval as evaluation
from eval import bits_per_byte, evaluate, sample, unigram_entropy, val_windows
from model import GPT, GPTConfig, quant_linears
from quant import QuantConfig

RECIPES = {"fp32": {}, "w8a8": {"wbits": 8, "abits": 8}, "per_tensor": {"wbits": 4, "abits": 4, "agran": "per_tensor"},
           "per_channel": {"abits": 4, "agran": "per_channel"}, "asym": {"abits": 8, "asym": True}}


def gpt(name, vocab_size=100):
    """A small GPT with weights large enough for quantization to show."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(2, 2, 32, 16, dropout=0.5), vocab_size, quant_linears(QuantConfig(**RECIPES[name]), 2))
    for p in model.parameters():
        p.data.mul_(5)
    return model


def windows(n=7):
    """n windows of random tokens."""
    return val_windows(np.random.default_rng(0).integers(0, 100, 16 * n + 1).astype(np.uint16), 16)


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_is_one_number(name):
    """At batch sizes 1, 3, 7 and 100, in training mode or not, evaluate is the mean of F.cross_entropy over windows."""
    model = gpt(name)
    found = [evaluate(model, windows(), size) for size in (1, 3, 7, 100)]
    assert model.training
    model.eval()
    by_hand = [torch.nn.functional.cross_entropy(model(torch.tensor(w[None, :-1]))[0, :, :100], torch.tensor(w[1:]))
               for w in windows()]
    assert found == pytest.approx([torch.stack(by_hand).mean().item()] * 4, rel=1e-6)
    assert evaluate(model, windows(), 3) == found[1] and not model.training


def test_windows():
    tokens = np.arange(103, dtype=np.uint16)
    all_of_them = val_windows(tokens, 10)
    assert all_of_them.shape == (10, 11) and (all_of_them == np.arange(0, 100, 10)[:, None] + np.arange(11)).all()
    assert (val_windows(tokens, 10, 50)[:, 0] == [0, 20, 40, 60, 80]).all()
    assert len(val_windows(tokens, 10, 10**9)) == 10 and len(val_windows(tokens, 10, 1)) == 1
    with pytest.raises(ValueError, match="103 tokens, and one window needs 104"):
        val_windows(tokens, 103)


def test_entropy_and_bits():
    assert unigram_entropy(np.array([0, 1, 2, 3] * 5)) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([7] * 5)) == 0
    assert bits_per_byte(2 * math.log(2), {"tokens": 10, "bytes": 40}) == pytest.approx(0.5)


def test_sample_continues_the_prompt():
    model = gpt("fp32", 257)
    texts = [sample(model, "bytes", "def f", 30, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("def f") and model.training


def test_eval_prints_what_train_logged(run, call, tmp_path):
    """`eval.py --ckpt=` prints the number of the run's last evaluation, `off` another one; an error is one line."""
    assert run(tmp_path / "out", "--wbits=2", "--abits=2", "--learning_rate=1e-2", "--sample_tokens=0")[0] == 0
    loss, bpb = (column(tmp_path / "out", key)[-1] for key in ("val_loss", "val_bpb"))
    flags = [f"--ckpt={tmp_path}/out", "--device=cpu"]
    code, out, _ = call(evaluation.main, *flags, "--sample_tokens=5")
    assert code == 0 and f"val_loss {loss:.4f} nats per token, {bpb:.4f} bits" in out
    _, off, _ = call(evaluation.main, *flags, "--quantizers=off", "--sample_tokens=0")
    assert "quantizers off" in off and f"val_loss {loss:.4f} " not in off
    for flag, message in (("--ckpt=nowhere", "no checkpoint"), ("--dataset=other", "no prepared dataset"),
                          ("--batch_size=0", "--batch_size=0"), ("--top_k=-1", "--top_k=-1")):
        code, _, err = call(evaluation.main, *flags, flag)
        assert code == 2 and message in err.splitlines()[-1]


def test_other_quantizers_after_the_fact(run, call, tmp_path):
    """--recipe takes presets and flags: that of training prints training's loss; --ptq has the paper's grid."""
    ckpt = f"--ckpt={tmp_path}/a"
    assert run(tmp_path / "a", "--wbits=4", "--abits=8", "--agran=per_tensor")[0] == 0

    def loss(*flags):
        code, out, err = call(evaluation.main, ckpt, "--sample_tokens=0", *flags)
        assert code == 0, err
        return out.splitlines()[1]
    trained, off = loss(), loss("--quantizers=off")
    assert loss("--recipe=W4,abits=8,agran=per_tensor") == loss("--recipe=wbits=4,A1") == trained != off
    assert loss("--recipe=E0") == off != loss("--recipe=lsq4")
    assert loss("--recipe=W4,abits=2,wbits=32") == loss("--recipe=abits=2") != loss("--recipe=W4,abits=2")
    rows = dict(line.split() for line in call(evaluation.main, ckpt, "--ptq")[1].splitlines()[1:])
    assert len(rows) == 25 and rows["E0"] in off and rows["W4,A1"] in trained and rows["W3,A3"] != rows["E0"]
    for flags, words in ((["--recipe=W9"], "'W9' is no preset of a recipe"), (["--recipe=tiny"], "'tiny' is no preset"),
                         (["--recipe=wgran=per_tensor"], "has no effect without --wbits"),
                         (["--recipe=W4", "--quantizers=off"], "with --recipe"),
                         (["--recipe=S6"], "--recipe=S6 changes nothing in a trained model"),
                         (["--ptq", "--seed=1"], "with --ptq")):
        code, out, err = call(evaluation.main, ckpt, *flags)
        assert code == 2 and words in err and not out
