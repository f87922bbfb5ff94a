#!/usr/bin/env bash
# All of this project that needs an NVIDIA GPU, in one go: build csrc, test its kernels, measure them.
#   tools/gpu_check.sh [FOLDER]      results go to FOLDER (tools/benchmarks/results); about 10 minutes
# It runs in .venv where `make setup` made one, else with the machine's own python3, which needs torch >= 2.11 and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

results=${1:-tools/benchmarks/results}
mkdir -p "$results"
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONPATH=$PWD  # where the package is not installed

failed=()
step() {
    echo "=== $*"
    timeout 600 "$@" || failed+=("$*")
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.__version__, torch.cuda.get_device_name())'
step "$python" -m flowrl_mega.ops
step "$python" -m pytest -q -p no:cacheprovider tests/ops/test_cuda.py
for what in logits head noise; do
    option=$([ $what = logits ] || echo "--$what")
    step "$python" tools/benchmarks/logprob.py --device cuda $option --json "$results/logprob_cuda_$what.json"
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
