#!/usr/bin/env bash
# Install a wheel into an empty environment, with what it asks for and nothing else, and import every
# public name:
#
#     bash tools/try_wheel.sh dist/megatron_llep-*.whl
#
# pip's own settings choose where torch comes from.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
wheel=$(realpath "$1")
cd "$(dirname "$0")/.."
python=$(bash tools/find_python.sh)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "$wheel"
cd "$folder"
for name in $(venv/bin/python -c 'import megatron_llep; print(*megatron_llep.__all__)'); do
    venv/bin/python -W ignore -c "from megatron_llep import $name"
    echo "megatron_llep.$name"
done
venv/bin/python -m megatron_llep plan --workload hot-80-4 --ranks 8 --experts 64 >plan.txt
tail -n 1 plan.txt
