"""What runs in a job: the pinned stages, one after another, by the same call as ``grappa run``.

The state of unfinished work lies in the run folder (``store.work``), never in the job: whatever ends a job, the
next start of it, or the next ``grappa submit``, goes on from there. The tasks of a job (a profile's ``nodes`` times
``tasks``) are the processes of ``grappa.pipeline.engine.team``: the first leads and alone speaks, stops and requeues.
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
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import load_config
from grappa.pipeline.engine.execution import Selection, follow, lead
from grappa.pipeline.engine.externals import MissingInputError
from grappa.pipeline.engine.fingerprints import expected_fingerprint
from grappa.pipeline.engine.freshness import compare_fingerprints
from grappa.pipeline.engine.progress import Progress, Snapshot
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.engine.team import Team, joined
from grappa.pipeline.errors import EXPECTED, explained
from grappa.pipeline.graph.stages import find_stage
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.checkpoints import Stopped, refuse_if_stopped, request_stop, withdraw_stop
from grappa.pipeline.store.locks import LockedError, read_holder
from grappa.pipeline.store.provenance import code_commit, peak_memory
from grappa.pipeline.store.storage import StorageError, atomic_write_json
from grappa.slurm.jobs_table import fingerprint_digest, write_jobs_table
from grappa.slurm.records import PINNED_CONFIG, Pin, append_event, progress_file, read_events

PATIENCE_SECONDS = 10.0  # from the signal to the checkpoint; later the job goes without, to the one before
LOCKED_SECONDS = 600.0
FIRST_PORT, NUM_PORTS = 20_000, 12_000
PACKAGE = Path(grappa.__file__).parent


class JobRefusedError(ValueError):
    """The job must not compute what it would compute now, or not once more; the message says why."""


@dataclass(frozen=True)
class Code:
    """The code that a job was submitted with; ``digest`` is that of all modules, so that uncommitted edits count."""

    commit: str | None
    digest: str


@dataclass(frozen=True)
class StageJob(submitit.helpers.Checkpointable):
    """What a job calls. ``code``: what it was submitted with; ``cpus``: the threads where the configuration says 0."""

    run: str
    submission: str
    pins: tuple[Pin, ...]
    code: Code
    cpus: int
    max_requeues: int
    task: str | None = None

    def __call__(self) -> None:
        """Make the artifacts; put the job back into the queue at the signal, exit with 1 at an error."""
        if self.task is None and take_place() > 0:
            self._help()
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
        """Return the same call: the state lies in the run folder."""
        return submitit.helpers.DelayedSubmission(self)

    def _help(self) -> None:
        """Compute beside the first task until that ends; the first task alone handles signals."""
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
        selection, begin = Selection(node.stage, node.instance, force=pin.force), time.monotonic()

        def make() -> None:
            progress = Progress(listener=self._note_progress)
            lead(run, config, selection, progress=progress, say=lambda line: print(line, flush=True), team=team)

        patiently(make, run.artifact(node).lock)
        manifest = run.artifact(node).manifest()
        assert manifest is not None, f"{pin.name} was just published"
        seconds = round(time.monotonic() - begin, 3)
        self._tell("made", artifact=pin.name, recipe=fingerprint_digest(manifest.fingerprint), seconds=seconds)

    def _end(self, error: BaseException) -> None:
        words = explained(error)[0] or f"{type(error).__name__}: {error}"
        self._tell("end", exit=1, error=words, peak_memory_bytes=peak_memory())
        self._say_and_exit(error)

    def _say_and_exit(self, error: BaseException) -> NoReturn:
        sentence, _ = explained(error)
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
        with suppress(OSError):  # whatever ails the disk: only `grappa status` reads it
            atomic_write_json(progress_file(Path(self.submission), self._task_id), asdict(snapshot))

    def _tell(self, event: str, **fields: object) -> None:
        """Append an event, then write the table of jobs anew."""
        with suppress(StorageError):  # a full disk: what matters is the artifact, and Slurm tells the end
            append_event(self._events_file, event, **fields)
            if event != "stop":  # perhaps in a signal handler: as little as possible
                write_jobs_table(RunFolder(Path(self.run)))


def take_place() -> int:
    """Tell ``pipeline.engine.team`` which task of a job this process is, by torchrun's variables; return its rank.

    The first task runs on the node that srun was called on, at whose address the others meet it. The port lies below
    those that systems give to outgoing connections.
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
    """At a signal, let the stage keep its state, then requeue the job by submitit's own handler.

    SIGUSR2 announces a preemption or the time limit. SIGTERM means the end (scancel), or a preemption on a cluster
    that sends nothing else: the state is kept, and Slurm decides what becomes of the job.
    """
    requeue = signal.getsignal(signal.SIGUSR2)
    if not callable(requeue):  # in process: no job to put anywhere
        yield
        return
    received: list[tuple[int, FrameType | None]] = []

    def leave() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        tell()
        number, frame = received[0]
        if number == signal.SIGUSR2:
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


def patiently(make: Callable[[], None], lock: Path) -> None:
    """Call ``make`` again while another process writes the artifact, for ten minutes.

    A former start of this very job may still be at work (on a node that Slurm took for dead). This start waits for it
    as long as it lives; when the former one has published, nothing is left to do.
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
            print(f"waiting: {error}", file=sys.stderr, flush=True)
        refuse_if_stopped()
        time.sleep(5)


def code_here() -> Code:
    """Return which code this is: the commit of a checkout, for people, and the digest of all its modules."""
    digest = hashlib.sha256()
    for path in _modules():
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return Code(code_commit(), digest.hexdigest())


def _modules() -> list[Path]:
    """Return the files of all modules; in a checkout two of its folders are links."""
    found = (Path(folder) / name for folder, _, names in os.walk(PACKAGE, followlinks=True) for name in names)
    return sorted(path for path in found if path.suffix == ".py")


def refuse_other_code(submitted: Code) -> None:
    """Raise JobRefusedError when a module is not the one that was submitted (a changed text elsewhere is no matter)."""
    found = code_here()
    if found.digest != submitted.digest:
        raise JobRefusedError(
            f"submitted with the code at {submitted.commit or 'no commit'}, found other code, at "
            f"{found.commit or 'no commit'}; check that out, or submit again"
        )


def refuse_other_fingerprint(run: RunFolder, config: Config, pin: Pin) -> None:
    """Raise JobRefusedError when version, settings or inputs of an artifact are not those that were submitted."""
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
    """Return the configuration with the job's processors where it says 0: a node's others may be someone else's."""
    compute = config.compute
    update = {name: cpus for name in ("num_threads", "num_workers") if getattr(compute, name) == 0}
    return config.model_copy(update={"compute": compute.model_copy(update=update)})
