"""A Slurm cluster on this machine. Head and nodes are namespaces with a name, an address and processes of their own.

All of it lives below one process: when the head's dies, which it does with the tests, everything is gone.
"""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "setpriv", "ip", "tc")
NODES = ("n1", "n2", "n3", "n4")
_NAMESPACES = ("--net", "--uts", "--pid", "--mount")
_UNSHARE = ("unshare", *_NAMESPACES, "--mount-proc", "--fork", "--kill-child")

_HEAD = r"""
set -eu
hostname head
ip link set lo up
ip link add bridge type bridge
ip addr add 10.77.0.254/24 dev bridge
ip link set bridge up
mount --bind hosts /etc/hosts
mount --bind /dev/null /etc/resolv.conf  # names that are not there are known not to be at once
munged --force --key-file=munge/key --socket=munge/socket \
    --pid-file=munge/pid --log-file=munge/log --seed-file=munge/seed
slurmctld -D -f slurm.conf 2>> head.log &
touch head.up
wait
"""

_NODE = r"""
node=$1 address=$2 folder=$3
unshare --net --uts --pid --mount --mount-proc --fork --kill-child bash -c '
    hostname '$node'
    mount -t tmpfs -o size=256m tmpfs /dev/shm
    until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
    ip addr add '$address'/24 dev eth0
    ip link set lo up
    ip link set eth0 up
    slurmd -D -N '$node' -f '$folder'/slurm.conf &
    wait' > $folder/$node.log 2>&1 &
until child=$(cat /proc/$!/task/$!/children) && [ "$child" ]; do sleep 0.02; done
echo $child > $folder/$node.pid
ip link add v$node type veth peer name eth0 netns $child
ip link set v$node master bridge up
wait
"""

_CONFIG = """
ClusterName=tests
SlurmctldHost=head(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
# A node claims more than its share of this machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,bf_resolution=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
GresTypes=gpu
NodeName=n[1-2] NodeAddr=10.77.0.[1-2] CPUs=8 RealMemory=4000 State=UNKNOWN
NodeName=n[3-4] NodeAddr=10.77.0.[3-4] CPUs=8 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=n[3-4] MaxTime=30
PartitionName=closed Nodes=ALL DefaultTime=60 State=INACTIVE
"""


class Cluster:
    """Four nodes; `n3` and `n4` claim two GPUs each, in partition `gpu`."""

    def __init__(self, folder: Path, proctrack: str = "linuxproc") -> None:
        self.folder = folder
        (folder / "state").mkdir(parents=True)
        (folder / "munge").mkdir()
        key = folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        addresses = [f"10.77.0.{number} {node}" for number, node in enumerate(NODES, start=1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", "10.77.0.254 head", *addresses, ""]))
        (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, proctrack=proctrack))
        (folder / "gres.conf").write_text("AutoDetect=off\nNodeName=n[3-4] Name=gpu File=/dev/tty[1-2]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        until(_no_cgroups, "no cgroup is left")

    def _start(self) -> None:
        head = self._popen(["setpriv", "--pdeathsig=KILL", *_UNSHARE, "bash", "-c", _HEAD])
        until((self.folder / "head.up").exists, "head")
        self.head_pid = int(Path(f"/proc/{head.pid}/task/{head.pid}/children").read_text())
        for node in NODES:
            self.start_node(node)
        until(lambda: self.output("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D") == str(len(NODES)), "nodes")

    def run(self, *command: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """A command as a user on the head runs it."""
        return subprocess.run(
            self.on("head", command, cwd),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def output(self, *command: object) -> str:
        result = self.run(*command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def on(self, host: str, command: Sequence[object], cwd: Path | None = None) -> list[str]:
        """The command line that runs `command` on the head or on a node."""
        enter = ["nsenter", "--target", str(self.head_pid), *_NAMESPACES, f"--wd={cwd or self.folder}"]
        if host != "head":
            enter += ["nsenter", "--target", self.pid_of(host), *_NAMESPACES]
        return [*enter, *map(str, command)]

    def run_on(self, node: str, *command: object) -> str:
        """Runs a command on a node; returns its output."""
        done = subprocess.run(self.on(node, command), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start_node(self, node: str) -> None:
        address = f"10.77.0.{NODES.index(node) + 1}"
        self._popen(self.on("head", ["bash", "-c", _NODE, "node", node, address, self.folder]))

    def kill_node(self, node: str) -> None:
        """As if its power were cut."""
        self.output("kill", "-KILL", self.pid_of(node))

    def pid_of(self, node: str) -> str:
        """Returns the pid of the node's first process, as the head sees it."""
        return (self.folder / f"{node}.pid").read_text().strip()

    def field(self, job: str, name: str) -> str:
        """`JobState` and so on, as scontrol shows it."""
        shown = dict(word.partition("=")[::2] for word in self.output("scontrol", "show", "job", job).split())
        return shown[name]

    def _popen(self, command: Sequence[str]) -> subprocess.Popen:
        with open(self.folder / "cluster.log", "a") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)
        return process


def until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def _no_cgroups() -> bool:
    """Removes those that slurmd made, once they are empty."""
    made = [path for top in Path("/sys/fs/cgroup").glob("*/slurm_n*") for path in (*top.rglob("*/"), top)]
    for path in sorted(made, reverse=True):
        with suppress(OSError):
            path.rmdir()
    return not made
