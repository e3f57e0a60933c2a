#!/usr/bin/env bash
# Installs the test extra into .venv and runs the tests in two processes; arguments go to pytest, e.g. -k lcm or -m slow
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" test
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  echo "PyTorch is not installed: the tests that compare with it are skipped. To run them:"
  echo "  .venv/bin/pip install -c constraints.txt torch --extra-index-url https://download.pytorch.org/whl/cpu"
fi
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
