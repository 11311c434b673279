"""The seams: a stranger that uses each of them trains, resumes, is evaluated and exported by the ordinary programs.

The stranger is what an extension or a program on train.Run may be, in its shortest form. Nothing in the core knows it.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
from conftest import column, read, same
from torch import Tensor

import eval as evaluation
import extensions
import train
from eval import shares_scales
from model import GPT, GPTConfig, linear_cross_entropy, quant_linears
from quant import QuantConfig, Quantizer, Recipe
from support.checkpoint import load_checkpoint, model_from
from support.config import own
from support.huggingface import load_hf


@dataclass
class StrangerConfig:
    """The stranger's flags."""
    stranger: str = ""  # which seams it uses
    weight: float = 0.1  # of its term of the loss


class Packed(NamedTuple):
    """Signs and one scale per row, as something that quant.py has never heard of would keep them."""
    signs: Tensor  # bool
    scale: Tensor  # (R, 1) fp32

    def unpack(self):
        return (self.signs * 2.0 - 1.0) * self.scale


class OneBit:
    """A slot with a format of its own."""

    def quantize(self, x):
        return Packed(x > 0, x.float().abs().mean(1, keepdim=True))

    def __call__(self, x):
        return self.quantize(x).unpack().to(x.dtype)


class Gain(nn.Module):
    """A reparam with a parameter of its own, per output row, learned ten times as fast."""

    def __init__(self, rows):
        super().__init__()
        self.lr_scale, self.gain = 10.0, nn.Parameter(torch.zeros(rows, 1))  # 2-D: must not be drawn, nor decay

    def forward(self, w):
        return w * (1 + self.gain)


def stranger_linears(config, flat, linear):
    """Slots, early backward, reparam: the factory that the flags ask for."""
    recipe = Recipe(output_input=Quantizer(8, (1, None)), output_weight=OneBit(), grad_weight_input=OneBit(),
                    backward="early")

    def make(name, n, k, bias):
        layer = (quant_linears(own(QuantConfig, flat), flat["n_layer"], lambda *_: recipe) if "slots" in config.stranger
                 else linear)(name, n, k, bias)
        if "reparam" in config.stranger and name != "lm_head":
            layer.reparam = Gain(k)
        return layer
    return make if config.stranger else linear


def stranger_losses(config, model):
    """A term of the loss: the mean square of the gains, times a weight."""
    gains = [p for name, p in model.named_parameters() if name.endswith("gain")]
    return {"penalty": config.weight * sum((1 + g).square().mean() for g in gains)} if "loss" in config.stranger else {}


def stranger_at_step(config, model, step):
    """Switch the recipe of the first block off from step 3 on."""
    if "switch" in config.stranger and step >= 3:
        model.h[0].mlp.c_fc.recipe = None


@dataclass
class Config(train.TrainConfig):
    """A config that inherits every flag of train.py."""
    mine: StrangerConfig = field(default_factory=StrangerConfig)


class Run(train.Run):
    """A program that trains, evaluates and keeps something else: tests below say which."""

    def make_objective(self):
        objective = nn.Module()
        objective.gpt, objective.bias = self.raw, nn.Parameter(torch.zeros(()))
        objective.forward = lambda x, y: self.raw(x, y) + (objective.bias - 1).square()
        self.bias = objective.bias
        return objective

    def make_optimizer(self):
        optimizer = super().make_optimizer()
        self.steps = 0
        optimizer.register_step_post_hook(lambda *_: setattr(self, "steps", self.steps + 1))
        return optimizer

    def extra_state(self):
        return {"bias": self.bias.data, "steps": self.steps}

    def load_extra_state(self, state):
        self.bias.data.copy_(state["bias"])
        self.steps = state["steps"]


@pytest.fixture(autouse=True)
def a_stranger(monkeypatch):
    """Enter the stranger into the list of extensions."""
    module = SimpleNamespace(Config=StrangerConfig, linears=stranger_linears, losses=stranger_losses,
                             at_step=stranger_at_step)
    monkeypatch.setitem(extensions.EXTENSIONS, "stranger", module)


CASES = {
    "slots": [], "slots,switch": ["--skip_blocks=-1", "--n_layer=2"],
    "reparam,loss": ["--gradient_accumulation_steps=3", "--m1bits=8", "--m2bits=8"],
    "slots,reparam,loss,switch": ["--compile=True"],
    "": ["--heads=1,2", "--hidden=40,8", "--n_layer=2", "--keep8=both", "--schedule=wsd", "--wsd_decay=0.5"],
}


@pytest.mark.parametrize("which", CASES)
def test_a_stranger_is_at_home(which, run, call, data, tmp_path):
    """Trained, interrupted and resumed bitwise; eval.py prints its loss; exported, it is the model that eval.py saw."""
    pytest.importorskip("safetensors")
    flags = [f"--stranger={which}", *CASES[which], "--lr_decay_iters=6"]
    main = lambda: train.main(Config)  # noqa: E731 (as short as it gets)
    assert run(tmp_path / "whole", *flags, main=main)[0] == 0
    assert run(tmp_path / "cut", *flags, "--max_iters=4", main=main)[0] == 0
    code, _, err = run(tmp_path / "cut", "--resume", "--max_iters=6", small=[], main=main)
    assert code == 0, err
    ours, whole = (load_checkpoint(tmp_path / name) for name in ("cut", "whole"))
    assert same({**ours, "config": 0}, {**whole, "config": 0})
    assert ("penalty" in read(tmp_path / "whole")[2]) == ("loss" in which)
    if "loss" in which:  # a mean over micro-batches: 0.1 x four gains of 1; the loss, about ln 257 = 5.55, is without
        assert column(tmp_path / "whole", "penalty")[0] == pytest.approx(0.4, rel=1e-3)
        first = column(tmp_path / "whole", "val_loss")[0]
        assert column(tmp_path / "whole", "loss")[0] == pytest.approx(first, abs=0.1)
    if "--compile=True" in flags:  # which changes roundings only
        assert run(tmp_path / "eager", *flags, "--compile=False", main=main)[0] == 0
        compiled, eager = (column(tmp_path / name, "loss") for name in ("whole", "eager"))
        assert compiled == pytest.approx(eager, abs=1e-2)  # a sign may flip
    # evaluated as trained, and without quantizers
    code, out, err = call(evaluation.main, f"--ckpt={tmp_path / 'whole'}", "--sample_tokens=0")
    assert code == 0 and f"val_loss {column(tmp_path / 'whole', 'val_loss')[-1]:.4f} nats" in out, err
    code, off, _ = call(evaluation.main, f"--ckpt={tmp_path / 'whole'}", "--sample_tokens=0", "--quantizers=off")
    assert code == 0 and "quantizers off" in off
    if which in ("", "slots"):  # with fewer slots in use the four decimals that are printed may agree
        assert (which == "slots") == (off.splitlines()[1] != out.splitlines()[1])
    # exported: the same function but for the recipe, in GPT-2's own shape and names
    assert call(evaluation.main, f"--ckpt={tmp_path / 'whole'}", f"--export={tmp_path / 'hf'}")[0] == 0
    linear = extensions.linears({**whole["config"], "stranger": which.replace("slots", ""), "skip_blocks": ()})
    model, loaded = model_from(whole, linear).eval(), load_hf(tmp_path / "hf")
    plain = model_from(loaded, quant_linears(QuantConfig(), loaded["config"]["n_layer"]))
    idx = torch.arange(24)[None]
    assert torch.allclose(plain(idx)[..., :257], model(idx)[..., :257], atol=1e-5)


def test_a_program_of_its_own(run, tmp_path):
    main = lambda: train.main(Config, Run)  # noqa: E731
    flags = ["--lr_decay_iters=6", "--learning_rate=0.1"]
    assert run(tmp_path / "whole", *flags, main=main)[0] == 0
    assert run(tmp_path / "cut", *flags, "--max_iters=4", main=main)[0] == 0
    assert run(tmp_path / "cut", "--resume", "--max_iters=6", small=[], main=main)[0] == 0
    ours, whole = (load_checkpoint(tmp_path / name) for name in ("cut", "whole"))
    assert same({**ours, "config": 0}, {**whole, "config": 0}) and whole["extra"]["steps"] == 6
    assert 0 < whole["extra"]["bias"] <= 0.61  # six of Adam's steps: its parameter is among those that train
    assert column(tmp_path / "whole", "loss")[0] > column(tmp_path / "whole", "val_loss")[0] + 0.9


def test_what_a_model_must_find(run, call, tmp_path, monkeypatch):
    """A trained model without its extension, or one of its tensors, is refused; without quantizers it is not."""
    assert run(tmp_path, "--stranger=reparam", "--max_iters=2", main=lambda: train.main(Config))[0] == 0
    checkpoint = load_checkpoint(tmp_path)
    del checkpoint["model"]["h.0.mlp.c_fc.reparam.gain"]
    torch.save(checkpoint, tmp_path / "less.pt")
    code, _, err = call(evaluation.main, f"--ckpt={tmp_path / 'less.pt'}")
    assert code == 2 and "h.0.mlp.c_fc.reparam.gain is missing" in err
    monkeypatch.delitem(extensions.EXTENSIONS, "stranger")
    code, _, err = call(evaluation.main, f"--ckpt={tmp_path}")
    assert code == 2 and "was trained with extensions/stranger.py, which eval.py does not know" in err
    assert call(evaluation.main, f"--ckpt={tmp_path}", "--quantizers=off", "--sample_tokens=0")[0] == 0


def test_early_in_the_head_is_fp():
    """Nothing waits for backward in the head: "early" is "fp" there, also where tokens and channels are as many."""
    x, w, y = torch.randn(16, 16), torch.randn(64, 16), torch.arange(16)
    grads = []
    for backward in ("early", "fp"):
        recipe = Recipe(output_input=Quantizer(4, (1, None)), grad_weight_input=Quantizer(4, (1, None)),
                        backward=backward)
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        linear_cross_entropy(a, b, y, 50, recipe).backward()
        grads.append((a.grad, b.grad))
    assert same(*grads)


def test_shared_scales_of_strangers():
    def model(slot):
        return GPT(GPTConfig(1, 2, 32, 16), 50, quant_linears(QuantConfig(), 1, lambda *_: Recipe(output_input=slot)))
    assert not shares_scales(model(None)) and not shares_scales(model(Quantizer(8, (1, None))))
    assert shares_scales(model(OneBit())) and shares_scales(model(torch.sign)) and shares_scales(model(Quantizer(8)))
