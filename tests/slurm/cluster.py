"""A real SLURM of two nodes on this host, under a temporary folder: munged, slurmctld, two slurmd."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("lalic1", "lalic2")

CONFIG = """\
ClusterName=lalic-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=20
MinJobAge=600
ReturnToService=2
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What is not installed of Debian's slurmctld, slurmd, slurm-client and munge."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Cluster:
    """Start with `start()`, always end with `stop()`: it ends its jobs, and the processes it started by pid."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        config = CONFIG.format(host=socket.gethostname(), folder=self.folder, ports=_free_ports(3), nodes=NODES)
        (self.folder / "slurm.conf").write_text(config)
        munge = [f"--key-file={key}", f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"]
        munge += [f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed"]
        self._spawn("munged", "--foreground", "--force", *munge)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        self._wait(lambda: self.run("sinfo", "-h", "-o", "%t %D").strip() == f"idle {len(NODES)}", "nodes idle")

    def stop(self) -> None:
        """End all jobs, so that none of their processes stays behind, then the daemons."""
        try:
            self.run("scancel", "--user=root")
            self._wait(lambda: not self.run("squeue", "--noheader").strip(), "no job left")
        except RuntimeError as error:
            print(f"jobs could not be ended: {error}")
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, *command: str, **environment: str) -> str:
        """Output of a SLURM command that must succeed."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, folder: Path, arguments: Sequence[str], **environment: str) -> str:
        """`sbatch` in `folder`; the job's number."""
        command = ["sbatch", "--parsable", f"--chdir={folder}", *arguments]
        return self.run(*command, **environment).strip().split(";")[0]

    def state(self, job: str) -> str:
        """State of a job, e.g. RUNNING, PENDING, COMPLETED, FAILED."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def _spawn(self, *command: str) -> None:
        log = open(self.folder / f"{len(self._processes)}-{command[0]}.out", "wb")  # noqa: SIM115 the child keeps it
        self._processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT))

    def _wait(self, ready, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if ready():
                    return
            except RuntimeError:
                pass
            time.sleep(0.3)
        logs = "".join(path.read_text(errors="replace")[-500:] for path in self.folder.glob("*.out"))
        raise RuntimeError(f"{what}: not there after {seconds} s\n{logs}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
