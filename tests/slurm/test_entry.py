"""The file of a job's call: only its owner can write it, a job loads no other, and it is removed after the call."""

from __future__ import annotations

import functools
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission

from grappa.pipeline.config.schema import Config
from grappa.pipeline.store.artifacts import RunFolder
from grappa.slurm import entry
from grappa.slurm.entry import ForeignFileError, load_own, private_files, remove_left_over, write_private
from grappa.slurm.jobs import Code
from grappa.slurm.launch import Waits, sbatch_text, start_local, submit_slurm
from grappa.slurm.plan import PlannedJob
from grappa.slurm.profiles import Profile
from grappa.slurm.records import Pin
from grappa.slurm.submission import Submission

ROOT = Path(__file__).parents[2]
PROFILE = Profile(cluster="local")
JOB = PlannedJob(("features",), ((Pin("features", 1, False, None),),), {}, (), PROFILE.resources(("features",)))


@pytest.fixture(autouse=True)
def _shared_folder() -> Iterator[None]:
    """The umask of groups that share their folders."""
    former = os.umask(0o000)
    yield
    os.umask(former)


def _mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def _call(file: Path, function: Callable[..., Any], *arguments: Any) -> Path:
    with private_files():
        DelayedSubmission(function, *arguments).dump(file)
    return file


def _tampered() -> dict[str, Callable[[Path, Path], object]]:
    modes = {
        f"mode {mode:o}": functools.partial(lambda mode, file, _: file.chmod(mode), mode)
        for mode in range(0o600, 0o1000)
        if mode & 0o022 and mode & 0o111 in (0, 0o111)
    }

    def replace(make: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
        return lambda file, other: (file.rename(other), make(file, other))

    return {
        **modes,
        "a link": replace(lambda file, other: file.symlink_to(other)),
        "a pipe": replace(lambda file, other: os.mkfifo(file)),
        "a folder": replace(lambda file, other: file.mkdir()),
        "a device": replace(lambda file, other: file.symlink_to("/dev/zero")),
    }


@pytest.mark.parametrize("how", _tampered())
def test_a_file_that_others_could_have_written_is_not_loaded(tmp_path: Path, how: str) -> None:
    file = _call(tmp_path / "5_submitted.pkl", os.mkdir, str(tmp_path / "ran"))
    _tampered()[how](file, tmp_path / "other.pkl")
    with pytest.raises((ForeignFileError, OSError)), private_files():
        DelayedSubmission.load(file).result()
    assert not (tmp_path / "ran").exists()


def test_a_file_of_another_user_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _call(tmp_path / "5_submitted.pkl", os.mkdir, str(tmp_path / "ran"))
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    with pytest.raises(ForeignFileError, match=r"belongs to user \d+, this job is of user \d+, so it is not loaded"):
        load_own(file)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o400])
def test_an_own_file_is_loaded(tmp_path: Path, mode: int) -> None:
    file = _call(tmp_path / "5_submitted.pkl", int, "7")
    file.chmod(mode)
    assert load_own(file).result() == 7


def test_files_are_private_whatever_there_was(tmp_path: Path) -> None:
    file = tmp_path / "5_submitted.pkl"
    file.write_bytes(b"x" * 10_000)
    assert _mode(file) == 0o666
    write_private([1], file)
    assert _mode(file) == 0o600 and load_own(file) == [1]
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        write_private([1], tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_nobody_else_can_change_the_folder_of_a_submission(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    submission = Submission(run, Config(), PROFILE, tmp_path / "jobs" / "1", "mark", Code(None, "x"))
    submission.prepare()
    assert _mode(tmp_path / "jobs" / "1") == 0o755
    assert {path.name for path in (tmp_path / "jobs" / "1").iterdir()} >= {"events", "progress"}


def _enter(folder: Path) -> subprocess.CompletedProcess[str]:
    """Start what a job starts, as the only task of job 5 of the local executor."""
    names = {"JOB_ID": 5, "NTASKS": 1, "JOB_NUM_NODES": 1, "NODEID": 0, "GLOBALID": 0, "LOCALID": 0}
    local = {f"SUBMITIT_LOCAL_{name}": str(value) for name, value in names.items()}
    command = entry.command(sys.executable, str(folder)).split()
    environment = {**os.environ, **local, "SUBMITIT_EXECUTOR": "local", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("function", "argument", "code", "left"),
    [(print, "made", 0, False), (int, "no number", 1, False), (sys.exit, 1, 1, False), (sys.exit, 143, 143, True)],
    ids=["it ends", "it fails", "it refuses", "it comes back"],
)
def test_a_file_is_removed_when_its_call_is_over(
    tmp_path: Path, function: Callable[..., Any], argument: Any, code: int, left: bool
) -> None:
    _call(tmp_path / "5_submitted.pkl", function, argument)
    assert _enter(tmp_path).returncode == code
    assert [file.name for file in tmp_path.glob("*.pkl")] == (["5_submitted.pkl"] if left else [])


def test_a_job_says_in_a_sentence_what_it_does_not_load(tmp_path: Path) -> None:
    _call(tmp_path / "5_submitted.pkl", os.mkdir, str(tmp_path / "ran")).chmod(0o660)
    entered = _enter(tmp_path)
    last = entered.stderr.strip().splitlines()[-1]
    assert entered.returncode == 1 and not (tmp_path / "ran").exists()
    assert last.startswith("grappa: ") and "can be written by others (mode 660), so it is not loaded" in last
    assert (tmp_path / "5_submitted.pkl").exists(), "kept, to be looked at"


def test_local_jobs_leave_no_file_of_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    calls: Any = [functools.partial(os.mkdir, str(tmp_path / name)) for name in "ab"]
    for started in start_local(PROFILE, JOB, tmp_path / "jobs", calls):
        started.wait()
    assert (tmp_path / "a").is_dir() and (tmp_path / "b").is_dir()
    assert not [*(tmp_path / "jobs").glob("*.pkl")]


def test_slurms_jobs_begin_at_the_same_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 5\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    profile, call = Profile(), functools.partial(os.mkdir, "x")
    assert submit_slurm(profile, JOB, tmp_path / "jobs", "grappa-1", Waits(), [call]) == ("5",)  # type: ignore[list-item]
    assert submit_slurm(profile, JOB, tmp_path / "jobs", "grappa-2", Waits(), [call] * 2) == ("5_0", "5_1")  # type: ignore[list-item]
    files = sorted((tmp_path / "jobs").glob("*.pkl"))
    assert [file.name for file in files] == [f"5{task}_submitted.pkl" for task in ("_0", "_1", "")]
    assert {_mode(file) for file in files} == {0o600}
    command = entry.command(sys.executable, str(tmp_path / "jobs"))
    for text in (
        *((file.read_text()) for file in (tmp_path / "jobs").glob("*.sh")),
        sbatch_text(profile, JOB, tmp_path / "jobs", "grappa-1", Waits()),
    ):
        assert command in text and "submitit.core._submit" not in text


def test_files_of_killed_jobs_are_removed_later(tmp_path: Path) -> None:
    folder = tmp_path / "20260101-x"
    folder.mkdir()
    for job in ("5", "55", "7_0", "7_1"):
        for kind in ("submitted.pkl", "0_result.pkl", "0_log.out"):
            (folder / f"{job}_{kind}").touch()
    remove_left_over(tmp_path, {"55", "7_1"})
    assert {file.name.rpartition("_")[0].removesuffix("_0") for file in folder.glob("*.pkl")} == {"55", "7_1"}
    assert len([*folder.glob("*.out")]) == 4


def test_a_job_runs_no_module_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder may be a run folder; only who takes modules from it himself lets a job do so."""
    run, ran = tmp_path / "run", tmp_path / "ran"
    run.mkdir()
    for name in ("submitit", "numpy", "torch", "grappa", "json", "yaml"):
        (run / f"{name}.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    monkeypatch.chdir(run)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert "-P" in entry.command("python", "x")
    calls: Any = [functools.partial(os.mkdir, str(tmp_path / "made"))]
    for started in start_local(PROFILE, JOB, tmp_path / "jobs", calls):
        started.wait()
    assert (tmp_path / "made").is_dir() and not ran.exists()
    assert "PYTHONSAFEPATH" not in os.environ
    monkeypatch.syspath_prepend(str(run))
    assert "-P" not in entry.command("python", "x")
