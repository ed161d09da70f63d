#!/usr/bin/env bash
# Our nodes in a real ComfyUI: every example workflow through its HTTP API, against a real Impasto server.
#
#     tests/comfyui/run.sh PATH_TO_COMFYUI [EXAMPLE|CHECK ...]
#
# COMFYUI_PYTHON is the Python that ComfyUI runs in, with its requirements and impasto; by default the one of a virtual
# environment in or beside PATH_TO_COMFYUI. PATH_TO_COMFYUI is not written to. Needs no GPU.
set -euo pipefail
[ $# -ge 1 ] && [ -f "$1/main.py" ] || { echo "usage: $0 PATH_TO_COMFYUI [EXAMPLE|CHECK ...]" >&2; exit 2; }
comfyui=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/../.."
for python in "${COMFYUI_PYTHON:-}" "$comfyui"/{venv,.venv,../venv}/bin/python; do
    [ -n "$python" ] && [ -x "$python" ] && break
done
[ -x "$python" ] || { echo "no Python for ComfyUI was found; name one with COMFYUI_PYTHON" >&2; exit 2; }
.venv/bin/python -m tests.comfyui.run --comfyui "$comfyui" --python "$python" "$@"
[ $# -gt 0 ] || tests/comfyui/exact.sh "$comfyui" "$python"
