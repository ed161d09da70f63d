#!/usr/bin/env bash
# The nodes that work inside ComfyUI, without its server: their unit tests with ComfyUI's own types, and the table of
# LoRA kinds, which fails where *Load LoRA, exact* is off by more than 1e-5.
#
#     tests/comfyui/exact.sh PATH_TO_COMFYUI PYTHON [EVERY]
#
# PYTHON is the one that ComfyUI runs in, with its requirements and impasto. EVERY runs one LoRA file in so many (10);
# 1 runs all of them and writes docs/comfyui-lora.md.
set -euo pipefail
[ $# -ge 2 ] && [ -f "$1/main.py" ] || { echo "usage: $0 PATH_TO_COMFYUI PYTHON [EVERY]" >&2; exit 2; }
IMPASTO_COMFYUI=$(cd "$1" && pwd)
export IMPASTO_COMFYUI
python=$2
every=${3:-10}
cd "$(dirname "$0")/../.."
"$python" -m pytest -n0 -q tests/unit/test_comfyui_exact.py tests/unit/test_comfyui_local.py
PYTHONPATH=$PWD exec "$python" -m tests.comfyui.exact_table --every "$every"
