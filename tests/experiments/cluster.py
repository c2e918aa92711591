"""A SLURM of one node, started and ended by a test: Debian's slurm-wlm and munge, as root, below one folder."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
# no accounting: what the commands need of a cluster is its queue
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=1,bf_interval=1,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=12
MinJobAge=300
NodeName={host} CPUs={slots} RealMemory=1000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=tests Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=12
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9
"""


def why_not() -> str:
    """Why there can be no SLURM here; nothing if there can."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    if missing:
        return f"SLURM is not installed (Debian: slurm-wlm, munge): no {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "the daemons of SLURM start as root only"


class Cluster:
    """Daemons of one node, with as many slots as jobs shall run at a time.

    Attributes:
        variables: those that SLURM's commands need to find it.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        with socket.socket() as one, socket.socket() as two:
            for s in (one, two):
                s.bind(("localhost", 0))
            ports = [s.getsockname()[1] for s in (one, two)]
        file = folder / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        file.write_text(CONFIGURATION.format(host=host, folder=folder, slots=slots, ports=ports))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        folder.chmod(0o755)
        self.variables = {"SLURM_CONF": str(file), "PATH": PATH}
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
        munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
        self.daemons = [self._start(munge)]
        self._wait_for(lambda: (folder / "munge.socket").exists())
        self.daemons += [self._start(["slurmctld", "-D"]), self._start(["slurmd", "-D"])]
        self._wait_for(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%t"))

    def _start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        log = (self.folder / f"{command[0]}.out").open("w")
        program = shutil.which(command[0], path=PATH)
        return subprocess.Popen(
            [program, *command[1:]], env={**os.environ, **self.variables}, stdout=log, stderr=subprocess.STDOUT
        )

    def ask(self, *command: str) -> str:
        """The output of one of SLURM's commands; nothing if it fails."""
        return subprocess.run(command, env={**os.environ, **self.variables}, capture_output=True, text=True).stdout

    def _wait_for(self, condition) -> None:
        for _ in range(300):
            if condition():
                return
            time.sleep(0.1)
        logs = "\n".join(f"{f.name}: {f.read_text()[-2000:]}" for f in self.folder.glob("*.out"))
        self.stop()
        raise RuntimeError(f"SLURM doesn't start:\n{logs}")

    def stop(self) -> None:
        self.ask("scancel", "--user", "root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait()
