"""extensions/lsq.py: the gradients of LSQ's paper, and that it is a run like any other."""

import pytest
import torch
from conftest import column

import extensions
from extensions.lsq import LearnedStep
from model import GPT, GPTConfig


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_the_papers(bits):
    """Eq. 3: dw^/ds is round(w/s) - w/s inside, +-qmax where w clips; dw^/dw is 1 inside and 0 where it clips."""
    torch.manual_seed(0)
    w, qmax = torch.randn(16, 32, requires_grad=True), 2 ** (bits - 1) - 1
    step = LearnedStep(w, bits, 1.0)
    step.start(w)
    assert step.s.item() == pytest.approx(2 * w.abs().mean().item() / qmax ** 0.5)
    step.s.data.mul_(0.5)  # so that some weights clip
    y, g = step(w), torch.randn(16, 32)
    s = step.s.detach()
    codes = (y / s).detach()
    assert torch.allclose(codes, codes.round(), atol=1e-4) and codes.abs().max() <= qmax + 1e-4
    y.backward(g)
    clips = (w / s).round().abs() > qmax
    assert torch.allclose(w.grad, g * ~clips) and clips.any() == (bits < 8)
    slope = torch.where(clips, qmax * w.sign(), (w / s).round() - w / s)
    assert step.s.grad.item() == pytest.approx((g * slope).sum().item() / (w.numel() * qmax) ** 0.5, rel=1e-4)


def test_steps_begin_at_the_weights():
    """Built, a model's steps fit its weights; the embedding, tied to lm_head, has none. Zeros are legal."""
    model = GPT(GPTConfig(1, 2, 32, 16), 50, extensions.linears({"n_layer": 1, "lsq_bits": 4}))
    layers = [m for m in model.modules() if getattr(m, "reparam", None)]
    assert len(layers) == 4 and model.lm_head.reparam is None
    for layer in layers:
        assert layer.reparam.s.item() == pytest.approx(2 * layer.weight.abs().mean().item() / 7 ** 0.5)
    step, zeros = LearnedStep(torch.zeros(4, 4), 4, 1.0), torch.zeros(4, 4)
    step.start(zeros)
    assert torch.equal(step(zeros), zeros)


def test_a_run_learns_its_steps(run, tmp_path):
    for name, flags in (("a", []), ("b", ["--lsq_lr=0"])):
        code, _, err = run(tmp_path / name, "--preset=tiny,lsq4", "--max_iters=20", "--learning_rate=1e-2", *flags)
        assert code == 0, err
        assert column(tmp_path / name, "val_loss")[-1] < column(tmp_path / name, "val_loss")[0] - 0.5
    moved, kept = (torch.load(tmp_path / name / "ckpt.pt")["model"]["h.0.mlp.c_fc.reparam.s"] for name in "ab")
    assert moved != kept


@pytest.mark.parametrize("flags, message", [
    (["--lsq_bits=4", "--wbits=8"], "--lsq_bits=4 with --wbits or --nvfp4 rounds the weights twice"),
    (["--lsq_bits=9"], "--lsq_bits=9 must be 2 to 8"), (["--lsq_lr=2"], "--lsq_lr=2.0 has no effect")])
def test_bad_flags(flags, message, run, tmp_path):
    code, _, err = run(tmp_path / "a", *flags)
    assert code == 2 and message in err.splitlines()[-1]
