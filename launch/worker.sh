#!/usr/bin/env bash
# Runs on every machine that launch/gcp_*.sh make: installs the code it came with, once, and trains.
#
#   bash launch/worker.sh EXTRAS ARGUMENT…   extras of pyproject.toml; the arguments go to mae_dist.main
#
# Its last line is "mae_dist exit code: N on HOST", and it exits with 0: the exit code of gcloud is then only about the
# connection. gcloud gives one code for all workers, and runs a command again whose connection broke.
set -euo pipefail

report() {
    local code=$?
    trap - EXIT
    printf '\nmae_dist exit code: %d on %s\n' "$code" "$HOSTNAME"
    exit 0
}
trap report EXIT
trap : TERM # a machine that shuts down tells every process: the trainer saves, and this script waits for its exit code

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

trainer_pid="$clone/trainer.pid"

is_trainer() { ps -o args= -p "$1" 2>/dev/null | grep -q 'mae_dist\.main'; }

# A connection that broke has left its trainer running, with the accelerator in its hands.
end_earlier_trainer() {
    local pid secs
    pid="$(cat "$trainer_pid" 2>/dev/null || true)"
    if [[ -z "$pid" ]] || ! is_trainer "$pid"; then
        return 0
    fi
    say "ending the trainer of an earlier connection (process $pid), which saves"
    kill -TERM "$pid"
    for ((secs = 0; secs < 120; secs++)); do
        is_trainer "$pid" || return 0
        sleep 1
    done
    kill -KILL "$pid"
}

extras="$1"
shift
end_earlier_trainer
ensure_python
ensure_venv "$extras" --quiet  # as many machines would report each package
cd "$clone"
# The bash that becomes the trainer expands this, so that the process number is the trainer's.
# shellcheck disable=SC2016
bash -c 'echo "$$" >"$0"; exec "$@"' "$trainer_pid" "$venv_python" -m mae_dist.main "$@" </dev/null
