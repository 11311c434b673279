"""extensions/lsq.py: the gradients of LSQ's paper, and that it is a run like any other."""

import math

import pytest
import torch
from conftest import column
from hypothesis import given
from hypothesis import strategies as st

import extensions
from extensions.lsq import LearnedStep, round_ste
from model import GPT, GPTConfig


@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=50), st.integers(2, 8))
def test_ste_mask_is_the_clip_range(values, bits):
    """Value and mask are torch.fake_quantize's, bit for bit: a gradient of 1 where no code was clamped, else 0."""
    qmax, values = 2 ** (bits - 1) - 1, torch.tensor(values)
    ties = torch.arange(-130, 130) + 0.5
    ours, theirs = (torch.cat((values, ties)).requires_grad_() for _ in range(2))
    y, expected = round_ste(ours, bits), torch.fake_quantize_per_tensor_affine(theirs, 1.0, 0, -qmax, qmax)
    assert torch.equal(y, expected) and not (y.signbit() & (y == 0)).any()  # no -0.0
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(torch.autograd.grad(out, x, g)[0] for out, x in ((y, ours), (expected, theirs))))


def test_ste_of_what_is_not_finite():
    """A nan stays nan, with a gradient; inf saturates."""
    x = torch.tensor([1.6, 99.0, math.nan, math.inf], requires_grad=True)
    y = round_ste(x, 4)
    dx, = torch.autograd.grad(y.sum(), x)
    assert y[[0, 1, 3]].tolist() == [2.0, 7.0, 7.0] and y[2].isnan() and dx.tolist() == [1, 0, 1, 0]


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
