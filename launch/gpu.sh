#!/usr/bin/env bash
# One machine with NVIDIA GPUs: as local.sh, with JAX's CUDA build. CUDA_VISIBLE_DEVICES picks GPUs.
#   bash launch/gpu.sh configs/voc.py
# A step trains on one episode per GPU.
set -euo pipefail
config=${1:?"usage: bash launch/gpu.sh CONFIG [--config.FIELD=VALUE ...], e.g. configs/voc.py"}
shift
export EXTRA=cuda12
exec bash "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$config" --config.train.episodes_per_step=0 "$@"
