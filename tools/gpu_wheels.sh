#!/usr/bin/env bash
# On a machine with network: fill a folder with all that a GPU machine without network needs beside PyTorch.
#   tools/gpu_wheels.sh [FOLDER]     build/gpu_wheels; at most 60 MiB, about 300 MB to download; then see gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
exec "$python" tools/gpu_wheels.py "$@"
