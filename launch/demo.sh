#!/usr/bin/env bash
# The whole method in minutes, on the built-in scenes: installs into .venv, trains, evaluates, prints the table, and
# writes runs/demo/report.html, a page with the results and what the model looked at.
# Run again, it goes on where it was stopped; arguments go to mlfsic_jax.main, e.g. --config.seed=1
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" ""
workdir=runs/demo
for argument in "$@"; do case $argument in --workdir=*) workdir=${argument#--workdir=} ;; esac; done
.venv/bin/python -m mlfsic_jax.main --config=configs/demo.py "$@"
exec .venv/bin/python -m mlfsic_jax.report --workdir="$workdir"
