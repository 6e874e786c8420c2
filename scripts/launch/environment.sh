#!/usr/bin/env bash
# Makes .venv in the checkout, with the package in it:
#
#   environment.sh EXTRAS          such as tpu,remote
#
# uv brings the Python, since those of cloud images are often older than the package takes (Ubuntu 22.04: 3.10) and without venv.
# A .venv that is there already is brought up to date. Every step that fails ends this script with its exit code.
set -euo pipefail

if (($# != 1)); then
  echo "usage: environment.sh EXTRAS" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export PATH="$HOME/.local/bin:$PATH" # where the installer puts uv
if ! command -v uv >/dev/null; then
  curl -LsSf https://astral.sh/uv/install.sh | env UV_NO_MODIFY_PATH=1 sh
fi
if [[ ! -x .venv/bin/python ]]; then
  rm -rf .venv
  uv venv --quiet --python-preference only-managed --python 3.12 --seed .venv
fi
uv pip install --quiet --python .venv/bin/python --editable ".[$1]"
