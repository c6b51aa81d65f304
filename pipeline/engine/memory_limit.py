"""The memory that is still free for this process: on the machine, and in the process's control group."""

from __future__ import annotations

from pathlib import Path

MEMINFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
GIB = 2**30


class NotEnoughMemoryError(ValueError):
    """A step needs more memory than is free; the message has both numbers."""


def require_memory(what: str, needed: int) -> None:
    """Refuse to start ``what`` where fewer than ``needed`` bytes are free, if the system says how many are free."""
    free = available_memory()
    if free is not None and needed > free:
        raise NotEnoughMemoryError(
            f"{what} needs about {needed / GIB:.1f} GiB of memory and {free / GIB:.1f} GiB are free here; "
            "free some, or run it on a machine (ask for a job) with more"
        )


def available_memory() -> int | None:
    """Return the number of free bytes, None where the system does not say it."""
    found = [_machine_memory(), *(_group_memory(group) for group in _own_groups())]
    return min((number for number in found if number is not None), default=None)


def _machine_memory() -> int | None:
    lines = MEMINFO.read_text().splitlines() if MEMINFO.exists() else []
    numbers = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return numbers[0] if numbers else None


def _own_groups() -> list[Path]:
    """Return the folders of this process's control group (version 2) and of the groups that contain it."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    own = [GROUPS / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return [folder for group in own for folder in (group, *group.parents) if folder.is_relative_to(GROUPS)]


def _group_memory(group: Path) -> int | None:
    """Return the limit in bytes minus the used memory that cannot be reclaimed; None without a limit."""
    limit, used, statistics = (group / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not (limit.exists() and used.exists() and statistics.exists()) or limit.read_text().strip() == "max":
        return None
    lines = (line.split() for line in statistics.read_text().splitlines())
    files = sum(int(value) for name, value in lines if name in {"active_file", "inactive_file"})
    return max(0, int(limit.read_text()) - int(used.read_text()) + files)
