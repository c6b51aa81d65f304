"""Work and publish: exact contents, resume, kills at every step, full disks, read-only folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from grappa.pipeline.engine.freshness import artifact_state
from grappa.pipeline.store import locks
from grappa.pipeline.store.artifacts import Artifact, RunFolder
from grappa.pipeline.store.locks import LockedError, LockLostError
from grappa.pipeline.store.storage import StorageError
from grappa.pipeline.store.work import Work, open_work, recover

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on: children only touch files


def fingerprint(value: int = 20) -> dict[str, Any]:
    return {
        "stage": "clusters",
        "instance": "k00256",
        "version": 1,
        "config": {"clusters.num_iterations": value},
        "inputs": {},
    }


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return RunFolder.create(tmp_path / "run").artifact("clusters/k00256")


def make(artifact: Artifact, text: str, value: int = 20) -> None:
    with open_work(artifact, fingerprint(value)) as work:
        (work.path / "centroids.npy").write_text(text)
        (work.path / "shards").mkdir(exist_ok=True)
        (work.path / "shards/00000.npy").write_text(text * 2)
        (work.path / "checkpoint.json").write_text("{}")
        (work.path / "checkpoint.safetensors").write_text("weights")
        work.log({"step": 1})
        work.publish({"host": "here"})


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def in_child(action: Callable[[], object], kill_step: int | None = None) -> int:
    """Runs in a forked process; its exit status, negative for a signal, 1 for an exception."""
    child = os.fork()
    if child == 0:
        try:
            if kill_step is not None:
                kill_at(kill_step)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(step: int) -> None:
    """Makes this process SIGKILL itself just before its `step`-th call that changes the disk (from 0)."""
    count = iter(range(10**6))

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted

    for name in ("rename", "replace", "fsync", "unlink", "rmdir", "link", "mkdir", "truncate"):
        setattr(os, name, wrap(getattr(os, name)))


def test_published_folder_holds_exactly_outputs_log_and_manifest(artifact: Artifact) -> None:
    make(artifact, "one")
    assert contents(artifact.path) == ["centroids.npy", "log.jsonl", "manifest.json", "shards", "shards/00000.npy"]
    assert contents(artifact.root) == ["clusters", "clusters/k00256"] + [
        f"clusters/k00256/{name}" for name in contents(artifact.path)
    ] + ["run.json"]
    manifest = artifact.manifest()
    assert manifest is not None
    assert manifest.fingerprint == fingerprint()
    assert manifest.provenance == {"host": "here"}
    assert list(manifest.outputs) == ["centroids.npy", "shards/00000.npy"]
    assert manifest.outputs["centroids.npy"]["bytes"] == 3
    assert artifact.check(verify=True) == []
    assert json.loads((artifact.path / "log.jsonl").read_text())["step"] == 1


def test_publishing_again_replaces_all_files(artifact: Artifact) -> None:
    make(artifact, "one")
    with open_work(artifact, fingerprint(50)) as work:
        assert not work.resumed
        assert (artifact.path / "centroids.npy").read_text() == "one"
        (work.path / "other.npy").write_text("two")
        published = work.publish({})
    assert contents(artifact.path) == ["manifest.json", "other.npy"]
    assert artifact.manifest() == published
    assert contents(artifact.path.parent) == ["k00256", "k00256/manifest.json", "k00256/other.npy"]


def test_exception_keeps_partial_for_the_same_fingerprint_only(artifact: Artifact) -> None:
    work = open_work(artifact, fingerprint())
    assert not work.resumed
    (work.path / "half.npy").write_text("half")
    (work.path / ".other.npy.1-2.tmp").write_text("draft")
    (work.path / "log.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(ZeroDivisionError), work:
        _ = 1 / 0
    assert not artifact.lock.exists()
    with open_work(artifact, fingerprint()) as work:
        assert work.resumed and work.finished is None
        assert contents(work.path) == ["half.npy", "log.jsonl", "recipe.json"]
        work.log({"step": 2})
        assert [json.loads(line)["step"] for line in (work.path / "log.jsonl").open()] == [1, 2]
    with open_work(artifact, fingerprint(50)) as work:
        assert not work.resumed
        assert contents(work.path) == ["recipe.json"]


def test_instances_are_made_side_by_side_but_one_writer_each(artifact: Artifact) -> None:
    other = RunFolder.open(artifact.root).artifact("clusters/k00512")
    with open_work(artifact, fingerprint(), job="77") as work, open_work(other, fingerprint()):
        (work.path / "kept").write_text("")
        with pytest.raises(LockedError, match=rf"clusters/k00256 .* process {os.getpid()} on .*Slurm job 77.* since"):
            open_work(artifact, fingerprint(50))
        assert contents(work.path) == ["kept", "recipe.json"]


def test_fingerprint_with_nan_is_refused(artifact: Artifact) -> None:
    with pytest.raises(ValueError, match="JSON"):
        open_work(artifact, {**fingerprint(), "config": {"a.b": float("nan")}})
    assert not artifact.lock.exists()


def test_publish_is_refused_when_the_lock_was_lost(artifact: Artifact) -> None:
    make(artifact, "one")
    with open_work(artifact, fingerprint(50)) as work:
        artifact.lock.write_text("another one's")
        with pytest.raises(LockLostError, match="nothing was published"):
            work.publish({})
    assert artifact.lock.read_text() == "another one's"
    assert (artifact.path / "centroids.npy").read_text() == "one"


class Sleeper:
    """Lets this process sleep before its `step`-th call that changes the disk, while another process takes over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, meanwhile: Callable[[], object]) -> None:
        self.woken, self.moved, count = False, list[str](), iter(range(10**6))

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                if self.woken and not self.asleep and function is rename:
                    self.moved.append(str(arguments[0]))
                if next(count) == step:
                    self.woken = self.asleep = True
                    with pytest.MonkeyPatch.context() as silent:
                        silent.setattr(locks, "_is_dead", lambda holder, silence: True)
                        meanwhile()
                    self.asleep = False
                return function(*arguments, **options)

            return counted

        self.asleep, rename = False, os.rename
        for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "scandir"):
            monkeypatch.setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.parametrize("former", [False, True])
@pytest.mark.parametrize("successor", ["has published", "works"])
def test_a_writer_that_slept_at_any_step_never_publishes_over_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: bool, successor: str
) -> None:
    for step in range(300):
        artifact = RunFolder.create(tmp_path / f"run{step}").artifact("clusters/k00256")
        if former:
            make(artifact, "one", 20)
        working: list[Work] = []

        def take_over(artifact: Artifact = artifact, working: list[Work] = working) -> None:
            if successor == "has published":
                make(artifact, "three", 60)
                return
            working.append(open_work(artifact, fingerprint(60)))
            (working[0].path / "centroids.npy").write_text("three")

        error: Exception | None = None
        with monkeypatch.context() as patch:
            try:
                with open_work(artifact, fingerprint(50)) as work:
                    (work.path / "centroids.npy").write_text("two")
                    sleeper = Sleeper(patch, step, take_over)
                    work.publish({})
            except LockLostError as lost:
                error = lost
        if working:
            assert (working[0].path / "centroids.npy").read_text() == "three"
            with working[0]:
                working[0].publish({})
        if not sleeper.woken:
            break
        assert artifact_state(artifact, fingerprint(60), verify=True).kind == "fresh"
        assert (artifact.path / "centroids.npy").read_text() == "three"
        assert str(artifact.path) not in sleeper.moved, "the successor's result was moved away for a moment"
        recover(artifact)
    assert [path.name for path in artifact.path.parent.iterdir()] == ["k00256"]
    assert step > 15 and error is None


def test_two_holders_never_share_a_folder(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LockLostError), open_work(artifact, fingerprint(50)) as stale:
        (stale.path / "half.npy").write_text("half")
        monkeypatch.setattr(locks, "_is_dead", lambda holder, silence: True)
        with open_work(artifact, fingerprint(50)) as work:
            assert work.resumed and (work.path / "half.npy").read_text() == "half"
            assert not stale.path.exists() and work.path != stale.path
            (stale.path / "more.npy").write_text("from a former holder")


@pytest.mark.parametrize("former", [False, True])
def test_kill_at_every_step_loses_nothing_and_the_next_run_recovers(tmp_path: Path, former: bool) -> None:
    for step in range(200):
        root = tmp_path / f"run{step}"
        artifact = RunFolder.create(root).artifact("clusters/k00256")
        if former:
            make(artifact, "one", 20)
        status = in_child(partial(make, artifact, "two", 50), kill_step=step)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        _check_after_kill(artifact, former)
        shutil.rmtree(root)
    assert step > 15


def _check_after_kill(artifact: Artifact, former: bool) -> None:
    before = artifact_state(artifact, fingerprint(50), verify=True)  # a status that only reads
    assert before.kind in ({"stale", "fresh"} if former else {"missing", "fresh"})
    expected = {"fresh": "two", "stale": "one"}
    if before.kind != "missing":
        assert (artifact.home / "centroids.npy").read_text() == expected[before.kind]
    written = any((folder / "centroids.npy").exists() for folder in artifact.unfinished())
    recover(artifact)
    after = artifact_state(artifact, fingerprint(50), verify=True)
    assert after.kind in {before.kind, "fresh"}
    if written and after.kind != "fresh":
        with open_work(artifact, fingerprint(50)) as work:
            assert work.resumed and (work.path / "centroids.npy").read_text() in {"", "two"}
    assert after.kind == "missing" or (artifact.path / "centroids.npy").read_text() == expected[after.kind]
    make(artifact, "two", 50)
    assert artifact_state(artifact, fingerprint(50), verify=True).kind == "fresh"
    assert contents(artifact.path.parent)[0] == "k00256"
    recover(artifact)
    assert [path.name for path in artifact.path.parent.iterdir()] == ["k00256"]


def test_kill_at_every_step_of_the_recovery_loses_nothing(tmp_path: Path) -> None:
    template = RunFolder.create(tmp_path / "template").artifact("clusters/k00256")
    make(template, "one", 20)
    shutil.copytree(template.path, tmp_path / "former")
    make(template, "two", 50)
    os.rename(template.path, template.partial)
    os.rename(tmp_path / "former", template.old)  # as between the two renames of a publish
    for step in range(60):
        artifact = RunFolder(tmp_path / f"run{step}").artifact("clusters/k00256")
        shutil.copytree(template.root, artifact.root)
        status = in_child(partial(recover, artifact), kill_step=step)
        assert artifact_state(artifact, fingerprint(50), verify=True).kind in {"stale", "fresh"}
        recover(artifact)
        assert artifact_state(artifact, fingerprint(50), verify=True).kind == "fresh"
        assert not artifact.old.exists() and not artifact.unfinished()
        if status == 0:
            break
    assert step > 5


def test_partial_half_emptied_by_a_kill_is_never_resumed(tmp_path: Path) -> None:
    names = [f"shard{number}" for number in range(5)]
    for step in range(60):
        artifact = RunFolder.create(tmp_path / f"run{step}").artifact("clusters/k00256")
        with open_work(artifact, fingerprint(20)) as work:
            for name in names:
                (work.path / name).write_text("")
        status = in_child(partial(open_work, artifact, fingerprint(50)), kill_step=step)
        with open_work(artifact, fingerprint(20)) as work:
            assert contents(work.path) == ["recipe.json", *(names if work.resumed else [])]
        if status == 0:
            break
    assert step > 5


def test_lone_old_is_read_in_place_and_put_back(artifact: Artifact) -> None:
    make(artifact, "one")
    os.rename(artifact.path, artifact.old)
    assert artifact_state(artifact, fingerprint(), verify=True).kind == "fresh"
    assert not artifact.path.exists()
    recover(artifact)
    assert not artifact.old.exists()
    assert artifact_state(artifact, fingerprint(), verify=True).kind == "fresh"


def test_lone_old_that_is_not_whole_is_never_put_back(artifact: Artifact) -> None:
    make(artifact, "one")
    os.rename(artifact.path, artifact.old)
    (artifact.old / "manifest.json").unlink()
    recover(artifact)
    assert artifact_state(artifact, fingerprint()).kind == "missing"


def test_open_work_completes_an_interrupted_publish_and_says_so(artifact: Artifact) -> None:
    make(artifact, "one")
    published = artifact.manifest()
    os.rename(artifact.path, artifact.partial)
    with open_work(artifact, fingerprint()) as work:
        assert work.finished == published and not work.resumed
    assert (artifact.path / "centroids.npy").read_text() == "one"


def test_a_publication_that_was_damaged_before_its_rename_is_never_completed(artifact: Artifact) -> None:
    make(artifact, "one")
    os.rename(artifact.path, artifact.partial)
    (artifact.partial / "centroids.npy").write_text("owe")
    recover(artifact)
    assert artifact_state(artifact, fingerprint()).kind == "missing"
    make(artifact, "one")
    assert artifact_state(artifact, fingerprint(), verify=True).kind == "fresh"


def test_recover_removes_what_a_killed_writer_left_of_its_lock(artifact: Artifact) -> None:
    """Wherever it was killed, also after its result was published: nobody works on a fresh artifact again."""
    for step in range(200):
        status = in_child(partial(make, artifact, "one"), kill_step=step)
        if artifact_state(artifact, fingerprint()).kind == "fresh":
            recover(artifact)
            assert [path.name for path in artifact.path.parent.iterdir()] == ["k00256"]
            shutil.rmtree(artifact.path)
        if status == 0:
            break
    assert step > 15


@pytest.mark.parametrize("finder", ["recover", "open_work"])
def test_of_several_unfinished_folders_the_one_that_can_be_resumed_stays(artifact: Artifact, finder: str) -> None:
    with open_work(artifact, fingerprint()) as work:
        (work.path / "half.npy").write_text("half")
    for token, recipe in (("0", None), ("f", json.dumps(fingerprint(50)) if finder == "open_work" else "{")):
        artifact.partial_of(token).mkdir()
        if recipe is not None:
            (artifact.partial_of(token) / "recipe.json").write_text(recipe)
    artifact.lock.write_text("")
    os.utime(artifact.lock, (1, 1))
    if finder == "recover":
        recover(artifact)
        assert artifact.unfinished() == [artifact.partial]
    with open_work(artifact, fingerprint()) as work:
        assert work.resumed and (work.path / "half.npy").read_text() == "half"


def test_recover_leaves_a_living_writer_alone(artifact: Artifact) -> None:
    make(artifact, "one")
    os.rename(artifact.path, artifact.old)
    with open_work(artifact, fingerprint()) as work:  # puts back
        os.rename(artifact.path, artifact.old)
        recover(artifact)
        assert artifact.old.exists() and work.path.exists()


def test_sigkilled_process_is_taken_over_at_once_and_resumed(artifact: Artifact) -> None:
    make(artifact, "one")
    program = f"""
        import sys, time
        from pathlib import Path
        from grappa.pipeline.store.artifacts import RunFolder
        from grappa.pipeline.store.work import open_work
        with open_work(RunFolder(Path(sys.argv[1])).artifact("clusters/k00256"), {fingerprint(50)!r}) as work:
            (work.path / "checkpoint.json").write_text("step 7")
            print("ready", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(artifact.root)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        with pytest.raises(LockedError, match=f"process {process.pid} "):
            open_work(artifact, fingerprint(50))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but a zombie still
        with open_work(artifact, fingerprint(50)) as work:
            assert work.resumed
            assert (work.path / "checkpoint.json").read_text() == "step 7"
    assert artifact.check(verify=True) == []


def _error_of(action: Callable[[], object]) -> StorageError | None:
    try:
        action()
    except StorageError as error:
        return error
    return None


def test_full_disk_at_every_sync_of_a_publish_leaves_a_whole_result(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(artifact, "one")
    fsync = os.fsync
    for step in range(100):
        count = iter(range(1000))

        def full(descriptor: int, step: int = step, count: Iterator[int] = count) -> None:
            if next(count) == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        error = _error_of(partial(make, artifact, "two", 50))
        monkeypatch.setattr(os, "fsync", fsync)
        if error is None:
            break
        assert error.errno == errno.ENOSPC
        assert str(error).startswith("The disk is full at ")
        assert not artifact.lock.exists()
        state = artifact_state(artifact, fingerprint(50), verify=True)
        assert state.kind in {"stale", "fresh"}
        assert (artifact.home / "centroids.npy").read_text() == {"stale": "one", "fresh": "two"}[state.kind]
    assert step > 5
    assert artifact_state(artifact, fingerprint(50), verify=True).kind == "fresh"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("1000 requested and 24 written")]
)
def test_full_disk_in_a_stage_is_said_in_a_sentence(artifact: Artifact, error: OSError) -> None:
    make(artifact, "one")
    with (
        pytest.raises(StorageError, match="The disk is full at .*; free some space"),
        open_work(artifact, fingerprint(50)),
    ):
        raise error
    assert artifact_state(artifact, fingerprint(20), verify=True).kind == "fresh"
    assert artifact.partial.exists() and not artifact.lock.exists()


def test_other_errors_in_a_stage_pass_unchanged(artifact: Artifact) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), open_work(artifact, fingerprint()):
        Path("nowhere").read_text()


def test_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    try:
        artifact = RunFolder.create(disk / "run").artifact("clusters/k00256")
        make(artifact, "one")
        with pytest.raises(StorageError, match="The disk is full"), open_work(artifact, fingerprint(50)) as work:
            (work.path / "big.npy").write_bytes(bytes(10**6))
        assert artifact_state(artifact, fingerprint(), verify=True).kind == "fresh"
        (artifact.partial / "big.npy").unlink()
        make(artifact, "two", 50)
        assert artifact_state(artifact, fingerprint(50), verify=True).kind == "fresh"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_read_only_run_folder_is_one_sentence() -> None:
    """In a process without root's rights: root may write anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        artifact = RunFolder.create(Path(folder, "run")).artifact("clusters/k00256")
        make(artifact, "one")
        for path in (artifact.root, artifact.path.parent):
            path.chmod(0o555)
        reader, writer = os.pipe()
        in_child(lambda: _try_to_write(artifact, writer))
        os.close(writer)
        with open(reader, encoding="utf-8") as pipe:
            lines = pipe.read().splitlines()
        for path in (artifact.root, artifact.path.parent):
            path.chmod(0o755)
    assert len(lines) == 3
    assert all("cannot be written" in line and "make it writable" in line for line in lines[:2])
    assert lines[2] == "fresh"


def _try_to_write(artifact: Artifact, writer: int) -> None:
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    with open(writer, "w", encoding="utf-8") as pipe:
        for action in (
            lambda: open_work(artifact, fingerprint(50)),
            lambda: RunFolder.open(artifact.root, writable=True),
        ):
            try:
                action()
            except StorageError as error:
                pipe.write(f"{error}\n")
        pipe.write(artifact_state(artifact, fingerprint(), verify=True).kind)
