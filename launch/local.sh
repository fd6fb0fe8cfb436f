#!/usr/bin/env bash
# Runs mae_dist on this machine, from a virtual environment that the first run makes in the clone.
#
#   bash launch/local.sh                                     the quick start: pretrain, reconstruct, probe; a minute and a half
#   bash launch/local.sh --config configs/cifar_medium.py …  any run: everything is passed on to mae_dist.main
#
# It works from any directory; paths in arguments are relative to the clone.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv ""
cd "$clone"

if (($# > 0)); then
    exec "$venv_python" -m mae_dist.main "$@"
fi

"$venv_python" -m mae_dist.main --config configs/quickstart.py
"$venv_python" -m mae_dist.reconstruct --workdir runs/quickstart
"$venv_python" -m mae_dist.main --config configs/quickstart_probe.py
say "done. Pictures: $clone/runs/quickstart/pictures/"
say "Results: $clone/runs/quickstart/summary.json and $clone/runs/quickstart_probe/summary.json"
