#!/usr/bin/env bash
# Tests that hurt, at length: the program killed at random 60 times in a row, every parser fuzzed, a long soak; about
# half an hour on a CPU. Arguments go to pytest, e.g. -k killed; MLFSIC_SEED chooses other moments for the kills.
# MLFSIC_OPTIMISED: with XLA's optimised programs, as users run them.
export MLFSIC_OPTIMISED=1 MLFSIC_KILLS=${MLFSIC_KILLS:-60} MLFSIC_FUZZ=${MLFSIC_FUZZ:-2000}
exec "$(dirname "${BASH_SOURCE[0]}")/test.sh" -n 0 -m "" tests/test_torture.py tests/test_fuzz.py "$@"
