"""A real SLURM of two nodes on this host, under a temporary folder: munged, slurmctld, two slurmd.

Two partitions share the nodes: `main`, whose jobs are preempted (a signal, a grace time, then requeued), and
`urgent`, whose jobs preempt them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("lalic1", "lalic2")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")

CONFIG = """\
ClusterName=lalic-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first_job}
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
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=120
UnkillableStepTimeout=600
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=600
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Sockets={cpus} CoresPerSocket=1
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Sockets={cpus} CoresPerSocket=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
"""


def missing_programs() -> list[str]:
    """What is not installed of Debian's slurmctld, slurmd, slurm-client and munge."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Cluster:
    """Start with `start()`, always end with `stop()`: it ends its jobs, and the processes it started by pid."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        # Every node has room for two jobs at once, however few processors the host has.
        config = CONFIG.format(
            host=socket.gethostname(),
            folder=self.folder,
            ports=_free_ports(3),
            nodes=NODES,
            cpus=2,
            first_job=secrets.randbelow(1_000_000) + 1,  # not the numbers of another cluster on this host
        )
        (self.folder / "slurm.conf").write_text(config)
        munge = [f"--key-file={key}", f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"]
        munge += [f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed"]
        self._spawn("munged", "munged", "--foreground", "--force", *munge)
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._spawn("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self._spawn(node, "slurmd", "-D", "-N", node)
        self.wait(lambda: all(self.node_state(node) == "IDLE" for node in NODES), "nodes idle")

    def stop(self) -> None:
        """End all jobs, so that none of their processes stays behind, then the daemons."""
        try:
            self.run("scancel", "--user=root")
            self.wait(lambda: not self.run("squeue", "--noheader").strip(), "no job left", 120)
        except RuntimeError as error:
            print(f"jobs could not be ended: {error}")
        daemons = list(reversed(self._daemons.values()))
        for process in daemons:
            process.terminate()
        for process in daemons:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # ---- jobs

    def submit(self, folder: Path, arguments: Sequence[str], **environment: str) -> str:
        """`sbatch` in `folder`; the job's number."""
        command = ["sbatch", "--parsable", f"--chdir={folder}", *arguments]
        return self.run(*command, **environment).strip().split(";")[0]

    def state(self, job: str) -> str:
        """State of a job, e.g. RUNNING, PENDING, COMPLETING, COMPLETED, FAILED."""
        return self.field(job, "JobState")

    def over(self, job: str) -> str | None:
        """The state in which the job ended for good, None before."""
        state = self.state(job)
        return state if state in OVER else None

    def restarts(self, job: str) -> int:
        """How often the job was requeued."""
        return int(self.field(job, "Restarts"))

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def signal(self, job: str, name: str, *, batch: bool) -> None:
        """`scancel --signal`: to the batch script (`batch`), or to the job's steps."""
        self.run("scancel", *(["--batch"] if batch else []), f"--signal={name}", job)

    def cancel(self, job: str) -> None:
        self.run("scancel", job)

    def requeue(self, job: str) -> None:
        """`scontrol requeue`: kill the job, wherever it is, and put it back into the queue."""
        self.run("scontrol", "requeue", job)

    def start_again(self, job: str, restarts: int) -> None:
        """Wait until the job was requeued `restarts` times, and start it at once; SLURM would wait for two minutes."""
        self.wait(lambda: self.restarts(job) >= restarts, f"requeue {restarts} of job {job}", 300)
        self.wait(lambda: self.state(job) == "PENDING", f"job {job} pending", 300)
        # A busy slurmd gets the kill of the old attempt late, and would take it for the new one's steps.
        deadline = time.monotonic() + 60
        while self.messages_left() and time.monotonic() < deadline:
            time.sleep(1)
        time.sleep(3)  # in the second of the kill, slurmd takes the new start for the job that it has just killed
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def messages_left(self) -> bool:
        """Whether the controller has messages for nodes that it has not got through to them."""
        said = self.run("sdiag")
        return any(int(n) for n in re.findall(r"^Agent (?:queue size|count):\s+(\d+)", said, re.MULTILINE))

    def processes_of(self, job: str, node: str | None = None) -> list[int]:
        """Processes of a job's batch script and steps, on one node or on all, without the daemon above them."""
        # Another test's cluster on this host has jobs of the same numbers on nodes of the same names.
        wanted = {f"SLURM_JOB_ID={self.field(job, 'JobId')}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        if node:
            wanted.add(f"SLURMD_NODENAME={node}")
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                with contextlib.suppress(OSError):
                    if wanted <= set((folder / "environ").read_bytes().decode(errors="replace").split("\0")):
                        found.append(int(folder.name))
        return sorted(found)

    def ranks_of(self, job: str, node: str | None = None) -> list[int]:
        """The training processes among them, data loading processes left out."""
        found = []
        for pid in self.processes_of(job, node):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if (
                    "lalic.train" in words
                    and "python" in Path(words[0]).name
                    and "accelerate" not in "".join(words[:3])
                ):
                    found.append(pid)
        return [pid for pid in found if _parent(pid) not in found]

    # ---- nodes

    def node_state(self, node: str) -> str:
        """State of a node, e.g. IDLE, MIXED, DOWN."""
        words = self.run("scontrol", "show", "node", node).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith("State="))

    def take_node_down(self, node: str, job: str | None = None) -> None:
        """What a power cut does: slurmd, and everything of `job` there, are gone at once; SLURM is told of it."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        if job:
            pids = self.processes_of(job, node)
            for pid in {*pids, *(p for p in map(_parent, pids) if p and _name(p).startswith("slurmstepd"))}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def bring_node_up(self, node: str) -> None:
        """Start slurmd again, and let SLURM use the node."""
        self._spawn(node, "slurmd", "-D", "-N", node)

        def idle() -> bool:
            state = self.node_state(node)
            if state.startswith("DOWN") and "NOT_RESPONDING" not in state and "*" not in state:
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            return state in ("IDLE", "MIXED", "ALLOCATED")

        self.wait(idle, f"{node} up", 120)

    # ---- commands

    def run(self, *command: str, **environment: str) -> str:
        """Output of a SLURM command that must succeed."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def wait(self, ready: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Wait until `ready()`; RuntimeError with the daemons' last lines when that takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):
                if ready():
                    return
            time.sleep(0.3)
        logs = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        tails = "".join(f"-- {p.name}\n{p.read_text(errors='replace')[-800:]}" for p in logs)
        raise RuntimeError(f"{what}: not there after {seconds} s\n{tails}")

    def _spawn(self, name: str, *command: str) -> None:
        log = open(self.folder / f"{name}.out", "ab")  # noqa: SIM115 the child keeps it
        self._daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return None


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
