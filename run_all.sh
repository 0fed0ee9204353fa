#!/usr/bin/env bash
# The front door: makes the environment once, then runs. `./run_all.sh --help` shows everything.
#   ./run_all.sh                         embedded data, SmolLM2-135M, on two CPU cores
#   ./run_all.sh MODEL [--dataset D] [--attack A] [--defense F] [-p key value ...] [--dry-run]
#   ./run_all.sh [MODEL] --model-dir PATH   the same on a model of yours: a folder, or a GGUF file
#   ./run_all.sh grid table2-tiny        many runs: every defense against every attack
#   ./run_all.sh purify --suspect DIR --base DIR --clean-data FILE --out DIR   a model of your own
#   ./run_all.sh tables                  tables and figures from the committed results
#   ./run_all.sh lab [jupyter options]   JupyterLab in the same environment, opened at 01_data
#   ./run_all.sh check                   does it work here: all six notebooks on a pico model, PASS or FAIL
#   ./run_all.sh test [fast] [options]   all tests, or those that train nothing and run no notebook
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
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: Python 3.11, 3.12 or 3.13 is needed; install one and run this again" >&2
    exit 1
fi

pins() { "$python" "$root/workflow/check_pins.py" "$@"; }

# An active environment that already holds the pins is used as it is; else .venv is made once.
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && pins >/dev/null; then
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
        lock="$root/requirements.lock"
        # PyPI's torch brings gigabytes for NVIDIA's GPUs on every Linux. Without one, torch comes from
        # its CPU index (pinned, but another file than the lock's hash is of) and the rest from the
        # lock; where that index is out of reach, all comes from the lock.
        if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null &&
            "$bin/pip" install -q --no-deps --retries 0 --timeout 5 2>/dev/null \
                --index-url https://download.pytorch.org/whl/cpu "$(pins torch)"; then
            lock="$root/.venv/requirements-cpu.lock"
            pins cpu >"$lock"
        fi
        # uv reads no pip settings (a mirror, a proxy's certificate); where it fails, pip goes on.
        PATH="$PATH:$bin"
        { command -v uv || "$bin/pip" install -q "$(pins uv)"; } >/dev/null 2>&1 || true
        uv pip install -q --python "$bin/python" --no-deps --require-hashes -r "$lock" 2>/dev/null ||
            "$bin/pip" install -q --disable-pip-version-check --no-deps --require-hashes -r "$lock"
        "$bin/pip" install -q --disable-pip-version-check --no-deps --no-build-isolation -e "$root"
    fi
fi
export PATH="$bin:$PATH"

# Fetched once per machine; what still lacks it then says how to get it.
[ -e "${LETHE_CACHE:-$HOME/.cache/lethe}/nltk_data/corpora/wordnet" ] ||
    "$bin/python" "$root/workflow/get_wordnet.py" >/dev/null 2>&1 || true

case "${1:-}" in
lab)
    for name in LETHE_RUNS LETHE_DATA_DIR LETHE_CACHE; do # the notebooks run in another folder
        case "${!name:-/}" in /*) ;; *) export "$name=$PWD/${!name}" ;; esac
    done
    cd "$root"
    exec "$bin/python" -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/01_data.ipynb "${@:2}"
    ;;
check)
    cd "$root"
    whole=tests/test_end_to_end.py::test_results_have_the_columns_controls_and_intervals
    "$bin/python" -m pytest -q -o addopts= "$whole" || { echo "FAIL: see above" && exit 1; }
    echo "PASS: the six notebooks ran and their results add up"
    exit
    ;;
test)
    cd "$root"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two workers, a core each
    if [ "${2:-}" = fast ]; then
        exec "$bin/python" -m pytest tests -m "not slow" "${@:3}"
    fi
    exec "$bin/python" -m pytest "${@:2}"
    ;;
esac
exec "$bin/python" "$root/workflow/run.py" "$@"
