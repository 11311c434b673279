"""Further papers, one file each. The list below is all that knows them: delete a line and its file, and the rest works.

An extension is a module with any of

    Config                                   a dataclass: its flags of train.py, all idle by default
    PRESETS                                  {name: flat differences}
    linears(config, flat, linear) -> linear  its factory of linear layers: wraps or replaces the one it is given
    losses(config, model) -> {name: term}    terms added to the loss; divided over micro-batches, logged apart
    at_step(config, model, step)             called before the gradients of every step: a function of the step alone
    EvalConfig                               a dataclass: its flags of eval.py, all idle by default
    evaluate(config, model, batch_size, alone, meta)    what eval.py does instead, if one of these is set

`config` is its own Config or EvalConfig, `flat` all flags of the run {name: value}, as a checkpoint keeps them; `alone`
says that tokens share scales (batches would change the result), `meta` what is known of the model. What needs more is a
program of its own on train.Run, as distill.py and prune.py, and not in the list. train.py, eval.py, bench.py and
analyze.py call the functions below, and nothing else here.
"""

from dataclasses import field, make_dataclass

from torch import Tensor

from extensions import gaussws, lsq, nvfp4, tasks
from model import GPT, Linear, quant_linears
from quant import QuantConfig
from support.config import own

# name: module, in the order in which they wrap the linear layers
EXTENSIONS = {"nvfp4": nvfp4, "lsq": lsq, "gaussws": gaussws, "tasks": tasks}

# one config with a nested one per extension, whose flags join the command line: of train.py, and of eval.py
Config, EvalConfig = (make_dataclass(kind, [(f"of_{name}", config, field(default_factory=config))
                                            for name, module in EXTENSIONS.items()
                                            if (config := getattr(module, kind, None))])
                      for kind in ("Config", "EvalConfig"))
PRESETS = {name: flags for module in EXTENSIONS.values()
           for name, flags in getattr(module, "PRESETS", {}).items()}


def active(flat: dict) -> list[str]:
    """Return the names of the extensions that the flags {name: value} make use of."""
    return [name for name, m in EXTENSIONS.items()
            if hasattr(m, "Config") and own(m.Config, flat) != m.Config()]


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


def evaluate(config: EvalConfig, model: GPT, batch_size: int, alone: bool, meta: dict) -> bool:
    """Let the extensions whose flags of eval.py are set do their work; tell whether there were any."""
    asked = {name: nested for name, nested in vars(config).items() if nested != type(nested)()}
    for name, nested in asked.items():
        EXTENSIONS[name.removeprefix("of_")].evaluate(nested, model, batch_size, alone, meta)
    return bool(asked)
