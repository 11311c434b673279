"""support/checkpoint.py: files are whole or refused in one line. support/huggingface.py against transformers itself."""

import copy
import json
import math
import os
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from test_model import PRUNED, RECIPES, W8A8, fit, gpt, grads, tokens
from torch import nn

import extensions
from model import GPTConfig, quant_linears
from quant import QuantConfig
from support.checkpoint import load_checkpoint, load_weights, model_from, save_checkpoint
from support.config import flatten
from support.huggingface import export_hf, load_hf

PLAIN = quant_linears(QuantConfig(), 2)


def checkpoint(model, quant=None):
    """Return what eval.py needs of a checkpoint that train.py saves."""
    flat = {**flatten(model.config), **flatten(QuantConfig()), **(quant or {}), "dataset": "text", "data_dir": "data",
            "eval_tokens": 512, "dtype": "float32", "learning_rate": 1e-3}
    return {"config": flat, "vocab_size": model.vocab_size, "model": model.state_dict(), "step": 3,
            "extensions": []}


@pytest.mark.parametrize("quant, shape", [
    *((q, {}) for q in RECIPES.values()), (W8A8, PRUNED), ({}, dict(stable_embedding=True, bias=False))], ids=str)
def test_round_trip(quant, shape, tmp_path):
    """Trained, saved, read and rebuilt: the same weights, config and loss, bit for bit; lm_head is the embedding."""
    model, idx = gpt(quant, seed=3, **shape), tokens(2, 16)
    built = model.wte.weight
    fit(model, [tokens(2, 17)], 1e-2)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint(model, quant))
    read = load_checkpoint(tmp_path)
    again = model_from(read, extensions.linears(read["config"]))
    assert same(load_checkpoint(tmp_path / "ckpt.pt"), read) and again.config == model.config
    assert same(again.state_dict(), model.state_dict()) and torch.equal(again(idx, idx), model(idx, idx))
    assert model.wte.weight is built and not torch.equal(built, gpt(quant, seed=3, **shape).wte.weight)
    for m in (model, again, copy.deepcopy(model), torch.compile(model)):
        assert m.lm_head.weight is m.wte.weight and sum(p is m.wte.weight for p in m.parameters()) == 1
    assert model_from(read, PLAIN, torch.bfloat16)(idx).dtype == torch.bfloat16 and os.listdir(tmp_path) == ["ckpt.pt"]


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace", "full disk"])
@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_failing_write_keeps_the_old_checkpoint(error, where, tmp_path, monkeypatch):
    path, flushed, fsync = tmp_path / "ckpt.pt", [], os.fsync

    def fail(*args):
        if where == "torch.save":
            args[1].write(b"half a checkpoint")
        if where == "os.replace":  # the last thing done: a whole and flushed file gets its name
            assert flushed and path == args[1] and same(torch.load(args[0]), checkpoint(gpt(seed=1)))
        raise error("No space left")
    save_checkpoint(path, checkpoint(gpt()))
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(file) or fsync(file))
    if where == "full disk":  # torch's own error, from within a tensor
        (tmp_path / "ckpt.pt.tmp").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match=r"\Acould not write .*ckpt.pt: .*No space left.*untouched\Z"):
        save_checkpoint(path, checkpoint(gpt(seed=1)))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["ckpt.pt"]


Bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("ran",)), "__repr__": lambda self: "mkdir"})


@pytest.mark.parametrize("content", [
    30, 1000, 30_000, -100, -1,  # a checkpoint, cut
    b"PK\x03\x04 zip?", b"\0" * 9, pickle.dumps(3, 2), b"", b"hello world", pickle.dumps(Bomb(), 2),
    {"model": Bomb()}, [1, 2], torch.zeros(3)], ids=str)
def test_what_is_no_checkpoint(content, tmp_path, monkeypatch):
    """Other bytes, a checkpoint cut anywhere, or with code in it: one line, and no code ever runs."""
    path, message = tmp_path / "ckpt.pt", "damaged or not a checkpoint"
    torch.save(checkpoint(gpt(n_layer=1)) if isinstance(content, int) else content, path)
    if isinstance(content, (int, bytes)):
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    else:  # unpickled by an unguarded torch.load, a Bomb makes a folder
        message = "holds something else .* might run code" if isinstance(content, dict) else "not a checkpoint"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"\A\S+ckpt.pt (is )?{message}.*\Z"):
        load_checkpoint(path)
    assert os.listdir() == ["ckpt.pt"]
    pickle.loads(pickle.dumps(Bomb()))
    assert sorted(os.listdir()) == ["ckpt.pt", "ran"]  # so it would
    with pytest.raises(FileNotFoundError, match=r"\Athere is no checkpoint \S+a/ckpt.pt; python train.py .*\Z"):
        load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("other, message", [
    (dict(n_layer=1), "tensor h.1.attn.c_attn.bias is missing"),
    (dict(n_layer=3), "tensor h.2.attn.c_attn.bias is unknown"),
    (PRUNED, r"h.0.attn.c_attn.weight has shape \(24, 32\), the model \(96, 32\)"),
    (dict(block_size=8), r"wpe.weight has shape \(8, 32\), the model \(16, 32\)"),
    (dict(vocab=65), r"wte.weight has shape \(128, 32\), the model \(64, 32\)")])
def test_weights_of_another_shape(other, message):
    weights = gpt(**other).state_dict()
    with pytest.raises(ValueError, match="somewhere: .*" + message):
        load_weights(gpt(), weights, "somewhere")


def test_load_weights_copies():
    """A longer context is cut, padding rows may be missing and stay; the source is neither aliased nor changed."""
    model, source, fresh = gpt(), gpt(seed=4, wide=True, block_size=20).state_dict(), gpt().state_dict()
    padded, source["wte.weight"] = source["wte.weight"], source["wte.weight"][:50]
    before, built = copy.deepcopy(source), model.wte.weight
    load_weights(model, source, "test")
    assert model.wte.weight is built is model.lm_head.weight and same(source, before)
    for name, t in model.state_dict().items():
        rows = 50 if len(t) == 64 else len(t)
        assert torch.equal(t[:rows], source[name][:rows]) and torch.equal(t[rows:], fresh[name][rows:])
    model.wpe.weight.data.zero_()
    assert same(source, before)
    load_weights(model, {**source, "wte.weight": padded}, "with the padding rows")
    assert torch.equal(model.wte.weight[:50], padded[:50])
    for bad, message in ((torch.zeros(49, 32), r"shape \(49, 32\)"), (torch.full((50, 32), math.nan), "not finite")):
        with pytest.raises(ValueError, match="wte.weight .*" + message):
            load_weights(model, {**source, "wte.weight": bad}, "test")


def test_parameters_of_a_reparam():
    """They are loaded where a model is rebuilt, and must all be there; begun from others' weights, they start anew."""
    plain, model, starts = gpt(seed=1), gpt(), []
    reparam = model.h[0].mlp.c_fc.reparam = nn.PReLU(init=0.5)
    reparam.start = starts.append
    load_weights(model, plain.state_dict(), "plain")
    assert reparam.weight == 0.5 and torch.equal(starts.pop(), plain.h[0].mlp.c_fc.weight)
    load_weights(plain, model.state_dict(), "reparametrized")
    assert same(plain.state_dict(), {k: v for k, v in model.state_dict().items() if ".reparam." not in k})
    theirs = {**model.state_dict(), "h.0.mlp.c_fc.reparam.weight": torch.tensor([0.75])}
    load_weights(model, theirs, "others")
    assert reparam.weight == 0.5 and len(starts) == 1
    load_weights(model, theirs, "checkpoint")
    assert reparam.weight == 0.75 and len(starts) == 1
    with pytest.raises(ValueError, match="h.0.mlp.c_fc.reparam.weight is missing"):
        load_weights(model, plain.state_dict(), "checkpoint")


# -----------------------------------------------------------------------------
# Hugging Face's layout

RELEASED = dict(model_type="gpt2", n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=50)  # its config.json


def logits(model):
    """Return logits in float64, where any other epsilon, GELU, mask or transpose is 1e-7 off at least."""
    with torch.no_grad():
        out = model.double()(tokens(3, 16))
    out = getattr(out, "logits", out)[..., :50]
    assert out.shape == (3, 16, 50) and out.std() > 0.5
    return out


@pytest.mark.parametrize("shape", [{}, PRUNED, "reparam"], ids=["dense", "pruned", "reparam"])
def test_transformers_and_back(shape, tmp_path):
    """Exported: a GPT-2 of full width, whose logits, loss and gradient are ours, here and in transformers."""
    pytest.importorskip("safetensors")
    idx, t = tokens(3, 16), tokens(3, 16, seed=2)
    model = gpt(wide=True, dtype=torch.float64, **(shape if shape != "reparam" else {}))
    model.h[1].attn.c_proj.reparam = nn.PReLU() if shape == "reparam" else None  # times 1/4 below 0, exact in fp32
    export_hf(model, tmp_path / "a" / "b")
    source = load_hf(tmp_path / "a" / "b")
    assert source["config"] == flatten(GPTConfig(2, model.config.n_head, 32, 16)) and source["vocab_size"] == 50
    again = model_from(source, PLAIN, torch.float64)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-12)
    hf = pytest.importorskip("transformers", reason="so far well; the oracle of the rest: pip install transformers")
    theirs, info = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "a" / "b", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert theirs.lm_head.weight is theirs.transformer.wte.weight and theirs.config.eos_token_id == 49
    torch.testing.assert_close(logits(theirs.eval()), logits(model), rtol=0, atol=1e-9)
    ours, loss = again(idx, t), F.cross_entropy(theirs(idx).logits.flatten(0, 1), t.flatten())
    torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=1e-6)  # ours is fp32
    found, _ = grads(again, ours), loss.backward()
    for name, p in theirs.transformer.named_parameters():
        g = found[name][:50] if name == "wte.weight" else found[name]
        g = g.mT if ".c_" in name and g.dim() == 2 else g
        assert (g - p.grad).norm() < 1e-4 * p.grad.norm() + 1e-7, name
    theirs.save_pretrained(tmp_path / "c")
    assert same(load_hf(tmp_path / "c"), source)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
def test_files_as_they_are_found(dtype, tmp_path):
    """Exported (None), and with all oddities of the released files: every weight comes back, bitwise if fp32."""
    safetensors, file = pytest.importorskip("safetensors.torch"), tmp_path / "model.safetensors"
    model = gpt(wide=True)
    export_hf(model, tmp_path)
    stored = safetensors.load_file(file)
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (32, 96) and "lm_head.weight" not in stored
    if dtype:
        stored = {k.removeprefix("transformer."): v for k, v in stored.items()}
        stored |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in (0, 1)}  # the causal mask
        stored |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)}
        stored["lm_head.weight"] = stored["wte.weight"].clone()
        safetensors.save_file({k: v.to(dtype) for k, v in stored.items()}, file)
    source = load_hf(tmp_path)
    assert {v.dtype for v in source["model"].values()} == {torch.float32} and "lm_head.weight" not in source["model"]
    again, short = (model_from({**source, "config": {**source["config"], "block_size": T}}, PLAIN) for T in (16, 5))
    for name, value in model.state_dict().items():
        rows = 50 if name in ("wte.weight", "lm_head.weight") else len(value)
        assert torch.equal(again.state_dict()[name][:rows], value[:rows].to(dtype or value.dtype).float()), name
    torch.testing.assert_close(short(tokens(2, 5))[..., :50], again(tokens(2, 5))[..., :50], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, content", [
    *(("model.safetensors", cut) for cut in (None, 0, 100, -1)), ("config.json", None), ("config.json", 1),
    *(("config.json", {**RELEASED, **change}) for change in (
        dict(n_head=None), dict(activation_function="relu"), dict(layer_norm_epsilon=1e-3), dict(n_layer="2"),
        dict(tie_word_embeddings=False), dict(scale_attn_by_inverse_layer_idx=True), dict(n_inner=64)))], ids=str)
def test_folders_that_are_not_our_gpt2(name, content, tmp_path):
    """A file that is missing, cut, or of a model that computes something else is one line that names --init_from."""
    pytest.importorskip("safetensors")
    export_hf(gpt(), tmp_path)
    path, error, message = tmp_path / name, ValueError, "not a GPT-2 in Hugging Face's layout"
    path.write_bytes(json.dumps(content).encode() if isinstance(content, dict) else path.read_bytes()[:content])
    if content is None:
        error, message = FileNotFoundError, path.unlink() or f"there is no {name} in it"
    with pytest.raises(error, match=rf"--init_from=\S+: {message}"):
        load_hf(tmp_path)


def test_what_has_no_export(tmp_path, monkeypatch):
    head = gpt()
    head.lm_head.reparam = nn.PReLU()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for model, message in ((gpt(bias=False), "--bias=False"), (gpt(stable_embedding=True), "--stable_embedding"),
                           (head, "reparametrized lm_head"), (gpt(), "pip install safetensors")):
        with pytest.raises(ValueError, match=message):
            export_hf(model, tmp_path)


def test_other_spellings_of_the_same_gpt2(tmp_path):
    """Two files and their index, n_inner = 4 n_embd, and gelu_pytorch_tanh are our GPT-2 too."""
    safetensors = pytest.importorskip("safetensors.torch")
    export_hf(gpt(), tmp_path)
    source, state = load_hf(tmp_path), safetensors.load_file(tmp_path / "model.safetensors")
    names, files = sorted(state), ("a.safetensors", "b.safetensors")
    for i, file in enumerate(files):
        safetensors.save_file({name: state[name] for name in names[i::2]}, tmp_path / file)
    index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"n_inner": 4 * config["n_embd"], "activation_function": "gelu_pytorch_tanh"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(load_hf(tmp_path), source)


def test_an_exported_tokenizer_is_gpt2s(tmp_path):
    """merges.txt and vocab.json, remade from tiktoken's ranks: the released sizes, first and last merges, some ids."""
    pytest.importorskip("safetensors")
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("GPT-2's vocabulary is not at hand: set TIKTOKEN_CACHE_DIR to the folder where tiktoken keeps it")
    files = export_hf(gpt(vocab=50257, n_layer=1), tmp_path, {"wbits": 8})
    vocabulary, merges = json.loads((tmp_path / "vocab.json").read_text()), (tmp_path / "merges.txt").read_text()
    assert len(vocabulary) == 50257 and sorted(vocabulary.values()) == list(range(50257)) and "vocab.json" in files
    merges = merges.splitlines()
    assert len(merges) == 50001 and merges[1:3] == ["\u0120 t", "\u0120 a"] and vocabulary["\u0120the"] == 262
    assert all(vocabulary["".join(merge.split())] == 256 + i for i, merge in enumerate(merges[1:]))
    assert json.loads((tmp_path / "config.json").read_text())["nanoqpt"] == {"wbits": 8}
    assert "vocab.json" not in export_hf(gpt(), tmp_path / "bytes")
