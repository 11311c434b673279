"""What the runs of a sweep say: differences to a row of the same seeds, their intervals, a verdict, two figures.

Training is chaotic: a recipe that changes no more than a rounding ends some hundredths of a nat away, seed by seed.
How much is taken from all rows that end within NEAR of E0 together, without runs that end NEAR or more from the
median of their row: what is left of their losses once a mean for each row and one for each seed are fitted. The
interval beside a mean difference is Student's at 95 %, from that deviation; from the row's own where that is WIDE
times as large (less goes unnoticed, and then the interval is too narrow); none for a single pair that is NEAR or more
apart. tie: the whole interval lies within TIE; worse, better: it excludes zero, or each of several pairs by itself
would; else the runs do not decide. All rows share E0's runs, and so their luck, an accident of E0 included; and of
twenty rows that change nothing, one is expected to exclude zero.
"""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analyze import new_figure

NEAR = 0.1  # nats from E0: rows whose scatter tells how chaotic training is at this scale
WIDE = 2.0  # a row whose differences scatter that many times as much has an interval of its own
TIE = 0.02  # nats: less than this between two recipes is called no difference
# Student's t, two-sided 95 %, by degrees of freedom
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131,
       20: 2.086, 40: 2.021}
# what the panels of curves.png show beside E0
PANELS = {"weights": "W1 W2 W3 W4", "activations": "A1 A2 A3 A4 A5 A6", "gradients": "G1 G2 G3 G5",
          "moments": "S1 S2 S3 S4 S6", "combined": "C1 C2 W4A8 W4A4"}

Runs = dict[tuple[str, int], dict]  # {(row, seed): a line of runs.jsonl}


def final(line: dict) -> float:
    """Return the last validation loss of a run, nats per token; nan if it diverged."""
    return line["val_loss"][-1][2] if line["status"] == "finished" else float("nan")


class Difference(NamedTuple):
    """A row beside another one, over the seeds that both have.

    mean: nats per token, nan if no pair finished.  half: of the 95 % interval.  pairs: of which both finished.
    diverged: seeds of which only the row's run diverged.  outlived: only the other's did.  both: of which both.
    each: 1 if every pair for itself is worse than chance could make it, -1 if better, else 0.
    """
    mean: float
    half: float
    pairs: int
    diverged: int
    outlived: int
    both: int
    each: int = 0

    def verdict(self) -> str:
        """Return tie, better, worse, diverged, both diverged, not decided or not run."""
        seeds = self.pairs + self.diverged + self.outlived + self.both
        if 2 * self.both > seeds:
            return "both diverged"
        if self.diverged > self.pairs + self.outlived:
            return f"diverged {self.diverged}/{seeds - self.both}"
        if self.outlived > self.pairs + self.diverged:
            return "better"
        if not self.pairs:
            return "not decided" if seeds else "not run"
        if abs(self.mean) + self.half <= TIE:
            return "tie"
        if abs(self.mean) <= self.half and not self.each:
            return "not decided"
        return "worse" if self.mean > 0 else "better"


def differences(done: Runs, name: str, base: str) -> tuple[list[float], int, int, int]:
    """Return the differences of two rows within seeds, and how many seeds only other or one or neither finished."""
    pairs = [(done[name, s], done[base, s]) for row, s in sorted(done) if row == name and (base, s) in done]
    ended = [(a["status"] == "finished", b["status"] == "finished") for a, b in pairs]
    found = [final(a) - final(b) for (a, b), both in zip(pairs, ended, strict=True) if all(both)]
    return found, *map(ended.count, ((False, True), (True, False), (False, False)))


def chaos(done: Runs) -> tuple[float, int]:
    """Return the standard deviation between seeds of a difference of two rows within seeds, and its freedom.

    A loss is a mean of its row + one of its seed + noise; a difference within seeds has the noise twice. (From the
    differences to E0 alone it would be known no better than E0's few runs tell: all of them share these.) Left out are
    rows whose median difference to E0 is NEAR or more, and runs that end that far from their row's.
    """
    runs = []
    for name in dict.fromkeys(row for row, _ in done):
        ends = {s: final(line) - final(done["E0", s]) for (row, s), line in done.items()
                if row == name and ("E0", s) in done and math.isfinite(final(line) - final(done["E0", s]))}
        middle = statistics.median(ends.values() or [math.inf])
        runs += [(name, s) for s, end in ends.items() if abs(middle) < NEAR and abs(end - middle) < NEAR]
    marks = sorted({mark for run in runs for mark in run}, key=str)
    A = np.array([[float(mark in run) for mark in marks] for run in runs])  # (runs, rows + seeds)
    losses = np.array([final(done[run]) for run in runs])
    if not runs:
        return math.inf, 0
    fit, _, rank, _ = np.linalg.lstsq(A, losses)
    freedom = len(runs) - int(rank)
    rest = float(np.square(losses - A @ fit).sum())
    return math.sqrt(2 * rest / freedom) if freedom else math.inf, freedom


def student(freedom: int) -> float:
    """Return Student's t, two-sided 95 %; of the next lower entry of T95."""
    return T95[max(n for n in T95 if n <= freedom)] if freedom else math.inf


def compare(done: Runs, name: str, base: str) -> Difference:
    """Return the difference of two rows within seeds."""
    found, *others = differences(done, name, base)
    if not found:
        return Difference(math.nan, math.inf, 0, *others)
    spread, freedom = chaos(done)
    chance = student(freedom) * spread  # of one pair
    each = int(min(found) > chance) - int(max(found) < -chance) if len(found) > 1 else 0
    if len(found) == 1 and abs(found[0]) >= NEAR:
        spread, freedom = math.inf, 0
    elif len(found) > 1 and (not freedom or statistics.stdev(found) > WIDE * spread):
        spread, freedom = statistics.stdev(found), len(found) - 1
    half = student(freedom) * spread / len(found) ** 0.5
    return Difference(statistics.mean(found), half, len(found), *others, each)


def judge(d: Difference, expected: str) -> str:
    """Return what the runs say of a claim that expects tie, better, worse or diverged."""
    found = d.verdict()
    if found in ("not run", "both diverged") or found == expected:
        return "confirmed" if found == expected else found
    if found.startswith("diverged"):
        return f"confirmed: {found}" if expected in ("diverged", "worse") else f"contradicted: {found}"
    if expected == "diverged":
        return f"not diverged in these runs: {found}"
    if found == "not decided" and not d.pairs:
        return "not decidable here: no seed finished in both rows"
    if found == "not decided" and d.half == math.inf:
        return "one seed decides nothing but divergence"
    near = expected == "tie" and abs(d.mean) - d.half <= TIE and not d.each
    if near or found in ("tie", "not decided"):
        return f"not decidable here: {abs(d.mean) + d.half:.3f} at most"
    return "contradicted"


def draw(done: Runs, path: Path) -> None:
    """Draw validation loss by tokens, the mean over seeds, a column of panels per kind of operand; below, the end."""
    figure, panels = new_figure(2, len(PANELS), size=(22, 9))
    for (title, names), (whole, end) in zip(PANELS.items(), panels.T, strict=True):
        late = []
        for name in ["E0", *names.split()]:
            runs = [line["val_loss"] for (row, _), line in done.items() if row == name]
            points = list(zip(*runs, strict=False))  # as far as all seeds came
            if points:
                x = [p[0][1] / 1e6 for p in points]
                y = [statistics.mean(v for *_, v in p) for p in points]
                style = dict(color="black", lw=2, zorder=3) if name == "E0" else {}
                for panel in (whole, end):
                    panel.plot(x, y, label=name, **style)
                late += [v for v in y[len(y) // 2:]]
        high = min(sorted(late)[len(late) * 9 // 10] + 0.02, min(late) + 0.5)
        end.set(ylim=(min(late) - 0.02, high),
                xlabel="million tokens")
        whole.set(title=title)
        whole.legend()
    for panel in panels[:, 0]:
        panel.set_ylabel("validation loss, nats per token")
    figure.savefig(path, dpi=80)


def draw_probe(rows: list[dict], path: Path) -> None:
    """Draw what one checkpoint said against what training said, by the measure that suits the kind of a row."""
    figure, panels = new_figure(1, 3, size=(16, 5))
    measures = {"loss": "change of the loss, nats", "bias": "bias of the gradient", "update": "error of Adam's update"}
    for panel, (key, unit) in zip(panels[0], measures.items(), strict=True):
        for row in rows:
            x, y = float(row[f"probe_{key}"] or 0), row["diff_to_E0_mean"]
            if x > 1e-9 and y is not None:
                half = row["diff_to_E0_ci"]
                half = 0.0 if half in (None, math.inf) else half
                panel.errorbar(x, y, half, fmt="o", ms=3, color="tab:blue", alpha=0.6)
                panel.annotate(row["id"], (x, y), fontsize=7)
        panel.set(xscale="log", yscale="symlog", xlabel=f"one checkpoint: {unit}")
    panels[0][0].set_ylabel("training: validation loss - E0's, nats per token")
    figure.savefig(path, dpi=100)
