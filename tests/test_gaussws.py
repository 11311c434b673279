"""extensions/gaussws.py: the noise has its closed form, bfloat16 carries it, gradients are those of w + R step."""

import math

import pytest
import torch
from conftest import column, read, same
from test_train import one_and_two

import eval as evaluation
from extensions import gaussws
from extensions.gaussws import Config, Sampled, block_step, rounded_normal
from model import GPT, GPTConfig, quant_linears
from quant import QuantConfig
from support.checkpoint import load_checkpoint

ON = dict(gaussws=True, b_decay=0.01)
FLAGS = ["--preset=tiny,gaussws", "--b_block=16", "--b_lr=5", "--b_decay=0.5"]


def weights(n=64, k=96, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def sample(w, seed=1, **flags):
    """Return w^, the R that was drawn, and the step of every element, (N, K) each."""
    config = Config(**{**ON, "b_target": 1.0, **flags})
    module = Sampled(w, config, torch.float32)
    torch.manual_seed(seed)
    w_hat = module(w)
    torch.manual_seed(seed)
    R = rounded_normal(torch.rand_like(w))
    step = block_step(w, module.bits(), config.b_block).expand(-1, config.b_block, -1, config.b_block).reshape(w.shape)
    return module, w_hat, R, step


def test_frequencies():
    """R = round(N(0, 1) / 2): each value within 5 sigma of the normal's, mean 0, neighbours independent."""
    n = 2**22
    R = rounded_normal(torch.rand(n, generator=torch.Generator().manual_seed(0)))
    cdf = [0.5 * math.erfc(-x / math.sqrt(2)) for x in (-5, -3, -1, 1, 3, 5)]
    for value, low, high in zip(range(-2, 3), cdf, cdf[1:], strict=False):
        p = high - low
        assert abs((R == value).sum().item() - n * p) < 5 * math.sqrt(n * p * (1 - p)), value
    assert abs(R.mean()) < 5 * math.sqrt(0.325413 / n) and R.var().item() == pytest.approx(0.325413, rel=5e-3)
    assert abs((R[1:] * R[:-1]).mean()) < 5 * 0.325413 / math.sqrt(n)


@pytest.mark.parametrize("b, low, high", [(8, 0, 0), (9, 0.001, 0.003), (10, 0.05, 0.06), (11, 0.22, 0.235)])
def test_bfloat16_carries_noise_of_nine_bits(b, low, high):
    """At p + 1 bits hardly any of the noise is swallowed by the cast (p = 8), a fifth two bits above."""
    w = weights(512, 512)
    step = block_step(w, torch.tensor(float(b)), 32).expand(-1, 32, -1, 32).reshape(w.shape)
    R = rounded_normal(torch.rand(w.shape, generator=torch.Generator().manual_seed(2)))
    lost = ((w + R * step).bfloat16() == w.bfloat16()) & (R != 0)
    assert low <= lost.sum().item() / (R != 0).sum().item() <= high


def test_compiled_weights_lie_on_bfloat16s_grid():
    """A compiler drops a cast there and back: the bits are rounded by hand, as torch rounds them."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.randint(-30, 30, (4096,))
    x[:4] = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875])  # two ties
    assert torch.equal(gaussws.round_to_bfloat16(x), x.bfloat16().float())
    module = Sampled(w := weights(), Config(**ON), torch.float32)
    w_hat = torch.compile(lambda w: module(w) * 1)(w)
    assert torch.equal(w_hat, w_hat.bfloat16().float()) and not torch.equal(w_hat, w)
    torch.compiler.reset()


@pytest.mark.parametrize("b", [2.0, 4.0, 6.5, 8.0])
def test_gradients(b):
    """dw is dw^ bit for bit; db is that of w + R step with the R that was drawn, which backward finds again."""
    w = weights().requires_grad_()
    module, w_hat, R, step = sample(w, b_init=b)
    torch.testing.assert_close(w_hat, (w + R * step).detach(), rtol=2**-8, atol=0)
    assert torch.equal(w_hat, w_hat.bfloat16().float()) and torch.equal(torch.round((w_hat - w) / step), R)
    g = weights(seed=3)
    w_hat.backward(g)
    assert torch.equal(w.grad, g)
    t = torch.ones_like(module.t, dtype=torch.float64, requires_grad=True)
    exact = block_step(w.detach().double(), 1 + t * (b - 1), 32)  # autograd, float64, R fixed
    exact = (exact.expand(-1, 32, -1, 32).reshape(w.shape) * R * g).sum()
    exact.backward()
    recovered = ((w_hat - w).detach() / step).round() * step - R * step
    assert not recovered.any()
    torch.testing.assert_close(module.t.grad.double(), t.grad, rtol=1e-5, atol=1e-9)


def test_corners():
    """A block of zeros stays so, its db finite; eval is the identity; seeds are noise; constant bits do not train."""
    w = weights()
    w[:32, :32] = 0
    module, w_hat, _, _ = sample(w.requires_grad_(), b_init=4.0)
    w_hat.sum().backward()
    assert not w_hat[:32, :32].any() and module.t.grad.isfinite().all() and module.t.grad[0, 0, 0, 0] == 0
    assert torch.equal(w_hat, sample(w, b_init=4.0)[1]) and not torch.equal(w_hat, sample(w, seed=2, b_init=4.0)[1])
    assert module.eval()(w) is w
    assert not Sampled(w, Config(gaussws=True), torch.float32).t.requires_grad
    uniform, found, _, step = sample(w, b_noise="uniform", b_init=4.0)
    assert ((found - w).abs() <= step * 0.5 + w.abs() * 2**-8).all()


def test_model():
    """Bits begin at b_init and have a group of their own; the head has none; w^ is all that is kept, in bfloat16."""
    torch.manual_seed(0)
    config, flat = Config(**ON), {"n_layer": 1, "dtype": "bfloat16"}
    linear = gaussws.linears(config, flat, quant_linears(QuantConfig(), 1))
    model = GPT(GPTConfig(1, 2, 64, 16), 257, linear)
    assert model.lm_head.reparam is None
    layers = [m for m in model.modules() if isinstance(m, Sampled)]
    assert len(layers) == 4 and all((m.bits() == 6).all() for m in layers)
    assert gaussws.losses(config, model)["penalty"].item() == pytest.approx(0.01 * 2)
    layer, kept = model.h[0].mlp.c_fc, {}
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)

    def pack(t):
        kept[t.untyped_storage()._cdata] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    kept.pop(layer.weight.untyped_storage()._cdata)  # the parameter itself
    assert [t.dtype for t in kept.values() if t.numel() == layer.weight.numel()] == [torch.bfloat16]


def test_run(run, call, tmp_path):
    """It trains its bits, resumes bitwise, logs the penalty apart, is evaluated with plain weights and exported."""
    assert run(tmp_path / "whole", *FLAGS)[0] == 0
    assert run(tmp_path / "parts", *FLAGS, "--max_iters=3", "--lr_decay_iters=6")[0] == 0
    assert run(tmp_path / "parts", "--resume", "--max_iters=6", small=())[0] == 0
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for key in ("model", "optimizer"):
        assert same(whole[key], parts[key])
    t = whole["model"]["h.0.mlp.c_fc.reparam.t"]
    assert (t != 1).any() and column(tmp_path / "whole", "penalty")[0] == pytest.approx(0.5 * 2, rel=1e-6)
    assert column(tmp_path / "whole", "loss")[-1] == [x["loss"] for x in read(tmp_path / "parts") if "loss" in x][-1]
    printed = [call(evaluation.main, f"--ckpt={tmp_path}/whole", "--sample_tokens=0", f"--quantizers={which}")[1]
               for which in ("trained", "off")]
    assert printed[0].splitlines()[1] == printed[1].splitlines()[1]
    pytest.importorskip("safetensors")
    assert call(evaluation.main, f"--ckpt={tmp_path}/whole", f"--export={tmp_path}/hf")[0] == 0
    assert run(tmp_path / "on", f"--init_from={tmp_path}/hf", "--preset=gaussws-4", "--b_block=16")[0] == 0


def test_two_processes(run, data, tmp_path):
    """Two processes draw noise of their own from the first step on: an average of samples, near one process's."""
    one, two = one_and_two(run, data, tmp_path, *FLAGS)
    assert one[1] != pytest.approx(two[1], abs=1e-6) and one == pytest.approx(two, abs=5e-3)


@pytest.mark.parametrize("flags, words", [
    (["--b_init=5"], "without --gaussws"), (["--gaussws", "--b_target=3"], "bits are constant"),
    (["--gaussws", "--b_init=10"], "carries the noise up to 9 bits"), (["--gaussws", "--wbits=8"], "drop one"),
    (["--gaussws", "--b_decay=1", "--b_target=7"], "--b_target=7.0 must lie in 1 to --b_init=6.0"),
    (["--gaussws", "--b_block=24"], "--b_block=24 must divide the 96 x 32 weight of h.0.attn.c_attn; try 32"),
    (["--gaussws", "--lsq_bits=4"], "drop one"), (["--gaussws", "--b_decay=1", "--b_target=6"], "below --b_init=6.0"),
    (["--gaussws", "--skip_blocks=0"], "--skip_blocks has no effect"),
    (["--preset=tiny,gaussws", "--b_lr=nan"], "--b_lr=nan"),
    (["--gaussws", "--b_block=0"], "--b_block=0 must be at least 1")])
def test_refused(flags, words, run, tmp_path):
    code, out, err = run(tmp_path / "a", *flags)
    assert code == 2 and words in err, err
