"""Tars, Parquet files and an HTTP server of images, for tests."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_tar(file: Path, members: Mapping[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def write_images(file: Path, images: list[bytes | None], names: list[str] | None = None, **columns: list[Any]) -> Path:
    """Write a Parquet file as the library ``datasets`` does; ``names``: those of the classes of the column label."""
    cells = [None if data is None else {"bytes": data, "path": None} for data in images]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, struct), **columns})
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=4)
    return file


def part_of(asked: str, size: int) -> tuple[int, int]:
    """Return the first and the last byte that a header ``Range`` asks for; "": all."""
    if not asked.startswith("bytes="):
        return 0, size - 1
    begin, _, end = asked[6:].partition("-")
    return int(begin), min(int(end), size - 1) if end else size - 1


class Served:
    """A folder behind HTTP: ``failing`` maps the end of a path to a status, "slow" or "half"; ``asked``: the paths."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.failing: dict[str, int | str] = {}
        self.asked: list[str] = []


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Serve a folder on a port of this machine, with parts of files (``Range``)."""
    state, free = Served(folder), threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            state.asked.append(self.path)
            failure = next((each for end, each in state.failing.items() if self.path.endswith(end)), None)
            file = Path(self.translate_path(self.path))
            if isinstance(failure, int):
                self.send_response(failure)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif file.is_file():
                self._send(file.read_bytes(), failure if with_body else None, with_body)
            else:
                (super().do_GET if with_body else super().do_HEAD)()

        def _send(self, data: bytes, failure: Any, with_body: bool) -> None:
            asked = self.headers.get("Range", "")
            first, last = part_of(asked, len(data))
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{hash(data):x}"')
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            if failure == "slow":
                free.wait(30)
            part = data[first : last + 1]
            if with_body:
                self.wfile.write(part[: len(part) // 2] if failure == "half" else part)
            self.close_connection = failure == "half"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        free.set()
        server.shutdown()
        server.server_close()
