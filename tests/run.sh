#!/usr/bin/env bash
# Runs the tests from the clone's virtual environment, which the first run makes.
#
#   bash tests/run.sh                       everything
#   bash tests/run.sh tests/test_x.py -k y  whatever pytest is told
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh"

ensure_venv test
cd "$clone"
exec "$venv_python" -m pytest "$@"
