"""Models on disk: our checkpoints, and Hugging Face's layout of GPT-2.

A checkpoint is a plain torch.save of tensors and plain Python values: {"config": flat flags, "vocab_size", "model", and
what a run needs to go on: "asked", the flags as they were before each `auto` was replaced, "optimizer", "step",
"evaluated", "best", "data", "extra"}. A source of weights, of either kind, is a dict with the first three of these;
"config" then has at least the shape of the model.
"""

import json
import os
import pickle
import zipfile
from dataclasses import asdict
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


def load_source(path: Path) -> dict:
    """Read what --init_from names, a checkpoint or a folder in Hugging Face's layout: {config, vocab_size, model}."""
    return load_hf(path) if path.is_dir() and not (path / "ckpt.pt").exists() else load_checkpoint(path)


# -----------------------------------------------------------------------------
# Hugging Face's layout: the same names, but its Conv1D keeps the four linears as (in, out)

HF_FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "n_inner": None,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}  # what is not a choice here
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _safetensors():
    """Import the optional dependency, or say how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("Hugging Face's files need safetensors: pip install safetensors") from None
    return safetensors


def load_hf(path: Path) -> dict:
    """Read a folder in Hugging Face's layout, config.json and model.safetensors: {config, vocab_size, model}.

    Raises: FileNotFoundError, ValueError.
    """
    for name in ("config.json", "model.safetensors"):
        if not (path / name).exists():
            raise FileNotFoundError(f"--init_from={path}: there is no {name} in it; the released GPT-2 is at "
                                    "https://huggingface.co/openai-community/gpt2/tree/main")
    try:
        hf = json.loads((path / "config.json").read_text())
        weights = _safetensors().torch.load_file(path / "model.safetensors")
        config, vocab_size = GPTConfig(hf["n_layer"], hf["n_head"], hf["n_embd"], hf["n_positions"]), hf["vocab_size"]
        for key, ours in HF_FIXED.items():
            if hf.get(key, ours) != ours:
                raise ValueError(f"{key}={hf[key]}, here it is {ours}")
    except (ValueError, TypeError, KeyError, _safetensors().SafetensorError) as error:
        raise ValueError(f"--init_from={path}: not a GPT-2 in Hugging Face's layout ({error})") from None
    weights = {k.removeprefix("transformer."): v.float() for k, v in weights.items()}
    weights = {k: v.T if k.endswith(TRANSPOSED) else v for k, v in weights.items()
               if not k.endswith((".attn.bias", ".attn.masked_bias")) and k != "lm_head.weight"}  # masks; tied
    return {"config": asdict(config), "vocab_size": vocab_size, "model": weights}


def _plain_weights(model: GPT) -> dict[str, Tensor]:
    """Return GPT-2's own tensors: reparametrized weights as they are used, zeros where heads or units were pruned."""
    state = {k: v for k, v in model.state_dict().items() if ".reparam." not in k and k != "lm_head.weight"}
    state["wte.weight"] = state["wte.weight"][:model.vocab_size]  # without the padding rows
    for name, layer in model.eval().named_modules():
        if getattr(layer, "reparam", None) is not None:
            state[f"{name}.weight"] = layer.used_weight().detach()

    def pad(t: Tensor, dim: int, size: int) -> Tensor:
        missing = (*t.shape[:dim], size - t.shape[dim], *t.shape[dim + 1:])
        return torch.cat((t, t.new_zeros(missing)), dim)
    C = model.config.n_embd
    for name, t in state.items():  # a head of zeros, or a hidden unit, adds zero to what c_proj returns
        if ".attn.c_attn." in name:
            state[name] = torch.cat([pad(part, 0, C) for part in t.chunk(3)])  # q, k and v apart
        elif ".mlp.c_fc." in name:
            state[name] = pad(t, 0, 4 * C)
        elif name.endswith(".c_proj.weight"):
            state[name] = pad(t, 1, 4 * C if ".mlp." in name else C)
    return state


def export_hf(model: GPT, folder: Path) -> None:
    """Write config.json and model.safetensors that `transformers` reads as GPT2LMHeadModel, in fp32.

    Quantizers stay behind, reparametrized weights are written as they are used, and a pruned model gets zeros in place
    of what it lost.

    Raises: ValueError for a model that GPT-2's layout cannot hold, OSError for a full disk.
    """
    for unfit, what in ((not model.config.bias, "trained with --bias=False: there, all layers have biases"),
                        (model.config.stable_embedding, "trained with --stable_embedding: it has no such LayerNorm"),
                        (getattr(model.lm_head, "reparam", None), "with a reparametrized lm_head: there, it is tied")):
        if unfit:
            raise ValueError(f"Hugging Face's GPT-2 does not fit a model {what}")
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"transformer.{k}": (v.T if k.endswith(TRANSPOSED) else v).contiguous()
             for k, v in _plain_weights(model).items()}
    c = model.config
    try:
        _safetensors().torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except _safetensors().SafetensorError as error:
        (folder / "model.safetensors").unlink(missing_ok=True)
        raise OSError(f"could not write {folder}/model.safetensors: {error}") from error
    (folder / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size,
        "vocab_size": model.vocab_size, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "bos_token_id": model.vocab_size - 1, "eos_token_id": model.vocab_size - 1}, indent=1))
