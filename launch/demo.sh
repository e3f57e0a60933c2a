#!/usr/bin/env bash
# The whole method in minutes, on the built-in scenes: installs into .venv, trains, evaluates, prints the table.
# Run again, it goes on where it was stopped; arguments go to mlfsic_jax.main, e.g. --workdir=runs/other
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" ""
exec .venv/bin/python -m mlfsic_jax.main --config=configs/demo.py "$@"
