"""How much faster is the forward pass of a pruned model? python results/forward_speed.py DENSE PRUNED [PRUNED ...]

Checkpoint files. Loss of one batch of 16 random windows without gradients, one thread; 40 rounds in which every model
runs once, in turns; a table of parameters, GEMM FLOPs, median milliseconds, and the median over rounds of the time
over that of the first model, which also goes to smaller/speed.jsonl, for smaller.py's picture.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import quant_linears  # noqa: E402
from quant import QuantConfig  # noqa: E402
from support.checkpoint import load_checkpoint, model_from  # noqa: E402
from support.device import flops_per_token  # noqa: E402

torch.set_num_threads(1)
models, times = {}, {}
for path in sys.argv[1:]:
    source = load_checkpoint(Path(path))
    models[path] = model_from(source, quant_linears(QuantConfig(), source["config"]["n_layer"])).eval()
    times[path] = []
block = next(iter(models.values())).config.block_size
x = torch.randint(next(iter(models.values())).vocab_size, (16, block + 1), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    for i in range(45):
        for path, model in models.items():
            started = time.perf_counter()
            model(x[:, :-1], x[:, 1:])
            if i >= 5:
                times[path].append(1000 * (time.perf_counter() - started))
print("| | parameters | forward GFLOPs | ms | ratio |\n|---|---|---|---|---|")
for path, model in models.items():
    ratio = statistics.median(a / b for a, b in zip(times[path], times[sys.argv[1]], strict=True))
    count, flops = sum(p.numel() for p in model.parameters()), flops_per_token(model) / 3 * 16 * block / 1e9
    cells = Path(path).parent.name, f"{count:,}", f"{flops:.2f}", f"{statistics.median(times[path]):.1f}"
    print("| " + " | ".join(cells) + f" | {ratio:.2f} |")
    with open(Path(__file__).parent / "smaller/speed.jsonl", "a") as file:
        file.write(json.dumps({"name": Path(path).parent.name, "ratio": ratio}) + "\n")
