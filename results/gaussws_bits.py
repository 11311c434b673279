"""Bits over time: python results/gaussws_bits.py DATA OUT [flags of train.py]: the preset gaussws, stage by stage.

A run of sweep.py's row gaussws that stops at each evaluation and is resumed, which changes no bit of it; after each
stage its checkpoint is read. Prints a row of a table per stage: step, validation loss, mean of the blocks' bits, and
the share of the blocks at each whole number of bits, rounded.
"""

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from support.checkpoint import load_checkpoint  # noqa: E402
from support.log import read_log  # noqa: E402
from support.presets import SIZES  # noqa: E402

if __name__ == "__main__":
    data, out, *flags = sys.argv[1:]
    size = SIZES["laptop"]
    print("| step | val_loss | mean b | " + " | ".join(f"b = {b}" for b in range(4, 10)) + " |\n" + "|---" * 9 + "|")
    for step in range(size["eval_interval"], size["max_iters"] + 1, size["eval_interval"]):
        begin = ["--preset=laptop,gaussws", "--compile=False", "--seed=1", f"--lr_decay_iters={size['max_iters']}"]
        how = ["--resume"] if Path(out, "ckpt.pt").exists() else [*begin, *flags]
        subprocess.run([sys.executable, str(ROOT / "train.py"), *how, "--sample_tokens=0", f"--data_dir={data}",
                        f"--out_dir={out}", f"--max_iters={step}"], check=True, stdout=subprocess.DEVNULL)
        checkpoint = load_checkpoint(Path(out))
        config = checkpoint["config"]
        t = torch.cat([v.flatten() for k, v in checkpoint["model"].items() if k.endswith("reparam.t")])
        b = config["b_target"] + t * (config["b_init"] - config["b_target"])
        loss = [line["val_loss"] for line in read_log(Path(out, "log.jsonl")) if "val_loss" in line][-1]
        shares = [(b.round() == n).float().mean().item() for n in range(4, 10)]
        print(f"| {step} | {loss:.4f} | {b.mean():.3f} | " + " | ".join(f"{s:.2f}" for s in shares) + " |", flush=True)
