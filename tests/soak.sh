#!/usr/bin/env bash
# A long trial: two processes of one run are preempted, killed and their checkpoints corrupted, at random, many times.
#
#   bash tests/soak.sh                              20 preemptions, 20 kills, 10 corrupted checkpoints: about 15 minutes
#   bash tests/soak.sh --preemptions 2 --kills 2 --corruptions 1 [--seed 7] [--workdir W]
#
# Ends with a line of figures, and with 0 if nothing was lost, wrong or stuck.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"

ensure_venv test
cd "$clone"
exec "$venv_python" -m tests.soak "$@"
