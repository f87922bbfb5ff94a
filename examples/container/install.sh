#!/usr/bin/env bash
# What the image holds: Dockerfile and flowrl-mega.def both call this as root, in the copy of the clone inside the image.
set -euo pipefail

dry_run=false
case "$*" in
    "") ;;
    --dry-run) dry_run=true ;;
    *)
        echo "usage: examples/container/install.sh [--dry-run]     (installs all that flowrl-mega needs; in an image)"
        if [ "$*" = --help ] || [ "$*" = -h ]; then exit; else exit 2; fi
        ;;
esac
cd "$(dirname "$0")/../.."

packages=(
    ca-certificates git make
    g++ python3-dev python3-venv # compile csrc and Transformer Engine's torch part; Triton compiles when it runs
    libnuma1                     # of SGLang's kernels
    ibverbs-providers libibverbs1 # NCCL over InfiniBand
)
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
# Beside the program: a home folder is the host's while an image is used.
export XDG_CACHE_HOME=$PWD/cache

if $dry_run; then # what would be installed where nothing is, and what make would run
    apt-get install --simulate -o Dir::State::status=/dev/null --no-install-recommends "${packages[@]}"
    make=(make -n)
else
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${packages[@]}"
    rm -rf /var/lib/apt/lists/*
    make=(make)
fi

"${make[@]}" setup TORCH=cuda
"${make[@]}" setup-te
"${make[@]}" setup-sglang TORCH=cuda
if $dry_run; then exit; fi

# In place of the editable install, with csrc's libraries inside: an image cannot be written to when it runs.
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --no-index .
ls .venv/lib/python3*/site-packages/flowrl_mega/ops/lib/{cpu,cuda}.so
rm -rf build "$XDG_CACHE_HOME"/flowrl-mega/te-*
