"""Our log-likelihoods beside lm_eval's own: python results/hflm.py CKPT TASK_DIR LIMIT TASK [TASK ...]

CKPT: a checkpoint with GPT-2's tokens, its quantizers off. It is exported in Hugging Face's layout and evaluated by
lm_eval's HFLM (logits_cache off: with it, windows of equal input are mixed up) and by extensions/tasks.py, the first
LIMIT documents of each task. Prints, by task: requests, the largest difference of a log-likelihood in units of
1e-4 + 1e-6 |ll|, greedy answers that differ, metrics of both. Needs lm_eval, transformers and accelerate.
"""

import sys
import tempfile
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from extensions.tasks import EvalConfig, harness_model, load_tasks, run  # noqa: E402
from model import quant_linears  # noqa: E402
from quant import QuantConfig  # noqa: E402
from support.checkpoint import load_checkpoint, model_from  # noqa: E402
from support.huggingface import export_hf  # noqa: E402

if __name__ == "__main__":
    ckpt, task_dir, limit, *names = sys.argv[1:]
    checkpoint = load_checkpoint(Path(ckpt))
    flat, config = checkpoint["config"], EvalConfig(tasks=",".join(names), task_dir=task_dir, limit=int(limit))
    model = model_from(checkpoint, quant_linears(QuantConfig(), flat["n_layer"]), torch.float32, own_recipe=False)
    with tempfile.TemporaryDirectory() as folder:
        export_hf(model, Path(folder), flat)
        theirs = HFLM(folder, device="cpu", dtype="float32", batch_size=8, logits_cache=False)
        (a, mine), (b, others) = (run(lm, load_tasks(names, task_dir), config, 1234)
                                  for lm in (harness_model(model, 8, False), theirs))
    print("| task | requests | largest difference | greedy differs | ours | HFLM |\n" + "|---" * 6 + "|")
    for name in names:
        pairs = [(x, y) for s, t in zip(mine[name], others[name], strict=True)
                 for x, y in zip(s["ll"], t["ll"], strict=True)]
        worst = max(abs(x - y) / (1e-4 + 1e-6 * abs(y)) for x, y in pairs)
        greedy = sum(list(s["greedy"]) != list(t["greedy"]) for s, t in zip(mine[name], others[name], strict=True))
        said = [", ".join(f"{k} {v:,.6g}" for k, v in found[name].items()) for found in (a, b)]
        print(f"| {name} | {len(pairs):,} | {worst:.2f} | {greedy} | {said[0]} | {said[1]} |", flush=True)
