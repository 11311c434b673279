"""A sweep killed at ten random moments, beside an undisturbed one: python results/sweep_kills.py WHOLE KILLED DATA.

WHOLE is the folder of a finished `sweep.py --scale=laptop-small` with at least the rows below; KILLED is made. Every
second SIGKILL takes the runs along, as a machine that goes down does; the others leave them behind as orphans, which
the next sweep has to wait for. Prints the moments, and whether each number of the losses is the same.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from sweep import read_runs  # noqa: E402

ROWS, KILLS = "C1,W4,A4", 10

if __name__ == "__main__":
    whole, killed, data = sys.argv[1:]
    words = [sys.executable, str(ROOT / "sweep.py"), "--scale=laptop-small", f"--rows={ROWS}", "--seeds=1", "--jobs=2",
             f"--data_dir={data}", f"--out_dir={killed}"]
    rng, began = random.Random(0), time.monotonic()
    for kill in range(KILLS):
        process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            sys.exit(f"ended with {process.wait(rng.uniform(3, 45))} before kill {kill + 1}")
        except subprocess.TimeoutExpired:
            (os.killpg if kill % 2 else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
        done = read_runs(Path(killed, "runs.jsonl"), "laptop-small")
        print(f"kill {kill + 1} after {time.monotonic() - began:.0f} s, {len(done)} runs are done", flush=True)
    subprocess.run(words, check=True)
    a, b = (read_runs(Path(folder, "runs.jsonl"), "laptop-small") for folder in (whole, killed))
    for run in b:
        same = all(a[run][key] == b[run][key] for key in ("status", "step", "val_loss", "loss", "grad_norm_max"))
        print(f"{run[0]}, seed {run[1]}: {'the same, bit for bit' if same else 'DIFFERS'}")
