#!/usr/bin/env bash
# One TPU VM:         bash launch/tpu_vm.sh configs/voc.py
# A pod, from anywhere, on all of its VMs at once; JAX finds the others by itself:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#     --command="cd mlfsic_jax && bash launch/tpu_vm.sh configs/voc.py --workdir=/mnt/shared/voc"
# The workdir and config.cache_dir have to be on a disk that all VMs of a pod share (Filestore, or a mounted bucket).
# A step trains on one episode per chip.
set -euo pipefail
config=${1:?"usage: bash launch/tpu_vm.sh CONFIG [--workdir=DIR] [--config.FIELD=VALUE ...]"}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh tpu
exec .venv/bin/python -m mlfsic_jax.main --config="$config" --config.train.episodes_per_step=0 "$@"
