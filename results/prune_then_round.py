"""Prune first, round after: python results/prune_then_round.py PRUNED [JOINT].

PRUNED: compressed.pt of `extensions.prune --bits=16,16`, or any checkpoint; JOINT: the out_dir of a run that learned
its bits. Rounds the weights of PRUNED's blocks to b bits, one scale a matrix (q_m = max|w|, t = 1), without training.
Prints a JSON object a line: bits, or "joint" for those of JOINT layer by layer; val_loss; bytes of packed.pt.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import evaluate, val_windows  # noqa: E402
from extensions.grid import LearnedGrid, pack_weights, unpack_weights  # noqa: E402
from model import quant_linears  # noqa: E402
from prepare_data import DataConfig, open_dataset  # noqa: E402
from quant import QuantConfig  # noqa: E402
from support.checkpoint import load_checkpoint, model_from, save_checkpoint  # noqa: E402
from support.log import read_log  # noqa: E402

torch.set_num_threads(1)
source = load_checkpoint(Path(sys.argv[1]))
flat = source["config"]
names = [name for name in source["model"] if name.startswith("h.") and source["model"][name].dim() == 2]
windows = val_windows(open_dataset(DataConfig(flat["dataset"], flat["data_dir"]))[1], flat["block_size"],
                      flat["eval_tokens"])
kept = {key: source[key] for key in ("vocab_size", "step", "extensions")} | {"config": flat}
choices = {str(b): dict.fromkeys(names, b) for b in range(3, 9)}
if len(sys.argv) > 2:
    log = read_log(Path(sys.argv[2], "log.jsonl"))
    choices["joint"] = next(line["bits"] for line in log if "packed_bytes" in line)
for name, bits in choices.items():
    weights, grids = dict(source["model"]), {}
    for n, b in bits.items():
        grid = LearnedGrid(weights[n], 1.0)
        grid.project(b, b)
        grids[n], weights[n] = (grid.d.detach(), b), grid(weights[n]).detach()
    packed = pack_weights({**kept, "model": weights}, grids)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "packed.pt"), packed)
        size = Path(folder, "packed.pt").stat().st_size
    model = model_from(unpack_weights(packed), quant_linears(QuantConfig(), flat["n_layer"]))
    print(json.dumps({"bits": name, "val_loss": evaluate(model, windows, 16), "packed_bytes": size}), flush=True)
