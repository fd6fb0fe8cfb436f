#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud, a spot one unless told otherwise, from its creation to its deletion. When the
# slice is taken away it asks for another and runs the same line again, which continues the run. So does this script.
#
#   bash launch/gcp_tpu.sh --workdir gs://BUCKET/RUN [options] -- --config configs/cifar_medium.py …
#   bash launch/gcp_tpu.sh status|delete --workdir gs://BUCKET/RUN   (or --name NAME)
#
#   --workdir W             where the run lives, in a bucket; its code is put there too (required)
#   --project P, --zone Z   default: what gcloud is set to
#   --accelerator_type T    v5litepod-16; v6e-8, v5p-8, v4-8, …
#   --runtime_version V     the machines' system; default by the accelerator's type
#   --num_slices N          1; several are one run over all their devices
#   --name NAME             of the queued resource; default from the workdir. One that is there already is
#                           used, and deleted at the end
#   --spot, --on_demand     --spot
#   --max_restarts N        10; restarts that no preemption explains. Preemptions are not counted
#   --poll_secs S           30; between looks at the state
#   --keep                  do not delete the slice at the end
#   --dry_run               print the commands, run none
#   --                      the rest goes to mae_dist.main
#
# Exit code: the trainer's (docs/preemption.md); 1 and 2 also for what kept it from starting; 130 after Ctrl-C. However
# it ends, by Ctrl-C or a closed terminal too (tmux, nohup), it deletes the slice; one that was killed by -9 cannot.
set -euo pipefail

# shellcheck source=launch/gcp.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcp.sh"

# shellcheck disable=SC2034
kind=tpu extras=tpu,gcs api=tpu.googleapis.com quota_hint="service Cloud TPU API, 'preemptible' for spot"
option_names="$option_names accelerator_type runtime_version num_slices"
accelerator_type=v5litepod-16 runtime_version="" num_slices=1

check_options() {
    local slice
    [[ "$num_slices" =~ ^[1-9][0-9]*$ ]] || refuse "--num_slices=$num_slices is not a number from 1."
    [[ ! "$accelerator_type" =~ ^(tpu-?|v)7 ]] ||
        refuse "--accelerator_type=$accelerator_type: TPU7x is no queued resource. Train on it with Google Kubernetes" \
            "Engine: the head of launch/gke_jobset.yaml says how."
    if [[ -z "$runtime_version" ]]; then
        case "$accelerator_type" in
            v2-* | v3-* | v4-*) runtime_version=tpu-ubuntu2204-base ;;
            v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime_version=v2-alpha-tpuv5 ;;
            v6e-*) runtime_version=v2-alpha-tpuv6e ;;
            *)
                refuse "--accelerator_type=$accelerator_type is none of v2, v3, v4, v5litepod, v5p, v6e (v5litepod-16)." \
                    "For a newer one give --runtime_version too: https://cloud.google.com/tpu/docs/runtimes"
                ;;
        esac
    fi
    nodes=("$name")
    if ((num_slices > 1)); then
        nodes=()
        for ((slice = 0; slice < num_slices; slice++)); do
            nodes+=("$name-$slice")
        done
    fi
}

phase_of() {
    case "$1" in
        ACTIVE) echo ready ;;
        SUSPENDING | DELETING) echo going ;;
        SUSPENDED | FAILED) echo stopped ;;
        *) echo coming ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING
    esac
}

create_call() {
    call=(gcloud compute tpus queued-resources create "$name")
    if ((num_slices > 1)); then
        call+=(--node-count="$num_slices" --node-prefix="$name")
    else
        call+=(--node-id="$name")
    fi
    call+=(--accelerator-type="$accelerator_type" --runtime-version="$runtime_version" "${common[@]}")
    if ((spot)); then
        call+=(--spot)
    fi
}

describe_field() { call=(gcloud compute tpus queued-resources describe "$name" "--format=value($1)" "${common[@]}"); }

describe_call() { describe_field state.state; }

delete_call() { call=(gcloud compute tpus queued-resources delete "$name" --force "${common[@]}"); }

ssh_call() { call=(gcloud compute tpus tpu-vm ssh "$1" --worker=all --command="$2" "${ssh_flags[@]}" "${common[@]}"); }

# A queued resource that has failed or was suspended never comes back: it makes room for another of its name.
revive() {
    local reason
    if [[ "$state" != FAILED ]]; then
        discard
        return
    fi
    describe_field state.failedData.error.message
    reason="$("${call[@]}" 2>&1)" || true
    discard
    echo "${reason:-no reason is given}" >"$scratch/said"
    judge_refusal again
}

gcp_main "$@"
