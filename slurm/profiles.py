"""Profiles: the resources that jobs ask of a cluster, one YAML file for each cluster, checked before submission.

Resources are never part of a fingerprint: another profile gives the same result.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from grappa.core.printing import printable, shown
from grappa.pipeline.config.yaml_file import ConfigError, read_yaml, shipped_or_file, validation_sentence
from grappa.pipeline.graph.stages import STAGES, find_stage

CLUSTERS = Path(__file__).parent / "clusters"
# The options that grappa gives to sbatch: a profile changes them by its own keys, or must not change them.
OWN_OPTIONS = (
    "account array chdir constraint cpus-per-task dependency error gpus-per-node job-name kill-on-invalid-dep "
    "mail-type mail-user mem nodes ntasks-per-node open-mode output partition qos requeue signal time wrap"
).split()

# The resources that must be 1, by kind of cluster.
SINGLE: dict[str, tuple[str, ...]] = {"slurm": (), "local": ("nodes",), "debug": ("nodes", "tasks")}


def minutes(text: Any) -> int:
    """Return the minutes of a time such as ``4h``, ``1d12h``, ``90m``, or Slurm's ``2-04:00:00`` and ``04:00:00``."""
    if isinstance(text, str):
        units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text)
        clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):\d\d", text)
        found = units if text and units else clock
        if found:
            days, hours, rest = (int(part or 0) for part in found.groups())
            total = (days * 24 + hours) * 60 + rest
            if total:
                return total
    raise ValueError(f"found {shown(text)}, expected a time such as 4h, 90m or 1d12h (at least 1m)")


def memory(text: Any) -> str:
    """Return a memory size as Slurm reads it, such as ``32G``; ``0`` means all memory of the node."""
    if isinstance(text, str | int) and re.fullmatch(r"[0-9]+[MGT]|0", str(text)):
        return str(text)
    raise ValueError(f"found {shown(text)}, expected a size such as 32G or 500M")


def one_line(text: str) -> str:
    """Return a value of an option; refuse one that is empty, or that would end the line of the script it stands in."""
    if not text.strip() or printable(text) != text:
        raise ValueError(f"found {shown(text)}, expected a text of one line without control characters")
    return text


def no_directive(text: str) -> str:
    """Return commands of the shell; refuse what sbatch would read as options, and a NUL, which no script can have."""
    if "\0" in text or re.search(r"^\s*#SBATCH", text, re.MULTILINE):
        raise ValueError(f"found {shown(text)}, expected commands of the shell; give options by `sbatch:`")
    return text


Count = Annotated[int, Field(strict=True, ge=1)]  # strict: YAML's `yes` is no 1
CountOrNone = Annotated[int, Field(strict=True, ge=0)]
Minutes = Annotated[int, BeforeValidator(minutes)]
Memory = Annotated[str, BeforeValidator(memory)]
Word = Annotated[str, AfterValidator(one_line)]
Option = Word | int | Literal[True]
OptionName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Resources(Strict):
    """The resources of one job (in an array: of each task); None: the default of the cluster.

    ``ranges``: in how many ranges the rows of a stage are computed, each as a task of its own with these resources.
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    nodes: Count = 1
    tasks: Count = 1  # processes on each node
    ranges: Count = 1  # tasks of an array, each on a node of its own, that compute ranges of the rows
    gpus: CountOrNone = 0  # GPUs of each node
    cpus: Count = 1  # CPUs of each task
    memory: Memory | None = None  # memory of each node
    time: Minutes = 60  # minutes


class Profile(Resources):
    """A cluster: the resources of all stages, exceptions by stage, and options of the jobs."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    stages: dict[str, dict[str, Any]] = {}
    shared: tuple[tuple[str, ...], ...] = ()
    array_parallelism: Count = 256
    signal_seconds: Annotated[int, Field(strict=True, ge=10)] = 120
    max_requeues: CountOrNone = 20
    mail: Word | None = None
    mail_events: tuple[Literal["BEGIN", "END", "FAIL", "REQUEUE", "ALL"], ...] = ("END", "FAIL")
    setup: tuple[Annotated[str, AfterValidator(no_directive)], ...] = ()
    sbatch: dict[OptionName, Option] = {}

    @model_validator(mode="after")
    def _fits_the_graph(self) -> Profile:
        _refuse_unknown("stages", self.stages, (stage.name for stage in STAGES))
        for stage in self.stages:
            self._check_processes(stage, self.resources((stage,)))
        for name in SINGLE[self.cluster]:
            if any(getattr(self.resources((stage.name,)), name) > 1 for stage in STAGES):
                raise ValueError(f"{name}: found more than 1, expected 1 with `cluster: {self.cluster}`")
        for group in self.shared:
            self._check_group(group)
        for each in STAGES:
            self._check_ranges(each.name)
        for option in self.sbatch:
            if option.replace("_", "-") in OWN_OPTIONS:
                raise ValueError(
                    f"sbatch: {option} is set by grappa; the profile's own keys change what may be changed"
                )
        return self

    def _check_processes(self, stage: str, found: Resources) -> None:
        """Refuse several processes, or ranges, for a stage that only one process, or only one job, can compute."""
        why = f"{stage} is computed by one process"
        able = ", ".join(each.name for each in STAGES if each.by_rows)
        reasons = {"nodes": why, "tasks": why, "ranges": f"only the rows of {able} are computed by ranges"}
        for name, reason in reasons.items():
            if self.stages[stage].get(name, 1) > getattr(found, name):
                raise ValueError(f"stages.{stage}.{name}: found {self.stages[stage][name]}, expected 1: {reason}")

    def _check_ranges(self, stage: str) -> None:
        """Refuse ranges of a stage whose ranges would be computed by several processes, or which shares a job."""
        asked = {"ranges": self.ranges} | self.stages.get(stage, {})
        if not find_stage(stage).by_rows or asked["ranges"] == 1:
            return
        found, where = self.resources((stage,)), f"stages.{stage}.ranges: found {asked['ranges']}"
        if found.nodes * found.tasks > 1:
            raise ValueError(
                f"{where} with nodes {found.nodes} and tasks {found.tasks}, expected one process a range: give the "
                "stage either ranges or several processes"
            )
        if len(self.group_of(stage)) > 1:
            raise ValueError(f"{where} in shared {list(self.group_of(stage))}, expected a job of its own")

    def _check_group(self, group: tuple[str, ...]) -> None:
        names = [stage.name for stage in STAGES]
        _refuse_unknown("shared", group, names)
        start = names.index(group[0]) if group else 0
        if not group or list(group) != names[start : start + len(group)]:
            left_out = [name for name in names[start : names.index(group[-1])] if name not in group] if group else []
            ordered = left_out and list(group) == sorted(group, key=names.index)
            hint = f"; {', '.join(left_out)} left out in between" if ordered else ""
            raise ValueError(f"shared: found {list(group)}, expected stages that follow one another in {names}{hint}")
        if sum(group[0] in other for other in self.shared) > 1 or len(set(group)) != len(group):
            raise ValueError(f"shared: {group[0]} is in two groups; a stage runs in one job")
        self.resources(group)

    def group_of(self, stage: str) -> tuple[str, ...]:
        """Return the stages that share a job with this stage, including itself."""
        return next((group for group in self.shared if stage in group), (stage,))

    def resources(self, stages: tuple[str, ...]) -> Resources:
        """Return the resources of a job for these stages: of each resource the largest number that a stage asks for.

        The job has one node and one task where no stage can be computed by several processes (``parallel`` in
        ``graph.stages``), and one range where the rows cannot be computed apart (``by_rows``).
        """
        general = {name: getattr(self, name) for name in Resources.model_fields}
        general["time"] = f"{self.time}m"
        found = []
        for stage in stages:
            try:
                found.append(Resources.model_validate(general | self.stages.get(stage, {})))
            except ValidationError as error:
                raise ValueError(_sentence(error, Resources, f"stages.{stage}.")) from None
        for name in ("partition", "account", "qos", "constraint"):
            values = {getattr(each, name) for each in found}
            if len(values) > 1:
                raise ValueError(f"shared: {', '.join(stages)} share a job but differ in {name}")
        numbers = {
            name: max(getattr(each, name) for each in found) for name in ("nodes", "tasks", "gpus", "cpus", "time")
        }
        if not any(find_stage(stage).parallel for stage in stages):
            numbers |= {"nodes": 1, "tasks": 1}
        numbers["ranges"] = max(
            (each.ranges for each, name in zip(found, stages, strict=True) if find_stage(name).by_rows), default=1
        )
        largest = max((each.memory for each in found if each.memory), key=_megabytes, default=None)
        return found[0].model_copy(update={**numbers, "memory": largest})


def load_profile(name_or_file: str) -> Profile:
    """Return a checked profile of the package or from a file; ConfigError says in a sentence what is wrong."""
    path = shipped_or_file(name_or_file, CLUSTERS, f"--cluster {name_or_file}", "profile")
    found = read_yaml(path)
    if not isinstance(found, dict | None):
        raise ConfigError(f"{path}: found {shown(found)}, expected keys such as `partition:`")
    try:
        return Profile.model_validate(found or {})
    except ValidationError as error:
        raise ConfigError(f"{path}: {_sentence(error, Profile)}") from None


def _sentence(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    def unknown(name: str) -> str:
        return _unknown(name, name.rpartition(".")[2], model.model_fields)

    return validation_sentence(error, unknown, where=where)


def _refuse_unknown(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(_unknown(f"{where}.{name}", name, known))


def _unknown(name: str, key: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {name}: " + (f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}")


def _megabytes(size: str) -> int:
    return int(size.rstrip("MGT")) * {"M": 1, "G": 1024, "T": 1024**2}.get(size[-1], 1 << 40)
