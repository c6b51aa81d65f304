"""A real Slurm cluster on one machine, for tests: controller, emulated nodes, accounting; root, Debian's packages.

    python tests/cluster/cluster.py start FOLDER [--nodes 2] [--cpus 4] [--no-accounting]
    export SLURM_CONF=FOLDER/etc/slurm.conf
    python tests/cluster/cluster.py stop FOLDER

Everything lies below FOLDER and listens on free ports of the loopback device, so that several clusters live side by
side. ``stop`` ends what ``start`` started (by process number and start time) and the cluster's jobs, nothing else. The
partition ``urgent`` preempts ``main``.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db")
SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
HERE = Path(__file__).parent


class ClusterError(RuntimeError):
    """The cluster cannot be started; the message says why."""


def missing_reason(*, accounting: bool = True) -> str | None:
    """Return why no cluster can be started here, or None."""
    wanted = (*PROGRAMS, *(ACCOUNTING_PROGRAMS if accounting else ()))
    missing = [name for name in wanted if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (tests/cluster/install.sh)"
    return None if os.getuid() == 0 else "the test cluster must be started by root"


@dataclass(frozen=True)
class Cluster:
    """The cluster of a folder."""

    folder: Path
    num_nodes: int = 2
    cpus: int = 4
    accounting: bool = True
    cpu_times: bool = False  # whether accounting knows the jobs' CPU time

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which Slurm's commands find the cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf), "PATH": SYSTEM_PATH}

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(f"n{number + 1}" for number in range(self.num_nodes))

    def start(self) -> None:
        """Start everything and wait until all nodes are idle; ClusterError (and everything ended) when that fails."""
        reason = missing_reason(accounting=self.accounting)
        if reason:
            raise ClusterError(reason)
        if self.folder.exists():
            raise ClusterError(f"{self.folder} exists already; stop that cluster, or name a new folder")
        try:
            self._write_files()
            self._start_munge()
            if self.accounting:
                self._start_accounting()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self.wait_until(self.all_nodes_idle, "all nodes are idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the jobs and the daemons."""
        self._end_jobs()
        for file in sorted((self.folder / "pids").glob("*"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            self.end(file.name)

    def start_controller(self) -> None:
        self.spawn("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        self.wait_until(lambda: "is UP" in self.call("scontrol", "ping"), "slurmctld answers")

    def start_node(self, node: str) -> None:
        self.spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def all_nodes_idle(self) -> bool:
        lines = self.call("sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N").split()
        return sorted(lines) == sorted(self.nodes)

    def call(self, *command: str, check: bool = False, user: str | None = None) -> str:
        """Return what a command prints, with the cluster's variables."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, user=user
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise ClusterError(f"waited {seconds:.0f} s in vain: {what}; the logs are in {self.folder / 'log'}")
            time.sleep(0.2)

    def spawn(self, name: str, *command: str) -> None:
        """Start a daemon in its own session and note its process number and start."""
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (self.folder / "pids" / name).write_text(f"{process.pid} {process_start(process.pid)}")

    def end(self, name: str, how: int = signal.SIGTERM) -> None:
        """End a daemon, by force when it does not listen; one that is gone (or whose number was reused) is let be."""
        file = self.folder / "pids" / name
        pid, start = map(int, file.read_text().split())
        end = time.monotonic() + 20
        while start and process_start(pid) == start:
            os.kill(pid, signal.SIGKILL if time.monotonic() > end else how)
            _reap(pid)
            time.sleep(0.1)
        file.unlink()

    def pause(self, name: str, *, resume: bool = False) -> None:
        """Stop a daemon in its tracks, or let it go on."""
        os.kill(int((self.folder / "pids" / name).read_text().split()[0]), signal.SIGCONT if resume else signal.SIGSTOP)

    def _write_files(self) -> None:
        for name in ("etc", "run", "log", "pids", "state", "spool", "munge", "sql"):
            (self.folder / name).mkdir(parents=True)
        for folder in (self.folder, self.folder / "munge"):
            folder.chmod(0o755)
        controller, accounting, database, *nodes = _free_ports(3 + self.num_nodes)
        host = socket.gethostname().partition(".")[0]
        values = {
            "host": host,
            "folder": str(self.folder),
            "controller_port": str(controller),
            "gather": "linux" if self.cpu_times else "none",
            "accounting": self._accounting_lines(accounting),
            "nodes": "\n".join(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} RealMemory=8000"
                for name, port in zip(self.nodes, nodes, strict=True)
            ),
        }
        self.conf.write_text(_filled(HERE / "slurm.conf.in", values))
        (self.folder / "etc" / "cgroup.conf").write_text("# none\n")
        if self.accounting:
            values |= {"accounting_port": str(accounting), "database_port": str(database)}
            conf = self.folder / "etc" / "slurmdbd.conf"
            conf.write_text(_filled(HERE / "slurmdbd.conf.in", values))
            conf.chmod(0o600)

    def _accounting_lines(self, port: int) -> str:
        if not self.accounting:
            return "AccountingStorageType=accounting_storage/none"
        return (
            "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={port}\nAccountingStoragePass={self.folder}/munge/socket"
        )

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        self.spawn(
            "munged",
            *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"),
            *(f"--socket={munge / 'socket'}", f"--pid-file={munge / 'pid'}"),
            *(f"--log-file={self.folder / 'log' / 'munged.log'}", f"--seed-file={munge / 'seed'}"),
        )
        self.wait_until(lambda: "MUNGE:" in self.call("munge", "-n", "-S", str(munge / "socket")), "munged answers")

    def _start_accounting(self) -> None:
        sql, data = self.folder / "sql", self.folder / "sql" / "data"
        shutil.chown(sql, "mysql", "mysql")
        plain = ("--no-defaults", "--user=mysql", f"--datadir={data}")
        self.call("mariadb-install-db", *plain, "--skip-test-db", check=True)
        port = next(
            line.partition("=")[2]
            for line in (self.folder / "etc" / "slurmdbd.conf").read_text().splitlines()
            if line.startswith("StoragePort=")
        )
        self.spawn(
            "mariadbd",
            *("mariadbd", *plain, f"--socket={sql / 'socket'}", f"--pid-file={sql / 'pid'}", f"--port={port}"),
            *("--bind-address=127.0.0.1", "--skip-grant-tables", "--skip-networking=0", "--skip-name-resolve"),
            *("--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0"),
            "--innodb-lock-wait-timeout=900",
        )
        ping = ("mariadb-admin", "--no-defaults", f"--socket={sql / 'socket'}", "ping")
        self.wait_until(lambda: "alive" in self.call(*ping), "mariadbd answers")
        self.spawn("slurmdbd", "slurmdbd", "-D")
        clusters = ("sacctmgr", "--noheader", "--immediate", "list", "cluster", "format=cluster")
        self.wait_until(
            lambda: subprocess.run(clusters, env=self.environment, capture_output=True).returncode == 0,
            "slurmdbd answers",
        )

    def _end_jobs(self) -> None:
        """Kill the jobs' processes: those with this cluster's configuration in their environment."""
        if (self.folder / "pids" / "slurmctld").exists():
            subprocess.run(("scancel", "--user=root"), env=self.environment, capture_output=True, timeout=30)
        mark = f"SLURM_CONF={self.conf}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _is_job(entry, mark):
                _kill(int(entry.name))


def _is_job(process: Path, mark: bytes) -> bool:
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
        step = (process / "cmdline").read_bytes().startswith(b"slurmstepd")
    except OSError:
        return False
    return mark in variables and (step or any(each.startswith(b"SLURM_JOB_ID=") for each in variables))


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def process_start(pid: int) -> int:
    """Return the clock tick at which a process started, 0 when there is none (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _filled(template: Path, values: dict[str, str]) -> str:
    text = template.read_text()
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=4)
    parser.add_argument("--no-accounting", action="store_true")
    given = parser.parse_args(arguments)
    cluster = Cluster(given.folder.resolve(), given.nodes, given.cpus, not given.no_accounting)
    if given.action == "stop":
        cluster.stop()
        return
    cluster.start()
    print(f"export SLURM_CONF={cluster.conf}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ClusterError as error:
        sys.exit(f"cluster.py: {error}")
