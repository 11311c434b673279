#!/usr/bin/env bash
# Trains with every format of Adam's moments and prints the validation losses: formats x beta2 x seeds.
#     bash results/moments.sh OUT [FLAG ...]      the flags go to every run, for instance --n_embd=160 --max_iters=26000
# JOBS at a time (2), SEEDS, BETA2 and FORMATS choose rows. Call it again and it goes on: finished runs are left alone.
set -u
cd "$(dirname "$0")/.."
export OUT=${1:?usage: bash results/moments.sh OUT [FLAG ...]} PYTHON=${PYTHON:-python}
shift
mkdir -p "$OUT"

one() {  # FORMAT BETA2 SEED FLAG ...
  local dir=$OUT/$1-$2-$3 format preset=$1
  case $1 in
    dynamic) preset=E0 format="--m1bits=8 --m1fmt=dynamic --m2bits=8 --m2fmt=dynamic" ;;
    adam?-nearest) preset=${1%-*} format=--m2round=nearest ;;
    *) format= ;;
  esac
  grep -qsE '"status": "(finished|diverged)"' "$dir/log.jsonl" && return
  if [ -e "$dir/ckpt.pt" ]; then
    set -- --resume
  else
    set -- --preset="tiny,$preset" $format --beta2="$2" --seed="$3" --eval_tokens=0 "${@:4}"
  fi
  "$PYTHON" train.py --out_dir="$dir" --sample_tokens=0 "$@" >> "$dir.txt" 2>&1 || echo "$dir: exit code $?"
}
export -f one
for seed in ${SEEDS:-1 2 3}; do for beta2 in ${BETA2:-0.999 0.95}; do
  for format in ${FORMATS:-E0 S6 adam8 adam4 dynamic adam8-nearest adam4-nearest S4 S2 S1 S3 S6-per_tensor}; do
    echo "$format $beta2 $seed $*"
  done; done; done | xargs -r -P "${JOBS:-2}" -L 1 bash -c 'one "$@"' one

"$PYTHON" - <<'EOF'
import collections, json, os, pathlib, statistics
losses = collections.defaultdict(dict)
for path in sorted(pathlib.Path(os.environ["OUT"]).glob("*/log.jsonl")):
    *name, beta2, seed = path.parent.name.split("-")
    lines = [json.loads(line) for line in open(path)]
    end = [line["status"] for line in lines if "status" in line][-1:]
    loss = [line["val_loss"] for line in lines if "val_loss" in line][-1:]
    if end in (["finished"], ["diverged"]):
        losses["-".join(name), beta2][seed] = loss[0] if end == ["finished"] else "diverged"
print("| moments | beta2 | runs | mean | standard deviation | each |\n|---|---|---|---|---|---|")
for (name, beta2), runs in losses.items():
    done = [loss for loss in runs.values() if loss != "diverged"]
    mean = f"{statistics.mean(done):.4f}" if done else ""
    spread = f"{statistics.stdev(done):.4f}" if len(done) > 1 else ""
    each = ", ".join(loss if loss == "diverged" else f"{loss:.4f}" for loss in runs.values())
    print(f"| {name} | {beta2} | {len(runs)} | {mean} | {spread} | {each} |")
EOF
