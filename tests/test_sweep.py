"""sweep.py: the rows are what they say, runs survive kills, verdicts follow from the numbers."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

import extensions
import sweep
import verdicts
from support.config import flatten, parse
from support.presets import PRESETS
from train import TrainConfig

TINY = ("--preset=tiny --dataset=text --n_layer=1 --n_embd=32 --n_head=2 --block_size=32 --batch_size=4 --max_iters=12 "
        "--eval_interval=4 --eval_tokens=1024 --log_interval=2 --warmup_iters=2 --sample_tokens=0 --compile=False")


def test_rows_are_configs_and_differ():
    """Each row's command is a legal one, no two rows train the same, and their partners are rows; so at all scales."""
    config, seen = sweep.SweepConfig(), {}
    config.resolve()
    for name, row in sweep.ROWS.items():
        flat = flatten(parse(TrainConfig, sweep.command(config, name, 7)[1:], PRESETS | extensions.PRESETS))
        assert flat["seed"] == 7 and row.beside in sweep.ROWS
        assert bool(row.expects) == (row.paper not in ("", "?", "the baseline"))
        key = str({k: v for k, v in flat.items() if k not in ("preset", "out_dir")})
        assert seen.setdefault(key, name) == name
    assert dict(config.runs()).keys() == sweep.ROWS.keys()  # .999 is no .99
    for scale, beta2 in (("gpu", "E0-beta2=.95"), ("paper", "E0-beta2=.999")):
        config = sweep.SweepConfig(scale=scale)
        config.resolve()
        assert beta2 not in dict(config.runs()) and len(dict(config.runs())) == len(sweep.ROWS) - 2
        parse(TrainConfig, sweep.command(config, "C1", 7)[1:], PRESETS)
    assert {name for names in verdicts.PANELS.values() for name in names.split()} <= sweep.ROWS.keys()


def line(row, seed, loss, status="finished"):
    """Return a line of runs.jsonl."""
    return {"scale": "laptop", "row": row, "seed": seed, "status": status, "step": 9, "data": "abc",
            "val_loss": [[0, 0, 5.0], [9, 900, loss]], "tokens_per_s": 1000 + seed}


def test_quantiles_of_t():
    """Student's density, integrated numerically, has 95 % between -q and q."""
    for n, q in verdicts.T95.items():
        x = np.linspace(-q, q, 200_001)
        constant = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
        assert np.trapezoid(constant * (1 + x**2 / n) ** (-(n + 1) / 2), x) == pytest.approx(0.95, abs=6e-5)


def test_differences_are_within_seeds():
    """Means are of the differences within seeds; the spread is of all rows near E0, and what is missing drops out."""
    losses = {"E0": (1.0, 1.2, 1.4, 9.0), "C1": (1.011, 1.209, 1.410), "W2": (1.02, 1.24), "A4": (1.5, 9.9)}
    done = {(row, s): line(row, s, x) for row, values in losses.items() for s, x in enumerate(values)}
    d, (spread, freedom) = verdicts.compare(done, "C1", "E0"), verdicts.chaos(done)
    assert d.mean == pytest.approx(0.01) and d[2:6] == (3, 0, 0, 0) and freedom == 9 - 3 - 4 + 1  # A4 is far away
    assert d.half == pytest.approx(3.182 * spread / math.sqrt(3))
    assert verdicts.compare(done, "A4", "E0").half == pytest.approx(12.706 * 8.2 / 2)  # its own spread, of .5 and 8.7
    done["C1", 3] = line("C1", 3, 9.5)  # one late run: the row's others still count, it has an interval of its own
    late = verdicts.compare(done, "C1", "E0")
    assert verdicts.chaos(done) == pytest.approx((spread, freedom))
    assert late.half > 20 * spread and late.verdict() == "not decided"
    done |= {("S3", s): line("S3", s, done["E0", s]["val_loss"][-1][2] + d) for s, d in enumerate((0.2, 0.3, 5.0))}
    lost = verdicts.compare(done, "S3", "E0")  # one is late too, but all lose
    assert lost.half > lost.mean > 0 and lost.each == 1 and lost.verdict() == "worse"
    done["C1", 1], done["C1", 3] = line("C1", 1, 1.3, "diverged"), line("C1", 3, 9.5, "diverged")
    assert verdicts.compare(done, "C1", "E0")[2:6] == (2, 2, 0, 0) and math.isnan(verdicts.final(done["C1", 1]))
    assert verdicts.compare(done, "W2", "C1")[2:6] == (1, 0, 1, 0)
    assert verdicts.compare({("E0", 1): line("E0", 1, 1.0), ("A4", 1): line("A4", 1, 1.2)}, "A4", "E0").half == math.inf
    done = {(row, s): line(row, s, 1.0, "diverged") for row in ("E0", "W3", "W4") for s in range(2)}
    assert verdicts.compare(done, "W3", "W4").verdict() == "both diverged" and verdicts.chaos(done) == (math.inf, 0)


def test_the_spread_of_simulated_runs():
    """Of rows that differ by constants only, 95 % intervals hold the true difference 95 times in 100."""
    rng, rows, held, spreads = np.random.default_rng(0), ["E0", *"abcdefg"], [], []
    for _ in range(400):
        seeds = rng.normal(0, 0.05, 3)  # their luck is common to all rows, and must not count
        done = {(row, s): line(row, s, 1.5 + 0.005 * i + seeds[s] + rng.normal(0, 0.01))
                for i, row in enumerate(rows) for s in range(3)}
        spreads.append(verdicts.chaos(done)[0])
        held += [abs(verdicts.compare(done, row, "E0").mean - 0.005 * i) < verdicts.compare(done, row, "E0").half
                 for i, row in enumerate(rows) if i]
    assert np.square(spreads).mean() ** 0.5 == pytest.approx(0.01 * 2**0.5, rel=0.03)
    assert 0.935 < np.mean(held) < 0.965


@pytest.mark.parametrize("numbers, verdict, judged", [
    ((0.005, 0.01, 3, 0, 0, 0), "tie", {"tie": "confirmed", "worse": "not decidable here: 0.015 at most",
                                        "diverged": "not diverged in these runs: tie"}),
    ((0.005, 0.002, 3, 0, 0, 0), "tie", {"tie": "confirmed", "worse": "not decidable"}),
    ((0.01, 0.02, 3, 0, 0, 0), "not decided", {"tie": "not decidable here: 0.030", "worse": "not decidable"}),
    ((0.03, 0.02, 3, 0, 0, 0), "worse", {"worse": "confirmed", "tie": "not decidable", "better": "contradicted"}),
    ((0.10, 0.02, 3, 0, 0, 0), "worse", {"worse": "confirmed", "tie": "contradicted",
                                          "diverged": "not diverged in these runs: worse"}),
    ((-.10, 0.02, 3, 0, 0, 0), "better", {"better": "confirmed", "worse": "contradicted", "tie": "contradicted"}),
    ((0.10, 0.02, 1, 2, 0, 0), "diverged 2/3", {"diverged": "confirmed", "worse": "confirmed", "tie": "contradicted"}),
    ((0.10, 0.02, 2, 1, 0, 0), "worse", {"diverged": "not diverged"}),
    ((math.nan, math.inf, 0, 0, 3, 0), "better", {"better": "confirmed", "worse": "contradicted"}),
    ((0.50, math.inf, 1, 0, 0, 0), "not decided", {"worse": "one seed decides", "tie": "one seed"}),
    ((0.36, 0.45, 3, 0, 0, 0, 1), "worse", {"worse": "confirmed", "tie": "contradicted", "better": "contradicted"}),
    ((math.nan, math.inf, 0, 1, 1, 0), "not decided", {"better": "not decidable here: no seed"}),
    ((0.1, 0.02, 1, 0, 0, 1), "worse", {"worse": "confirmed"}),
    ((math.nan, math.inf, 0, 1, 0, 1), "diverged 1/1", {"diverged": "confirmed"}),
    ((math.nan, math.inf, 0, 2, 0, 1), "diverged 2/2", {"diverged": "confirmed"}),
    ((math.nan, math.inf, 0, 0, 0, 2), "both diverged", {"tie": "both diverged", "diverged": "both diverged"}),
    ((math.nan, math.inf, 0, 0, 0, 0), "not run", {"tie": "not run"})])
def test_verdicts(numbers, verdict, judged):
    """A claim is confirmed or contradicted by what the interval excludes, else it stays open."""
    d = verdicts.Difference(*numbers)
    assert d.verdict() == verdict
    for expected, words in judged.items():
        assert verdicts.judge(d, expected).startswith(words)


def test_report(tmp_path, call):
    """table.md, table.csv and curves.png from whatever runs there are, one of them diverged, one line cut off."""
    lines = [line("E0", 1, 1.0), line("E0", 2, 1.1), line("W4", 1, 1.5), line("W4", 2, 1.61)]
    lines += [line("A4", 1, 1.0, "diverged") | {"tokens_per_s": None}]
    text = "".join(json.dumps(x) + "\n" for x in lines)
    (tmp_path / "runs.jsonl").write_text(text + text[:30])
    code, out, err = call(sweep.main, "--report", f"--out_dir={tmp_path}")
    assert code == 0 and "steps | A4 - E0, diverged 1 | confirmed: diverged 1/1 |" in out
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert table[0].startswith("id,seeds,val_loss_mean,val_loss_std,diff_to_E0_mean,diff_to_E0_ci,diverged,verdict")
    assert [row.split(",")[:2] for row in table[1:]] == [["E0", "2"], ["W4", "2"], ["A4", "1"]]
    assert "W4,2,1.555,0.0777817,0.505,0.06353,,worse" in table[2] and "1: step 9" in table[3]
    assert min((tmp_path / name).stat().st_size for name in ("curves.png", "probe.png")) > 10_000
    broken = line("E0", 1, 1.0)
    for lines, message in (([], "has no run of E0 yet"), ([{"row": "E0", "seed": 1}], "has a line without "),
                           ([broken, broken | {"data": "d"}], "has runs of 2 data sets (abc, d)"),
                           ([broken | {"scale": "gpu"}], "has runs of --scale=gpu")):
        (tmp_path / "runs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        code, out, err = call(sweep.main, "--report", f"--out_dir={tmp_path}")
        assert code == 2 and message in err


@pytest.mark.parametrize("flags, message", [
    (["--rows=E0,W9"], "there is no row 'W9'; use some of E0,"), (["--seeds=0"], "--seeds=0 must lie in 1 to 100"),
    (["--show", "--report"], "exclude each other"),
    (["--report", "--rows=C1"], "--rows=C1 has no effect with --report"),
    (["--show", "--jobs=2"], "--jobs=2 has no effect with --show"),
    (["--jobs=65"], "--jobs=65 must lie in 1 to 64")])
def test_refused(flags, message, call):
    """One line, exit code 2."""
    code, out, err = call(sweep.main, *flags)
    assert code == 2 and message in err


def test_a_killed_sweep_ends_as_an_undisturbed_one(tmp_path, data, call, monkeypatch):
    """SIGKILL while the first run trains, which goes on as an orphan: the sweep that follows ends the same, bitwise."""
    monkeypatch.setitem(sweep.SCALES, "laptop", sweep.Scale(TINY, (1, 2, 3), ""))
    flags = ["--rows=C1", "--seeds=1", "--jobs=2", f"--data_dir={data}"]
    program = f"import sweep; sweep.SCALES['laptop'] = sweep.Scale({TINY!r}, (1, 2, 3), ''); sweep.main()"
    killed = subprocess.Popen([sys.executable, "-c", program, *flags, f"--out_dir={tmp_path}/killed"], cwd=ROOT,
                              env=os.environ | {"PYTHONPATH": "."}, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("killed/runs/E0-1/log.jsonl")) and killed.poll() is None:
        time.sleep(0.05)
    code, _, err = call(sweep.main, *flags, f"--out_dir={tmp_path}/killed")
    assert code == 2 and "another sweep runs" in err
    killed.kill()
    assert killed.wait() == -9
    for name in ("killed", "whole"):
        assert "2/2" in call(sweep.main, *flags, f"--out_dir={tmp_path}/{name}")[1]
    runs = [sweep.read_runs(tmp_path / name / "runs.jsonl", "laptop") for name in ("whole", "killed")]
    assert runs[0].keys() == runs[1].keys() == {("E0", 1), ("C1", 1)}
    for run in runs[0]:
        a, b = (r[run] for r in runs)
        assert a["val_loss"] == b["val_loss"] and a["loss"] == b["loss"] and a["status"] == "finished"
    assert "2 of 2 runs are done" in call(sweep.main, *flags, f"--out_dir={tmp_path}/whole")[1]


def test_a_run_of_other_flags_or_of_before_is_no_result(tmp_path, data, call, monkeypatch):
    """Its folder is refused, finished or not; and where nothing could be started, what an old log says is not taken."""
    flags = ["--rows=E0", "--seeds=1", "--jobs=1", f"--data_dir={data}", f"--out_dir={tmp_path}"]
    monkeypatch.setitem(sweep.SCALES, "laptop", sweep.Scale(TINY, (1,), ""))
    assert "1/1" in call(sweep.main, *flags)[1]
    (tmp_path / "runs.jsonl").write_text("")
    code, out, err = call(sweep.main, *flags, "--launcher=false")
    assert code == 2 and "E0 with seed 1 failed with exit code 1" in err
    monkeypatch.setitem(sweep.SCALES, "laptop", sweep.Scale(TINY + " --learning_rate=0.002", (1,), ""))
    code, out, err = call(sweep.main, *flags)
    assert code == 2 and "--learning_rate=0.002 differs from the 0.003 this run began with" in err
    assert not (tmp_path / "runs.jsonl").read_text()
    monkeypatch.setitem(sweep.SCALES, "laptop", sweep.Scale(TINY, (1,), ""))
    (tmp_path / "runs.jsonl").write_text(old := json.dumps(line("C1", 1, 1.0)) + "\n")
    code, out, err = call(sweep.main, *flags)
    assert code == 2 and "has runs of other data than E0's; choose another --out_dir" in err
    assert (tmp_path / "runs.jsonl").read_text() == old
