#!/usr/bin/env bash
# Trains and evaluates on this machine, on every device that JAX finds. Give the config, then any fields:
#   bash launch/local.sh configs/voc.py:cpu --config.data.source=/mnt/VOCdevkit
# A run that was stopped goes on with the same command.
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" "${EXTRA:-}"
config=${1:?"usage: bash launch/local.sh CONFIG [--config.FIELD=VALUE ...], e.g. configs/voc.py:cpu"}
shift
.venv/bin/python -c 'import jax; d = jax.devices(); print(f"{len(d)} x {d[0].device_kind}, jax {jax.__version__}")'
exec .venv/bin/python -m mlfsic_jax.main --config="$config" "$@"
