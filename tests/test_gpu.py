"""The same numbers on a GPU as on a CPU: codes, integer GEMMs, the optimizer, and whole runs. All of it needs one."""

import pytest
import torch
from conftest import column, same
from test_quant import bitwise, normal

import eval as evaluation
from int8 import int8_gemm
from optim import AdamW, OptimConfig
from quant import Quantized, Quantizer

DEVICE = "cuda"  # "cpu" tries this file without one, but for the refusal of sizes
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")


def moved(q):
    """Put a quantized matrix onto the device."""
    return Quantized(*(None if t is None else t.to(DEVICE) for t in q))


@pytest.mark.parametrize("quantizer", [Quantizer(8, (1, None)), Quantizer(4, (1, 32), asym=True), Quantizer(3),
                                       Quantizer(8, (1, None), fmt="e4m3"), Quantizer(8, (None, 1), fmt="e5m2")])
def test_codes_are_the_cpus(quantizer):
    """But for an ulp of the scale: a GPU multiplies by 1 / 127 where a CPU divides. Few codes move."""
    x = normal(64, 96)
    ours, theirs = quantizer.quantize(x.to(DEVICE)), quantizer.quantize(x)
    torch.testing.assert_close(ours.scale.cpu(), theirs.scale, rtol=2.0**-22, atol=0)
    for a, b in ((ours.codes, theirs.codes), (ours.zero_point, theirs.zero_point)):
        assert b is None or (a.cpu().float() != b.float()).float().mean() < 1e-3


def test_integer_gemms_of_forward_and_backward():
    """Operands as stored, and both ways transposed as backward meets them; 5 rows are filled up to 17."""
    rounding = Quantizer(8, (1, None))
    for m, k, n in ((5, 64, 40), (64, 128, 256)):
        x, w, g = (rounding.quantize(normal(*s)) for s in ((m, k), (n, k), (m, n)))
        whole = Quantizer(8)  # one scale, so that the transposed operand has no other
        xt, wt, gt = (whole.quantize(normal(*s)).T for s in ((m, k), (n, k), (m, n)))
        cases = [(x, w), (g, wt)] + [(gt, xt)] * (m % 8 == 0)
        for a, b in cases:
            exact = int8_gemm(a, b, torch.float32)
            assert bitwise(int8_gemm(moved(a), moved(b), torch.float32).cpu(), exact)
    with pytest.raises(ValueError, match="multiples of 8"):
        int8_gemm(moved(rounding.quantize(normal(64, 12))), moved(rounding.quantize(normal(64, 12))), torch.float32)


@pytest.mark.parametrize("flags", [dict(m1bits=8, m2bits=8), dict(m1bits=4, m2bits=4), dict(m2bits=8, m2fmt="dynamic"),
                                   dict(m1bits=4, m1fmt="linear", m1gran="per_channel")], ids=str)
@pytest.mark.parametrize("compile", [False, True])
def test_optimizer(flags, compile):
    """Ten steps: parameters and scales agree to rounding, which moves few codes."""
    results = []
    for device in ("cpu", DEVICE):
        p = torch.nn.Parameter(normal(96, 64).to(device))
        optimizer = AdamW([p], 1e-2, OptimConfig(**flags), compile=compile and device == DEVICE)
        for step in range(10):
            p.grad = normal(96, 64, seed=step).to(device)
            optimizer.step()
        state = optimizer.state[p]
        results.append((p.detach().cpu(), *(state[key].cpu() for key in ("scales", "exp_avg", "exp_avg_sq"))))
    (p, s, *codes), (q, t, *others) = results
    torch.testing.assert_close(s, t, rtol=1e-3, atol=0)
    assert (p - q).abs().max() < 1e-2 and (p - q).abs().mean() < 1e-5
    for a, b in zip(codes, others, strict=True):
        assert torch.isclose(a.float(), b.float(), rtol=1e-4, atol=1e-6).float().mean() > 0.99


@pytest.mark.parametrize("flags", ["E0", "w8a8", "int8-all,keep8,adam8", "fp8", "best", "nvfp4", "gaussws", "lsq4"])
def test_runs(flags, run, call, tmp_path):
    """A run in bf16, compiled, learns; stopped and resumed it is the same to the last bit; eval.py agrees with it."""
    size = [f"--preset=tiny,{flags}", f"--device={DEVICE}", "--dtype=bfloat16", "--compile=True", "--n_embd=64",
            "--n_head=1", "--n_layer=2", "--deterministic", "--max_iters=12", "--eval_interval=4",
            "--learning_rate=1e-2"]
    code, _, error = run(tmp_path / "a", *size)
    assert code == 0, error
    loss = column(tmp_path / "a", "val_loss")
    assert loss[-1] < loss[0] - 0.3
    assert run(tmp_path / "b", *size, "--max_iters=8", "--lr_decay_iters=12")[0] == 0
    assert run(tmp_path / "b", "--resume", "--max_iters=12", small=[])[0] == 0
    ckpts = [torch.load(tmp_path / name / "ckpt.pt", map_location="cpu", weights_only=True) for name in "ab"]
    assert same(ckpts[0]["model"], ckpts[1]["model"]) and same(ckpts[0]["optimizer"], ckpts[1]["optimizer"])
    code, out, error = call(evaluation.main, f"--ckpt={tmp_path}/a", f"--device={DEVICE}", "--sample_tokens=0")
    assert code == 0 and f"{loss[-1]:.4f}" in out, error


def test_file_of_codes(run, call, tmp_path):
    """--export=NAME.safetensors: its codes follow the model onto the GPU."""
    pytest.importorskip("safetensors")
    assert run(tmp_path / "a", "--wbits=8", "--abits=8")[0] == 0
    file = tmp_path / "codes.safetensors"
    assert call(evaluation.main, f"--ckpt={tmp_path}/a", f"--export={file}")[0] == 0
    code, out, error = call(evaluation.main, f"--ckpt={file}", f"--device={DEVICE}", "--sample_tokens=0")
    assert code == 0 and f"{column(tmp_path / 'a', 'val_loss')[-1]:.2f}" in out, error
