# Sourced by the scripts beside it: makes .venv and installs the project there, unless that is already done.
# Usage: source launch/install.sh [EXTRAS]    PYTHON=python3.12 picks another interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $python is missing or older than Python 3.11: install one, or name it with PYTHON=..." >&2
  exit 1
fi
stamp=".venv/installed${extras:+-$extras}"
wanted=$(cat setup.py constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing mlfsic_jax${extras:+[$extras]} into .venv (about a minute)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # -qq: pip's warnings do not matter here, its errors still show. --no-compile: Python compiles what it imports.
  .venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
  echo "$wanted" >"$stamp"
fi
