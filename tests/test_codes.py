"""support/codes.py: a file of int8 codes is the model it was written from, to the last bit, or one line of refusal."""

import pytest
import torch
from conftest import column
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import extensions
from support.checkpoint import load_checkpoint, model_from
from support.codes import Stored, load_codes, pack_bits, unpack_bits, with_codes

safetensors = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("flags", [["--wbits=8", "--abits=8"], ["--wbits=8", "--wgran=per_block", "--wblock=32"],
                                   ["--wbits=8", "--gemm=int8", "--abits=8", "--quant_head"],
                                   ["--wbits=8", "--abits=4", "--asym", "--skip_blocks=0", "--untied_head"]])
def test_the_loss_is_the_same_to_the_last_bit(flags, run, call, tmp_path):
    """Codes are int8 and those of the recipe, the rest is fp32, and eval.py prints the same from either."""
    assert run(tmp_path / "a", "--n_layer=2", *flags)[0] == 0
    file = tmp_path / "codes.safetensors"
    code, out, err = call(evaluation.main, f"--ckpt={tmp_path}/a", f"--export={file}")
    assert code == 0 and out.startswith(f"wrote {file}:"), err
    tensors = safetensors.load_file(file)
    codes = {k for k in tensors if k.endswith(".codes")}
    assert all(t.dtype == (torch.int8 if k in codes else torch.float32) for k, t in tensors.items())
    assert len(codes) == (4 if "--skip_blocks=0" in flags else 8) + ("--quant_head" in flags)
    assert not {k.removesuffix(".codes") for k in codes} & tensors.keys()
    loss, idx = [], torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(0))
    for source, wrap in ((load_checkpoint(tmp_path / "a"), lambda linear, _: linear), (load_codes(file), with_codes)):
        linear = extensions.linears(source["config"])
        loss.append(model_from(source, wrap(linear, source.get("codes"))).eval()(idx, idx))
    assert torch.equal(*loss)
    before, after = (call(evaluation.main, f"--ckpt={path}", "--sample_tokens=40")[1].split("\n", 1)
                     for path in (tmp_path / "a", file))
    assert before[1] == after[1] and f"{column(tmp_path / 'a', 'val_loss')[-1]:.4f}" in after[1]


def test_codes_go_where_the_model_is():
    """The file is read on the CPU, and the model moved afterwards."""
    stored = Stored(torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1, 1, 1))
    assert {t.device.type for t in stored.quantize(torch.empty(4, 8, device="meta"))[:2]} == {"meta"}


def test_refused(run, call, tmp_path, monkeypatch):
    """4-bit weights, a damaged file, one of another kind, and none: one line each."""
    assert run(tmp_path / "a", "--wbits=4")[0] == run(tmp_path / "b", "--wbits=8")[0] == 0
    file = tmp_path / "codes.safetensors"
    assert "has no 8-bit integer codes" in call(evaluation.main, f"--ckpt={tmp_path}/a", f"--export={file}")[2]
    assert "there is no" in call(evaluation.main, f"--ckpt={file}")[2]
    assert run(tmp_path / "c", "--lsq_bits=8")[0] == 0  # its steps are no codes
    assert "no layer has 8-bit weights" in call(evaluation.main, f"--ckpt={tmp_path}/c", f"--export={file}")[2]
    code, out, err = call(evaluation.main, f"--ckpt={tmp_path}/b", f"--export={tmp_path}/no/folder.safetensors")
    assert code == 2 and "could not write" in err
    assert call(evaluation.main, f"--ckpt={tmp_path}/b", f"--export={file}")[0] == 0
    whole = file.read_bytes()
    with monkeypatch.context() as patch:  # a disk that is full: what was there stays
        def full(tensors, path, metadata):
            path.write_bytes(b"half of it")
            raise OSError("No space left on device")
        patch.setattr(safetensors, "save_file", full)
        code, _, err = call(evaluation.main, f"--ckpt={tmp_path}/b", f"--export={file}")
    assert code == 2 and "could not write" in err and file.read_bytes() == whole and not [*tmp_path.glob("*.tmp")]
    safetensors.save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors")
    for data in (whole[:-5], whole[:100], b"", (tmp_path / "other.safetensors").read_bytes()):
        file.write_bytes(data)
        code, out, err = call(evaluation.main, f"--ckpt={file}")
        assert code == 2 and "is damaged, or not written by eval.py --export" in err and err.count("\n") == 1


@given(bits=st.integers(1, 16), data=st.data())
def test_packed_bits(bits, data):
    """Any codes of 1 to 16 bits: as many bits as that, in whole bytes, and back without loss; as Python spells them."""
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=0, max_size=20))
    packed = pack_bits(torch.tensor(codes, dtype=torch.int64), bits)
    text = "".join(f"{code:0{bits}b}" for code in codes)
    text += "0" * (-len(text) % 8)
    assert packed.tolist() == [int(text[i:i + 8], 2) for i in range(0, len(text), 8)] and packed.dtype == torch.uint8
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes
    assert pack_bits(torch.tensor([5, 2]), 3).tolist() == [168]
