#!/usr/bin/env bash
# Print the path of a Python that Megatron-core 0.19 runs on: from PATH, then from pyenv.
set -euo pipefail

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))' \
        >/dev/null 2>&1
}

for name in python3.12 python3.13 python3.14 python3 python; do
    if path=$(command -v "$name") && fits "$path"; then
        echo "$path"
        exit 0
    fi
done
for minor in 12 13 14; do
    for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python; do
        if fits "$path"; then
            echo "$path"
            exit 0
        fi
    done
done
echo "no Python 3.12 to 3.14 (with venv) in PATH or pyenv: install one, for example with" \
    "'pyenv install 3.12' or 'apt-get install python3.12-venv', and try again" >&2
exit 1
