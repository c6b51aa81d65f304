"""Naming, merging and splitting clusters: one small file, read by `Run.assignments`; no artifact changes."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import grappa
from grappa.pipeline.pages.explore import editing
from grappa.pipeline.pages.explore.editing import LOCK_FILE
from grappa.pipeline.pages.explore.web.server import make_app
from grappa.pipeline.pages.explore.workspace import Workspace
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.edits import EDITS_FILE, Edits, read_edits
from grappa.pipeline.store.storage import storage_errors
from tests.helpers.tiny import digests, run_all
from tests.pipeline.explore.material import EVIL

HOME = "http://127.0.0.1:8421"


@pytest.fixture
def run(explored: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(explored.root, tmp_path / "run")))


@pytest.fixture
def client(run: RunFolder) -> Iterator[TestClient]:
    workspace = Workspace.open(run.root)
    with TestClient(make_app(workspace), base_url=HOME) as client:
        yield client
    workspace.close()


def sizes(client: TestClient, granularity: str = "k00004") -> dict[int, int]:
    items = client.get(f"/api/clusters/{granularity}").json()["items"]
    return {each["group"]: each["size"] for each in items}


def post(client: TestClient, path: str, **content: Any) -> Any:
    answer = client.post(f"/api/clusters/k00004/{path}", json=content)
    assert answer.status_code == 200, answer.text
    return answer.json()["groups"]


def test_edits_are_read_by_the_run_and_no_artifact_changes(client: TestClient, run: RunFolder) -> None:
    before, plain = digests(run), grappa.open_run(run.root).assignments()
    assert "k00004_group" not in plain
    post(client, "name", group=1, name=f"  Wheels   & {EVIL} ")
    post(client, "merge", groups=[1, 3])
    rows = [each["row"] for each in client.get("/api/clusters/k00004/1/images?limit=3").json()["items"]]
    (new,) = post(client, "split_off", rows=rows, name="Three")
    table = grappa.open_run(run.root).assignments()
    assert table["k00004_group"].value_counts().to_dict() == sizes(client)
    assert (table["k00004"] == plain["k00004"]).all(), "the pseudo-labels stay"
    assert set(table.loc[table["k00004_group"] == 1, "k00004_name"]) == {f"Wheels & {EVIL}"}
    assert set(np.flatnonzero(table["k00004_group"] == new)) == set(rows) and new == 4
    assert table["k00004_name"].value_counts()["Three"] == 3 and "k00008_name" not in table
    assert digests(run) == before


def test_merging_twice_and_splitting_again_keeps_every_image_in_one_group(client: TestClient, run: RunFolder) -> None:
    post(client, "merge", groups=[0, 1])
    post(client, "merge", groups=[2, 0])
    assert set(sizes(client)) == {2, 3} and sum(sizes(client).values()) == 37
    made = post(client, "split", group=2, parts=3)
    assert len(made) == 2 and set(sizes(client)) == {2, 3, *made} and sum(sizes(client).values()) == 37
    assert sizes(client)[2] == max(size for group, size in sizes(client).items() if group != 3)
    post(client, "merge", groups=[made[0], made[1]])
    assert set(sizes(client)) == {2, 3, made[0]}


def test_the_last_edits_can_be_taken_back(client: TestClient, run: RunFolder) -> None:
    before = sizes(client)
    post(client, "name", group=0, name="A")
    post(client, "merge", groups=[0, 1])
    assert client.get("/api/run").json()["can_undo"]
    assert client.post("/api/undo", json={}).json() == {"granularity": "k00004", "can_undo": True}
    assert sizes(client) == before and read_edits(run)["k00004"].names == {0: "A"}
    assert client.post("/api/undo", json={}).json()["can_undo"] is False
    assert json.loads((run.root / EDITS_FILE).read_text())["clusterings"] == []
    assert client.post("/api/undo", json={}).json()["granularity"] is None


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("name", {"group": 0, "name": "x" * 101}, "the name has 101 characters; give at most 100"),
        ("name", {"group": 0, "name": "a\x1bb"}, "holds a control character"),
        ("name", {"group": 0, "name": "\ud800"}, "holds a control character"),
        ("name", {"group": 0, "name": 5}, "name is a text"),
        ("name", {"group": True, "name": "x"}, "give a whole number"),
        ("merge", {"groups": [1]}, "two or more clusters"),
        ("merge", {"groups": [1, 1]}, "two or more clusters"),
        ("merge", {"groups": {"a": 1}}, "two or more clusters"),
        ("split", {"group": 0, "parts": 1}, "parts is 1; give a number from 2"),
        ("split_off", {"rows": []}, "rows is a list of 1 to"),
        ("split_off", {"rows": [0.5]}, "rows is a list of 1 to"),
    ],
)
def test_an_edit_that_means_nothing_is_refused(
    client: TestClient, run: RunFolder, path: str, content: Any, words: str
) -> None:
    body = json.dumps(content)
    answer = client.post(f"/api/clusters/k00004/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and words in answer.json()["error"]
    assert not (run.root / EDITS_FILE).exists()


def test_a_second_explorer_reads_only(client: TestClient, run: RunFolder) -> None:
    second = Workspace.open(run.root)
    with TestClient(make_app(second), base_url=HOME) as other:
        notice = other.get("/api/run").json()["read_only"]
        assert notice.startswith("another explorer has this run open (process ") and "\n" not in notice
        answer = other.post("/api/clusters/k00004/name", json={"group": 0, "name": "mine"})
        assert answer.status_code == 409 and answer.json()["error"] == notice
    second.close()
    post(client, "name", group=0, name="theirs")
    assert read_edits(run)["k00004"].names == {0: "theirs"}


def test_a_lock_that_was_taken_over_ends_editing(client: TestClient, run: RunFolder) -> None:
    (run.root / LOCK_FILE).write_text("{}")
    answer = client.post("/api/clusters/k00004/name", json={"group": 0, "name": "late"})
    assert answer.status_code == 409 and "took explore.lock over" in answer.json()["error"]
    assert not (run.root / EDITS_FILE).exists()


def test_a_run_that_cannot_be_written_is_shown(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: str) -> None:
        with storage_errors(path.parent):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(editing, "acquire", refuse)
    workspace = Workspace.open(run.root)
    with TestClient(make_app(workspace), base_url=HOME) as client:
        (notice,) = client.get("/api/run").json()["notices"]
        assert notice.startswith("clusters cannot be edited: ") and "cannot be written" in notice
        assert sum(sizes(client).values()) == 37
        assert client.post("/api/clusters/k00004/name", json={"group": 0, "name": "A"}).status_code == 409
    workspace.close()


def test_edits_of_other_clusters_are_kept_and_not_applied(client: TestClient, run: RunFolder) -> None:
    post(client, "name", group=0, name="Old")
    path = run.root / EDITS_FILE
    entry = json.loads(path.read_text())["clusterings"][0] | {"assignments": "0" * 64}
    path.write_text(json.dumps({"format": 1, "clusterings": [entry]}))
    with pytest.warns(UserWarning, match="k00004 belongs to clusters that were made again since: it is left out"):
        assert "k00004_name" not in grappa.open_run(run.root).assignments()
    assert client.post("/api/clusters/k00004/name", json={"group": 1, "name": "New"}).status_code == 200
    assert [each["names"] for each in json.loads(path.read_text())["clusterings"]] == [
        {"0": "Old"},
        {"0": "Old", "1": "New"},
    ]


def test_an_explorer_does_not_edit_clusters_that_were_made_again(client: TestClient, run: RunFolder) -> None:
    sealed = run.root / "clusters" / "k00004" / "manifest.json"
    manifest = json.loads(sealed.read_text())
    manifest["outputs"]["assignments.parquet"]["sha256"] = "1" * 64
    sealed.write_text(json.dumps(manifest))
    answer = client.post("/api/clusters/k00004/name", json={"group": 1, "name": "New"})
    assert answer.status_code == 409 and "start the explorer again" in answer.json()["error"]
    assert not (run.root / EDITS_FILE).exists()


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"format": 9, "clusterings": []}', '{"format": 1, "clusterings": [{}]}']
)
def test_a_damaged_file_is_one_sentence(run: RunFolder, damage: str) -> None:
    (run.root / EDITS_FILE).write_text(damage)
    for read in (lambda: grappa.open_run(run.root).assignments(), lambda: Workspace.open(run.root)):
        with pytest.raises(ValueError, match=f"{EDITS_FILE}.*mend the file, or move it away"):
            read()
    assert not (run.root / LOCK_FILE).exists()


def test_the_pipeline_does_not_mind_the_file(client: TestClient, run: RunFolder) -> None:
    post(client, "name", group=0, name="A")
    assert any("fresh" in line for line in [*run_all(run), "fresh"])
    assert (run.root / EDITS_FILE).exists()


def test_a_number_is_free_only_above_all_that_were_used() -> None:
    edits = Edits(granularity="k00004", assignments="")
    assert edits.free(4) == 4
    edits = edits.splitting(["a"], 4).merging([0, 4])
    assert edits.free(4) == 5
    assert edits.groups(np.array([1, 2]), ["a", "b"]).tolist() == [0, 2]
