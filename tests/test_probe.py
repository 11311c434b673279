"""probe.py against brute force: gradients, sharpness, outliers, stored moments, and rescalings that change nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parameters_to_vector as vector

import probe
from support.presets import PRESETS


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("probe") / "out"


@pytest.fixture
def one(run, out):
    """A checkpoint of an unquantized run, with three batches of two windows."""
    if not out.exists():
        assert run(out, "--n_layer=2")[0] == 0
    return probe.Probe(str(out), batches=3, batch_size=2)


def gradient(model, batch):
    model.zero_grad()
    model(batch[:, :-1], batch[:, 1:]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


@given(st.lists(st.floats(-10, 10), min_size=4, max_size=4), st.integers(0, 99))
def test_gradients_beside_each_other(values, seed):
    """Error, cosine and slope are those of the flattened vectors."""
    rng = torch.Generator().manual_seed(seed)
    exact, found = ([{"a": torch.randn(3, 2, generator=rng), "b": torch.randn(5, generator=rng), "c": torch.ones(9)}
                     for _ in values] for _ in range(2))
    for x, scale in zip(found, values, strict=True):
        x["a"] *= scale
    g, q = (np.array([np.concatenate([x[n].double().flatten() for n in "ab"]) for x in each])
            for each in (exact, found))
    row = probe.compare_gradients(exact, found, ["a", "b"])
    norm = np.linalg.norm
    assert row["error"] == pytest.approx(np.mean(norm(q - g, axis=1) / norm(g, axis=1)), rel=1e-5)
    assert row["cosine"] == pytest.approx(np.mean((g * q).sum(1) / norm(g, axis=1) / norm(q, axis=1)), abs=1e-6)
    assert row["slope"] == pytest.approx(np.mean((g * q).sum(1) / (g * g).sum(1)), abs=1e-5)


def test_rows_of_recipes(one):
    """Nothing changes nothing; a loss is the quantized model's; fewer bits cost more; layers have rows of their own."""
    flags = {name: PRESETS[name] for name in ("E0", "W2", "W4", "G2", "G3", "S6", "adam8", "adam4", "adam8-dynamic")}
    rows = {(row["recipe"], row["layer"]): row for row in probe.probe_rows(one, flags)}
    total = {name: rows[name, "all"] for name in flags}
    assert (total["E0"]["loss"], total["E0"]["error"], total["E0"]["slope"], total["E0"]["bias"]) == (0, 0, 1, 0)
    w4, plain = one.model(PRESETS["W4"]), one.model({})
    losses = [[m(b[:, :-1], b[:, 1:]).item() for b in one.batches] for m in (w4, plain)]
    assert total["W4"]["loss"] == pytest.approx(np.mean(losses[0]) - np.mean(losses[1]), abs=1e-6)
    errors = [np.linalg.norm(gradient(w4, b) - gradient(plain, b)) / gradient(plain, b).norm() for b in one.batches]
    assert total["W4"]["error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert total["G3"]["bias"] == total["G3"]["error"]  # nothing is drawn
    noisy = probe.probe_rows(one, {"": PRESETS["G3"] | {"rounding": "stochastic"}})[0]
    assert noisy["error"] > total["G3"]["error"]
    assert noisy["bias"] == pytest.approx(noisy["error"] / probe.DRAWS**0.5, rel=0.15)  # unbiased
    assert total["W2"]["error"] < total["W4"]["error"] and total["G2"]["bias"] < total["G3"]["bias"]
    assert total["G3"]["loss"] == 0 == rows["G3", "h.1.mlp.c_proj.weight"]["loss"]
    assert [total[name]["update"] for name in ("E0", "W4")] == [None, None]
    assert 0 < total["adam8"]["update"] < total["adam4"]["update"] < 1 < total["S6"]["update"]


def test_moments_that_codes_can_hold_have_no_error(one):
    """m = 64 and v = 256^2 everywhere are levels of power8, so u comes back; without moments there is no row."""
    for state in one.checkpoint["optimizer"]["state"].values():
        state["exp_avg"].fill_(64.0)
        state["exp_avg_sq"].fill_(256.0**2)
    assert probe.stored_update_error(one.checkpoint, one.model({}), PRESETS["adam8"]) < 1e-6
    next(iter(one.checkpoint["optimizer"]["state"].values()))["scales"] = 0  # it has codes of its own
    assert probe.stored_update_error(one.checkpoint, one.model({}), PRESETS["adam8"]) is None
    one.checkpoint["optimizer"]["state"].clear()
    assert probe.stored_update_error(one.checkpoint, one.model({}), PRESETS["adam8"]) is None


def test_sharpness(one):
    """S is the loss a step of rho up the gradient, less the loss; tiny steps climb rho |g|; the weights come back."""
    model = one.model({})
    before = vector(model.parameters()).clone()
    rise = []
    for b in one.batches:
        g, loss = gradient(model, b), model(b[:, :-1], b[:, 1:]).item()
        torch.nn.utils.vector_to_parameters(before + (0.05 * g / g.norm()).float(), model.parameters())
        rise.append(model(b[:, :-1], b[:, 1:]).item() - loss)
        torch.nn.utils.vector_to_parameters(before.clone(), model.parameters())
    (row,) = probe.sharpness_rows(one, {"E0": {}}, 0.05)
    assert row["S"] == pytest.approx(np.mean(rise), abs=2e-6)
    assert probe.sharpness_rows(one, {"E0": {}}, 1e-3)[0]["S / (rho |g|)"] == pytest.approx(1, abs=0.05)
    with probe.moved(model, {"wte.weight": torch.ones_like(model.wte.weight)}, 3.0):
        assert not torch.equal(vector(model.parameters()), before)
    assert torch.equal(vector(model.parameters()), before)


def test_outliers_and_gradients(one):
    """A channel that is blown up is found where it is, and its crest grows; shares of zeros are counted."""
    model = one.model({})
    rows = {row["layer"]: row for row in probe.outlier_rows(model, one.batches)}
    assert len(rows) == 8 and all(row["channels"] == "0" for name, row in rows.items() if "c_attn" in name)
    probe.rescale(model, "attn.c_attn", [5], 1000.0)
    after = {row["layer"]: row for row in probe.outlier_rows(model, one.batches)}
    assert after["h.0.attn.c_attn"]["channels"] == "0"  # of 32 channels none exceeds the mean by more than 5.6 std
    assert after["h.0.attn.c_attn"]["crest, channels"] == pytest.approx(32**0.5, rel=1e-3)
    assert after["h.1.mlp.c_fc"]["crest, channels"] == pytest.approx(rows["h.1.mlp.c_fc"]["crest, channels"], rel=1e-3)
    rows = {row["gradient of"]: row for row in probe.gradient_rows(one)}
    plain, zero = one.model({}), []
    for b in one.batches:
        gradient(plain, b)
        k = plain.h[1].attn.c_attn.weight.grad[32:64].abs()
        zero.append((torch.round(k / (k.max() / 7)) == 0).float().mean().item())
    assert rows["h.1.attn.c_attn.k"]["zero in 4 bits"] == pytest.approx(np.mean(zero), abs=1e-6) and len(rows) == 12


@pytest.mark.parametrize("reader", ["attn.c_attn", "mlp.c_fc", "attn.c_proj"])
def test_a_rescaling_by_a_power_of_two_changes_no_bit(one, reader):
    """The function stays; under one scale per channel (A6) so does the quantized one, per token (A4) it does not."""
    for preset, bitwise in (("E0", True), ("A6", True), ("A4", False)):
        model, batch = one.model(PRESETS[preset]), one.batches[0]
        before = model(batch[:, :-1])
        probe.rescale(model, reader, [3], 16.0)
        after = model(batch[:, :-1])
        assert torch.equal(before, after) == bitwise


def test_refused(one, out, run, tmp_path):
    """More batches than there are windows; data of another vocabulary; a preset with reparams starts them anew."""
    with pytest.raises(ValueError, match="--batches=99 of --batch_size=99 need 9801 windows, the validation split has"):
        probe.Probe(str(out), 99, 99)
    row = probe.probe_rows(probe.Probe(str(out), 2, 2), {"lsq4": {"lsq_bits": 4}})[0]
    assert row["loss"] != 0
    checkpoint = torch.load(out / "ckpt.pt")
    (tmp_path / "other").mkdir()
    torch.save({**checkpoint, "vocab_size": 99}, tmp_path / "other" / "ckpt.pt")
    with pytest.raises(ValueError, match="has a vocabulary of 257, .* one of 99; name the folder it was trained on"):
        probe.Probe(str(tmp_path / "other"), 2, 2)
