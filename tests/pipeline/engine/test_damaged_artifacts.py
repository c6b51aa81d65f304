"""Bytes that a disk changed: they are named with the command, never used, never published under a new digest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from grappa.pipeline.cli import app
from grappa.pipeline.engine.execution import NotReadyError
from grappa.pipeline.engine.reuse import reuse_artifacts
from grappa.pipeline.graph.stages import nodes
from grappa.pipeline.store.digests import forget_digests
from tests.helpers.fake_stages import FakeStages, fake_stages


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fakes = fake_stages(tmp_path / "run", monkeypatch)
    fakes.execute()
    forget_digests()  # as in a new process
    return fakes


def flip(path: Path) -> bytes:
    """Change the last byte as a disk would: size and time stamp stay; return the content as it was."""
    before, stat = path.read_bytes(), path.stat()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return before


def outputs(fakes: FakeStages) -> list[tuple[str, str]]:
    """Return (artifact, file) of every output of a run."""
    manifests = [(str(node), fakes.run.artifact(node).manifest()) for node in nodes(fakes.config)]
    return [(name, file) for name, manifest in manifests if manifest for file in manifest.outputs]


def grappa(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_no_flipped_byte_of_any_artifact_reaches_another_run(complete: FakeStages, tmp_path: Path) -> None:
    for number, (name, file) in enumerate(outputs(complete)):
        path = complete.root / name / file
        right, said = flip(path), list[str]()
        forget_digests()
        other = FakeStages(tmp_path / f"other{number}")
        other.configure(**complete.settings)
        reuse_artifacts(complete.run, other.run, other.config, say=said.append)
        taken = other.run.artifact(name).path
        assert not taken.exists(), f"{name} was published with a digest of damaged bytes"
        cure = f"repair it by `grappa run {complete.root} --verify`"
        assert f"not reused: {name} in {complete.root} is damaged ({file}: sha256 differs); {cure}" in said
        path.write_bytes(right)


def test_damage_is_named_repaired_and_the_repaired_run_is_whole(complete: FakeStages) -> None:
    for name, file in outputs(complete):
        flip(complete.root / name / file)
        told = grappa("status", complete.root, "--verify")
        assert told.exit_code == 1, name
        assert told.stdout.splitlines()[-1] == f"{name}: damaged; repair by `grappa run {complete.root} --verify`"
        planned = grappa("run", complete.root, "--verify", "--dry-run").stdout
        assert f"would run {name}: corrupt: {file}: sha256 differs" in planned
        complete.execute(verify=True)
        assert complete.ran == [name], "made again with the same bytes, it makes nothing else stale"
        assert grappa("status", complete.root, "--verify").exit_code == 0


def test_status_verify_as_json_has_its_exit_code_too(complete: FakeStages) -> None:
    assert grappa("status", complete.root, "--verify", "--json").exit_code == 0
    flip(complete.root / "features" / "features.npy")
    told = grappa("status", complete.root, "--verify", "--json")
    assert told.exit_code == 1 and {"corrupt"} < {each["state"] for each in json.loads(told.stdout)}


def test_run_says_that_it_compared_sizes_only(complete: FakeStages) -> None:
    flip(complete.root / "index" / "result.bin")
    assert "(sizes were compared, --verify reads every byte)" in grappa("run", complete.root, "--until", "model").stdout


@pytest.mark.parametrize("damaged", ["features/features.npy", "images/pixels/00000.npy", "sources/sources.parquet"])
def test_no_stage_computes_from_damaged_inputs(complete: FakeStages, damaged: str) -> None:
    """A result made of them would be fresh: its fingerprint holds the digest of the bytes that were right."""
    path, stage = complete.root / damaged, damaged.partition("/")[0]
    flip(path)
    reader = {"features": "whitening", "images": "features", "sources": "images"}[stage]
    with pytest.raises(NotReadyError, match=f"{reader}.* cannot run: {stage} in .* is damaged .*repair it by `grappa "):
        complete.execute(stage=reader, force=True)
    assert complete.ran == [] and complete.not_fresh() == {}


def test_a_manifest_without_outputs_is_corrupt_and_made_again(complete: FakeStages) -> None:
    path = complete.root / "heads/mean/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"outputs": {}}))
    assert complete.states()["heads/mean"] == "corrupt: manifest.json: it names no output"
    complete.execute()
    assert complete.ran == ["heads/mean"] and complete.not_fresh(verify=True) == {}
