"""A stand-in for the Hugging Face hub's API on this machine: repositories of small files, in memory."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "a" * 40


class Hub:
    """What the stand-in holds: files by repository; ``refuses``: the status that it answers to whatever is sent."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refuses = 0
        self.asked: list[str] = []


@contextmanager
def stand_in() -> Iterator[tuple[Hub, str]]:
    """Give a hub and its address while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        self.hub.asked.append(self.path)
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.hub.repositories.get(repository)
        if self.hub.refuses or files is None:
            self._answer({"error": "refused"}, self.hub.refuses or 404)
        elif parts[0] == "api" and parts[4:5] == ["tree"]:
            self._answer([{"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in files])
        elif parts[0] == "api":
            self._answer({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        else:
            self._file(files["/".join(parts[4:])])

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        self.hub.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.hub.refuses:
            self._answer({"error": "refused"}, self.hub.refuses)
        elif parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            repository = "/".join(each for each in (asked.get("organization"), asked["name"]) if each)
            self.hub.repositories.setdefault(repository, {})
            self._answer({"url": f"http://{self.headers['Host']}/{repository}"})
        elif parts[1:] == ["validate-yaml"]:
            self._answer({"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self._answer({"files": modes})
        else:
            self._commit("/".join(parts[2:4]), body)

    def _commit(self, repository: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.hub.repositories[repository][line["value"]["path"]] = content
        url = f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"
        self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _chunks(self) -> bytes:
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline().strip(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return body

    def _file(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{abs(hash(content)):040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self._send(content)

    def _answer(self, content: object, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self._send(json.dumps(content).encode())

    def _send(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
