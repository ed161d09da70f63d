#!/usr/bin/env bash
# Go on with the GPU course for MINUTES: bash training/gpu.sh MINUTES [further options of training.second.lease run]
# Needs .cache/gpu (made by `python -m training.second.lease pack`); wheels in .cache/gpu/wheels are put in reach first.
# State lies in IMPASTO_TRAINING (outside the checkout), results in OUT; the same command again goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-9}
shift || true
python=${PYTHON:-python3}
export OUT=${OUT:-out/gpu} IMPASTO_TRAINING=${IMPASTO_TRAINING:-/tmp/impasto-training} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT" "$IMPASTO_TRAINING"
if compgen -G ".cache/gpu/wheels/*.whl" >/dev/null && ! "$python" -c "import diffusers" 2>/dev/null; then
  site=$IMPASTO_TRAINING/site
  [ -d "$site" ] || "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .cache/gpu/wheels/*.whl
  export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" -m training.second.lease run --minutes "$minutes" --out "$OUT" "$@" 2>&1 | tee -a "$OUT/log.txt"
