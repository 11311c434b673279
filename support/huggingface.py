"""Hugging Face's layout of GPT-2: the same names, but its Conv1D keeps the four linears as (in, out)."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig
from prepare_data import get_tokenizer
from support.checkpoint import load_checkpoint

# What is not a choice here, and other spellings of the same.
FIXED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
         "tie_word_embeddings": (True,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _safetensors():
    """Import the optional dependency, or say how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("Hugging Face's files need safetensors: pip install safetensors") from None
    return safetensors


def load_source(path: Path) -> dict:
    """Read what --init_from names, a checkpoint or a folder in Hugging Face's layout: {config, vocab_size, model}."""
    return load_hf(path) if path.is_dir() and not (path / "ckpt.pt").exists() else load_checkpoint(path)


def load_hf(path: Path) -> dict:
    """Read config.json and model.safetensors, or its shards, from a folder: {config, vocab_size, model}.

    Raises: FileNotFoundError, ValueError.
    """
    index = path / "model.safetensors.index.json"  # of a model in several files
    for file in (path / "config.json", path / "model.safetensors"):
        if not file.exists() and not (index.exists() and file.suffix == ".safetensors"):
            raise FileNotFoundError(f"--init_from={path}: there is no {file.name} in it; the released GPT-2 is at "
                                    "https://huggingface.co/openai-community/gpt2/tree/main")
    try:
        hf, files = json.loads((path / "config.json").read_text()), {"model.safetensors"}
        if index.exists():
            files = set(json.loads(index.read_text())["weight_map"].values())
        weights = {k: v for file in files for k, v in _safetensors().torch.load_file(path / file).items()}
        config, vocab_size = GPTConfig(hf["n_layer"], hf["n_head"], hf["n_embd"], hf["n_positions"]), hf["vocab_size"]
        for key, same in (FIXED | {"n_inner": (None, 4 * config.n_embd)}).items():
            if hf.get(key, same[0]) not in same:
                raise ValueError(f"{key}={hf[key]}, here it is {same[0]}")
    except (ValueError, TypeError, KeyError, AttributeError, _safetensors().SafetensorError) as error:
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


def _tokenizer_files() -> dict[str, str]:
    """Return GPT-2's vocab.json and merges.txt, remade from tiktoken's ranks.

    vocab.json spells bytes as characters: those of Latin-1 that can be seen stand for themselves, the others, in order,
    for 256 and up. A merge is the last two pieces that a token is put together from, by the merges of lower rank.
    """
    tokenizer = get_tokenizer("gpt2")
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelt = dict(zip(seen, map(chr, seen), strict=True))
    spelt |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in spelt)}
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)]
    ranks, merges = {token: i for i, token in enumerate(tokens[:-1])}, []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(spelt[b] for b in part) for part in parts))
    names = {"".join(spelt[b] for b in token): i for i, token in enumerate(tokens[:-1])} | {"<|endoftext|>": 50256}
    return {"vocab.json": json.dumps(names), "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}


def export_hf(model: GPT, folder: Path, flat: dict | None = None) -> list[str]:
    """Write what `transformers` reads as GPT2LMHeadModel and GPT2Tokenizer, in fp32; return the files' names.

    Quantizers stay behind (their flags, `flat`, are recorded in config.json), reparametrized weights are written as
    they are used, a pruned model gets zeros in place of what it lost. A tokenizer is written for GPT-2's tokens only:
    transformers has none for bytes.

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
    ends = {"bos_token_id": model.vocab_size - 1, "eos_token_id": model.vocab_size - 1}
    files = {"config.json": json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size,
        "vocab_size": model.vocab_size, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, **ends,
        "nanoqpt": flat or {}}, indent=1), "generation_config.json": json.dumps(ends)}
    if model.vocab_size == 50257:
        files |= _tokenizer_files()
        files["tokenizer_config.json"] = json.dumps({
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")})
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return ["model.safetensors", *files]
