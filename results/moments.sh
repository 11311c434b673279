#!/usr/bin/env bash
# Trains with every format of Adam's moments and prints the validation losses: formats x beta2 x seeds.
#     bash results/moments.sh OUT [FLAG ...]      the flags (without blanks) go to every run: --n_embd=144 --max_iters=20800
# JOBS at a time (2), SEEDS, BETA2 and FORMATS choose rows. Stopped (Ctrl-C, or `timeout 9000 bash ...`) it prints what is done;
# called again it goes on: what has finished is left alone, what was interrupted is resumed, both whatever the flags.
# OMP_NUM_THREADS=1 for JOBS=2 on 2 cores.
set -u
trap : INT TERM  # to all of its processes, as a terminal and timeout do; killed alone, it waits for them
cd "$(dirname "$0")/.."
export OUT=${1:?usage: bash results/moments.sh OUT [FLAG ...]} PYTHON=${PYTHON:-python}
shift
export FLAGS=$*
mkdir -p "$OUT"

one() {  # FORMAT BETA2 SEED
  local dir=$OUT/$1-$2-$3 preset=$1 format=
  case $1 in
    dynamic) preset=E0 format="--m1bits=8 --m1fmt=dynamic --m2bits=8 --m2fmt=dynamic" ;;
    adam?-nearest) preset=${1%-*} format=--m2round=nearest ;;
  esac
  grep -qsE '"status": "(finished|diverged)"' "$dir/log.jsonl" && return
  if [ -e "$dir/ckpt.pt" ]; then
    set -- --resume
  else
    set -- --preset="tiny,$preset" $format --beta2="$2" --seed="$3" --eval_tokens=0 $FLAGS
  fi
  "$PYTHON" train.py --out_dir="$dir" --sample_tokens=0 "$@" >> "$dir.txt" 2>&1 || echo "$dir: exit code $?"
}
export -f one
for seed in ${SEEDS:-1 2 3}; do for beta2 in ${BETA2:-0.999 0.95}; do
  for format in ${FORMATS:-E0 S6 adam8 adam4 dynamic adam8-nearest adam4-nearest S4 S2 S1 S3 S6-per_tensor}; do
    echo "$format $beta2 $seed"
  # cat ends when the last run has: each has the pipe as fd 3, also one that is still saving when xargs is gone
  done; done; done | xargs -r -P "${JOBS:-2}" -L 1 bash -c 'one "$@"' one 3>&1 | (trap '' INT TERM; cat)

PYTHONPATH=. "$PYTHON" - <<'EOF'
import collections, os, pathlib, statistics
from support.log import read_log
losses = collections.defaultdict(dict)
for path in sorted(pathlib.Path(os.environ["OUT"]).glob("*/log.jsonl")):
    *name, beta2, seed = path.parent.name.split("-")
    lines = read_log(path)
    end = [line["status"] for line in lines if "status" in line][-1:]
    loss = [line["val_loss"] for line in lines if "val_loss" in line][-1:]
    if end == ["diverged"] or end == ["finished"] and loss:
        losses["-".join(name), beta2][seed] = loss[0] if end == ["finished"] else "diverged"
print("| moments | beta2 | mean | standard deviation | each seed |\n|---|---|---|---|---|")
for (name, beta2), runs in losses.items():
    done = [loss for loss in runs.values() if loss != "diverged"]
    mean = f"{statistics.mean(done):.4f}" if done == list(runs.values()) else "diverged"
    spread = f"{statistics.stdev(done):.4f}" if len(done) > 1 and mean != "diverged" else ""
    each = ", ".join(loss if loss == "diverged" else f"{loss:.4f}" for loss in runs.values())
    print(f"| {name} | {beta2} | {mean} | {spread} | {each} |")
EOF
