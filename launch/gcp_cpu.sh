#!/usr/bin/env bash
# Trains on one CPU machine of Google Cloud, a spot one unless told otherwise, from its creation to its deletion. When
# it is taken away it is started again and runs the same line, which continues the run. So does this script.
#
#   bash launch/gcp_cpu.sh --workdir gs://BUCKET/RUN [options] -- --config configs/cifar_medium.py …
#   bash launch/gcp_cpu.sh status|delete --workdir gs://BUCKET/RUN   (or --name NAME)
#
#   --workdir W             where the run lives, in a bucket; its code is put there too (required)
#   --project P, --zone Z   default: what gcloud is set to
#   --machine_type T        n2-standard-8; e2-standard-4, c3-standard-22, …
#   --image_family F        debian-12; any with Python 3.11 or newer
#   --image_project P       debian-cloud
#   --disk_gb N             30
#   --name NAME             of the machine; default from the workdir. One that is there already is
#                           used, and deleted at the end
#   --spot, --on_demand     --spot
#   --max_restarts N        10; restarts that no preemption explains. Preemptions are not counted
#   --poll_secs S           30; between looks at the state
#   --keep                  do not delete the machine at the end
#   --dry_run               print the commands, run none
#   --                      the rest goes to mae_dist.main
#
# Exit code: the trainer's (docs/preemption.md); 1 and 2 also for what kept it from starting; 130 after Ctrl-C. However
# it ends, by Ctrl-C or a closed terminal too (tmux, nohup), it deletes the machine; one that was killed by -9 cannot.
set -euo pipefail

# shellcheck source=launch/gcp_vm.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcp_vm.sh"

# shellcheck disable=SC2034
kind=cpu extras=gcs quota_hint="'Preemptible CPUs' for spot, or CPUs"
# shellcheck disable=SC2034
machine_type=n2-standard-8 image_family=debian-12 image_project=debian-cloud disk_gb=30

gcp_main "$@"
