#!/usr/bin/env bash
# What has to be measured on a GPU, in under 30 minutes on an H100: tests, benches, curves, the matrix of moments.
#     bash results/gpu.sh OUT [PART ...]     writes OUT/*.txt and OUT/runs/**/log.jsonl; PYTHON names another interpreter
# Parts: tests optimizer gemm step curves moments; all without one. The time limits add up to 27 minutes; a part fails alone.
# Written before a GPU was at hand: it has not run on one yet.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: bash results/gpu.sh OUT [PART ...]}
shift
parts=" ${*:-tests optimizer gemm step curves moments} "
export PYTHON=${PYTHON:-python}
mkdir -p "$out/runs"
wanted() { [[ $parts == *" $1 "* ]]; }
part() { name=$1; limit=$2; shift 2; echo "== $name"; timeout "$limit" "$@" > "$out/$name.txt" 2>&1; echo "rc $?"; tail -n 12 "$out/$name.txt"; }

git describe --always --dirty > "$out/commit.txt"
"$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' > "$out/device.txt" || exit  # no GPU, an old driver
test -d data/stdlib || "$PYTHON" prepare_data.py --dataset=stdlib  # once, not by eight runs at a time
wanted tests && part tests 240 "$PYTHON" -m pytest -q tests/test_gpu.py tests/test_quant.py -k "test_gpu or accumulator"
wanted optimizer && part optimizer 120 "$PYTHON" bench.py --what=optimizer --rounds=30
wanted gemm && for width in 768 1024 1280; do
  part "gemm-$width" 40 "$PYTHON" bench.py --what=gemm --n_embd=$width --n_head=16 --batch_size=32
done
wanted step && part step 300 "$PYTHON" bench.py --batch_size=16 --vocab_size=50257 --rounds=20 \
  --variants=E0,plain,w8a8,int8,int8-all,keep8,w8a8+keep8,int8-all+keep8+adam8

# Simulated beside integer, the same seed: the losses of two log files.
wanted curves && for preset in E0 w8a8 int8 int8-all; do
  part "curve-$preset" 75 "$PYTHON" train.py --preset=gpt2,$preset --out_dir="$out/runs/curve-$preset" --max_iters=100 \
    --gradient_accumulation_steps=4 --warmup_iters=50 --eval_interval=100 --sample_tokens=0
done

# Moments: 1.3M parameters, 27M tokens (20 per parameter), 3 seeds, two beta2; eight runs at a time.
export JOBS=8 FORMATS="E0 S1 S2 S3 S4 S6 S6-per_tensor dynamic adam8 adam4"
wanted moments && part moments 560 bash results/moments.sh "$out/runs/moments" --n_embd=160 --batch_size=64 --max_iters=3300 \
  --warmup_iters=200 --eval_interval=1100 --dtype=float32
find "$out" -name '*.pt' -delete
grep -h val_loss "$out"/runs/curve-*/log.jsonl | tail -n 3
