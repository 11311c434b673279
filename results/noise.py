"""Where the scatter between seeds comes from: python results/noise.py DATA, from the runs and checkpoints of sweep.py.

Prints the late runs of scale laptop: at the first evaluation LATE nats or more above E0 with the same seed. Then rows
that end within 0.02 nats of E0 count as one and the same recipe, without late runs: for each evaluation of a run, the
standard deviation over all their runs and the correlation with the last one; from the checkpoints on all windows of
the validation split, what the choice of windows alone would make of it, and each tenth's share.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import extensions  # noqa: E402
from eval import val_windows  # noqa: E402
from prepare_data import DataConfig, open_dataset  # noqa: E402
from support.checkpoint import load_checkpoint, model_from  # noqa: E402
from sweep import read_runs  # noqa: E402
from verdicts import compare  # noqa: E402

LAPTOP = ROOT / "results/laptop"
LATE = 0.1


@torch.no_grad()
def by_window(folder: Path, windows: torch.Tensor) -> np.ndarray:
    """Return the loss of each window, nats per token."""
    checkpoint = load_checkpoint(folder)
    model = model_from(checkpoint, extensions.linears(checkpoint["config"])).eval()
    losses = [F.cross_entropy(model(w[:, :-1])[..., :model.vocab_size].flatten(0, 1), w[:, 1:].flatten(),
                              reduction="none").view(len(w), -1).mean(1) for w in windows.split(64)]
    return torch.cat(losses).numpy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    done = read_runs(LAPTOP / "runs.jsonl", "laptop")
    late = set()
    for (row, seed), line in done.items():
        (step, _, loss), (*_, other) = (x["val_loss"][1] for x in (line, done["E0", seed]))
        if loss - other >= LATE:
            late.add((row, seed))
            print(f"{row}, seed {seed}: {loss:.3f} at step {step} ({loss - other:+.3f} to E0)")
    runs = sorted(run for run in done.keys() - late
                  if run[0] == "E0" or abs(compare(done, run[0], "E0").mean) < 0.02)
    losses = np.array([[loss for *_, loss in done[run]["val_loss"][1:]] for run in runs])  # (runs, evaluations)
    print(f"{len(runs)} runs of {', '.join(sorted({row for row, _ in runs}))}")
    for i, (step, *_) in enumerate(done[runs[0]]["val_loss"][1:]):
        print(f"| {step} | {losses[:, i].std(ddof=1):.4f} | {np.corrcoef(losses[:, i], losses[:, -1])[0, 1]:.2f} |")
    windows = val_windows(open_dataset(DataConfig(dataset="stdlib", data_dir=sys.argv[1]))[1], 128, 0)
    windows = torch.from_numpy(np.asarray(windows).astype(np.int64))
    found = np.array([by_window(LAPTOP / f"runs/{row}-{seed}", windows) for row, seed in runs])  # (runs, windows)
    apart = found - found.mean(0)  # of a run from the mean of all, window by window
    print(f"all {len(windows)} windows: standard deviation {apart.mean(1).std(ddof=1):.4f}, from the windows alone "
          f"{(apart.std(1) / len(windows) ** 0.5).mean():.4f}; correlation of a tenth's mean with the mean of all: "
          f"{', '.join(f'{np.corrcoef(t.mean(1), apart.mean(1))[0, 1]:.2f}' for t in np.array_split(apart, 10, 1))}")
