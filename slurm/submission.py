"""One call of ``grappa submit``: the values that its jobs share, and its folder."""

from __future__ import annotations

import socket
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.yaml_file import dump_config
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.storage import atomic_write_text, storage_errors
from grappa.slurm.jobs import Code, StageJob
from grappa.slurm.plan import PlannedJob
from grappa.slurm.profiles import Profile
from grappa.slurm.records import PINNED_CONFIG, JobRecord, now, write_submission


@dataclass(frozen=True)
class Submission:
    """The values that all jobs of one call of ``grappa submit`` share; ``mark``: the random part of their names."""

    run: RunFolder
    config: Config
    profile: Profile
    folder: Path
    mark: str
    code: Code

    def job_name(self, job: PlannedJob) -> str:
        """Return a name that no other job ever has: Slurm uses an id again after a while, but a name only once."""
        return f"grappa-{job.stages[0]}{'-ranges' if job.by_ranges else ''}-{self.mark}"

    def calls(self, job: PlannedJob) -> list[StageJob]:
        where = (str(self.run.root), str(self.folder))
        cpus, requeues = job.resources.cpus, self.profile.max_requeues
        return [StageJob(*where, pins, self.code, cpus, requeues) for pins in job.tasks]

    def prepare(self) -> None:
        """Make the folder of the submission, with the present configuration; only this user can change what is in it.

        What lies there is run: the scripts of jobs until sbatch has read them, and their calls.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True)
            self.folder.chmod(self.folder.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
            for name in ("events", "progress"):
                (self.folder / name).mkdir()
        atomic_write_text(self.folder / PINNED_CONFIG, dump_config(self.config))

    def record(self, job: PlannedJob, ids: tuple[str, ...], after: tuple[str, ...]) -> JobRecord:
        return JobRecord(self.job_name(job), ids, job.tasks, after, job.resources.model_dump(mode="json"))

    def write(self, records: Sequence[JobRecord]) -> None:
        """Write the jobs that were submitted so far."""
        general = {
            "submitted": now(),
            "cluster": self.profile.cluster,
            "host": socket.gethostname(),
            "code": asdict(self.code),
            "profile": self.profile.model_dump(mode="json"),
        }
        write_submission(self.folder, records, general)
