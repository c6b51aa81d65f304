"""The code that runs in a job: it makes the pinned artifacts, one after another, by the same call as ``grappa run``.

The state of unfinished work lies in the run folder (``store.work``), never in the job. Whatever ends a job, its next
start, or the next ``grappa submit``, resumes the work. The tasks of a job (a profile's ``nodes`` times ``tasks``) are
the processes of ``grappa.pipeline.engine.team``: the first task leads, and only the first task writes events, stops and
requeues the job.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import submitit

import grappa
from grappa.core.printing import printable
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import load_config
from grappa.pipeline.engine.execution import Selection, follow, lead
from grappa.pipeline.engine.externals import MissingInputError
from grappa.pipeline.engine.fingerprints import expected_fingerprint
from grappa.pipeline.engine.freshness import compare_fingerprints
from grappa.pipeline.engine.progress import Progress, Snapshot
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.team import Team, joined
from grappa.pipeline.errors import EXPECTED, sentence_and_code
from grappa.pipeline.graph.stages import find_stage
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.checkpoints import Stopped, refuse_if_stopped, request_stop, withdraw_stop
from grappa.pipeline.store.locks import LockedError, read_holder
from grappa.pipeline.store.provenance import code_commit, peak_memory
from grappa.pipeline.store.storage import StorageError, atomic_write_json
from grappa.slurm.jobs_table import fingerprint_digest, write_jobs_table
from grappa.slurm.records import PINNED_CONFIG, Pin, append_event, progress_file, read_events

PATIENCE_SECONDS = 10.0  # the time from a signal to the checkpoint; then the job ends with the former checkpoint
LOCKED_SECONDS = 600.0  # the time that a job waits for an artifact that another process writes
FIRST_PORT, NUM_PORTS = 20_000, 12_000
PACKAGE = Path(grappa.__file__).parent


class JobRefusedError(ValueError):
    """The job must not run: code, settings or inputs changed, or it was requeued too often; the message says why."""


@dataclass(frozen=True)
class Code:
    """The code that a job was submitted with; ``digest`` is that of all modules, so it shows uncommitted edits too."""

    commit: str | None
    digest: str


@dataclass(frozen=True)
class StageJob(submitit.helpers.Checkpointable):
    """The call that a job makes. ``cpus``: the number of threads where the configuration says 0."""

    run: str
    submission: str
    pins: tuple[Pin, ...]
    code: Code
    cpus: int
    max_requeues: int
    task: str | None = None

    def __call__(self) -> None:
        """Make the artifacts; put the job back into the queue at a signal, exit with 1 at an error."""
        if self.task is None and take_place() > 0:
            self._follow()
            return
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        node = os.environ.get("SLURM_JOB_NODELIST") or socket.gethostname()
        self._tell("start", restarts=restarts, node=node, pid=os.getpid())
        try:
            with _stopping(lambda: self._tell("stop")):
                self._make_all(restarts)
        except EXPECTED as error:
            self._end(error)
        except Exception as error:
            self._tell("end", exit=1, error=f"{type(error).__name__}: {error}", peak_memory_bytes=peak_memory())
            raise
        else:
            self._tell("end", exit=0, error="", peak_memory_bytes=peak_memory())

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the same call for the requeued job: the state lies in the run folder."""
        return submitit.helpers.DelayedSubmission(self)

    def _follow(self) -> None:
        """Compute the stages together with the first task, until it ends; only the first task handles signals."""
        try:
            with suppress(Stopped), joined() as team:
                refuse_other_code(self.code)
                follow(RunFolder.open(Path(self.run)), team)
        except EXPECTED as error:
            self._say_and_exit(error)

    def _make_all(self, restarts: int) -> None:
        with joined() as team:
            if restarts > self.max_requeues:
                raise JobRefusedError(
                    f"the job was put back into the queue {restarts} times, the profile allows {self.max_requeues} "
                    "(max_requeues); nothing is lost: grappa submit goes on from here"
                )
            refuse_other_code(self.code)
            made = {each["artifact"] for each in read_events(self._events_file) if each["event"] == "made"}
            for pin in self.pins:
                if pin.name not in made:
                    refuse_if_stopped()
                    self._make(pin, team)

    def _make(self, pin: Pin, team: Team) -> None:
        run, node = RunFolder.open(Path(self.run), writable=True), pin.node
        config = _with_threads(load_config(Path(self.submission) / PINNED_CONFIG), self.cpus)
        refuse_other_fingerprint(run, config, pin)
        self._tell("artifact", artifact=pin.name)
        # What was made before a forced submission went with it: the ranges that are there were made for this job.
        selection = Selection(node.stage, node.instance, force=pin.force, rows=node.rows, keep_ranges=True)
        begin = time.monotonic()

        def make() -> None:
            progress = Progress(listener=self._note_progress)
            lead(run, config, selection, progress=progress, say=_say, team=team)

        patiently(make, run.artifact(node).lock)
        # A range that is not there was joined meanwhile, or need not be made: the whole artifact is there.
        manifest = run.artifact(node).manifest() or run.artifact(node.whole).manifest()
        assert manifest is not None, f"{pin.name} was just published"
        seconds = round(time.monotonic() - begin, 3)
        self._tell("made", artifact=pin.name, recipe=fingerprint_digest(manifest.fingerprint), seconds=seconds)

    def _end(self, error: BaseException) -> None:
        words = sentence_and_code(error)[0] or f"{type(error).__name__}: {error}"
        self._tell("end", exit=1, error=words, peak_memory_bytes=peak_memory())
        self._say_and_exit(error)

    def _say_and_exit(self, error: BaseException) -> NoReturn:
        sentence, _ = sentence_and_code(error)
        if sentence is None:
            raise error
        print(f"grappa: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None

    @property
    def _task_id(self) -> str:
        return self.task or str(submitit.JobEnvironment().job_id)

    @property
    def _events_file(self) -> Path:
        return Path(self.submission) / "events" / f"{self._task_id}.jsonl"

    def _note_progress(self, snapshot: Snapshot) -> None:
        with suppress(OSError):  # the disk cannot take it; only `grappa status` reads this file
            atomic_write_json(progress_file(Path(self.submission), self._task_id), asdict(snapshot))

    def _tell(self, event: str, **fields: object) -> None:
        """Append an event, then write the table of jobs anew."""
        with suppress(StorageError):  # the disk is full; the artifact matters more, and Slurm knows how the job ended
            append_event(self._events_file, event, **fields)
            if event != "stop":  # this event may be written in a signal handler, which should do little
                write_jobs_table(RunFolder(Path(self.run)))


def take_place() -> int:
    """Set torchrun's environment variables for this task of a job, which ``engine.team`` reads; return its rank.

    The first task runs on the node on which srun was called; the other tasks meet it at the address of this node. The
    port lies below the ports that systems give to outgoing connections.
    """
    job = submitit.JobEnvironment()
    on_slurm = job.cluster == "slurm"
    places = {
        "RANK": job.global_rank,
        "WORLD_SIZE": job.num_tasks,
        "LOCAL_RANK": job.local_rank,
        "LOCAL_WORLD_SIZE": job.num_tasks // job.num_nodes,
        "MASTER_ADDR": os.environ["SLURM_LAUNCH_NODE_IPADDR"] if on_slurm else "127.0.0.1",
        "MASTER_PORT": FIRST_PORT + int(job.raw_job_id) % NUM_PORTS,
    }
    os.environ |= {name: str(value) for name, value in places.items()}
    return job.global_rank


@contextmanager
def _stopping(tell: Callable[[], None]) -> Iterator[None]:
    """At a signal, let the stage save its state, then requeue the job by submitit's own handler.

    SIGUSR2 announces a preemption or the time limit. SIGTERM comes from scancel, or from a preemption on a cluster that
    sends no other signal: the state is saved, and Slurm decides whether the job starts again. While the job asks to be
    put back, it ignores SIGTERM, and so does the ``scontrol`` it calls: Slurm answers by this signal to all processes
    of the job, often before scontrol has ended, and a scontrol that ends by it looks like a refusal.
    """
    requeue = signal.getsignal(signal.SIGUSR2)
    if not callable(requeue):  # the call runs in the user's process: there is no job to requeue
        yield
        return
    received: list[tuple[int, FrameType | None]] = []

    def leave() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        tell()
        number, frame = received[0]
        if number == signal.SIGUSR2:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            requeue(number, frame)
        raise SystemExit(128 + number)

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, f"grappa: {signal.Signals(number).name}: keeping the state and leaving\n".encode())
        if not received:
            received.append((number, frame))
            request_stop()
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)

    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, lambda number, frame: leave())
    try:
        yield
    except Stopped:
        leave()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        withdraw_stop()


def _say(line: str) -> None:
    print(printable(line), flush=True)


def patiently(make: Callable[[], None], lock: Path) -> None:
    """Call ``make`` again while another process writes the artifact, for ten minutes at most.

    A former start of the same job may still work on a node that Slurm took for dead. This start waits for the former
    one as long as it lives; after the former one has published the artifact, ``make`` finds it fresh.
    """
    end = time.monotonic() + LOCKED_SECONDS
    while True:
        try:
            return make()
        except LockedError as error:
            holder = read_holder(lock)
            former = holder is not None and holder.job is not None and holder.job == os.environ.get("SLURM_JOB_ID")
            if time.monotonic() > end and not former:
                raise
            print(printable(f"waiting: {error}"), file=sys.stderr, flush=True)
        refuse_if_stopped()
        time.sleep(5)


def code_here() -> Code:
    """Return the code that runs now: the commit of a checkout, for people, and the digest of all modules."""
    digest = hashlib.sha256()
    for path in _modules():
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return Code(code_commit(), digest.hexdigest())


def _modules() -> list[Path]:
    """Return the files of all modules; in a checkout two folders of the package are links, which are followed."""
    found = (Path(folder) / name for folder, _, names in os.walk(PACKAGE, followlinks=True) for name in names)
    return sorted(path for path in found if path.suffix == ".py")


def refuse_other_code(submitted: Code) -> None:
    """Raise JobRefusedError when a module has changed since the submission; other files of a checkout may change."""
    found = code_here()
    if found.digest != submitted.digest:
        raise JobRefusedError(
            f"submitted with the code at {submitted.commit or 'no commit'}, found other code, at "
            f"{found.commit or 'no commit'}; check that out, or submit again"
        )


def refuse_other_fingerprint(run: RunFolder, config: Config, pin: Pin) -> None:
    """Raise JobRefusedError when version, settings or inputs of an artifact have changed since the submission."""
    version = find_stage(pin.node.stage).version
    changes = [f"stage version: {pin.version} -> {version}"] if version != pin.version else []
    try:
        now = expected_fingerprint(run, config, pin.node).fingerprint
        changes += compare_fingerprints(pin.fingerprint, now) if pin.fingerprint is not None else []
        changes += compare_fingerprints(now, expected_fingerprint(run, read_config(run), pin.node).fingerprint)
    except MissingInputError:
        pass  # running the stage says which input is missing, and the command that makes it
    if changes:
        lines = "; ".join(dict.fromkeys(changes))
        raise JobRefusedError(f"{pin.name} is no longer what was submitted: {lines}; submit again")


def _with_threads(config: Config, cpus: int) -> Config:
    """Return the configuration with the job's CPUs where it says 0: other CPUs of the node may belong to other jobs."""
    compute = config.compute
    update = {name: cpus for name in ("num_threads", "num_workers") if getattr(compute, name) == 0}
    return config.model_copy(update={"compute": compute.model_copy(update=update)})
