"""Further papers, one file each. The list below is all that knows them: delete a line and its file, and the rest works.

An extension is a module with a dataclass `Config` (its flags, all idle by default) and any of

    PRESETS                                  {name: flat differences}
    linears(config, flat, linear) -> linear  its factory of linear layers: wraps or replaces the one it is given
    losses(config, model) -> {name: term}    terms added to the loss; divided over micro-batches, logged apart
    at_step(config, model, step)             called before the gradients of every step: a function of the step alone

`config` is its own Config, `flat` all flags of the run {name: value}, as a checkpoint keeps them. What needs more is a
program of its own on train.Run. train.py, eval.py, bench.py and analyze.py call the functions below, and nothing else
here.
"""

from dataclasses import field, make_dataclass

from torch import Tensor

from extensions import lsq
from model import GPT, Linear, quant_linears
from quant import QuantConfig
from support.config import own

EXTENSIONS = {"lsq": lsq}  # name: module, in the order in which they wrap the linear layers

# one config with a nested one per extension, whose flags join the command line
Config = make_dataclass("Config", [(name, module.Config, field(default_factory=module.Config))
                                   for name, module in EXTENSIONS.items()])
PRESETS = {name: flags for module in EXTENSIONS.values()
           for name, flags in getattr(module, "PRESETS", {}).items()}


def active(flat: dict) -> list[str]:
    """Return the names of the extensions that the flags {name: value} make use of."""
    return [name for name, m in EXTENSIONS.items() if own(m.Config, flat) != m.Config()]


def linears(flat: dict) -> Linear:
    """Return the factory of linear layers that the flags {name: value} ask for; every program makes its model so."""
    linear = quant_linears(own(QuantConfig, flat), flat["n_layer"])  # the core's
    for module in EXTENSIONS.values():
        if hasattr(module, "linears"):
            linear = module.linears(own(module.Config, flat), flat, linear)  # one around the other
    return linear


def losses(flat: dict, model: GPT) -> dict[str, Tensor]:
    """Return the extensions' terms of the loss, by name."""
    return {name: term for m in EXTENSIONS.values() if hasattr(m, "losses")
            for name, term in m.losses(own(m.Config, flat), model).items()}


def at_step(flat: dict, model: GPT, step: int) -> None:
    """Tell the extensions which step comes next."""
    for module in EXTENSIONS.values():
        if hasattr(module, "at_step"):
            module.at_step(own(module.Config, flat), model, step)  # may change its layers in place
