"""How wrong are few-bit gradients of a whole batch? python results/gradients.py DATA RUN [...]: folders of E0's runs.

Per number of batches n whose gradients are averaged (16 windows each), of the block linears' weights: the size of the
mean gradient, and by how much of it the same mean differs with g rounded per token, as the paper's G2 and G3 are, or in
blocks of tokens. What is noise of the batch or of stochastic rounding falls as n**-0.5, what is left is bias. Slope:
how much of the exact mean's length is found along it. Official floor: the one that the official code puts
under scales, 1e-9, is 6.4e-8 here: its micro-batch's loss is divided by 64 times as many tokens.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import quant  # noqa: E402
from probe import Probe, compare_gradients, flat_norm  # noqa: E402

BATCHES = (1, 16, 64)


def means(probe: Probe, flags: dict) -> list[dict[str, torch.Tensor]]:
    """Return the mean gradient of the first n batches for each n of BATCHES."""
    total, found = {}, []
    for n, (_, grads) in enumerate(probe.passes(probe.model(flags)), 1):
        total = {k: g + total.get(k, 0) for k, g in grads.items() if k.startswith("h.") and g.dim() == 2}
        found += [{k: t / n for k, t in total.items()}] * (n in BATCHES)
    return found


if __name__ == "__main__":
    probes = [Probe(run, BATCHES[-1], data_dir=sys.argv[1]) for run in sys.argv[2:]]
    for probe in probes:  # its batches are pieces of the text, one after the other: mix the windows
        order = torch.randperm(probe.batches[..., 0].numel(), generator=torch.Generator().manual_seed(0))
        probe.batches = probe.batches.flatten(0, 1)[order].view_as(probe.batches)
    exact = [means(probe, {}) for probe in probes]
    print("| g | " + " | ".join(f"{n} x 2,048 tokens" for n in BATCHES) + " | slope of the last |\n" + "|---" * 5 + "|")
    sizes = [statistics.mean(map(flat_norm, of_n)) for of_n in zip(*exact, strict=True)]
    print("| size of the mean gradient | " + " | ".join(f"{size:.3f}" for size in sizes) + " | |")
    floor, token, block = quant.SCALE_FLOOR, dict(split_qkv=True), dict(ggran="per_block", wblock=32)
    rows = [(b, where, how, "", token, floor) for where in ("grad_weight", "both") for how in ("nearest", "stochastic")
            for b in (8, 4, 3, 2)] + [(b, "grad_weight", "nearest", ", official floor", token, 6.4e-8) for b in (8, 4)]
    rows += [(4, "grad_input", "nearest", "", token, floor)]
    rows += [(4, "grad_weight", how, ", blocks of 32 tokens", block, floor) for how in ("nearest", "stochastic")]
    for bits, where, how, special, more, quant.SCALE_FLOOR in rows:
        flags = dict(gbits=bits, ggemm=where, rounding=how, **more)
        found = [[compare_gradients([e], [f], list(e)) for e, f in zip(ex, means(p, flags), strict=True)]
                 for p, ex in zip(probes, exact, strict=True)]
        errors = [statistics.mean(of_run[i]["error"] for of_run in found) for i in range(len(BATCHES))]
        slope = statistics.mean(of_run[-1]["slope"] for of_run in found)
        numbers = " | ".join(f"{x:.3f}" for x in (*errors, slope))
        print(f"| {bits} bits in {where}, {how}{special} | {numbers} |", flush=True)
