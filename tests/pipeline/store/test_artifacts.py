"""Run folders, artifact names, manifests, atomic writes, provenance; nothing heavy is imported."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from grappa.pipeline.graph.node import Node
from grappa.pipeline.store.artifacts import FileDigest, Manifest, RunFolder, RunFolderError, check_same_origin
from grappa.pipeline.store.provenance import git_commit, provenance
from grappa.pipeline.store.storage import (
    StorageError,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    file_digest,
    storage_errors,
)

REPOSITORY = Path(__file__).resolve().parents[3]


def test_nothing_heavy_is_imported() -> None:
    modules = "artifacts, locks, provenance, storage, work"
    program = "import sys, grappa.pipeline.engine.freshness\n"
    program += f"from grappa.pipeline.store import {modules}\nprint({{'torch', 'numpy', 'pandas'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_run_folder_is_made_once_and_opened_after(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs" / "mrt")
    assert json.loads((run.root / "run.json").read_text()) == {"format": 1}
    assert run.config_path == run.root / "config.yaml"
    run.config_path.write_text("seed: 1\n")
    assert RunFolder.create(run.root) == RunFolder.open(run.root, writable=True) == run
    assert run.config_path.read_text() == "seed: 1\n"


def test_making_a_run_folder_goes_on_after_a_crash(tmp_path: Path) -> None:
    (tmp_path / ".run.json.1-2.tmp").write_text("{")
    RunFolder.create(tmp_path)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    killed = subprocess.Popen(["true"])
    killed.wait()
    dead, living = (f".run.json.{process}-139.tmp" for process in (killed.pid, os.getpid()))
    for round_number in range(2):  # before there is a run, and in one
        for name in (dead, living, ".config.yaml.0.tmp"):
            (tmp_path / name).touch()
        RunFolder.create(tmp_path)
        left = {path.name for path in tmp_path.iterdir()} - {"run.json"}
        assert left == {living, ".config.yaml.0.tmp"}, round_number


def test_folders_that_are_no_run_are_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="There is no run folder .*gone; make one with `grappa init .*gone"):
        RunFolder.open(tmp_path / "gone")
    with pytest.raises(RunFolderError, match="is not a run folder .*`grappa init"):
        RunFolder.open(tmp_path)
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(RunFolderError, match="holds other files"):
        RunFolder.create(tmp_path)
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "letter.txt")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["letter.txt"]


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"format": 2}', "run format 2, this version reads up to 1; update grappa"), ("{", "damaged"), ("[]", "damaged")],
)
def test_newer_or_damaged_run_folder_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "run.json").write_text(content)
    for act in (RunFolder.open, RunFolder.create):
        with pytest.raises(RunFolderError, match=said):
            act(tmp_path)


def test_artifact_names_and_places(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    features, clusters = run.artifact("features"), run.artifact("clusters/k00256")
    assert (features.name, features.path) == ("features", tmp_path / "features")
    assert (clusters.name, clusters.path) == ("clusters/k00256", tmp_path / "clusters" / "k00256")
    beside = [path.name for path in (clusters.partial, clusters.old, clusters.lock)]
    assert beside == ["k00256.partial", "k00256.old", "k00256.lock"]
    assert clusters.manifest() is None
    with pytest.raises(ValueError, match="may hold letters"):
        Node("clusters", "../k")


def test_manifest_survives_writing_and_reading(tmp_path: Path) -> None:
    fingerprint = {"stage": "s", "instance": None, "version": 1, "config": {"s.a": [1, 2.5, None]}, "inputs": {}}
    odd = os.fsdecode(b"caf\xe9 'x\".npy")
    manifest = Manifest(fingerprint, {odd: {"bytes": 3, "sha256": "0" * 64}}, {"host": "h"})
    atomic_write_json(tmp_path / "manifest.json", manifest.to_json())
    assert Manifest.read(tmp_path / "manifest.json") == manifest


@pytest.mark.parametrize("order", [("index", "model", "evaluation"), ("evaluation", "index", "model")])
@pytest.mark.parametrize("head", ["heads/fused", "features"])
def test_the_most_upstream_artifact_that_was_made_again_is_named(
    tmp_path: Path, order: tuple[str, ...], head: str
) -> None:
    run = RunFolder.create(tmp_path / "run")
    former, now = "0" * 64, "1" * 64
    inputs = {
        "index": {head: {"a": former}, "embeddings/fused": {"a": former}},
        "model": {head: {"a": now}, "clusters/k00004": {"a": now}},
        "evaluation": {"embeddings/fused": {"a": now}, "clusters/k00004": {"a": now}},
    }
    for stage, digests in inputs.items():
        recipe = {"stage": stage, "instance": None, "version": 1, "config": {}, "inputs": digests}
        own: dict[str, FileDigest] = {"output": {"bytes": 0, "sha256": former}}
        run.artifact(stage).path.mkdir()
        atomic_write_json(run.artifact(stage).path / "manifest.json", Manifest(recipe, own, {}).to_json())
    first = "features" if head == "features" else "embeddings/fused"
    with pytest.raises(ValueError, match=f"do not belong together: {first} was made again in between; run `grappa run"):
        check_same_origin(run, *order)
    check_same_origin(run, "model", "evaluation")


def test_file_digest(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == (len(data), hashlib.sha256(data).hexdigest())


def test_atomic_write_leaves_only_the_file(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "note", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "note").read_bytes() == b"caf\xe9"
    with pytest.raises(ValueError):
        atomic_write_json(tmp_path / "note", {"loss": float("nan")})
    assert [entry.name for entry in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_atomic_write_keeps_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    atomic_write_bytes(tmp_path / "note", b"former")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match=r"^The disk is full at .*note; free some space") as caught:
        atomic_write_bytes(tmp_path / "note", b"new")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "note").read_bytes() == b"former"
    assert [entry.name for entry in tmp_path.iterdir()] == ["note"]


def test_where_nothing_can_be_written_the_folder_is_named_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for draft in (tmp_path / ".model.7.tmp", ".model.7.tmp", tmp_path):
        with pytest.raises(StorageError) as caught, storage_errors(tmp_path / "model"):
            raise PermissionError(errno.EACCES, "Permission denied", str(draft))
        fix = "make it writable for this user, or choose another folder."
        assert str(caught.value) == f"{tmp_path} cannot be written (Permission denied); {fix}"


def test_provenance_is_json_with_versions_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    started = datetime(2024, 5, 1, 12, tzinfo=UTC)
    found = json.loads(json.dumps(provenance(started=started, device="cpu")))
    assert set(found) == {
        "git_commit", "python", "packages", "host", "device", "slurm_job", "started", "ended", "peak_memory_bytes",
        "command",
    }  # fmt: skip
    assert found["started"] == "2024-05-01T12:00:00+00:00" < found["ended"]
    assert found["device"] == "cpu" and found["slurm_job"] == "12"
    assert found["packages"]["numpy"] and found["peak_memory_bytes"] > 10**6
    assert provenance(started=started, device="cpu", job="13")["slurm_job"] == "13"


def test_commit_of_a_checkout_and_of_none(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{commit}+changes"
