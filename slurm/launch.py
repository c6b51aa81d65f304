"""Starting jobs by submitit: as sbatch requests, as local processes, or as calls in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grappa.slurm.plan import PlannedJob
from grappa.slurm.profiles import Profile, Resources
from grappa.slurm.scheduler import SchedulerError

if TYPE_CHECKING:
    from grappa.slurm.jobs import StageJob


@dataclasses.dataclass(frozen=True)
class Waits:
    """The ids of the tasks that a job waits for: ``made`` must end without an error, ``ended`` must only end."""

    made: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The options of sbatch; a job whose ``made`` failed is cancelled."""
        kinds = (("afterok", self.made), ("afterany", self.ended))
        asked = [f"{kind}:{':'.join(ids)}" for kind, ids in kinds if ids]
        return {"dependency": ",".join(asked), "kill-on-invalid-dep": "yes"} if asked else {}


def sbatch_text(profile: Profile, job: PlannedJob, folder: Path, name: str, waits: Waits) -> str:
    """Return the script that `submit_slurm` gives to sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string

    from grappa.slurm.entry import command as entry_command

    command = entry_command(shlex.quote(sys.executable), shlex.quote(str(folder)))
    count = len(job.tasks) if len(job.tasks) > 1 else None
    parameters = _slurm_parameters(profile, job.resources, name, waits)
    text: str = _make_sbatch_string(command=command, folder=folder, map_count=count, **parameters)
    return text


def submit_slurm(
    profile: Profile, job: PlannedJob, folder: Path, name: str, waits: Waits, calls: Sequence[StageJob]
) -> tuple[str, ...]:
    """Call sbatch once, for one job or an array; return the ids of the tasks. SchedulerError has sbatch's message."""
    import submitit

    from grappa.slurm.entry import command, private_files

    class SlurmExecutor(submitit.SlurmExecutor):  # its name says to submitit what it is
        @property
        def _submitit_command_str(self) -> str:
            return command(self.python, shlex.quote(str(self.folder)))

    _refuse_without_slurm()
    executor = SlurmExecutor(folder, max_num_timeout=profile.max_requeues)
    executor.update_parameters(**_slurm_parameters(profile, job.resources, name, waits))
    try:
        with (
            private_files(),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # submitit prints the message of the error as well
            found = executor.submit_array(calls) if len(calls) > 1 else [executor.submit(calls[0])]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise SchedulerError(f"{job.title} was refused: {_own_words(str(error))}") from None
    return tuple(each.job_id for each in found)


def start_local(profile: Profile, job: PlannedJob, folder: Path, calls: Sequence[StageJob]) -> list[Any]:
    """Start a process on this machine for each call; return submitit's jobs."""
    import submitit

    from grappa.slurm.entry import command, private_files, safe_path

    class LocalExecutor(submitit.LocalExecutor):
        @property
        def _submitit_command_str(self) -> str:
            return command(self.python, shlex.quote(str(self.folder)))

    executor = LocalExecutor(folder, max_num_timeout=profile.max_requeues)
    executor.update_parameters(
        timeout_min=job.resources.time,
        nodes=job.resources.nodes,
        tasks_per_node=job.resources.tasks,
        gpus_per_node=job.resources.gpus,
        signal_delay_s=profile.signal_seconds,
        stderr_to_stdout=True,
        setup=list(profile.setup),
    )
    with private_files(), safe_path():
        return [executor.submit(call) for call in calls]


def run_here(call: StageJob, task: str) -> None:
    """Make the call of a job in this process; errors are raised to the caller."""
    dataclasses.replace(call, task=task)()


def _slurm_parameters(profile: Profile, resources: Resources, name: str, waits: Waits) -> dict[str, Any]:
    mail = {"mail_user": profile.mail, "mail_type": ",".join(profile.mail_events)} if profile.mail else {}
    return {
        "job_name": name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "time": resources.time,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks,
        "gpus_per_node": resources.gpus or None,
        "cpus_per_task": resources.cpus,
        "mem": resources.memory,
        "setup": list(profile.setup) or None,
        "signal_delay_s": profile.signal_seconds,
        "array_parallelism": profile.array_parallelism,
        "wckey": None,
        "stderr_to_stdout": True,
        # Since Slurm 22.05 srun takes no --cpus-per-task from sbatch.
        "srun_args": [f"--cpus-per-task={resources.cpus}"],
        "additional_parameters": {"requeue": True, **waits.options, **profile.sbatch},
        **mail,
    }


def _own_words(text: str) -> str:
    """Return the lines that sbatch printed, without those of submitit; the whole text where there are none."""
    lines = re.findall(r"^sbatch: (?:error: )?(.+)$", text, flags=re.MULTILINE)
    return "; ".join(lines) or " ".join(text.split())


def _refuse_without_slurm() -> None:
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise SchedulerError(f"{program} is not on the PATH: submit where Slurm is, or give --cluster local")
