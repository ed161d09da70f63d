#!/usr/bin/env bash
# Every GPU measurement and test in one go, the most important first, each with a time limit: 29 minutes at most on one
# H100, without a network. Results and logs go to $OUT (default: out/gpu). Parts may be named, so that several shorter
# runs do the same:
#
#   OUT=out/gpu benchmarks/gpu.sh                     # all
#   OUT=out/gpu benchmarks/gpu.sh tests latency       # the first ten minutes
#   DRY=1 benchmarks/gpu.sh                           # tiny sizes on a CPU: does it all run?
#
# PYTHON names an interpreter with torch for the GPU; WHEELS a folder of wheels to install first, for machines that
# reach no registry; MODELS where random weights are written (7 GB, once).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
PYTHON=${PYTHON:-python3}
MODELS=${MODELS:-${TMPDIR:-/tmp}/impasto-models}
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(tests latency switch throughput compiled beside cold profile fp8 decode recipe)
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="src:." PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/impasto-inductor}
began=$(date +%s)

if [ -n "${WHEELS:-}" ]; then "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl || exit 1; fi

# part NAME SECONDS COMMAND...: run it within its limit, keep its output, go on whatever comes of it
part() {
  local name=$1 limit=$2 status=0 start
  shift 2
  start=$(date +%s)
  echo "== $name (at most $limit s): $*" | tee -a "$OUT/log.txt"
  timeout --kill-after=10 "$limit" "$@" > "$OUT/part.tmp" 2>&1 || status=$?
  { echo "== $name: $*"; cat "$OUT/part.tmp"; } >> "$OUT/log.txt"
  grep -v '^{' "$OUT/part.tmp" | tail -n 60
  rm -f "$OUT/part.tmp"
  echo "== $name: status $status, $(($(date +%s) - start)) s, $(($(date +%s) - began)) s in all" | tee -a "$OUT/log.txt"
}
bench() { "$PYTHON" -m "benchmarks.$1" "${@:2}"; }
export -f bench
export PYTHON

GPU="--models $MODELS --model full --device cuda --dtype bfloat16"
FAST=channels_last,vae_channels_last,fuse_projections,cuda_graphs
EXACT=$FAST,static_shapes FP8=channels_last,vae_channels_last,cuda_graphs,static_shapes,fp8
WHERE="--device cuda --dtype bfloat16" SEEDS=2 FEW=20
SIDE=1024 STEPS="30" MIX_SIDES="768 1024" MIX_STEPS="20 30" REQUESTS=20 SETS="1 100" RUNS=3 RANK=32 PEERS="diffusers" MIN=1
if [ -n "${DRY:-}" ]; then
  GPU="--models $MODELS --model reduced --device cpu --dtype bfloat16"
  FAST=vae_channels_last,fuse_projections
  EXACT=$FAST FP8=vae_channels_last,fp8 WHERE="--device cpu --dtype bfloat16 --side 256" SEEDS=1 FEW=2
  SIDE=256 STEPS="2" MIX_SIDES="256" MIX_STEPS="2" REQUESTS=6 SETS="1 4" RUNS=1 RANK=4 MIN=${DRY_LIMIT:-1}
fi

for name in "${PARTS[@]}"; do
  case $name in
    tests)
      (command -v nvidia-smi >/dev/null && nvidia-smi) > "$OUT/machine.txt" 2>&1
      "$PYTHON" -m pip list >> "$OUT/machine.txt" 2>&1
      part tests $((180 * MIN)) "$PYTHON" -m pytest -q -n0 -p no:cacheprovider tests/gpu ;;
    latency)  # 1.0 s is the aim; plain, the switches that need no compiler, and diffusers eager
      part latency $((240 * MIN)) bash -c "bench latency $GPU --sizes $SIDE --steps $STEPS --loras 0 1 5 --rank $RANK \
        --runs $RUNS --accels $FAST '' --peers $PEERS --out $OUT/latency.json" ;;
    switch)  # 30 ms is the aim for five of rank 32; then when mixed batches pay
      part switch $((90 * MIN)) bash -c "bench lora_switch --stack 5 --ranks $RANK --runs 5 && \
        bench lora_switch --mixed --ranks $RANK --runs 3 --rows 4 --side $SIDE" ;;
    compiled)
      part compiled $((300 * MIN)) bash -c "bench latency $GPU --sizes $SIDE --steps $STEPS --loras 0 --runs $RUNS \
        --accels $FAST,static_shapes $FAST,compile --peers 'diffusers compiled' --out $OUT/latency_compiled.json" ;;
    throughput)  # 100 sets should reach 90 % of one set's rate
      part throughput $((150 * MIN)) bash -c "bench throughput $GPU --accel $FAST --requests $REQUESTS --sets $SETS \
        --sizes $MIX_SIDES --steps $MIX_STEPS --ours-only --out $OUT/throughput.json" ;;
    decode)  # the same load of one set, pictures decoded beside the steps: compare with throughput's first row
      part decode $((80 * MIN)) bash -c "bench throughput $GPU --accel $FAST,decode_beside --requests $REQUESTS --sets 1 \
        --sizes $MIX_SIDES --steps $MIX_STEPS --ours-only --out $OUT/throughput_decode.json" ;;
    beside)  # the same load, beside diffusers one by one
      part beside $((130 * MIN)) bash -c "bench throughput $GPU --accel $FAST --requests $((REQUESTS / 2)) \
        --sizes $MIX_SIDES --steps $MIX_STEPS --out $OUT/throughput_beside.json" ;;
    cold)
      part cold $((100 * MIN)) bash -c "bench cold_start $GPU --side $SIDE --accel $FAST --runs 1 --rank $RANK \
        --out $OUT/cold_start.json" ;;
    profile)
      part profile $((50 * MIN)) bash -c "bench profile_step $GPU --side $SIDE --accels $FAST" ;;
    fp8)  # what 8 bits save, compiled and recorded as the exact way is; and what they cost: PSNR on the built-in model
      part fp8 $((200 * MIN)) bash -c "bench latency $GPU --sizes $SIDE --steps $STEPS --loras 0 5 --rank $RANK \
        --runs $RUNS --accels $EXACT $FP8 --peers --out $OUT/latency_fp8.json && \
        bench accel --model builtin $WHERE --modes fp8 --seeds $SEEDS --steps $FEW --out $OUT/fp8.json" ;;
    recipe)  # torch's best published recipe; max-autotune takes its time, so it comes last
      part recipe $((260 * MIN)) bash -c "bench latency $GPU --sizes $SIDE --steps $STEPS --loras 0 --runs $RUNS \
        --accels $FAST --peers 'torch recipe' --out $OUT/latency_recipe.json" ;;
    *) echo "no part $name: tests latency switch throughput compiled beside cold profile fp8 decode recipe" >&2; exit 2 ;;
  esac
done
ls -l "$OUT"
