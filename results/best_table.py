"""The candidates for the preset `best`, from sweep.py's runs: python results/best_table.py [SCALE, else laptop].

Prints a row of a table per candidate, and what changing one thing does, taken from all pairs of rows that differ in it
('at random' and 'W8 A8, and G' are two): the mean of the differences within seeds, and Student's 95 % interval from the
spread of all runs (verdicts.py).
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from sweep import read_runs  # noqa: E402
from verdicts import chaos, compare, differences, student  # noqa: E402

CANDIDATES = {  # W, A, G, m1, m2
    "C1": (8, 8, 32, 32, 32), "G3": (32, 32, 4, 32, 32), "S4": (32, 32, 32, 4, 32), "adam8": (32, 32, 32, 8, 8),
    "adam4": (32, 32, 32, 4, 4),
    "bits84": (8, 8, 32, 4, 32), "bits36": (8, 8, 4, 8, 8), "bits32-6": (6, 6, 4, 8, 8), "bits32": (8, 8, 4, 4, 8),
    "bits31": (6, 6, 3, 8, 8), "bits28-6": (6, 6, 4, 4, 8), "bits27": (6, 6, 3, 4, 8), "bits26": (5, 6, 3, 4, 8),
    "bits28": (8, 8, 4, 4, 4), "bits24": (6, 6, 4, 4, 4), "bits24-both": (6, 6, 4, 4, 4)}
CONTRASTS = {
    "both moments in 4 bits instead of 8": (("adam4", "adam8"), ("bits28", "bits36"), ("bits24", "bits32-6")),
    "m1 in 4 bits instead of 8": (("bits32", "bits36"), ("bits28-6", "bits32-6"), ("bits27", "bits31")),
    "G in 3 bits at random instead of 4 to nearest": (("G3-3bits-stochastic", "G3"), ("bits31", "bits32-6"),
                                                      ("bits27", "bits28-6")),
    "m2 in 4 bits instead of 8": (("bits28", "bits32"), ("bits24", "bits28-6")),
    "W in 5 bits instead of 6": (("bits26", "bits27"),),
    "W8 A8, and G in 4 bits": (("bits36", "adam8"), ("bits28", "adam4")),
    "W and A in 6 bits, A asymmetric, instead of 8": (("bits32-6", "bits36"), ("bits28-6", "bits32"),
                                                      ("bits24", "bits28"))}

if __name__ == "__main__":
    scale = sys.argv[1] if sys.argv[1:] else "laptop"
    done = read_runs(ROOT / "results" / scale / "runs.jsonl", scale)
    spread, freedom = chaos(done)
    print("| row | W, A, G, m1, m2 | sum | loss - E0's | by seed | bytes of moments a parameter |\n" + "|---" * 6 + "|")
    for name, bits in ((name, bits) for name, bits in CANDIDATES.items() if (name, 1) in done):
        d, (each, *_) = compare(done, name, "E0"), differences(done, name, "E0")
        print(f"| `{name}` | {', '.join(map(str, bits))} | {sum(bits)} | {d.mean:+.4f} +- {d.half:.4f} | "
              f"{', '.join(f'{x:+.3f}' for x in each)} | {done[name, 1]['optimizer_bytes']:.2f} |")
    print("\n| change | pairs of rows, runs | difference |\n" + "|---" * 3 + "|")
    for change, pairs in CONTRASTS.items():
        if all((row, 1) in done for pair in pairs for row in pair):
            found = np.concatenate([differences(done, *pair)[0] for pair in pairs])
            print(f"| {change} | {', '.join(f'{a} - {b}' for a, b in pairs)}, {len(found)} | "
                  f"{found.mean():+.4f} +- {student(freedom) * spread / len(found) ** 0.5:.4f} |")
