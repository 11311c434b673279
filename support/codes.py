"""A trained model as a file of int8 codes: --export=NAME.safetensors, and --ckpt=NAME.safetensors to use it.

Of each linear layer with 8-bit integer weights the file has the very codes and scales that its GEMMs multiplied, a byte
an element instead of four: NAME.weight.codes, int8 (N, K), and NAME.weight.scale, fp32. All else is fp32. The metadata
hold the flags of the run, so that activations are quantized as they were; the loss is the same to the last bit.
For other files of codes there are `pack_bits`, 1 to 16 bits each, and `huffman`.
"""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import GPT, Linear
from quant import Quantized, QuantLinear, restore
from support.huggingface import load_safetensors, save_safetensors


class Stored:
    """A quantizer that returns the codes it was given, whatever the weight."""

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes = Quantized(codes, scale, None)  # (N, K) int8, (N/tr, 1, K/tc, 1) fp32

    def quantize(self, x: Tensor) -> Quantized:
        """Return the codes of x (N, K), where x is."""
        self.codes = Quantized(*(t if t is None else t.to(x.device) for t in self.codes))
        return self.codes


def export_codes(model: GPT, path: Path, checkpoint: dict) -> str:
    """Write the model, and return one line on how large it is. Raises: ValueError if no layer has 8-bit codes."""
    # (1) what forward multiplies: the codes that the recipe makes of the weight as it is used
    tensors, flat = {}, 0
    with torch.no_grad():
        for name, layer in model.named_modules():
            quantizer = getattr(getattr(layer, "recipe", None), "output_weight", None)
            if not hasattr(quantizer, "quantize"):
                continue
            q = quantizer.quantize(layer.used_weight())
            integers = isinstance(q, Quantized) and q.codes.dtype == torch.int8
            if not integers or getattr(quantizer, "bits", 8) != 8:
                raise ValueError(f"--export={path}: {name} has no 8-bit integer codes; "
                                 "it is for --wbits=8")
            tensors |= {f"{name}.weight.codes": q.codes.contiguous(),
                        f"{name}.weight.scale": q.scale.contiguous()}
            flat += q.codes.numel()
    if not tensors:
        raise ValueError(f"--export={path}: no layer has 8-bit weights; train with --wbits=8, "
                         "or name a folder")
    # (2) all else in fp32; a tied head is the embedding, and a reparam has done its work
    kept = {k: v.contiguous() for k, v in model.state_dict().items() if ".reparam." not in k
            and (k != "lm_head.weight" or model.config.untied_head) and f"{k}.codes" not in tensors}
    facts = {key: checkpoint[key] for key in ("config", "vocab_size", "step", "extensions")}
    save_safetensors(tensors | kept, path, {"nanoqpt": json.dumps(facts)})
    whole = 4 * sum(p.numel() for p in model.parameters())
    return (f"wrote {path}: {path.stat().st_size:,} bytes, {flat:,} weights of them in one byte each; "
            f"in fp32 the model has {whole:,}")


def load_codes(path: Path) -> dict:
    """Read such a file as a checkpoint, its codes under "codes". Raises: ValueError if it is something else."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; "
                                f"python eval.py --ckpt=out --export={path} makes it")
    safetensors = load_safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["nanoqpt"])
        tensors = safetensors.torch.load_file(path)
        # JSON has no tuples, a config no lists
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["config"].items()}
        names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
        codes = {name.removesuffix(".weight"):
                 (tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scale")) for name in names}
        # in fp32 too, for --quantizers=off and --recipe; as trained, the layers use the codes (with_codes)
        weights = {f"{name}.weight": restore(Quantized(*q, None)) for name, q in codes.items()
                   if name != "lm_head" or config.get("untied_head")}
    except Exception as error:  # of a file that is cut or of another kind, anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise ValueError(f"{path} is damaged, or not written by eval.py --export ({reason})") from None
    return {**facts, "config": config, "model": weights | tensors, "codes": codes}


def with_codes(linear: Linear, codes: dict[str, tuple[Tensor, Tensor]]) -> Linear:
    """Return the factory `linear`, but layers whose codes were stored use these."""
    def stored(name: str, in_features: int, out_features: int, bias: bool) -> QuantLinear:
        layer = linear(name, in_features, out_features, bias)
        if name in codes:
            layer.recipe = replace(layer.recipe, output_weight=Stored(*codes[name]))
            layer.reparam = None  # the codes are of what it made of the weight
        return layer
    return stored


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (n,), whole numbers from 0 to 2^bits - 1, one behind the other: uint8, (n bits / 8, rounded up).

    The highest bit comes first. Args: bits: 1 to 16. Example: 5 and 2 in 3 bits: 101 010 and two zeros, the byte 168.
    """
    two_bytes = codes.cpu().numpy().astype(">u2").view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(np.packbits(np.unpackbits(two_bytes, axis=1)[:, 16 - bits:]))


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the n codes, int64 (n,), that `pack_bits` has packed."""
    each = np.unpackbits(packed.cpu().numpy(), count=n * bits).reshape(n, bits)
    two_bytes = np.packbits(np.pad(each, ((0, 0), (16 - bits, 0))), axis=1)  # (n, 2)
    return torch.from_numpy(two_bytes.view(">u2").astype(np.int64).reshape(n))


def huffman(parts: list[Tensor]) -> Tensor:
    """Compress codes, 0 to 255, (n,) of each part: uint8, one zlib stream of Huffman codes, new ones for each part."""
    stream, data = zlib.compressobj(9, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY), bytearray()
    for codes in parts:
        data += stream.compress(codes.cpu().to(torch.uint8).numpy()) + stream.flush(zlib.Z_BLOCK)
    return torch.frombuffer(data + stream.flush(), dtype=torch.uint8)


def unhuffman(stream: Tensor) -> Tensor:
    """Return the codes of all parts, int64, that `huffman` has compressed."""
    data = bytearray(zlib.decompress(stream.cpu().numpy()))
    return torch.frombuffer(data, dtype=torch.uint8).long()
