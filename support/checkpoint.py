"""Checkpoints: writing, reading and checking them.

A checkpoint is a plain torch.save of tensors and plain Python values: {"config": flat flags, "vocab_size", "model", and
what a run needs to go on: "asked", the flags as they were before each `auto` was replaced, "optimizer", "step",
"evaluated", "best", "data", "extra"}. A source of weights, of either kind, is a dict with the first three of these;
"config" then has at least the shape of the model.
"""

import os
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig, Linear
from support.config import own


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that its final name only ever holds a whole file: write beside it, then rename.

    Raises: OSError (a full disk); the file that was there before stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # what torch's writer hid
        raise OSError(f"could not write {path}: {reason}; the checkpoint before it is untouched") from error


# What a checkpoint holds, and of which type: for every use, and to go on with its run.
ALWAYS = {"config": dict, "vocab_size": int, "model": dict, "step": int}
TO_RESUME = {"asked": dict, "optimizer": dict, "evaluated": int, "best": float, "data": str, "extra": dict}
IN_CONFIG = {"n_layer": int, "dataset": str, "data_dir": str, "eval_tokens": int, "dtype": str}


def load_checkpoint(path: Path, resume: bool = False) -> dict:
    """Read a checkpoint on the CPU. Code in it is never executed (weights_only), every byte of it is checked (crc32).

    Raises: FileNotFoundError, or ValueError if the file is damaged or no checkpoint of nanoQPT.
    """
    path = path / "ckpt.pt" if path.is_dir() or not path.suffix else path
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; python train.py --out_dir=DIR makes DIR/ckpt.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes a zip, whose checksums torch.load does not read
            if record := archive.testzip():
                raise zipfile.BadZipFile(f"{record} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds something else than tensors and plain values; "
                         "it was not loaded, since it might run code") from None
    except Exception as error:  # garbage makes torch's reader raise anything: KeyError, struct.error, an empty EOFError
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}); "
                         "if ckpt_best.pt lies beside it, copy that over it") from None
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    for place, needed in ((checkpoint, ALWAYS | (TO_RESUME if resume else {})), (config, IN_CONFIG)):
        for name, kind in needed.items():
            if not isinstance(place, dict) or not isinstance(place.get(name), kind):
                raise ValueError(f"{path} is not a checkpoint of nanoQPT{' to resume' if resume else ''}: {name} is "
                                 f"missing or no {kind.__name__}")
    if config["dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f"{path} is not a checkpoint of nanoQPT: dtype is {config['dtype']!r}")
    if not all(isinstance(t, Tensor) for t in checkpoint["model"].values()):
        raise ValueError(f"{path} is not a checkpoint of nanoQPT: its model holds something else than tensors")
    return checkpoint


def load_weights(model: GPT, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights (name -> tensor) into the model.

    The embedding's padding rows may be missing, and a longer context is cut. Parameters of a reparam (names with
    ".reparam.") that only one side has are left out: a plain model may start one that is reparametrized, and the other
    way round.

    Raises: ValueError that names the first tensor that is missing, unknown or of another shape.
    """
    state, weights = ({k: v for k, v in tensors.items() if k != "lm_head.weight"}  # tied: it is wte.weight
                      for tensors in (model.state_dict(), weights))
    for name in sorted(set(state) ^ set(weights)):
        if ".reparam." not in name:
            raise ValueError(f"{source}: tensor {name} is {'missing' if name in state else 'unknown'}; "
                             "it holds a model of another shape (n_layer, bias)")
    for name in (name for name in state if name in weights):
        theirs, mine = weights[name], state[name]
        if name == "wte.weight" and len(theirs) == model.vocab_size:
            mine = mine[:model.vocab_size]
        if name == "wpe.weight":
            theirs = theirs[:len(mine)]
        if mine.shape != theirs.shape:
            raise ValueError(f"{source}: {name} has shape {tuple(theirs.shape)}, the model {tuple(mine.shape)}; "
                             "n_embd, block_size or the vocabulary differ")
        if not theirs.isfinite().all():
            raise ValueError(f"{source}: {name} holds values that are not finite: its run has diverged")
        with torch.no_grad():
            mine.copy_(theirs)
    if not any(".reparam." in name for name in weights):
        model.start_reparams()


def model_from(checkpoint: dict, linear: Linear, dtype: torch.dtype = torch.float32) -> GPT:
    """Rebuild the model of a checkpoint, on the CPU, with the linear layers that `linear` makes.

    As it was trained: extensions.linears(checkpoint["config"]).
    """
    model = GPT(own(GPTConfig, checkpoint["config"]), checkpoint["vocab_size"], linear, dtype)
    load_weights(model, checkpoint["model"], "checkpoint")
    return model
