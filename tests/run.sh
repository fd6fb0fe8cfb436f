#!/usr/bin/env bash
# Runs the tests from the clone's virtual environment, which the first run makes.
#
#   bash tests/run.sh                       the short tests, in one worker process per core: about eight minutes on two
#   bash tests/run.sh --long                every test, also those marked `long`
#   bash tests/run.sh --no-parity           installs neither PyTorch nor transformers, 5 GB of 7; what needs them is skipped
#   bash tests/run.sh tests/test_x.py -k y  whatever pytest is told; a single file needs no workers and gets none
#   bash tests/run.sh -n 0                  in one process and in order, for -s and to stop at the first (-x)
#   bash tests/run.sh --pdb                 the debugger at the first failure: in one process, too
#
# What is named by a file, by -k or by -m is run whether it is long or not.
# The tests of W&B's, MLflow's and Trackio's clients are skipped, with the reason, unless they are installed (another
# 300 MB): .venv/bin/pip install -e '.[trackers]'.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"

extras="test,parity"
arguments=()
for argument in "$@"; do
    if [[ "$argument" == --no-parity ]]; then
        extras="test"
    else
        arguments+=("$argument")
    fi
done

ensure_venv "$extras"
cd "$clone"

files=0
for argument in ${arguments[@]+"${arguments[@]}"}; do
    if [[ -f "${argument%%::*}" ]]; then
        files=$((files + 1))
    fi
done
workers=()
if ((files != 1)); then
    # Of two options -n pytest takes the last, the user's. More than eight workers only wait for the slowest tests.
    workers=(-n auto --maxprocesses=8 --dist=worksteal)
fi
exec "$venv_python" -m pytest ${workers[@]+"${workers[@]}"} ${arguments[@]+"${arguments[@]}"}
