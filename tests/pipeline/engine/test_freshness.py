"""Fingerprints compared, and the state of one artifact: missing, fresh, stale or corrupt, with reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grappa.pipeline.engine.freshness import State, artifact_state, compare_fingerprints
from grappa.pipeline.store.artifacts import Artifact, RunFolder
from grappa.pipeline.store.work import open_work

FINGERPRINT: dict[str, Any] = {
    "stage": "fusion",
    "instance": None,
    "version": 1,
    "config": {"clusters.num_iterations": 20, "fusion.loss": "agreement"},
    "inputs": {"features": {"features.npy": "a" * 64}, "adaptors/k00256": {"adaptors.safetensors": "b" * 64}},
}


def changed(**parts: Any) -> dict[str, Any]:
    return {**FINGERPRINT, **parts}


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    artifact = RunFolder.create(tmp_path / "run").artifact("fusion")
    with open_work(artifact, FINGERPRINT) as work:
        (work.path / "fusion.safetensors").write_bytes(bytes(20))
        work.publish({"images_root": "somewhere"})
    return artifact


@pytest.mark.parametrize(
    ("new", "lines"),
    [
        (FINGERPRINT, []),
        (changed(version=2), ["stage version: 1 -> 2"]),
        (changed(instance="views"), ["instance: null -> views"]),
        (
            changed(config={"clusters.num_iterations": 50, "fusion.loss": "barlow"}),
            ["config clusters.num_iterations: 20 -> 50", "config fusion.loss: agreement -> barlow"],
        ),
        (
            changed(config={"clusters.num_iterations": 20, "fusion.layers": None}),
            ["config fusion.layers: (not there) -> null", "config fusion.loss: agreement -> (not there)"],
        ),
        (
            changed(inputs={"features": {"features.npy": "c" * 64}, "adaptors/k01024": {}}),
            ["input adaptors/k00256: removed", "input adaptors/k01024: added", "input features: content changed"],
        ),
    ],
)
def test_compare_fingerprints(new: dict[str, Any], lines: list[str]) -> None:
    assert compare_fingerprints(FINGERPRINT, new) == lines


def test_missing(tmp_path: Path) -> None:
    artifact = RunFolder.create(tmp_path / "run").artifact("fusion")
    assert artifact_state(artifact, FINGERPRINT) == State("missing", [])
    with open_work(artifact, FINGERPRINT):
        assert artifact_state(artifact, None, ["upstream features is missing"]) == State("missing", [])


def test_fresh(artifact: Artifact) -> None:
    assert artifact_state(artifact, FINGERPRINT, verify=True) == State("fresh", [])
    assert str(artifact_state(artifact, FINGERPRINT)) == "fresh"


def test_stale_by_fingerprint_and_by_upstream(artifact: Artifact) -> None:
    upstream = ["upstream features is stale"]
    both = State("stale", ["stage version: 1 -> 2", *upstream])
    assert artifact_state(artifact, changed(version=2), upstream) == both
    assert artifact_state(artifact, FINGERPRINT, upstream) == State("stale", upstream)
    assert str(artifact_state(artifact, None, upstream)) == "stale: upstream features is stale"


def test_unknown_fingerprint_needs_a_named_problem(artifact: Artifact) -> None:
    with pytest.raises(AssertionError):
        artifact_state(artifact, None)


def test_truncated_or_lost_output_is_corrupt(artifact: Artifact) -> None:
    output = artifact.path / "fusion.safetensors"
    output.write_bytes(bytes(10))
    assert artifact_state(artifact, FINGERPRINT) == State("corrupt", ["fusion.safetensors: 10 bytes, manifest says 20"])
    output.unlink()
    assert artifact_state(artifact, changed(version=2)) == State("corrupt", ["fusion.safetensors: missing"])


def test_flipped_byte_is_found_when_verifying(artifact: Artifact) -> None:
    (artifact.path / "fusion.safetensors").write_bytes(bytes(19) + b"\1")
    assert artifact_state(artifact, FINGERPRINT).kind == "fresh"
    assert artifact_state(artifact, FINGERPRINT, verify=True) == State(
        "corrupt", ["fusion.safetensors: sha256 differs"]
    )


def _edited(manifest: dict[str, Any], field: str, value: Any) -> str:
    return json.dumps({**manifest, field: value})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("format", 2, "format 2 is newer than 1, the newest this version reads; update grappa"),
        ("format", "one", "field format is 'one', expected a number"),
        ("provenance", [], "field provenance is not an object"),
        ("extra", 1, "fields are "),
        ("recipe", {"stage": "fusion"}, "fields of recipe are "),
        ("recipe", changed(version="1"), "a field of recipe has the wrong type"),
        ("recipe", changed(inputs={"features": "abc"}), "a field of recipe has the wrong type"),
        ("outputs", {"../x": {"bytes": 1, "sha256": "0" * 64}}, "output '../x' is not a path inside the artifact"),
        ("outputs", {"x": {"bytes": -1, "sha256": "0" * 64}}, "output x needs bytes and sha256"),
        ("outputs", {"x": {"bytes": 1, "sha256": "short"}}, "output x needs bytes and sha256"),
    ],
)
def test_manifest_with_wrong_fields_is_corrupt(artifact: Artifact, field: str, value: Any, said: str) -> None:
    path = artifact.path / "manifest.json"
    path.write_text(_edited(json.loads(path.read_text()), field, value))
    state = artifact_state(artifact, FINGERPRINT)
    assert state.kind == "corrupt"
    assert len(state.reasons) == 1 and state.reasons[0].startswith(f"manifest.json: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"", "not JSON"), (b"[]", "expected an object, found list")],
)
def test_manifest_that_is_not_json_is_corrupt(artifact: Artifact, content: bytes, said: str) -> None:
    (artifact.path / "manifest.json").write_bytes(content)
    state = artifact_state(artifact, FINGERPRINT)
    assert state.kind == "corrupt" and state.reasons[0].startswith(f"manifest.json: {said}")


def test_folder_without_manifest_is_corrupt(artifact: Artifact) -> None:
    (artifact.path / "manifest.json").unlink()
    assert artifact_state(artifact, FINGERPRINT) == State("corrupt", ["manifest.json: missing"])
