"""Which bits does one checkpoint forgive? python results/best_probe.py DATA RUN [RUN ...]; RUN: unquantized

For weights alone and activations alone, at 8 to 3 bits and several granularities: change of the validation loss in
nats, mean over the runs (96 windows each); for gradients: bias and error of the gradient (probe.py defines them). The
first step of the search for the preset `best`; the second is training.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from probe import Probe, mean_loss, probe_rows  # noqa: E402

WEIGHTS = {"per_channel": {}, "per_block": dict(wgran="per_block", wblock=32)}
ACTIVATIONS = {"per_token": {}, "per_token, asym behind GELU": dict(asym_gelu=True), "asym": dict(asym=True),
               "per_block": dict(agran="per_block", wblock=32),
               "per_block, asym behind GELU": dict(agran="per_block", wblock=32, asym_gelu=True),
               "per_block, asym": dict(agran="per_block", wblock=32, asym=True)}
GRADIENTS = {"grad_weight, per_token": dict(split_qkv=True), "both, per_token": dict(ggemm="both"),
             "both, stochastic": dict(ggemm="both", rounding="stochastic"),
             "both, per_block": dict(ggemm="both", ggran="per_block", wblock=32),
             "both, per_block, stochastic": dict(ggemm="both", ggran="per_block", wblock=32, rounding="stochastic")}

if __name__ == "__main__":
    torch.set_num_threads(1)
    probes = [Probe(run, data_dir=sys.argv[1]) for run in sys.argv[2:]]
    exact = [mean_loss(probe.model({}), probe.batches) for probe in probes]
    for title, bits, flags in (("W", "wbits", WEIGHTS), ("A", "abits", ACTIVATIONS)):
        print(f"\n| {title} | " + " | ".join(map(str, range(8, 2, -1))) + " |\n" + "|---" * 7 + "|")
        for name, more in flags.items():
            rows = [[mean_loss(probe.model({bits: n, **more}), probe.batches) - base for n in range(8, 2, -1)]
                    for probe, base in zip(probes, exact, strict=True)]
            print(f"| {name} | " + " | ".join(f"{statistics.mean(x):+.4f}" for x in zip(*rows, strict=True)) + " |",
                  flush=True)
    print("\n| G in 4 bits | bias | error |\n|---|---|---|")
    for name, more in GRADIENTS.items():
        rows = [next(row for row in probe_rows(probe, {name: dict(gbits=4, **more)}) if row["layer"] == "all")
                for probe in probes]
        print(f"| {name} | " + " | ".join(f"{statistics.mean(row[key] for row in rows):.3f}"
                                           for key in ("bias", "error")) + " |", flush=True)
