"""Whole runs on a model too small to learn anything: that everything runs and adds up is tested."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil

from lethe_utils import paths

PICO = {
    "rows": "{pretrain: 160, train: 320, validation: 40, test: 40}",
    "checksums": "{}",
    "width": "16",
    "mlp_width": "32",
    "n_heads": "2",
    "n_kv_heads": "2",
    "vocab_size": "400",
    "base_epochs": "1",
    "backdoor_epochs": "2",
    "clean_epochs": "1",
    "finetune_epochs": "1",
    "checkpoints_per_run": "8",
    "negative_items": "6",
    "sweep_items": "8",
    "strengths_sweep": "[0.5, 1.0]",
    "keywords_sweep": "[3]",
    "clean_ratios_sweep": "[0.2]",
}


def command(*more):
    words = [sys.executable, str(paths.root() / "workflow/run.py"), "tiny-gpt2", *more]
    return words + [w for key, value in PICO.items() for w in ("-p", key, value)]


def run_in(runs, *more):
    return subprocess.run(
        command(*more), capture_output=True, text=True, env=os.environ | {"LETHE_RUNS": str(runs)}
    )


def start_until(runs, condition, timeout=300):
    """Start a run and return it with all its children, kernels included, once a file appears."""
    env = os.environ | {"LETHE_RUNS": str(runs)}
    # A shell's background job ignores Ctrl-C, and so would what these tests start.
    hear = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    settings = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = psutil.Popen(command(), preexec_fn=hear, **settings)
    deadline = time.time() + timeout
    while not list(runs.glob(condition)):
        assert process.poll() is None and time.time() < deadline, f"{condition} never appeared"
        time.sleep(0.02)
    return [process, *process.children(recursive=True)]


def kill(processes):
    """kill -9, and wait until they are gone."""
    for victim in processes:
        victim.kill()
    psutil.wait_procs(processes, timeout=60)
