"""Starts a real SLURM cluster of two nodes and a spare one on this machine within a second, without systemd.

Each node is a network namespace with its own address, host name and slurmd; another namespace holds the controller and
a bridge between them. Nothing is attached to the machine's own network. All files, including munge's key and socket,
are in one directory, and names contain this process's id, so two clusters do not interfere.
Needs root and Debian's slurmctld, slurmd, slurm-client, munge and iproute2, which are installed with apt if possible.
"""

import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
_CONFIG = """\
ClusterName=ci
SlurmctldHost={ctl}(10.231.77.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool.%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.%n.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/affinity
TaskPluginParam=Cores
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MinJobAge=600
GresTypes=gpu
NodeName={n1} NodeAddr=10.231.77.11 CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
NodeName={n2} NodeAddr=10.231.77.12 CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
NodeName={n3} NodeAddr=10.231.77.13 CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=ci Nodes={n1},{n2},{n3} Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes={n1},{n2},{n3} MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""


class Unavailable(Exception):
    """Raised with the reason why a cluster cannot run on this machine."""


class Namespaces:
    """Three nodes and a controller as network namespaces that a bridge connects. ``run`` acts on one of them."""

    def __init__(self, directory: Path):
        tag = os.getpid()
        self.directory = directory
        self.ctl = f"ctl-{tag}"
        self.n1, self.n2, self.n3 = self.nodes = tuple(f"n{i}-{tag}" for i in (1, 2, 3))
        self.hosts = (self.ctl, *self.nodes)
        self.addresses = {self.ctl: "10.231.77.1"} | {node: f"10.231.77.1{i + 1}" for i, node in enumerate(self.nodes)}

    def up(self) -> None:
        _require_programs()
        try:
            self._connect()
        except AssertionError as error:
            self.down()
            raise Unavailable(f"no network namespaces here: {error}") from error

    def _connect(self) -> None:
        lines = [f"{address} {host}\n" for host, address in self.addresses.items()]
        (self.directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        for host in self.hosts:
            _ip("netns", "add", host)
            _ip("-n", host, "link", "set", "lo", "up")
        _ip("-n", self.ctl, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", self.ctl, "address", "add", "10.231.77.1/24", "dev", "bridge0")
        _ip("-n", self.ctl, "link", "set", "bridge0", "up")
        for port, host in enumerate(self.nodes):
            veth = f"port{port}"
            _ip("-n", self.ctl, "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", self.ctl, "link", "set", veth, "master", "bridge0", "up")
            _ip("-n", host, "address", "add", f"{self.addresses[host]}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")

    def down(self) -> None:
        for host in self.hosts:
            if Path("/run/netns", host).exists():
                self.kill(host)
                subprocess.run(["ip", "netns", "del", host], check=False)

    def kill(self, host: str) -> None:
        """Kill every process of a node, as in a power failure."""
        for _ in range(50):  # a process may have started another one in the meantime
            pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
            if not pids:
                return
            for pid in map(int, pids):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)

    def command(self, host: str, *command) -> list[str]:
        """Wrap ``command`` to run on a node, with its network, its host name and the names of the other nodes."""
        enter = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        namespace = ["nsenter", f"--net=/run/netns/{host}", "unshare", "--uts", "--mount"]
        return [*namespace, "sh", "-c", enter, host, f"{self.directory}/hosts", *map(str, command)]

    def run(self, host: str, *command, **kwargs) -> str:
        done = subprocess.run(self.command(host, *command), capture_output=True, text=True, timeout=120, **kwargs)
        if done.returncode:
            raise AssertionError(f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


class Cluster(Namespaces):
    """A SLURM cluster in the namespaces."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of SLURM's commands. Valid after ``up``, which adds /usr/sbin to the path."""
        return {**os.environ, "SLURM_CONF": f"{self.directory}/slurm.conf"}

    def up(self) -> None:
        super().up()
        d = self.directory
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (d / name).mkdir()
        # proctrack/cgroup also finds ranks that have lost their parent; it needs the freezer of cgroup version 1.
        freezer = Path("/sys/fs/cgroup/freezer")
        proctrack = "cgroup" if freezer.is_dir() and os.access(freezer, os.W_OK) else "linuxproc"
        if proctrack == "cgroup":
            plugin = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
            (d / "cgroup.conf").write_text(plugin)
        names = {host.split("-")[0]: host for host in self.hosts}
        (d / "slurm.conf").write_text(_CONFIG.format(d=d, **names, proctrack=proctrack))
        for i in range(2):  # SLURM gives these to jobs as GPUs; nothing opens them
            os.mknod(d / f"gpu{i}", stat.S_IFCHR | 0o666, os.stat("/dev/null").st_rdev)
        (d / "gres.conf").write_text(f"Name=gpu File={d}/gpu[0-1]\n")
        key = d / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": key, "socket": d / "munge.sock", "pid-file": d / "munged.pid", "seed-file": d / "seed"}
        munge = [f"--{name}={file}" for name, file in files.items()]
        _run("munged", *munge, f"--log-file={d}/munged.log", "--num-threads=2", "--force")
        self.run(self.ctl, "slurmctld", "-c", env=self.environment)
        for node in self.nodes:
            self.start_node(node)
        self._wait_until_idle()

    def start_node(self, host: str) -> None:
        # -c starts from a clean state, as after a reboot.
        self.run(host, "slurmd", "-c", "-N", host, env=self.environment)

    def slurm(self, *command, environment: dict | None = None, **kwargs) -> str:
        """Run a command on the controller, such as ``sbatch``, and return its output."""
        return self.run(self.ctl, *command, env=self.environment | (environment or {}), **kwargs).strip()

    def state(self, job: str) -> dict[str, str]:
        fields = self.slurm("scontrol", "show", "job", "-o", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, condition, timeout: float, log: Path | None = None):
        """Wait until ``condition(state)`` holds, and return the state."""
        end = time.monotonic() + timeout
        while not condition(state := self.state(job)):
            if time.monotonic() > end or state["JobState"] in (
                "FAILED",
                "TIMEOUT",
                "CANCELLED",
                "NODE_FAIL",
                "COMPLETED",
            ):
                self.slurm("scancel", job)  # the next test needs the nodes
                output = log.read_text()[-6000:] if log and log.is_file() else ""
                raise AssertionError(f"job {job} is {state['JobState']}: {state}\n{output}\n{self._logs()}")
            time.sleep(0.2)
        return state

    def down(self) -> None:
        if (self.directory / "slurmctld.pid").is_file():
            subprocess.run(self.command(self.ctl, "scancel", "--user=root"), env=self.environment, check=False)
        super().down()
        for file in (self.directory / "munged.pid",):
            if file.is_file():
                os.kill(int(file.read_text()), signal.SIGTERM)
        for node in self.nodes:  # SLURM's cgroups, which are empty now
            for path in sorted(Path("/sys/fs/cgroup/freezer").glob(f"slurm_{node}/**/"), reverse=True):
                path.rmdir()

    def _wait_until_idle(self) -> None:
        end = time.monotonic() + 60
        while self.slurm("sinfo", "-h", "-p", "ci", "-t", "idle", "-o", "%D") != "3":
            if time.monotonic() > end:
                raise AssertionError(f"SLURM did not become ready\n{self._logs()}")
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(f"{file.name}:\n{file.read_text()[-1500:]}" for file in self.directory.glob("slurm*.log"))


def _require_programs() -> None:
    if os.geteuid() != 0:
        raise Unavailable("network namespaces and slurmd need root")
    os.environ["PATH"] += os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing and shutil.which("apt-get"):
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, timeout=300)
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        raise Unavailable(f"{', '.join(missing)} not found; Debian's packages {', '.join(PACKAGES)} have them")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
