# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by launch/gcp_gpu.sh and launch/gcp_cpu.sh: one Compute Engine machine, for launch/gcp.sh.

# shellcheck source=launch/gcp.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcp.sh"

api=compute.googleapis.com
option_names="$option_names machine_type image_family image_project disk_gb"
machine_flags=()

check_options() {
    [[ "$disk_gb" =~ ^[1-9][0-9]*$ ]] || refuse "--disk_gb=$disk_gb is not a number of gigabytes."
    nodes=("$name")
}

phase_of() {
    case "$1" in
        RUNNING) echo ready ;;
        STOPPING | PENDING_STOP | SUSPENDING | DEPROVISIONING) echo going ;;
        TERMINATED | STOPPED | SUSPENDED) echo stopped ;;
        *) echo coming ;; # PENDING, PROVISIONING, STAGING, REPAIRING
    esac
}

# The scope lets the machine write to the bucket; what its service account may do there is decided by IAM.
create_call() {
    call=(gcloud compute instances create "$name" --machine-type="$machine_type" --image-family="$image_family"
        --image-project="$image_project" --boot-disk-size="${disk_gb}GB" --scopes=cloud-platform
        ${machine_flags[@]+"${machine_flags[@]}"} "${common[@]}")
    if ((spot)); then
        call+=(--provisioning-model=SPOT --instance-termination-action=STOP)
    fi
}

describe_call() { call=(gcloud compute instances describe "$name" "--format=value(status)" "${common[@]}"); }

delete_call() { call=(gcloud compute instances delete "$name" "${common[@]}"); }

ssh_call() { call=(gcloud compute ssh "$1" --command="$2" "${ssh_flags[@]}" "${common[@]}"); }

# A machine that was stopped has kept its disk, and on it what was installed.
revive() {
    say "starting $name again"
    call=(gcloud compute instances start "$name" "${common[@]}")
    ask
}
