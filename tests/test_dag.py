"""A run that is at work is not started beside itself."""

import signal

import psutil
import pytest
from pico import kill, run_in, start_until

pytestmark = pytest.mark.slow


def test_a_run_whose_front_door_was_killed_is_not_started_beside_itself(tmp_path):
    runs = tmp_path / "orphan"
    runs.mkdir()
    front_door, *others = start_until(runs, "*/notebooks/01_data.log")
    kill([front_door])
    again = run_in(runs)
    alive = [p for p in others if p.is_running()]
    kill([*alive, *(child for p in alive for child in p.children(recursive=True))])
    assert again.returncode == 1
    assert "another process is working on this run" in again.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_leaves_nothing_at_work(tmp_path, how):
    started = start_until(tmp_path, "*/notebooks/01_data.log")
    started[0].send_signal(how)
    gone, alive = psutil.wait_procs(started, timeout=60)
    kill(alive)
    assert not alive
    assert started[0].returncode == 1
