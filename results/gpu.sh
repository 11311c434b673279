#!/usr/bin/env bash
# What is measured on a GPU, in some 15 minutes of one with 16 cores: tests, learning rates, a step, GEMMs, sizes (results/gpu.md).
#     bash results/gpu.sh OUT PART [...]     writes OUT/*.txt and OUT/**/runs.jsonl; PYTHON names another interpreter
# Parts: tests tune warm (side by side; they fill the compiler's cache), step adamw profile gemm (alone), sizes; LIMIT: its seconds.
# tune and sizes read data/english, text of your own, 67M bytes or more (results/gpu.md says which text it was):
#     python prepare_data.py --dataset=english --tokenizer=bytes --input=FILES
set -u
cd "$(dirname "$0")/.."
usage="usage: bash results/gpu.sh OUT PART [...], parts: tests tune warm step adamw profile gemm sizes"
out=${1:?$usage}
shift
parts=" ${*:?$usage} "
for name in $*; do [[ " tests tune warm step adamw profile gemm sizes " == *" $name "* ]] || { echo "no part $name; $usage" >&2; exit 2; }; done
export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
mkdir -p "$out"
wanted() { [[ $parts == *" $1 "* ]]; }
part() {  # NAME LIMIT COMMAND...
  local name=$1 limit=$2 start=$SECONDS; shift 2
  timeout "$limit" "$@" > "$out/$name.txt" 2>&1
  echo "== $name: rc $?, $((SECONDS - start)) s"; tail -n 5 "$out/$name.txt" | cut -c1-300
}
"$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' > "$out/device.txt" || exit  # no GPU, an old driver
git describe --always --dirty > "$out/commit.txt"

wanted tests && part tests 200 "$PYTHON" -m pytest -v -n 8 tests/test_gpu.py tests/test_quant.py -k "test_gpu or accumulator" &
STEP="bench.py --batch_size=16 --vocab_size=50257"
wanted warm && for variants in E0,plain E0,w8a8 E0,int8-all E0,int8-all+keep8+adam8; do  # the second E0 finds the first's kernels
  TORCHINDUCTOR_COMPILE_THREADS=2 part "warm-$variants" 200 "$PYTHON" $STEP --rounds=1 --variants=$variants &
done
wanted tune && for run in 64:1e-2 64:1.6e-2 64:2.4e-2 128:6e-3 128:1e-2 128:1.6e-2 256:3e-3 256:6e-3 256:1e-2; do
  part "tune-$run" 200 "$PYTHON" train.py --preset="width-${run%:*},E0" --dataset=english --dtype=float32 --sample_tokens=0 \
    --learning_rate="${run#*:}" --seed=1 --out_dir="$out/tune/$run" &
done
wait
wanted step && part step 170 "$PYTHON" $STEP --rounds=20 --variants=E0,plain,w8a8,int8-all,int8-all+keep8+adam8
wanted adamw && TORCHINDUCTOR_COMPILE_THREADS=16 part adamw 120 "$PYTHON" $STEP --rounds=20 --variants=E0,adam8,adam4
wanted profile && part profile 90 "$PYTHON" - <<'EOF'
import torch
from torch.profiler import profile
from bench import BenchConfig, Variant
device = "cuda" if torch.cuda.is_available() else "cpu"
v = Variant("adam8", BenchConfig(vocab_size=50257, batch_size=1, dtype="bfloat16"), device)
[v.step() for _ in range(5)]
v.forward().backward()
with profile() as p:  # where do the milliseconds of AdamW go: the device's kernels, or the host?
    v.optimizer.step()
print(p.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15))
EOF
wanted gemm && part gemm 50 "$PYTHON" bench.py --what=gemm --batch_size=32 --rounds=10

# The first seed of each row everywhere, then the next: the later ones find their kernels in the cache.
sizes() {  # WIDTH
  for seeds in 1 2 3; do
    ((SECONDS < deadline)) || break
    timeout "$((deadline - SECONDS))" "$PYTHON" sweep.py --scale="width-$1" --rows=E0,C1,W4,A4,bits28-6 --seeds=$seeds --jobs=5 \
      --out_dir="$out/width-$1" > "$out/sizes-$1-$seeds.txt" 2>&1
    echo "== sizes-$1-$seeds: rc $?, $SECONDS s"; tail -n 2 "$out/sizes-$1-$seeds.txt"
  done
}
deadline=$((SECONDS + ${LIMIT:-400}))
wanted sizes && for width in 256 128 64; do sizes $width & done
wait
find "$out" -name '*.pt' -delete
