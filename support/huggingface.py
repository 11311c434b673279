"""Hugging Face's layout of GPT-2: the same names, but its Conv1D keeps the four linears as (in, out)."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, GPTConfig
from prepare_data import get_tokenizer

# What is not a choice here, and other spellings of the same.
FIXED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
         "tie_word_embeddings": (True,), "scale_attn_weights": (True,),
         "scale_attn_by_inverse_layer_idx": (False,)}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_safetensors():
    """Import the optional dependency, or say how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("this file format needs safetensors: pip install safetensors") from None
    return safetensors


def save_safetensors(tensors: dict, path: Path, metadata: dict[str, str]) -> None:
    """Write beside the final name, then rename. Raises: OSError, and what was there before stays."""
    safetensors, temporary = load_safetensors(), path.with_name(path.name + ".tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}") from error


def load_hf(path: Path) -> dict:
    """Read config.json and model.safetensors, or its shards, from a folder: {config, vocab_size, model}."""
    index = path / "model.safetensors.index.json"  # of a model in several files
    for name in ("config.json", "model.safetensors"):
        if not (path / name).exists() and not (index.exists() and name == "model.safetensors"):
            raise FileNotFoundError(f"--init_from={path}: there is no {name} in it; the released GPT-2 is at "
                                    "https://huggingface.co/openai-community/gpt2/tree/main")
    # (1) the files: shape, and weights from one file or several
    try:
        hf, files = json.loads((path / "config.json").read_text()), {"model.safetensors"}
        if index.exists():
            files = set(json.loads(index.read_text())["weight_map"].values())
        load = load_safetensors().torch.load_file
        weights = {k: v for file in files for k, v in load(path / file).items()}
        config = GPTConfig(*(hf[key] for key in ("n_layer", "n_head", "n_embd", "n_positions")))
        vocab_size = hf["vocab_size"]
        for key, same in (FIXED | {"n_inner": (None, 4 * config.n_embd)}).items():
            if hf.get(key, same[0]) not in same:
                raise ValueError(f"{key}={hf[key]}, here it is {same[0]}")
    except (ValueError, TypeError, KeyError, AttributeError, load_safetensors().SafetensorError) as error:
        raise ValueError(f"--init_from={path}: not a GPT-2 in Hugging Face's layout ({error})") from None
    # (2) our names and our layout
    weights = {k.removeprefix("transformer."): (v.T if k.endswith(TRANSPOSED) else v).float()
               for k, v in weights.items()  # without the masks, and what is tied
               if not k.endswith((".attn.bias", ".attn.masked_bias")) and k != "lm_head.weight"}
    return {"config": asdict(config), "vocab_size": vocab_size, "model": weights}


def _plain_weights(model: GPT) -> dict[str, Tensor]:
    """Return GPT-2's own tensors: reparametrized weights as they are used, zeros where heads or units were pruned."""
    state = {k: v for k, v in model.state_dict().items()
             if ".reparam." not in k and k != "lm_head.weight"}
    state["wte.weight"] = state["wte.weight"][:model.vocab_size]  # without the padding rows
    for name, layer in model.eval().named_modules():
        if getattr(layer, "reparam", None) is not None:
            state[f"{name}.weight"] = layer.used_weight().detach()

    def pad(t: Tensor, dim: int, size: int) -> Tensor:
        return F.pad(t, [0, 0] * (t.dim() - 1 - dim) + [0, size - t.shape[dim]])
    C = model.config.n_embd
    for name, t in state.items():  # zeros add zero to what c_proj returns
        if ".attn.c_attn." in name:
            state[name] = torch.cat([pad(part, 0, C) for part in t.chunk(3)])  # q, k and v apart
        elif ".mlp.c_fc." in name:
            state[name] = pad(t, 0, 4 * C)
        elif name.endswith(".c_proj.weight"):
            state[name] = pad(t, 1, 4 * C if ".mlp." in name else C)
    return state


def _tokenizer_files() -> dict[str, str]:
    """Return GPT-2's vocab.json and merges.txt, remade from tiktoken's ranks.

    vocab.json spells bytes as characters: those of Latin-1 that can be seen stand for themselves, the others, in order,
    for 256 and up. A merge is the last two pieces that a token is put together from, by the merges of lower rank.
    """
    tokenizer = get_tokenizer("gpt2")
    spelt = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    spelt |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(spelt)))}
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab - 1)]
    ranks, merges = {token: i for i, token in enumerate(tokens)}, []

    def spell(token: bytes) -> str:
        return "".join(spelt[b] for b in token)
    for token in tokens:  # in the order of their ranks
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(spell, parts)))
    names = {spell(token): i for token, i in ranks.items()} | {"<|endoftext|>": 50256}
    return {"vocab.json": json.dumps(names), "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}


def export_hf(model: GPT, folder: Path, flat: dict | None = None) -> list[str]:
    """Write what `transformers` reads as GPT2LMHeadModel and GPT2Tokenizer, in fp32; return the files' names.

    Quantizers stay behind (their flags, `flat`, are in config.json). A tokenizer is written for GPT-2's tokens only.
    """
    c = model.config
    head = getattr(model.lm_head, "reparam", None)
    for unfit, what in (
            (not c.bias, "trained with --bias=False: there, all layers have biases"),
            (c.stable_embedding, "trained with --stable_embedding: it has no such LayerNorm"),
            (c.untied_head, "trained with --untied_head: there, it is tied"),
            (head, "with a reparametrized lm_head: there, it is tied")):
        if unfit:
            raise ValueError(f"Hugging Face's GPT-2 does not fit a model {what}")
    # (1) weights: their names, and Conv1D's layout
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"transformer.{k}": (v.T if k.endswith(TRANSPOSED) else v).contiguous()
             for k, v in _plain_weights(model).items()}
    save_safetensors(state, folder / "model.safetensors", {"format": "pt"})
    # (2) what from_pretrained wants beside them
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), model.vocab_size - 1)
    files = {"config.json": json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size,
        "vocab_size": model.vocab_size, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, **ends,
        "nanoqpt": flat or {}}, indent=1), "generation_config.json": json.dumps(ends)}
    if model.vocab_size == 50257:
        files |= _tokenizer_files() | {"tokenizer_config.json": json.dumps({
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")})}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return ["model.safetensors", *files]
