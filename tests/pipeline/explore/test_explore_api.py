"""The server of `grappa explore`: what it answers, and what it refuses with a sentence."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

import grappa
from grappa.pipeline.commands.search import search
from grappa.pipeline.pages.explore import layout, tsne
from grappa.pipeline.pages.explore.collection import Column
from grappa.pipeline.pages.explore.groups import Groups, Purity
from grappa.pipeline.pages.explore.similar import Near, near_duplicates
from grappa.pipeline.pages.explore.thumbnails import Thumbnails
from grappa.pipeline.pages.explore.web.guard import MAX_BODY_BYTES
from grappa.pipeline.pages.explore.web.server import STATIC, address_of, listening, make_app, serve
from grappa.pipeline.pages.explore.workspace import Workspace
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.tiny import make_run, run_all, tiny_cache, with_other_bytes
from tests.pipeline.explore.material import EVIL

HOME = "http://127.0.0.1:8421"


@pytest.fixture(scope="module")
def run(explored: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder.open(copied(explored, tmp_path_factory.mktemp("served") / "run"))


@pytest.fixture(scope="module")
def client(run: RunFolder) -> Iterator[TestClient]:
    workspace = Workspace.open(run.root)
    with TestClient(make_app(workspace), base_url=HOME, raise_server_exceptions=False) as client:
        yield client
    workspace.close()


def refused(answer: Any, status: int, words: str) -> None:
    """Check that an answer is one sentence in JSON."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"] and words in answer.json()["error"], answer.json()
    assert "\n" not in answer.json()["error"]


def copied(run: RunFolder, folder: Path) -> Path:
    """Copy a run that an explorer has open."""
    return Path(shutil.copytree(run.root, folder, ignore=shutil.ignore_patterns("explore.lock*")))


def picture(size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, format=kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """Return a PNG of a few bytes whose header promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_the_run_is_described(client: TestClient, run: RunFolder) -> None:
    found = client.get("/api/run").json()
    assert found["num_images"] == 37 and found["num_indexed"] == 37
    assert found["models"] == {"before": "zero_shot", "after": "fused"}
    assert [each["name"] for each in found["domains"]] == ["checks", "discs", "stripes"]
    assert [each["name"] for each in found["granularities"]] == ["k00004", "k00008"]
    assert found["root"] == str(run.root) and found["notices"] == []


def test_clusters_are_those_of_the_table_of_assignments(client: TestClient, run: RunFolder) -> None:
    table = grappa.open_run(run.root).assignments()
    found = client.get("/api/clusters/k00004?sort=size").json()
    sizes = table["k00004"].value_counts()
    assert {each["group"]: each["size"] for each in found["items"]} == sizes.to_dict()
    assert [each["size"] for each in found["items"]] == sorted(sizes, reverse=True)
    first = found["items"][0]
    own = table[table["k00004"] == first["group"]]
    images = client.get(f"/api/clusters/k00004/{first['group']}/images?limit=100").json()
    assert {each["image_id"] for each in images["items"]} == set(own.index)
    assert images["items"][0]["image_id"] == own["k00004_distance"].idxmin()
    assert first["medoids"][0] == images["items"][0]["row"]
    assert first["purity"] == pytest.approx(own["label"].value_counts(normalize=True).iloc[0], abs=1e-4)
    detail = client.get(f"/api/clusters/k00004/{first['group']}").json()
    assert sum(child["overlap"] for child in detail["children"]) == first["size"] and detail["parents"] == []
    assert len(detail["neighbors"]) == 3
    similarities = [each["similarity"] for each in detail["neighbors"]]
    assert similarities == sorted(similarities, reverse=True)


def test_lists_come_in_pages_and_in_the_order_that_is_asked_for(client: TestClient) -> None:
    everyone = client.get("/api/clusters/k00008?sort=number").json()
    page = client.get("/api/clusters/k00008?sort=number&offset=2&limit=3").json()
    assert page["items"] == everyone["items"][2:5] and page["total"] == len(everyone["items"])
    assert {each["group"] for each in client.get("/api/clusters/k00008?q=CLUSTER 1").json()["items"]} == {1}
    assert client.get("/api/images?q=discs/class_2").json()["total"] == 4
    assert client.get("/api/images?q=class_2&domain=checks").json()["total"] == 3


def test_neighbors_are_those_of_the_run_before_and_after(client: TestClient, run: RunFolder) -> None:
    opened = grappa.open_run(run.root)
    image_id = opened.images().index[7]
    found = client.get("/api/images/7/neighbors?k=5").json()
    for side, model in (("results", None), ("zero_shot", "zero_shot")):
        wanted = opened.neighbors(image_id, 5, model=model)
        assert [each["image_id"] for each in found[side]] == list(wanted.index)
        assert [each["file"] for each in found[side]] == list(wanted["file"])
        assert np.allclose([each["similarity"] for each in found[side]], wanted["similarity"], atol=1e-4)
    by_id = client.post("/search", json={"id": image_id, "k": 5, "compare": True}).json()
    assert by_id == found


def test_an_image_finds_what_the_command_finds(client: TestClient, run: RunFolder, tmp_path: Path) -> None:
    file = Path(grappa.open_run(run.root).images()["file"].iloc[3])
    copy = with_other_bytes(file, tmp_path)
    wanted = search(run.root, copy, 4)
    found = client.post("/search?k=4", content=copy.read_bytes(), headers={"Content-Type": "image/png"}).json()
    assert {(each["image_id"], each["file"]) for each in found["results"]} == {
        (each["image_id"], each["file"]) for each in wanted
    }
    assert found["results"][0]["file"] == str(file) and found["stale"] is None
    assert np.shape(found["query"]["attention"]["blocks"]) == (2, 2)


def test_both_models_embed_an_image_as_the_pipeline_did(client: TestClient, run: RunFolder) -> None:
    images = grappa.open_run(run.root).images()
    body = Path(images["file"].iloc[5]).read_bytes() + b"other bytes"
    found = client.post("/search?compare=1&k=1", content=body).json()
    for side in ("results", "zero_shot"):
        assert found[side][0]["image_id"] == images.index[5] and found[side][0]["similarity"] > 0.995


def test_the_query_is_not_its_own_result(client: TestClient, run: RunFolder) -> None:
    images = grappa.open_run(run.root).images()
    twins = images.index[images["path"].str.contains("discs/class_2/(?:0|twin)")]
    found = client.post("/search?k=36", content=Path(images.loc[twins[0], "file"]).read_bytes()).json()
    assert set(found["query"]["same_file"]) == set(twins)
    assert not set(twins) & {each["image_id"] for each in found["results"]}
    by_id = client.post("/search", json={"id": twins[0], "k": 36}).json()["results"]
    assert by_id[0]["image_id"] == twins[1] and by_id[0]["similarity"] > 0.999
    of_domain = client.post("/search", json={"id": twins[0], "k": 36, "domain": "checks"}).json()["results"]
    assert {each["domain"] for each in of_domain} == {"checks"} and len(of_domain) == 12


@pytest.mark.parametrize(
    ("request_of", "status", "words"),
    [
        (lambda c: c.post("/search", content=b"no image"), 422, "not an image in JPEG"),
        (lambda c: c.post("/search", content=b""), 422, "empty file"),
        (
            lambda c: c.post("/search", content=bomb(40_000)),
            413,
            "1600000000 pixels), more than the limit of 100000000",
        ),
        (lambda c: c.post("/search", content=bytes(MAX_BODY_BYTES + 1)), 413, "larger than 32 MiB"),
        (lambda c: c.post("/search", content=picture(), headers={"Content-Type": "text/html"}), 415, "text/html"),
        (lambda c: c.post("/search?k=0", content=picture()), 400, "k is 0; give a number from 1 to 200"),
        (lambda c: c.post("/search?k=9e9", content=picture()), 400, "k is '9e9'; give a whole number"),
        (lambda c: c.post("/search?domain=no", content=picture()), 400, "there is no domain 'no'; the run has checks"),
        (lambda c: c.post("/search", json={"id": "../../etc/passwd"}), 404, "there is no image '../../etc/passwd'"),
        (lambda c: c.post("/search", json={"id": ["a"], "k": 1}), 404, "there is no image"),
        (
            lambda c: c.post("/search", content="[1]", headers={"Content-Type": "application/json"}),
            400,
            "no JSON object",
        ),
        (lambda c: c.post("/search", content="{" * 5000, headers={"Content-Type": "application/json"}), 400, "no JSON"),
        (lambda c: c.get("/search"), 405, "GET cannot be asked of /search"),
        (lambda c: c.get("/nothing"), 404, "there is nothing at /nothing"),
        (lambda c: c.get("/static/..%2fserver.py"), 404, "there is nothing at"),
        (lambda c: c.get("/thumbnails/..%2f..%2fconfig.yaml"), 404, "there is nothing at"),
        (lambda c: c.get("/thumbnails/37"), 404, "there is no image 37; the run has 37"),
        (lambda c: c.get("/thumbnails/-1"), 404, "there is no image -1"),
        (lambda c: c.get("/originals/" + "9" * 5000), 400, "give a whole number"),
        (lambda c: c.get("/api/clusters/k00099"), 404, "there is no granularity 'k00099'; the run has k00004, k00008"),
        (lambda c: c.get("/api/clusters/k00004/77"), 404, "no image is in the cluster 77 of k00004"),
        (lambda c: c.get("/api/clusters/k00004?limit=100000"), 400, "limit is 100000"),
        (lambda c: c.get("/api/clusters/k00004?sort=luck"), 400, "sort is 'luck'; it is one of size"),
        (lambda c: c.get("/api/positions?method=umap"), 400, "it is pca or tsne"),
        (lambda c: c.get("/api/positions?space=else"), 400, "space is 'else'"),
        (lambda c: c.get("/api/columns/color"), 404, "images have no property 'color'"),
        (lambda c: c.post("/api/images", json={"rows": [1, 99]}), 400, "numbers of images, from 0 to 36"),
        (lambda c: c.post("/api/clusters/k00004/name", content=b"group=1"), 415, "send JSON"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(client: TestClient, request_of: Any, status: int, words: str) -> None:
    refused(request_of(client), status, words)


def test_a_page_of_another_site_is_refused(client: TestClient) -> None:
    refused(client.get("/api/run", headers={"Host": "evil.example"}), 403, "'evil.example' is not this explorer")
    refused(client.get("/api/run", headers={"Host": "10.0.0.7"}), 403, "is not this explorer")
    for host in ("localhost:9999", "[::1]:8421", "127.0.0.1"):
        assert client.get("/api/run", headers={"Host": host}).status_code == 200
    refused(client.post("/api/undo", json={}, headers={"Origin": "http://evil.example"}), 403, "from another site")
    refused(client.post("/search", content=b"x", headers={"Sec-Fetch-Site": "cross-site"}), 403, "from another site")
    assert client.post("/api/undo", json={}, headers={"Origin": HOME}).status_code == 200


def test_every_answer_forbids_foreign_code(client: TestClient) -> None:
    for path in ("/", "/api/run", "/nothing", "/thumbnails/0", "/static/main.js"):
        headers = client.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"] and "unsafe" not in str(headers)
        assert headers["x-content-type-options"] == "nosniff"


def test_the_pages_own_files_hold_nothing_that_the_policy_forbids() -> None:
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text, file
        assert not [line for line in text.splitlines() if "https://" in line], file
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert "<style" not in page and " style=" not in page and "onclick" not in page


def test_pictures_are_kept_by_the_browser(client: TestClient) -> None:
    version = client.get("/api/run").json()["version"]
    answer = client.get(f"/thumbnails/3?v={version}")
    assert "immutable" in answer.headers["cache-control"] and answer.headers["content-type"] == "image/jpeg"
    again = client.get("/thumbnails/3", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content and "no-cache" in again.headers["cache-control"]
    assert Image.open(io.BytesIO(client.get("/pictures/3").content)).size == (47, 40)
    assert Image.open(io.BytesIO(client.get("/originals/3").content)).size == (52, 44)


def test_only_the_file_that_the_run_was_made_from_is_shown(client: TestClient, run: RunFolder) -> None:
    file = Path(grappa.open_run(run.root).images()["file"].iloc[9])
    kept = file.read_bytes()
    try:
        file.unlink()
        refused(client.get("/originals/9"), 404, "cannot be read now (No such file or directory): bring it back")
        assert client.get("/pictures/9").status_code == 200, "the decoded image is still there"
        file.symlink_to(Path(grappa.open_run(run.root).images()["file"].iloc[10]))
        refused(client.get("/originals/9"), 404, "has other bytes than were decoded: bring it back")
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(kept)


def test_thumbnails_are_forgotten_above_a_size(tmp_path: Path) -> None:
    thumbnails = Thumbnails(tiny_cache(tmp_path, 20), cache_bytes=3000)
    found = [thumbnails.small(row) for row in range(20)]
    assert sum(map(len, thumbnails._kept.values())) <= 3000 < sum(map(len, found))
    assert [thumbnails.small(row) for row in range(20)] == found


def test_the_map_is_binary(client: TestClient) -> None:
    positions = np.frombuffer(client.get("/api/positions?space=before").content, dtype="<f4").reshape(-1, 2)
    assert positions.shape == (37, 2) and positions.min() > -0.2 and positions.max() < 1.2
    codes = np.frombuffer(client.get("/api/columns/domain").content, dtype="<i4")
    legend = client.get("/api/legends/domain").json()["items"]
    assert [each["count"] for each in legend] == np.bincount(codes).tolist()
    labels = client.get("/api/legends/label").json()["items"]
    assert len(labels) == 4 and all(EVIL in each["name"] for each in labels), "names come as they are"
    refused(client.get("/api/positions?method=tsne&space=before"), 409, "t-SNE is not ready")


def test_t_sne_tells_how_far_it_is(client: TestClient) -> None:
    assert client.get("/api/tsne?space=after").json()["state"] == "none"
    assert client.post("/api/tsne", json={"space": "after"}).json()["state"] in ("running", "done")
    while (job := client.get("/api/tsne?space=after").json())["state"] == "running":
        assert 0 <= job["progress"] <= 1
        time.sleep(0.05)
    assert job == {"state": "done", "progress": 1.0, "error": ""}
    positions = np.frombuffer(client.get("/api/positions?method=tsne").content, dtype="<f4")
    assert len(positions) == 2 * 37 and np.isfinite(positions).all()


def test_t_sne_of_many_places_the_others_between_their_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(side, 0.1, (60, 8)) for side in (-1, 1)]).astype(np.float32)
    monkeypatch.setattr(layout, "MAX_IMAGES", 40)
    monkeypatch.setattr(layout, "_run", lambda files, report: np.save(files[1], np.load(files[0])[:, :2]))
    found = layout.tsne(points, lambda share: None)
    assert found.shape == (120, 2)
    centers = found[:60].mean(0), found[60:].mean(0)
    own = [
        np.linalg.norm(part - center, axis=1).max()
        for part, center in zip((found[:60], found[60:]), centers, strict=True)
    ]
    assert np.linalg.norm(centers[0] - centers[1]) > max(own)
    assert tsne.MAX_IMAGES > 1000


def test_t_sne_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(9000, 50)).astype(np.float32))
    command = [sys.executable, str(layout.PROGRAM), str(tmp_path / "points.npy"), str(tmp_path / "positions.npy")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as program:
        assert program.stdin is not None
        program.stdin.close()
        assert program.wait(timeout=60) == 1
    assert not (tmp_path / "positions.npy").exists()


def test_duplicates_and_outliers(client: TestClient) -> None:
    (group,) = client.get("/api/duplicates?kind=files").json()["items"]
    assert group["size"] == 2 and all("discs/class_2" in each["path"] for each in group["images"])
    while (answer := client.get("/api/duplicates?kind=near&threshold=0.9999")).status_code == 202:
        assert answer.json()["state"] == "running"
    assert group["images"] in [each["images"] for each in answer.json()["items"]]
    outliers = client.get("/api/outliers?limit=200").json()["items"]
    values = [each["loneliness"] for each in outliers]
    assert len(outliers) == 37 and values == sorted(values, reverse=True)
    assert {each["domain"] for each in client.get("/api/outliers?domain=discs").json()["items"]} == {"discs"}


@pytest.mark.parametrize("path", ["duplicates?kind=nearly", "clusters/k00004/0/images?order=rarest"])
def test_a_word_that_is_not_known_is_refused(client: TestClient, path: str) -> None:
    answer = client.get(f"/api/{path}")
    assert answer.status_code == 400 and "it is one of" in answer.json()["error"]


def test_near_duplicates_are_chains() -> None:
    neighbors = np.array([[1], [2], [1], [4], [3], [0]])
    similarities = np.array([[0.99], [0.97], [0.97], [0.999], [0.999], [0.5]], dtype=np.float32)
    near = Near(neighbors, similarities, np.zeros(6, dtype=np.float32))
    found = near_duplicates(near, 0.96)
    assert [rows for rows, _ in found] == [[3, 4], [0, 1, 2]] and found[1][1] == pytest.approx(0.97)
    assert [rows for rows, _ in near_duplicates(near, 0.98)] == [[3, 4], [0, 1]]


def test_groups_without_labels_have_no_purity() -> None:
    groups = Groups.of_images("k", np.array([5, 2, 5]), np.array([0.2, 0.0, 0.1], dtype=np.float32), {})
    assert groups.rows(1).tolist() == [2, 0] and groups.place(5) == 1 and groups.place(3) is None
    none = Purity.of(groups, Column.of(pd.Series([None, None, None], dtype=object)))
    assert none.label.tolist() == [-1, -1] and np.isnan(none.share).all()


def test_a_stale_run_says_so(run: RunFolder, explored: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder.open(copied(run, tmp_path / "stale"))
    make_run(copy.root, [], explored.root.parent / "weights.safetensors", fusion__learning_rate=0.123)
    workspace = Workspace.open(copy.root)
    with TestClient(make_app(workspace), base_url=HOME) as client:
        found = client.post("/search", json={"id": workspace.collection.ids[0]}).json()
        assert "not up to date" in found["stale"] and "grappa run" in found["stale"]
        assert client.get("/api/run").json()["notices"] == [found["stale"]]
    workspace.close()


def test_the_frozen_backbone_is_deployed_with_its_head(run: RunFolder, explored: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder.open(copied(run, tmp_path / "frozen"))
    make_run(copy.root, [], explored.root.parent / "weights.safetensors", model__source="zero_shot")
    run_all(copy)
    opened = grappa.open_run(copy.root)
    head = np.load(copy.root / "heads" / "zero_shot" / "embeddings.npy")
    np.testing.assert_array_equal(opened.embeddings()[0], head)
    assert not np.array_equal(opened.embeddings("zero_shot")[0], head)
    workspace = Workspace.open(copy.root)
    with TestClient(make_app(workspace), base_url=HOME) as client:
        assert client.get("/api/run").json()["models"] == {"before": "zero_shot", "after": "zero_shot_head"}
        found = client.get("/api/images/2/neighbors?k=4").json()["results"]
    workspace.close()
    assert [each["image_id"] for each in found] == list(opened.neighbors(opened.images().index[2], 4).index)


@pytest.mark.parametrize("missing", ["index", "model", "embeddings/zero_shot"])
def test_a_run_without_a_part_names_the_command(run: RunFolder, tmp_path: Path, missing: str) -> None:
    copy = copied(run, tmp_path / "part")
    shutil.rmtree(copy / missing)
    with pytest.raises(ValueError, match=f"{missing} is missing in .*; run `grappa run"):
        Workspace.open(copy)


def test_a_taken_port_is_one_sentence(run: RunFolder) -> None:
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken, "127.0.0.1") == f"http://127.0.0.1:{port}/"
        command = [sys.executable, "-m", "grappa", "explore", str(run.root), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"grappa: 127.0.0.1 port {port} cannot be used") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["starlette", "uvicorn"])
def test_without_its_extra_one_sentence(run: RunFolder, module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None\nfrom grappa.pipeline.cli import main\nmain()"
    command = [sys.executable, "-c", code, "explore", str(run.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"the package {module} is missing; install it by `pip install 'grappa-retrieval[explore]'`" in done.stderr


def test_the_command_serves_until_it_is_stopped(run: RunFolder, tmp_path: Path) -> None:
    copy = copied(run, tmp_path / "served")
    command = [sys.executable, "-u", "-m", "grappa", "explore", str(copy), "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        assert line.startswith("37 images at http://0.0.0.0:"), line + server.stderr.read()
        port = int(line.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nhalf")
        with socket.create_connection(("127.0.0.1", port)) as asking:
            asking.sendall(b"GET /api/images/1 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: asking.recv(4096), b""))
        assert json.loads(answer.split(b"\r\n\r\n")[1])["row"] == 1
        server.terminate()
        out, said = server.communicate(timeout=20)
    assert server.returncode == 0 and out == "ended\n"
    assert "no authentication" in said and "Traceback" not in said
    assert not (copy / "explore.lock").exists()


def test_a_signal_before_the_server_runs_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []

    def run(server: uvicorn.Server, sockets: object) -> None:
        signal.raise_signal(signal.SIGINT)
        ends.append(server.should_exit)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    with listening("127.0.0.1", 0) as listener:
        serve(make_app, listener)  # type: ignore[arg-type]
    assert ends == [True]
