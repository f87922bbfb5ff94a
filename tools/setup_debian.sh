#!/usr/bin/env bash
# What some tests need of Debian's or Ubuntu's packages: `make setup-slurm setup-chromium`. Where it cannot be installed
# it says so in a line, and those tests are skipped. No cluster is set up: the tests of SLURM bring up their own.
set -euo pipefail

case "$*" in
    slurm) packages=(slurm-wlm munge) needed=(slurmctld slurmd munged sbatch) ;;
    chromium) packages=(chromium) needed=(chromium) ;;
    *)
        echo "usage: tools/setup_debian.sh slurm | chromium     (installs the packages where they are missing)"
        if [ "$*" = --help ] || [ "$*" = -h ]; then exit; else exit 2; fi
        ;;
esac
# Chromium under another name will do.
if [ "$1" = chromium ]; then
    for name in chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name" >/dev/null; then exit; fi
    done
fi
if type "${needed[@]}" >/dev/null 2>&1; then exit; fi
if ! command -v apt-get >/dev/null; then
    echo "setup-$1: no apt-get here; install ${packages[*]} for the tests that need them"
elif [ "$(id -u)" != 0 ]; then
    echo "setup-$1: not root; as root, apt-get install ${packages[*]} for the tests that need them"
else
    echo "setup-$1: installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    install() { apt-get install -y -qq --no-install-recommends "${packages[@]}"; }
    if ! said=$(install 2>&1 </dev/null || { apt-get update -qq && install; } 2>&1 </dev/null); then
        printf '%s\n' "$said" | tail -n 5
        echo "setup-$1: ${packages[*]} cannot be installed, as said above; the tests that need them are skipped"
    fi
fi
