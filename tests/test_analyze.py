"""analyze.py: what the tables say of known runs and formats; pictures are drawn, or missed politely."""

import sys

import numpy as np
import pytest
from conftest import read

import analyze


def cells(table):
    """Return the rows of a printed table under its header, as lists of cells."""
    return [[x.strip() for x in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]


@pytest.fixture
def losses(run, tmp_path, monkeypatch):
    """Validation losses by step of two runs with different steps; the programs run in the folder of both."""
    monkeypatch.chdir(tmp_path)
    assert run("long")[0] == 0 and run("short", "--max_iters=3", "--eval_interval=3", "--wbits=4")[0] == 0
    return [{x["step"]: x["val_loss"] for x in read(tmp_path / name) if "val_loss" in x} for name in ("long", "short")]


def test_curves(losses, call, tmp_path, monkeypatch):
    """Values and differences by step, nothing where a run has none; whatever is missing is one line."""
    long, short = losses
    _, out, _ = call(analyze.main, "--runs=long,short,long")  # one that is named twice is shown once
    assert out.startswith("val_loss, nats per token; in brackets the difference to short\n") and cells(out) == [
        ["0", f"{long[0]:.4f} ({long[0] - short[0]:+.4f})", f"{short[0]:.4f}"], ["2", f"{long[2]:.4f}", ""],
        ["3", "", f"{short[3]:.4f}"], ["4", f"{long[4]:.4f}", ""], ["6", f"{long[6]:.4f}", ""]]
    log = (path := tmp_path / "short" / "log.jsonl").read_text()
    path.write_text(log.splitlines()[0] + "\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for flags, words in ((["--runs=long,gone"], "there is no gone/log.jsonl"), (["--runs=short"], "no evaluation yet"),
                         (["--runs=long", "--out=a.png"], "pip install matplotlib")):
        code, out, err = call(analyze.main, *flags)
        assert code == 2 and words in err and err.count("\n") == 1 and not out
    path.write_text(log.replace('"dataset": "text"', '"dataset": "other"'))
    assert call(analyze.main, "--runs=long,short")[1].startswith("val_bpb, bits per byte")


def test_pictures(losses, call, tmp_path):
    pytest.importorskip("matplotlib")
    for i, flag in enumerate(("--runs=long,short", "--what=codebooks")):
        assert call(analyze.main, flag, f"--out={i}.png")[0] == 0
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, words", [
    (["--what=probe", "--ckpt=long", "--recipes=W4,G3+adam4"], "| G3+adam4 | 0.00000 |"),
    (["--what=sharpness", "--ckpt=short", "--recipes=W4"], "S / (rho |g|)"),
    (["--what=landscape", "--ckpt=long", "--recipes=W4"], ""),
    (["--what=gradients", "--ckpt=long"], "| h.0.mlp.c_fc |"),
    (["--what=outliers", "--runs=long,short"], "| short | 3 | h.0.mlp.c_proj |"),
    (["--what=memory", "--recipes=adam8"], "| adam8 | 16 | 474.8 | 252")])
def test_tables_and_their_pictures(flags, words, losses, call, tmp_path):
    """Each of them prints its table, draws it, and writes the numbers beside the picture."""
    pytest.importorskip("matplotlib")
    small = [] if "--what=memory" in flags else ["--batches=2", "--batch_size=2"]
    code, out, err = call(analyze.main, *flags, *small, "--out=a.png")
    assert code == 0 and words in out, err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and "," in (tmp_path / "a.csv").read_text()


@pytest.mark.parametrize("flags, words", [
    (["--what=probe", "--recipes=W4+W9"], "no preset 'W9'"), (["--what=probe", "--rho=0.1"], "with --what=probe"),
    (["--what=codebooks"], "name its file: --out=codebooks.png"), (["--what=curves", "--recipes=W4"], "--what=curves"),
    (["--what=probe", "--batches=0"], "--batches=0 must be at least 1"), (["--what=memory", "--ckpt=a"], "--ckpt=a")])
def test_refused(flags, words, call):
    """One line, exit code 2."""
    code, out, err = call(analyze.main, *flags)
    assert code == 2 and words in err and not out


def test_update_error(call, monkeypatch):
    """A row per format: fp32 has no error, 8 bits less than 4, linear v far more; bytes are those stored."""
    monkeypatch.setitem(analyze.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=64, block_size=64, batch_size=2))
    tokens = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint16)
    monkeypatch.setattr(analyze, "make_missing", lambda *_: None)
    monkeypatch.setattr(analyze, "open_dataset", lambda *_: (tokens, tokens, {"vocab_size": 257}))
    code, out, err = call(analyze.main, "--what=update_error", "--steps=2")
    rows = {row[0]: [float(x.replace(",", "")) for x in row[1:]] for row in cells(out)}
    assert code == 0 and list(rows) == ["fp32", *analyze.FORMATS], err
    assert rows["fp32"][:2] == [0, 0] and rows["fp32"][3] == 8 and "2 steps of 128 tokens" in out
    eight, four, v = (rows[f] for f in ("power8 + power8 (adam8)", "power4 + power4 (adam4)", "linear8 v, per_block"))
    assert 0 < eight[0] < 0.1 < four[0] < 1 < v[0] and v[2] > 100 and (eight[3], four[3], v[3]) == (2.125, 1.125, 5.125)
