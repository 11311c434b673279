"""Does a recipe's loss grow with the model? python results/sizes.py SCALE SCALE [...] of sweep.py, from results/.

Takes every row that ran at two of the scales or more; writes results/sizes-SCALE.csv and .png, of the largest SCALE,
and prints the table: difference to E0 within seeds, and half of its 95 % interval, by the number of parameters. Of a
row with three sizes, the last columns are the exponent k of |difference| ~ parameters**k and its range over 2,000 draws
from the intervals; the prediction at 124M parameters follows from the fit and is a prediction, not a measurement.
"""

import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from analyze import new_figure, write_csv  # noqa: E402
from sweep import read_runs  # noqa: E402
from verdicts import compare  # noqa: E402

TARGET = 124e6  # parameters of GPT-2


def fit(sizes: np.ndarray, means: np.ndarray, halves: np.ndarray) -> dict[str, float]:
    """Return exponent and prediction of a power law through the means, with 95 % of 2,000 draws around them."""
    draws = np.random.default_rng(0).normal(means, halves / 2, (2000, len(means)))  # half: 2 deviations, or more
    draws = np.vstack((means, draws))
    draws = draws[(draws > 0).all(1)]  # a law of growth needs a loss that is above zero at every size
    if len(draws) < 1800 or (means <= 0).any() or len(means) < 3:
        return dict.fromkeys(("k", "k_low", "k_high", "at_124M", "low", "high"), math.nan)
    k, c = np.polyfit(np.log(sizes), np.log(draws.T), 1)  # one column a draw
    at = np.exp(c + k * np.log(TARGET))
    (k_low, k_high), (low, high) = (np.percentile(v[1:], (2.5, 97.5)) for v in (k, at))
    return {"k": k[0], "k_low": k_low, "k_high": k_high, "at_124M": at[0], "low": low, "high": high}


if __name__ == "__main__":
    found = [read_runs(ROOT / "results" / scale / "runs.jsonl", scale) for scale in sys.argv[1:]]
    found = sorted(((done["E0", 1]["parameters"], done) for done in found), key=lambda pair: pair[0])
    out = str(ROOT / "results" / f"sizes-{found[-1][1]['E0', 1]['scale']}")
    sizes = np.array([n for n, _ in found], float)
    names = [name for name in dict.fromkeys(row for _, done in found for row, _ in done) if name != "E0"
             and sum(compare(done, name, "E0").pairs > 0 for _, done in found) > 1]
    rows, (figure, panels) = [], new_figure(1, 1, size=(8, 5))
    print("| row | " + " | ".join(f"{n:,.0f}" for n in sizes) + " | k | at 124M |\n" + "|---" * (len(sizes) + 3) + "|")
    for name in names:
        ds = [compare(done, name, "E0") for _, done in found]
        means, halves = (np.array([getattr(d, key) for d in ds]) for key in ("mean", "half"))
        ran = np.isfinite(means)
        law = fit(sizes[ran], means[ran], halves[ran])
        rows.append({"row": name, **{f"{key} {n:.0f}": v for n, m, h in zip(sizes, means, halves, strict=True)
                                     for key, v in (("mean", m), ("half", h))}, **law})
        aside = 1 + 0.02 * names.index(name)  # or the bars would hide one another
        bars = np.where(np.isfinite(halves), halves, 0.0)  # one seed has none
        panels[0][0].errorbar(sizes[ran] * aside, means[ran], bars[ran], fmt="o-", capsize=3, label=name)
        cells = ["" if math.isnan(m) else f"{m:+.4f} +- {h:.4f}" if math.isfinite(h) else f"{m:+.4f}, one seed"
                 for m, h in zip(means, halves, strict=True)]
        said = ["", ""] if math.isnan(law["k"]) else [
            f"{law['k']:+.2f} ({law['k_low']:+.2f} to {law['k_high']:+.2f})",
            f"{law['at_124M']:.3f} ({law['low']:.3f} to {law['high']:.3f})"]
        print(f"| {name} | " + " | ".join(cells + said) + " |")
    # one late run has a bar that would press all else flat: cut off
    panels[0][0].set(xscale="log", ylim=(-0.1, 0.2), xlabel="parameters (20 tokens for each)",
                     ylabel="validation loss - E0's, nats per token")
    panels[0][0].legend(loc="lower center", ncols=3)
    figure.savefig(f"{out}.png", dpi=100)
    write_csv(rows, Path(f"{out}.csv"))
