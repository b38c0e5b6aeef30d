"""A real SLURM cluster on one machine, for tests: two nodes with host names, addresses and process tables of their own.

Login host and nodes are Linux namespaces, joined by a bridge that nobody outside sees; all daemons are Debian's. Nodes
claim more cores than there are, and have fake GPUs (device files that are only counted). Partitions: `main`, and
`preempt`, whose jobs are requeued, after a warning, when a job of `main` needs their nodes.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

NODES = ("node1", "node2")
GPUS_PER_NODE = 4
PREEMPTION_SECONDS = 20  # from the warning to the end
NODE_SILENCE_SECONDS = 10  # until a node counts as lost

_HERE = Path(__file__).resolve().parent
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "nsenter", "setpriv", "ip")
_NETWORK = "10.99.0"
_NAMESPACES = ("--net", "--uts", "--mount")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

_SETTINGS = f"""
ClusterName=test
SlurmctldHost=login({_NETWORK}.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={{folder}}/munge/socket
StateSaveLocation={{folder}}/state
SlurmdSpoolDir={{folder}}/spool/%n
SlurmctldPidFile={{folder}}/slurmctld.pid
SlurmdPidFile={{folder}}/slurmd-%n.pid
SlurmdLogFile={{folder}}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
GresTypes=gpu
EnforcePartLimits=ALL
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1
KillWait=5
MessageTimeout=10
TCPTimeout=2
SlurmdTimeout={NODE_SILENCE_SECONDS}
ReturnToService=2
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeAddr={_NETWORK}.11 CPUs=64 RealMemory=256000 Gres=gpu:{GPUS_PER_NODE}
NodeName=node2 NodeAddr={_NETWORK}.12 CPUs=64 RealMemory=256000 Gres=gpu:{GPUS_PER_NODE}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=preempt Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={PREEMPTION_SECONDS}
"""


class Unavailable(Exception):
    """No cluster can be started here; the text says why."""


@dataclass(frozen=True)
class Job:
    """What SLURM says of a job or of one task of an array."""

    task: str
    """Index in the array, empty without one"""
    state: str
    exit_code: int
    restarts: int
    start: str

    @property
    def ended(self) -> bool:
        return self.state in _ENDED


def eventually(condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
    """Wait until a condition holds; AssertionError naming `what` after the time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {what}"
        time.sleep(0.1)


class Cluster:
    """Running from construction to `stop`; raises Unavailable where that cannot be."""

    def __init__(self) -> None:
        _require_programs()
        # Short, because the path of munge's socket may have 107 characters only.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self._processes: dict[str, subprocess.Popen[str]] = {}
        try:
            self._write_settings()
            self._start_login_host()
            for node in NODES:
                self.boot(node)
            eventually(lambda: self.states() == ["idle"] * len(NODES), "all nodes idle", 30)
        except (OSError, subprocess.SubprocessError, AssertionError) as problem:
            logs = "; ".join(path.read_text()[-300:] for path in sorted((self.folder / "log").glob("*")))
            self.stop()
            raise Unavailable(f"SLURM does not start here: {problem} ({' '.join(logs.split())[-900:]})") from problem

    def _write_settings(self) -> None:
        for name in ("etc", "log", "munge", "state", "spool", "dev"):
            (self.folder / name).mkdir(mode=0o755)
        self.folder.chmod(0o755)
        (self.folder / "etc/slurm.conf").write_text(_SETTINGS.format(folder=self.folder))
        for gpu in range(GPUS_PER_NODE):  # SLURM insists on device files; these are /dev/null
            os.mknod(self.folder / f"dev/gpu{gpu}", 0o20666, os.makedev(1, 3))
        gpus = f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/dev/gpu[0-{GPUS_PER_NODE - 1}]\n"
        (self.folder / "etc/gres.conf").write_text(gpus)
        hosts = {"127.0.0.1": "localhost", f"{_NETWORK}.1": "login"}
        hosts |= {f"{_NETWORK}.{11 + number}": node for number, node in enumerate(NODES)}
        (self.folder / "etc/hosts").write_text("".join(f"{address} {name}\n" for address, name in hosts.items()))
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _start_login_host(self) -> None:
        script = ["sh", str(_HERE / "login.sh"), str(self.folder), f"{_NETWORK}.1"]
        self._start("login", ["unshare", *_NAMESPACES, "--propagation", "slave", *script])
        munge = self.folder / "munge"
        files = [f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid"]
        files += [f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
        self._start("munged", self._on_login("munged", "--foreground", "--force", *files), wait=False)
        eventually((munge / "socket").exists, "munge's socket", 10)
        self._start("slurmctld", self._on_login("slurmctld", "-D"), wait=False)

    def _start(self, name: str, command: Sequence[str], *, wait: bool = True) -> None:
        """Start a process that dies with this one; it says `ready` on its first line if it is to be waited for."""
        with (self.folder / "log" / name).open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if wait else log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._processes[name] = process
        if process.stdout and process.stdout.readline() != "ready\n":
            raise OSError(f"{name} did not start")

    def _on_login(self, *command: str, cwd: Path | None = None) -> list[str]:
        where = [f"--wd={cwd}"] if cwd else []
        return ["nsenter", "--target", str(self._processes["login"].pid), *_NAMESPACES, *where, "--", *command]

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """What a command on the login host prints; AssertionError with its message if it fails."""
        done = subprocess.run(self._on_login(*command, cwd=cwd), env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done.stdout

    def states(self) -> list[str]:
        """Of the nodes: idle, mixed, down* ..."""
        with contextlib.suppress(AssertionError):
            return self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
        return []

    def boot(self, node: str) -> None:
        """Start a node, also one that crashed."""
        number = NODES.index(node) + 1
        shutil.rmtree(self.folder / "spool" / node, ignore_errors=True)
        (self.folder / "spool" / node).mkdir()
        script = ["sh", str(_HERE / "node.sh"), str(self.folder), node, f"{_NETWORK}.{10 + number}"]
        own = [*_NAMESPACES, "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "slave"]
        self._start(node, ["unshare", *own, *script])
        cable, pid = f"cable{number}", self._processes[node].pid
        # The cable of a crashed node goes away with its network, a little later.
        eventually(lambda: f"{cable}@" not in self.run("ip", "link"), f"the old {cable} gone", 10)
        self.run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self.run("ip", "link", "set", cable, "master", "br0", "up")

    def crash(self, node: str) -> None:
        """A power cut: all processes of the node are gone at once."""
        process = self._processes.pop(node)
        process.kill()
        process.wait(10)

    def start_on(self, node: str, *command: str) -> subprocess.Popen[str]:
        """Start a command on a node; a signal would not reach it, but it sees the end of its input."""
        children = Path(f"/proc/{self._processes[node].pid}/task/{self._processes[node].pid}/children").read_text()
        enter = ["nsenter", "--target", children.split()[0], *_NAMESPACES, "--pid", "--"]
        return subprocess.Popen([*enter, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def submit(self, *arguments: str, cwd: Path, env: dict[str, str]) -> str:
        """sbatch with these arguments; returns the number of the job."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env).strip()

    def jobs(self, number: str) -> list[Job]:
        """The job's state, or one for each task of an array."""
        found = []
        for line in self.run("scontrol", "--oneliner", "show", "job", number).splitlines():
            values = dict(word.split("=", 1) for word in line.split() if "=" in word)
            code, by_signal = map(int, values["ExitCode"].split(":"))
            found.append(
                Job(
                    values.get("ArrayTaskId", ""),
                    values["JobState"],
                    code or 128 * bool(by_signal) + by_signal,
                    int(values["Restarts"]),
                    values["StartTime"],
                )
            )
        return sorted(found, key=lambda job: job.task)

    def wait_until(self, number: str, condition: Callable[[list[Job]], bool], timeout_seconds: float) -> list[Job]:
        """Wait for a condition on the job; a requeued one is not left to wait the two minutes that SLURM has for it."""
        deadline = time.monotonic() + timeout_seconds
        while not condition(jobs := self.jobs(number)):
            assert time.monotonic() < deadline, f"job {number} after {timeout_seconds} s: {jobs}"
            for job in jobs:
                if job.state == "PENDING" and job.restarts and _seconds_until(job.start) > 10:
                    # Not at once: a node refuses a job in the second in which it was requeued.
                    which = f"{number}_{job.task}" if job.task else number
                    with contextlib.suppress(AssertionError):
                        self.run("scontrol", "update", f"JobId={which}", "StartTime=now+3seconds")
            time.sleep(0.2)
        return jobs

    def wait(self, number: str, timeout_seconds: float) -> list[Job]:
        """Wait for the end of a job, or of all tasks of an array."""
        return self.wait_until(number, lambda jobs: all(job.ended for job in jobs), timeout_seconds)

    def processes(self, node: str) -> list[str]:
        """Command lines of the processes on a node that are neither its own nor SLURM's."""
        listed = self.start_on(node, "ps", "-eo", "stat=,args=", "--cols", "400").communicate(timeout=30)[0]
        own = ("sh ", "sleep 3600", "slurmd", "/usr/sbin/slurmd", "ps ")
        lines = [line.split(maxsplit=1) for line in listed.splitlines()]
        return [args for state, args in lines if state[0] != "Z" and not args.startswith(own)]

    def stop(self) -> None:
        """End everything and remove the folder."""
        for name in reversed(list(self._processes)):
            process = self._processes.pop(name)
            process.send_signal(signal.SIGKILL if name in ("login", *NODES) else signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait(10)
            if process.stdout:
                process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _seconds_until(moment: str) -> float:
    """SLURM's local time; 0 where it has none."""
    try:
        return (datetime.fromisoformat(moment) - datetime.now()).total_seconds()
    except ValueError:
        return 0.0


def _require_programs() -> None:
    if os.geteuid() != 0:
        raise Unavailable("a SLURM cluster can be started by root only")
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"no {', '.join(missing)} here: install munge, slurmctld, slurmd, slurm-client and iproute2")
    done = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"no namespaces can be made here: {done.stderr.strip()}")
