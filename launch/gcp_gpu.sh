#!/usr/bin/env bash
# Trains on one GPU machine of Google Cloud, a spot one unless told otherwise, from its creation to its deletion. When
# it is taken away it is started again and runs the same line, which continues the run. So does this script.
#
#   bash launch/gcp_gpu.sh --workdir gs://BUCKET/RUN [options] -- --config configs/cifar_medium.py …
#   bash launch/gcp_gpu.sh status|delete --workdir gs://BUCKET/RUN   (or --name NAME)
#
#   --workdir W             where the run lives, in a bucket; its code is put there too (required)
#   --project P, --zone Z   default: what gcloud is set to
#   --machine_type T        g2-standard-8 (one L4); g2-standard-48 (four), a2-highgpu-1g (an A100), …
#   --image_family F        with NVIDIA's driver; CUDA itself comes with JAX: common-cu128-ubuntu-2204-nvidia-570.
#                           gcloud compute images list --project=P --no-standard-images --show-deprecated lists them
#   --image_project P       deeplearning-platform-release
#   --disk_gb N             100
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
kind=gpu extras=cuda12,gcs quota_hint="'Preemptible NVIDIA L4 GPUs' or its like, and GPUS-ALL-REGIONS"
# shellcheck disable=SC2034
machine_type=g2-standard-8 disk_gb=100
# shellcheck disable=SC2034
image_family=common-cu128-ubuntu-2204-nvidia-570 image_project=deeplearning-platform-release
# A machine with GPUs cannot be moved to another host while it runs.
# shellcheck disable=SC2034
machine_flags=(--maintenance-policy=TERMINATE)

gcp_main "$@"
