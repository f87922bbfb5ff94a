#!/usr/bin/env bash
# All of this project that needs an NVIDIA GPU, in one go and without network: build, test, measure; one table last.
#   tools/gpu_check.sh [--wheels FOLDER] [--stage first|engine|bench|more|all] [RESULTS]     --list: what would be done
#   tools/gpu_check.sh --budget 570 --out FOLDER --wheels FOLDER      in one call on a machine that is lent for minutes
# FOLDER is what tools/gpu_wheels.sh filled; results go to RESULTS (tools/benchmarks/results). Run again, it goes on
# where it stopped. It runs in .venv where `make setup` made one, else with the machine's own python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
exec "$python" tools/gpu_check.py "$@"
