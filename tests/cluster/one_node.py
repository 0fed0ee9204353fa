"""A Slurm cluster of one node in a temporary folder, as root: munged, slurmctld and slurmd.

For tests: Debian's packages slurmctld, slurmd, slurm-client and munge, and all of it gone at the
end. Job steps know the cluster by the system's own configuration file alone (Snakemake's plugin
drops SLURM_CONF), so that is a link to the one here, and must not be there before.
"""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SYSTEM = Path("/etc/slurm/slurm.conf")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
CONF = """
ClusterName=lethe
SlurmctldHost={host}
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=3600
SlurmctldTimeout=10
SlurmdTimeout=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; "" where there can."""
    if os.geteuid() != 0:
        return "a one-node Slurm needs root"
    if SYSTEM.exists():
        return f"this machine has a Slurm of its own: {SYSTEM}"
    lacking = [name for name in PROGRAMS if not shutil.which(name)]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Node:
    """The running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        memory = psutil.virtual_memory().total // 2**20 - 512
        cpus = len(os.sched_getaffinity(0))
        text = CONF.format(host=host, ports=_free_ports(2), folder=folder, cpus=cpus, memory=memory)
        (folder / "slurm.conf").write_text(text)
        SYSTEM.parent.mkdir(parents=True, exist_ok=True)
        SYSTEM.unlink(missing_ok=True)  # a dead link, of a test that was killed
        SYSTEM.symlink_to(folder / "slurm.conf")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        self.start(
            "munged",
            *("--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"),
            *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
        )
        self.wait("munge.socket", lambda: (folder / "munge.socket").exists())
        self.start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        self.start_node()

    def start(self, name: str, *words: str) -> None:
        """Start one of the three programs."""
        log = (self.folder / f"{name}.out").open("a")
        command = [shutil.which(name), *words]
        self.processes[name] = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log
        )

    def start_node(self) -> None:
        """Start slurmd, and wait until the node takes jobs."""
        self.start("slurmd", "-D", "-f", str(self.folder / "slurm.conf"))
        self.wait("a node that answers", self.answers)

    def answers(self) -> bool:
        """Whether the node is up: free, or at work on what it had before it went down."""
        return self.ask("sinfo", "-h", "-o", "%t").strip() in ("idle", "mix", "alloc")

    def stop_node(self) -> None:
        """Kill slurmd, as a node that goes down; its jobs' processes live on."""
        self.processes.pop("slurmd").kill()

    def ask(self, *command: str) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout

    def wait(self, what: str, condition, seconds: int = 60) -> None:
        """Wait for a condition. Raises TimeoutError with what was waited for."""
        end = time.time() + seconds
        while not condition():
            if time.time() > end:
                logs = [f.read_text()[-400:] for f in self.folder.glob("*.out")]
                raise TimeoutError(f"{what} never came: {logs}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End everything."""
        self.ask("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
        for process in reversed(self.processes.values()):
            process.terminate()
            process.wait()
        SYSTEM.unlink()


@contextmanager
def one_node(folder: Path) -> Iterator[Node]:
    """A cluster for as long as the block takes."""
    node = Node(folder)
    try:
        yield node
    finally:
        node.stop()
