#!/usr/bin/env bash
# Runs the tests from the clone's virtual environment, which the first run makes.
#
#   bash tests/run.sh                       everything, in one worker process per core
#   bash tests/run.sh tests/test_x.py -k y  whatever pytest is told; a single file needs no workers and gets none
#   bash tests/run.sh -n 0                  everything in one process and in order, for -s and to stop at the first (-x)
#   bash tests/run.sh --pdb                 the debugger at the first failure: in one process, too
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"

ensure_venv test
cd "$clone"

files=0
for argument in "$@"; do
    if [[ -f "${argument%%::*}" ]]; then
        files=$((files + 1))
    fi
done
workers=()
if ((files != 1)); then
    # Of two options -n pytest takes the last, the user's. More than eight workers only wait for the slowest tests.
    workers=(-n auto --maxprocesses=8 --dist=worksteal)
fi
exec "$venv_python" -m pytest ${workers[@]+"${workers[@]}"} "$@"
