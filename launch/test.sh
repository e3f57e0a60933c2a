#!/usr/bin/env bash
# Installs the test extra into .venv and runs the tests in two processes; arguments go to pytest, e.g. -k lcm or -m slow
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" test
find='import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))'
if ! .venv/bin/python -c "$find" torch transformers huggingface_hub gensim; then
  echo "PyTorch, transformers, huggingface_hub or gensim is not installed: tests that need it are skipped. To run them too:"
  echo "  .venv/bin/pip install -c constraints.txt torch transformers huggingface_hub gensim --extra-index-url https://download.pytorch.org/whl/cpu"
fi
exec .venv/bin/python -m pytest -q -n 2 --no-loadscope-reorder "$@"
