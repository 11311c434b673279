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

# What a checkpoint holds, and of which type: for every use, and to go on with its run.
ALWAYS = {"config": dict, "vocab_size": int, "model": dict, "step": int, "extensions": list}
TO_RESUME = {"asked": dict, "optimizer": dict, "evaluated": int, "best": float, "data": str, "extra": dict}
IN_CONFIG = {"n_layer": int, "dataset": str, "data_dir": str, "eval_tokens": int, "dtype": str}


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write beside the final name, which only ever holds a whole file, then rename. OSError: the old file stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # to torch's zip writer a full disk is a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"could not write {path}: {reason}; the checkpoint before it is untouched") from error


def load_checkpoint(path: Path, resume: bool = False) -> dict:
    """Read a checkpoint on the CPU; code in it is never executed (weights_only), every byte of it checked (crc32)."""
    path = path / "ckpt.pt" if path.is_dir() or not path.suffix else path
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; "
                                "python train.py --out_dir=DIR makes DIR/ckpt.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not read its checksums
            if record := archive.testzip():
                raise zipfile.BadZipFile(f"{record} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds something else than tensors and plain values; "
                         "it was not loaded, since it might run code") from None
    except Exception as error:  # on garbage torch's reader raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}); "
                         "if ckpt_best.pt lies beside it, copy that over it") from None
    other, aim = f"{path} is not a checkpoint of nanoQPT", " to resume" if resume else ""
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    for place, kinds in ((checkpoint, ALWAYS | (TO_RESUME if resume else {})), (config, IN_CONFIG)):
        for name, kind in kinds.items():
            if not isinstance(place, dict) or not isinstance(place.get(name), kind):
                raise ValueError(f"{other}{aim}: {name} is missing or no {kind.__name__}")
    if config["dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f"{other}: dtype is {config['dtype']!r}")
    if not all(isinstance(t, Tensor) for t in checkpoint["model"].values()):
        raise ValueError(f"{other}: its model holds something else than tensors")
    return checkpoint


def load_weights(model: GPT, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights (name -> tensor) into the model; padding rows of the embedding may be missing, contexts are cut.

    A model that is begun from others' weights (--init_from) starts its reparams anew; one that is rebuilt, with
    source "checkpoint", needs all of its own, and leaves out those it does not have (--quantizers=off).
    """
    rebuilt = source == "checkpoint"
    tied = set() if model.config.untied_head else {"lm_head.weight"}
    state, weights = ({k: v for k, v in tensors.items() if k not in tied}
                      for tensors in (model.state_dict(), weights))
    for name in sorted(state.keys() ^ weights):
        if ".reparam." not in name or rebuilt and name in state:
            raise ValueError(f"{source}: tensor {name} is {'missing' if name in state else 'unknown'}; "
                             "it holds a model of another shape (n_layer, bias)")
    for name, mine in ((n, t) for n, t in state.items() if n in weights and (rebuilt or ".reparam." not in n)):
        theirs = weights[name]
        if name == "wte.weight" and len(theirs) == model.vocab_size:
            mine = mine[:model.vocab_size]
        if name == "wpe.weight":
            theirs = theirs[:len(mine)]
        if mine.shape != theirs.shape:
            raise ValueError(f"{source}: {name} has shape {tuple(theirs.shape)}, the model {tuple(mine.shape)}; "
                             "n_embd, block_size or the vocabulary differ")
        if not theirs.isfinite().all():
            raise ValueError(f"{source}: {name} holds values that are not finite: its run has diverged")
        mine.copy_(theirs)  # a state_dict's tensors are detached
    if not rebuilt:
        model.start_reparams()


def model_from(checkpoint: dict, linear: Linear, dtype: torch.dtype = torch.float32, own_recipe: bool = True) -> GPT:
    """Rebuild a model on the CPU with the linears of `linear`; as trained: extensions.linears(checkpoint["config"]).

    own_recipe: they are those of training; else reparams that the checkpoint lacks start from its weights.
    """
    model = GPT(own(GPTConfig, checkpoint["config"]), checkpoint["vocab_size"], linear, dtype)
    load_weights(model, checkpoint["model"], "checkpoint" if own_recipe else "the checkpoint")
    return model
