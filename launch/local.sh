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

say "1 of 3: pretraining on handwritten digits, without their labels"
"$venv_python" -m mae_dist.main --config configs/quickstart.py
say "2 of 3: drawing what it makes of digits that it never saw"
"$venv_python" -m mae_dist.reconstruct --workdir runs/quickstart
say "3 of 3: a small classifier on its features, to measure them"
"$venv_python" -m mae_dist.main --config configs/quickstart_probe.py

picture="$(find runs/quickstart/pictures -name 'test_*.png' 2>/dev/null | sort | tail -n 1)" || true
accuracy="$("$venv_python" -c 'import json
summary = json.load(open("runs/quickstart_probe/summary.json"))
print("%.1f %% of the test digits are named correctly (by guessing: 10 %%)" % (100 * summary["test_top1"]))' \
    2>/dev/null)" || accuracy="see runs/quickstart_probe/summary.json"
cat >&2 <<END

Done. You have now, in $clone:

  picture    ${picture:-runs/quickstart/pictures/}
             each row a digit: original, masked, reconstruction, the same with visible patches
  accuracy   $accuracy
  all files  runs/quickstart and runs/quickstart_probe, for TensorBoard too

Next:

  cd $(printf %q "$clone") && source .venv/bin/activate
  python -m mae_dist.report runs/quickstart runs/quickstart_probe --out report.html
  python -m mae_dist.main --config folder:mini,64,8 --config.data.data_dir=/my/images

The report is one page about both runs. The last line trains on your own images:
any folder, no labels needed.
END
