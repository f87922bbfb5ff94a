#!/usr/bin/env bash
# SLURM for tests/integration/test_slurm.py, from the packages of Debian or Ubuntu: `make setup-slurm`. Where they cannot
# be installed it says so in a line, and those tests are skipped. No cluster is set up: the tests bring up their own.
set -euo pipefail

if [ $# -gt 0 ]; then
    echo "usage: tools/setup_slurm.sh     (installs slurm-wlm and munge where they are missing; takes no arguments)"
    if [ "$*" = --help ] || [ "$*" = -h ]; then exit; else exit 2; fi
fi
if type slurmctld slurmd munged sbatch >/dev/null 2>&1; then exit; fi
if ! command -v apt-get >/dev/null; then
    echo "setup-slurm: no apt-get here; install SLURM and munge for the tests that need them"
elif [ "$(id -u)" != 0 ]; then
    echo "setup-slurm: not root; as root, apt-get install slurm-wlm munge for the tests that need them"
else
    echo "setup-slurm: installing slurm-wlm and munge"
    export DEBIAN_FRONTEND=noninteractive
    install() { apt-get install -y -qq --no-install-recommends slurm-wlm munge; }
    if ! said=$(install 2>&1 </dev/null || { apt-get update -qq && install; } 2>&1 </dev/null); then
        printf '%s\n' "$said" | tail -n 5
        echo "setup-slurm: slurm-wlm and munge cannot be installed, as said above; the tests that need them are skipped"
    fi
fi
