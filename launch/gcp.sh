# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by launch/gcp_tpu.sh, gcp_gpu.sh and gcp_cpu.sh: what they share. Machines are asked for until there are some,
# the code of this clone is put on them, the trainer runs, and its exit code says what comes next.
#
# Such a script sets $kind, $extras, $option_names and the options' defaults, and defines
#   check_options        refuses what cannot work; sets the array $nodes
#   phase_of STATE       prints ready, coming, going or stopped
#   create_call, describe_call, delete_call, ssh_call NODE COMMAND
#                        each sets the array $call to a whole gcloud command
#   revive               brings back, or clears away, what is stopped
#
# Variables that are set here and used there, or the other way round, are why SC2034 and SC2154 are off.

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# The options that every script has.
name="" project="" zone="" workdir="" max_restarts=10 poll_secs=30 spot=1 keep=0 dry_run=0
option_names="name project zone workdir max_restarts poll_secs"
action=train trainer_example="-- --config configs/cifar_medium.py"
arguments=() nodes=() call=()
# A lost machine leaves its connection open and silent, and a prompt in the background would wait for ever.
ssh_flags=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=6 --ssh-flag=-oBatchMode=yes)

refuse() {
    say "error: $*"
    exit 2
}

# The comment at the top of the script is its manual.
print_help() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }

set_option() {
    local option="${1#--}"
    [[ " $option_names " == *" $option "* ]] ||
        refuse "unknown option --$option; there are --${option_names// / --} --spot --on_demand --keep --dry_run" \
            "--help. The trainer's own arguments come after --."
    (($# == 2)) || refuse "--$option needs a value."
    printf -v "$option" '%s' "$2"
}

parse_arguments() {
    case "${1:-}" in
        delete | status)
            action="$1"
            shift
            ;;
    esac
    while (($# > 0)); do
        case "$1" in
            --help | -h)
                print_help
                exit 0
                ;;
            --)
                shift
                arguments=(${1+"$@"})
                break
                ;;
            --spot) spot=1 ;;
            --on_demand) spot=0 ;;
            --keep) keep=1 ;;
            --dry_run) dry_run=1 ;;
            --*=*) set_option "${1%%=*}" "${1#*=}" ;;
            --*)
                set_option "${@:1:2}"
                shift
                ;;
            *) refuse "unexpected argument $1; the trainer's own come after --, as in … $trainer_example" ;;
        esac
        shift
    done
}

# What gcloud itself is set to use; a dry run asks nobody and shows the name $2 in its place.
configured() {
    if ((dry_run)); then
        echo "$2"
    else
        gcloud config get-value "$1" 2>/dev/null || true
    fi
}

check_settings() {
    local number
    ((dry_run)) || command -v gcloud >/dev/null ||
        fail "gcloud is not on PATH. Install it (https://cloud.google.com/sdk/docs/install), then: gcloud auth login"
    project="${project:-${CLOUDSDK_CORE_PROJECT:-$(configured core/project PROJECT)}}"
    [[ -n "$project" ]] || refuse "no project. Give --project=PROJECT, or: gcloud config set project PROJECT"
    zone="${zone:-${CLOUDSDK_COMPUTE_ZONE:-$(configured compute/zone ZONE)}}"
    [[ -n "$zone" ]] || refuse "no zone. Give --zone=ZONE, or: gcloud config set compute/zone ZONE." \
        "Where there is what: https://cloud.google.com/tpu/docs/regions-zones (TPUs)," \
        "https://cloud.google.com/compute/docs/gpus/gpu-regions-zones (GPUs)"
    for number in max_restarts poll_secs; do
        [[ "${!number}" =~ ^[0-9]+$ ]] || refuse "--$number=${!number} is not a number."
    done
    if [[ "$action" == train ]]; then
        [[ "$workdir" =~ ^gs://[^/]+/.*[^/] ]] ||
            refuse "--workdir=$workdir is not in a bucket, but a machine's disk goes with the machine." \
                "Give --workdir=gs://BUCKET/RUN. A bucket is made by:" \
                "gcloud storage buckets create gs://BUCKET --project=$project --location=${zone%-*}"
        workdir="${workdir%/}"
        [[ " ${arguments[*]-} " == *" --config"[=\ ]* ]] ||
            refuse "no --config for the trainer. Its arguments come after --, as in … $trainer_example"
        [[ " ${arguments[*]-} " != *" --workdir"[=\ ]* ]] || refuse "--workdir belongs before the --, once."
    fi
    if [[ -z "$name" ]]; then
        [[ -n "$workdir" ]] || refuse "no name. Give --name=NAME, or the --workdir of the run."
        name="mae-$kind-$(basename "$workdir" | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9\n' - | cut -c1-40)"
        name="${name%-}"
    fi
    [[ "$name" =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] ||
        refuse "--name=$name is no name for a machine: small letters, digits and -, a letter first, at most 52."
    check_options
    common=(--project="$project" --zone="$zone" --quiet)
    archive="$workdir/code.tar.gz"
}

show_call() {
    printf '%q ' "${call[@]}"
    printf '\n'
}

# What installing needs and nothing else: no data, no pictures, no stray secrets of the clone.
archive_call() {
    call=(tar -czf - -C "$clone" --exclude=__pycache__ pyproject.toml README.md LICENSE mae_dist configs launch)
}
upload_call() { call=(gcloud storage cp - "$archive" --project="$project"); }

# In the bucket rather than copied to each worker: it is sent once, and every restart runs the code the run began with.
upload() {
    local pack
    archive_call
    pack=("${call[@]}")
    upload_call
    say "uploading the code to $archive"
    COPYFILE_DISABLE=1 "${pack[@]}" | "${call[@]}" >&2 ||
        fail "the upload to $archive failed (see above). Is there such a bucket, and may you write to it?" \
            "gcloud auth login; gcloud storage buckets create gs://$(bucket) --project=$project --location=${zone%-*}"
}

bucket() { cut -d/ -f3 <<<"$workdir"; }

# The same line every time: after a preemption it is what continues the run.
worker_line() {
    local code=mae_dist_code
    printf 'mkdir -p %s && gcloud storage cp %q - | tar -xzf - -C %s && exec bash %s/launch/worker.sh %s' \
        "$code" "$archive" "$code" "$code" "$extras"
    printf ' %q' "${arguments[@]}" --workdir "$workdir"
}

# `wait`, unlike a program in the foreground, lets a signal through at once.
pause() {
    sleep "$1" &
    wait "$!"
}

back_off() {
    pause "$delay"
    delay=$((delay * 2 < poll_secs * 16 ? delay * 2 : poll_secs * 16))
}

# What is not a preemption may happen only so often: machines cost money whether or not they get anywhere.
count_restart() {
    restarts=$((restarts + 1))
    if ((restarts > max_restarts)); then
        say "error: $1. That is all of --max_restarts=$max_restarts."
        exit "$code"
    fi
    say "$1: restart $restarts of at most $max_restarts"
}

# Sets $state, the cloud's word, and $phase, ours.
look() {
    describe_call
    if state="$("${call[@]}" 2>"$scratch/errors")"; then
        phase="$(phase_of "$state")"
    elif grep -qiE 'not[ _]found' "$scratch/errors"; then
        state="not there" phase=absent
    else
        cat "$scratch/errors" >&2
        state="unknown" phase=unknown
    fi
}

# Whether a text says so. What gcloud calls an exhausted resource may be a quota, so that is asked first.
is_about() { grep -qiE "$1" "$scratch/said"; }

# A refusal in $scratch/said: waits where waiting helps, else ends with the cure. One not known: `stop`, or try `again`.
judge_refusal() {
    cat "$scratch/said" >&2
    if is_about 'already exists|per minute|RATE_LIMIT'; then
        back_off
    elif is_about 'quota.*exceed|exceed.*quota|QUOTA_EXCEEDED'; then
        fail "the quota of project $project does not allow this (see above), and waiting will not change it." \
            "Ask for more: https://console.cloud.google.com/iam-admin/quotas?project=$project" \
            "($quota_hint, in ${zone%-*}), or try fewer or another zone."
    elif is_about 'no more capacity|insufficient capacity|enough resources|stockout|RESOURCE(_POOL)?_EXHAUSTED'; then
        say "no capacity in $zone now: trying again in $delay s"
        back_off
    elif [[ "$1" == again ]] || is_about 'UNAVAILABLE|INTERNAL|DEADLINE|try again|timed out|connection'; then
        count_restart "asking for $name failed (see above)"
        back_off
    else
        fail "$zone refused $name (see above). If an API is not enabled: gcloud services enable $api --project=$project"
    fi
}

# Runs $call, which asks for machines.
ask() {
    "${call[@]}" >"$scratch/said" 2>&1 || judge_refusal stop
}

# Runs $call, which deletes; that there is nothing left to delete is as good.
delete_now() {
    local tries
    for tries in 1 2 3; do
        if "${call[@]}" >"$scratch/said" 2>&1 || grep -qiE 'not[ _]found' "$scratch/said"; then
            return
        fi
        cat "$scratch/said" >&2
        ((tries == 3)) || pause "$poll_secs"
    done
    return 1
}

discard() {
    say "deleting $name ($state)"
    delete_call
    delete_now || count_restart "deleting $name failed (see above)"
}

# Returns when the machines are there. How long that takes is up to the zone.
acquire() {
    local seen=""
    delay="$poll_secs"
    while :; do
        look
        if [[ "$state" != "$seen" ]]; then
            say "$name: $state"
        fi
        seen="$state"
        case "$phase" in
            ready) return ;;
            absent)
                say "asking for $name in $zone"
                create_call
                ask
                ;;
            stopped) revive ;;
            unknown)
                count_restart "the state of $name cannot be asked (see above)"
                back_off
                ;;
            *) pause "$poll_secs" ;;
        esac
    done
}

# Passes lines on as they come, and notes the exit codes among them.
pass_on() {
    local line
    while IFS= read -r line || [[ -n "$line" ]]; do
        printf '%s%s\n' "$1" "$line"
        if [[ "$line" =~ mae_dist\ exit\ code:\ ([0-9]+) ]]; then
            echo "${BASH_REMATCH[1]}" >>"$scratch/codes"
        fi
    done
}

# A command on every worker of every node at once; the connections' exit codes are then in $scratch/connections.
on_workers() {
    local node prefix=""
    : >"$scratch/codes"
    : >"$scratch/connections"
    set -m # a process group for each, so that `finish` ends gcloud and its ssh together
    for node in "${nodes[@]}"; do
        ((${#nodes[@]} == 1)) || prefix="[$node] "
        ssh_call "$node" "$1"
        {
            connection=0
            "${call[@]}" </dev/null || connection=$?
            echo "$connection" >>"$scratch/connections"
        } 2>&1 | pass_on "$prefix" &
    done
    set +m
    wait
}

connected() { ! grep -qvx 0 "$scratch/connections"; }

# A machine answers a little after it is said to run.
wait_for_ssh() {
    local tries
    for tries in 1 2 3 4 5; do
        on_workers true >"$scratch/said"
        if connected; then
            return
        fi
        look
        [[ "$phase" == ready && "$tries" != 5 ]] || break
        pause "$poll_secs"
    done
    cat "$scratch/said" >&2
    say "no ssh to $name. If it stays so, the network needs a rule:" \
        "gcloud compute firewall-rules create allow-ssh --allow=tcp:22 --project=$project"
    return 1
}

# Of several workers' exit codes the one that says most: faults that would come again, then a preemption, then whatever
# else; a lost peer is only what the others saw of it. 255: the connection was lost before the trainer ended.
worst_code() {
    local code
    for code in 2 3 4 5 75 76; do
        if grep -qx "$code" "$scratch/codes"; then
            echo "$code"
            return
        fi
    done
    grep -vxE '0|77' "$scratch/codes" | head -n 1 | grep . && return
    if grep -qx 77 "$scratch/codes"; then
        echo 77
    elif [[ -s "$scratch/codes" ]] && connected; then
        echo 0
    else
        echo 255
    fi
}

meaning() {
    case "$1" in
        2) echo "bad config or command line" ;;
        3) echo "a fault of the data" ;;
        4) echo "diverged" ;;
        5) echo "a fault of the workdir" ;;
        75) echo "preempted and saved" ;;
        76) echo "stalled" ;;
        77) echo "a peer was lost" ;;
        255) echo "the connection was lost" ;;
        *) echo "an unexpected error" ;;
    esac
}

# The machines as they are, or others, until the trainer has ended for good.
train() {
    local line
    line="$(worker_line)"
    while :; do
        acquire
        say "installing and training on $name"
        code=255
        if wait_for_ssh; then
            on_workers "$line"
            code="$(worst_code)"
        fi
        case "$code" in
            0)
                say "done: $workdir"
                exit 0
                ;;
            2 | 3 | 4 | 5)
                say "error: the trainer ended with exit code $code, $(meaning "$code") (see above);" \
                    "running it again would not help."
                exit "$code"
                ;;
        esac
        say "exit code $code, $(meaning "$code")"
        pause "$poll_secs" # the state follows a preemption by some seconds
        look
        if [[ "$phase" != ready ]]; then
            say "$name was taken away ($state); the run continues on another"
        elif [[ "$code" == 75 ]]; then
            discard
        else
            count_restart "the trainer ended with exit code $code, $(meaning "$code")"
            case "$code" in 76 | 77) discard ;; esac # its machines may be what is wrong
        fi
    done
}

# However the script ends, nothing that costs money is left without a word.
finish() {
    local code=$? pid
    trap - EXIT
    trap '' INT TERM HUP
    for pid in $(jobs -p); do
        kill -TERM -- "-$pid" 2>/dev/null || kill -TERM "$pid" 2>/dev/null || true
    done
    look
    delete_call
    if [[ "$phase" == absent ]]; then
        say "$name is not there: nothing is left that costs money. In doubt:"
    elif ((keep)); then
        say "$name is kept and costs money until:"
    else
        say "deleting $name; by hand that is:"
    fi
    show_call >&2
    if [[ "$phase" != absent ]] && ! ((keep)) && ! delete_now; then
        say "error: $name could not be deleted (see above) and may go on costing money: run the command above."
    fi
    rm -rf "$scratch"
    exit "$code"
}

print_dry_run() {
    local node step
    archive_call
    printf '%q ' "${call[@]}"
    printf '| '
    upload_call
    show_call
    for step in create_call describe_call; do
        "$step"
        show_call
    done
    for node in "${nodes[@]}"; do
        ssh_call "$node" "$(worker_line)"
        show_call
    done
    delete_call
    show_call
}

gcp_main() {
    parse_arguments "$@"
    check_settings
    if ((dry_run)) && [[ "$action" == train ]]; then
        print_dry_run
        exit 0
    fi
    case "$action" in
        status) describe_call ;;
        delete) delete_call ;;
        train)
            restarts=0 code=1
            upload
            scratch="$(mktemp -d)"
            trap finish EXIT
            trap 'exit 129' HUP
            trap 'exit 130' INT
            trap 'exit 143' TERM
            train
            ;;
    esac
    if ((dry_run)); then
        show_call
    else
        exec "${call[@]}"
    fi
}
