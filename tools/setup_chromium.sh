#!/usr/bin/env bash
# Chromium for tests/report/test_report_browser.py, from the packages of Debian: `make setup-chromium`. Where it cannot be
# installed it says so in a line, and those tests are skipped.
set -euo pipefail

if [ $# -gt 0 ]; then
    echo "usage: tools/setup_chromium.sh     (installs chromium where it is missing; takes no arguments)"
    if [ "$*" = --help ] || [ "$*" = -h ]; then exit; else exit 2; fi
fi
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then exit; fi
done
if ! command -v apt-get >/dev/null; then
    echo "setup-chromium: no apt-get here; install Chromium for the tests that need it"
elif [ "$(id -u)" != 0 ]; then
    echo "setup-chromium: not root; as root, apt-get install chromium for the tests that need it"
else
    echo "setup-chromium: installing chromium"
    export DEBIAN_FRONTEND=noninteractive
    install() { apt-get install -y -qq --no-install-recommends chromium; }
    if ! said=$(install 2>&1 </dev/null || { apt-get update -qq && install; } 2>&1 </dev/null); then
        printf '%s\n' "$said" | tail -n 5
        echo "setup-chromium: chromium cannot be installed, as said above; the tests that need it are skipped"
    fi
fi
