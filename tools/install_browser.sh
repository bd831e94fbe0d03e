#!/usr/bin/env bash
# Install Chromium for the tests that open a page, where that can be done (Debian, Ubuntu; as root):
#
#     bash tools/install_browser.sh
#
# Says what it did in one line. Without a browser these tests are skipped, so it never fails.
set -uo pipefail
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if "$name" --version > /dev/null 2>&1; then
        echo "browser: $name is there"
        exit 0
    fi
done
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "browser: none, and no root with apt-get to install one: tests that need it are skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if { apt-get update && apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } \
    > /dev/null 2>&1 && chromium --version > /dev/null 2>&1; then
    echo "browser: chromium was installed"
else
    echo "browser: chromium could not be installed: tests that need it are skipped"
fi
