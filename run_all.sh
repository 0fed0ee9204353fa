#!/usr/bin/env bash
# The front door: makes the environment once, then runs. `./run_all.sh --help` shows everything.
#   ./run_all.sh                         the tiny profile: embedded data, tiny-gpt2, on a CPU
#   ./run_all.sh MODEL [--dataset D] [--attack A] [--defense F] [-p key value ...] [--dry-run]
#   ./run_all.sh grid table2-tiny        many runs: every defense against every attack
#   ./run_all.sh purify --suspect DIR --base DIR --clean-data FILE --out DIR   a model of your own
#   ./run_all.sh tables                  tables and figures from the committed results
#   ./run_all.sh test [pytest options]   all tests
set -euo pipefail
here="${BASH_SOURCE[0]}"
while [ -L "$here" ]; do  # a link to this file stands for the checkout it points to
    link="$(readlink "$here")"
    case "$link" in /*) here="$link" ;; *) here="$(dirname "$here")/$link" ;; esac
done
root="$(cd "$(dirname "$here")" && pwd -P)"
export LETHE_ROOT="$root" TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
export PYTHONWARNINGS=ignore
# OpenMP's threads spin while they wait; beside any other busy program that can slow a tiny model
# tenfold, for its steps are short. Waiting asleep after a few microseconds costs nothing measurable.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

python=""
for candidate in python python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: Python 3.11 or newer is needed; install it and run this again" >&2
    exit 1
fi

# An active environment that already holds the pins is used as it is; else .venv is made once.
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && "$python" "$root/workflow/check_pins.py" >/dev/null; then
    bin="$(dirname "$("$python" -c 'import sys; print(sys.executable)')")"
else
    bin="$root/.venv/bin"
    if ! { [ -x "$bin/python" ] && "$bin/python" "$root/workflow/check_pins.py" >/dev/null; }; then
        echo "installing the pinned packages into .venv (once, a few minutes) ..."
        if "$python" -c 'import ensurepip' 2>/dev/null; then
            "$python" -m venv "$root/.venv"
        else  # Debian keeps it in a package of its own
            "$python" -m venv --without-pip "$root/.venv"
            "$bin/python" "$root/workflow/get_pip.py"
        fi
        if ! command -v nvidia-smi >/dev/null; then
            # Without a GPU the CPU build saves gigabytes; where its index is out of reach, PyPI's does.
            "$bin/pip" install -q --retries 0 --timeout 5 --index-url https://download.pytorch.org/whl/cpu \
                "$("$bin/python" "$root/workflow/check_pins.py" torch)" 2>/dev/null || true
        fi
        "$bin/pip" install -q --disable-pip-version-check -e "$root[local]"
    fi
fi
export PATH="$bin:$PATH"

if [ "${1:-}" = test ]; then
    shift
    cd "$root"
    exec "$bin/python" -m pytest "$@"
fi
exec "$bin/python" "$root/workflow/run.py" "$@"
