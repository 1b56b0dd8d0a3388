#!/usr/bin/env bash
# A reward with an old stack, served from its own virtual environment to a run in this one.
#   PYTHON      of the run: has diffusion-rtb installed; default python
#   OLD_PYTHON  makes the reward's environment: Python 3.11; default python3.11
#   OLD_VENV    where that environment is; default .venv-brisque
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python}"
OLD_VENV="${OLD_VENV:-.venv-brisque}"
HERE=examples/other_environment

if [ ! -e "$OLD_VENV/.installed" ]; then
    "${OLD_PYTHON:-python3.11}" -m venv "$OLD_VENV"
    "$OLD_VENV/bin/pip" install --quiet --disable-pip-version-check -r "$HERE/requirements.txt"
    # Without their dependencies: brisque's would bring the newest ones, this package's a second torch.
    "$OLD_VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps brisque==0.0.16 .
    touch "$OLD_VENV/.installed"
fi

DIFFUSION_RTB_TOKEN="$("$PYTHON" -c 'import secrets; print(secrets.token_urlsafe())')"
export DIFFUSION_RTB_TOKEN
PYTHONPATH="$HERE" "$OLD_VENV/bin/diffusion-rtb" serve-reward --reward brisque_reward:Brisque scale=10 --arrays numpy --port 8817 &
SERVER=$!
trap 'kill $SERVER' EXIT

"$PYTHON" train.py "$HERE/quality.yaml" "$@"
