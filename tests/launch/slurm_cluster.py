"""A Slurm cluster of one node on loopback, with daemons of its own that end with the test."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.integration.cluster import free_port

NUM_GPUS = 8
"""GPUs of the node: empty files, which Slurm counts and hands out as it does real ones."""
KILL_WAIT_SECONDS = 120
"""Between SIGTERM and SIGKILL of a job that is cancelled; a busy machine takes long to compile and save."""

_DAEMONS = ("munged", "slurmctld", "slurmd")
_SBIN = "/usr/sbin"  # of an ordinary user's PATH it is no part


def why_not() -> str | None:
    """Returns why Slurm cannot be started here; None if it can."""
    missing = [each for each in (*_DAEMONS, "sbatch", "srun") if not _path_of(each)]
    if missing:
        return f"Slurm is not installed here: no {', '.join(missing)} (on Debian: apt-get install slurm-wlm munge)"
    if os.getuid() != 0:
        return "slurmd starts tasks only as root"
    try:
        pwd.getpwnam("munge")
        socket.gethostbyname(_node())
    except (KeyError, OSError) as error:
        return f"Slurm cannot be started here: {error}"
    return None


class SlurmCluster:
    """A running cluster; `environ` lets the commands of Slurm find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *words: object) -> str:
        """Returns the output of a command, such as ("squeue", "--noheader")."""
        done = subprocess.run([*map(str, words)], env=self.environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}{self.logs()}"
        return done.stdout.strip()

    def job(self, number: str) -> Mapping[str, str]:
        """Returns what `scontrol show job` says of a job: JobState, Restarts, ExitCode and more."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, done: Callable[[], bool], what: str, seconds: float = 600) -> None:
        """
        Raises:
          AssertionError: it has not happened after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}{self.logs()}"
            time.sleep(0.2)

    def wait_for_state(self, number: str, *states: str) -> Mapping[str, str]:
        """Waits until a job is in one of some states."""
        self.wait(lambda: self.job(number)["JobState"] in states, f"job {number}: {states}")
        return self.job(number)

    def logs(self) -> str:
        """Returns the last lines of each daemon."""
        return "".join(f"\n== {path.name}\n{path.read_text()[-3000:]}" for path in (self.folder / "log").iterdir())


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Starts munged, slurmctld and slurmd on free ports; jobs and daemons end with the context."""
    # Not the folder of a test, which is its user's alone: munged has a user of its own, and looks at every parent.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("state", "spool", "log", "gpus"):
            (folder / part).mkdir()
        cluster = SlurmCluster(folder)
        munge = pwd.getpwnam("munge")
        _write_config(folder)
        _write_munge_key(folder / "munge", munge)

        def start(daemon: str, *words: str, user: int | None = None, group: int | None = None) -> None:
            with (folder / "log" / daemon).open("wb") as log:
                process = subprocess.Popen(
                    [_path_of(daemon) or daemon, *words],
                    env=cluster.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    user=user,
                    group=group,
                    extra_groups=None if user is None else [],
                )
            stack.callback(process.wait)
            stack.callback(process.terminate)

        own = folder / "munge"
        start("munged", "--foreground", *_munge_words(own), user=munge.pw_uid, group=munge.pw_gid)
        cluster.wait((own / "socket").exists, "munged listens", 60)
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", _node())
        cluster.wait(lambda: _state_of_node(cluster) == "idle", "the node is idle", 60)
        stack.callback(_end_jobs, cluster)
        yield cluster


def _write_config(folder: Path) -> None:
    node = _node()
    for index in range(NUM_GPUS):
        (folder / "gpus" / str(index)).touch()
    (folder / "gres.conf").write_text(f"NodeName={node} Name=gpu File={folder}/gpus/[0-{NUM_GPUS - 1}]\n")
    (folder / "slurm.conf").write_text(
        f"""
ClusterName=loopback
SlurmctldHost={node}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
AuthType=auth/munge
# A requeued job starts once the credentials of its former start are void, by default after two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
# Nothing that needs cgroups, which a container has not.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
KillWait={KILL_WAIT_SECONDS}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
GresTypes=gpu
# The node claims to have more than this machine.
SlurmdParameters=config_overrides
NodeName={node} NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:{NUM_GPUS} State=UNKNOWN
PartitionName=all Nodes={node} Default=YES OverSubscribe=FORCE GraceTime={KILL_WAIT_SECONDS} State=UP
# Its jobs take the node from those of the other partition.
PartitionName=urgent Nodes={node} PriorityTier=10 PreemptMode=OFF OverSubscribe=NO State=UP
"""
    )


def _write_munge_key(folder: Path, munge: pwd.struct_passwd) -> None:
    folder.mkdir(mode=0o755)
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (folder, key):
        os.chown(path, munge.pw_uid, munge.pw_gid)


def _munge_words(folder: Path) -> list[str]:
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return [f"--{option}={folder / name}" for option, name in files.items()]


def _state_of_node(cluster: SlurmCluster) -> str:
    asked = subprocess.run(["sinfo", "-h", "-o", "%T"], env=cluster.environ, capture_output=True, text=True)
    return asked.stdout.strip()


def _end_jobs(cluster: SlurmCluster) -> None:
    """Ends all jobs: their processes are no children of the daemons, and would outlive them."""
    cluster.ask("scancel", "--full", "--signal=KILL", "--user=root")
    cluster.ask("scancel", "--user=root")
    cluster.wait(lambda: not cluster.ask("squeue", "--noheader"), "all jobs have ended", 60)


def _path_of(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=_SBIN)


def _node() -> str:
    return socket.gethostname().split(".")[0]
