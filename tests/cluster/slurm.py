"""The same grid here and through a Slurm of one node, where a job is cancelled and the node goes
down: ./run_all.sh test tests/cluster/slurm.py, as root, with the packages of one_node.py.

Not among the tests that run by themselves: it takes a quarter of an hour.
"""

import sys
import threading
import time

import one_node
import pytest
import yaml
from pico import PICO

from lethe_utils import paths

sys.path.insert(0, str(paths.root() / "workflow"))
import dag  # noqa: E402

# No accounting here, so that sacct knows of no job.
ONE_NODE = {"slurm-status-command": "squeue"}
QUICK = {"slurm-init-seconds-before-status-checks": 5, "seconds-between-status-checks": 5}


def grid():
    """Two attacks and two seeds on one base."""
    changes = {key: yaml.safe_load(value) for key, value in PICO.items()}
    changes |= {"merge_methods": ["slerp"], "strengths_sweep": [], "clean_ratios_sweep": []}
    names = {"model": "tiny-gpt2", "dataset": "embedded", "defense": "lethe"}
    return [
        dag.load(names | {"attack": attack}, changes | {"seed": seed})
        for attack in ("cba", "lwp")
        for seed in (0, 1)
    ]


def results(runs):
    return {run.name: (run.folder / "results.csv").read_text() for run in runs}


def make_trouble(node, happened):
    """Cancel one running job, then take the node down for a while under another."""

    def running():
        return node.ask("squeue", "-h", "-t", "R", "-o", "%i").split()

    node.wait("two running jobs", lambda: len(running()) > 1, 300)
    node.ask("scancel", running()[0])
    happened.append("a job was cancelled")
    time.sleep(20)
    node.wait("a running job", running, 300)
    node.stop_node()
    time.sleep(5)
    node.start_node()
    happened.append("the node was down")


@pytest.mark.skipif(bool(one_node.missing()), reason=one_node.missing())
def test_a_cancelled_job_and_a_node_that_went_down_change_no_number(tmp_path, monkeypatch):
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path / "here"))
    assert dag.execute(grid(), 2, tmp_path / "log") == {}
    expected = results(grid())
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path / "there"))
    profile = tmp_path / "profile"
    profile.mkdir()
    ours = yaml.safe_load((dag.profile_folder("slurm") / "config.yaml").read_text("utf8"))
    (profile / "config.yaml").write_text(yaml.safe_dump(ours | ONE_NODE | QUICK))
    happened = []
    with one_node.one_node(tmp_path / "slurm") as node:
        monkeypatch.setenv("SLURM_CONF", node.environment["SLURM_CONF"])
        trouble = threading.Thread(target=make_trouble, args=(node, happened))
        trouble.start()
        failed = dag.execute(grid(), 2, tmp_path / "first", str(profile))
        trouble.join()
        print("first time:", failed)
        again = dag.execute(grid(), 2, tmp_path / "second", str(profile))
    assert happened == ["a job was cancelled", "the node was down"]
    assert again == {} and results(grid()) == expected
