"""The web server of the explorer: the page's own files, the API, and what ends a request that went wrong."""

from __future__ import annotations

import hashlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from grappa.pipeline.pages.explore.web import answers, lookup
from grappa.pipeline.pages.explore.web.guard import ApiError, Guard, answer, is_loopback, known_names, refusal
from grappa.pipeline.pages.explore.workspace import Workspace

STATIC = Path(__file__).with_name("static")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
MAX_CONNECTIONS = 200


def make_app(workspace: Workspace, host: str = "127.0.0.1") -> ASGIApp:
    """Return the explorer of an open run as an ASGI application, to be served at ``host``."""
    app = Starlette(
        routes=[*_files(), *answers.ROUTES, *lookup.ROUTES],
        exception_handlers={
            ApiError: lambda request, error: refusal(error),
            HTTPException: lambda request, error: _unknown(request, error),
            Exception: lambda request, error: answer({"error": _unexpected(error)}, 500),
        },
    )
    app.state.workspace = workspace
    return Guard(app, names=known_names(host), loopback=is_loopback(host))


def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at", 405: f"{request.method} cannot be asked of"}.get(error.status_code)
    path = request.url.path[:100]
    return answer({"error": f"{what} {path}" if what else str(error.detail)}, error.status_code)


def _unexpected(error: Exception) -> str:
    return f"the explorer failed at this ({type(error).__name__}); the terminal it was started in says more"


def _files() -> list[Route]:
    """Return the routes of the page's own files, which are read now: a request can name no other file."""
    routes = []
    for path in sorted(STATIC.iterdir()):
        content, kind = path.read_bytes(), TYPES[path.suffix]
        routes.append(Route(f"/static/{path.name}", _file(content, kind)))
        if path.name == "index.html":
            routes.append(Route("/", _file(content, kind)))
    return routes


def _file(content: bytes, kind: str) -> Callable[[Request], Response]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}

    def handle(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, 200, headers, kind)

    return handle


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address of this machine; ValueError, in a sentence, where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ValueError(f"{host} is no address of this machine; give one by --host, such as 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        advice = "give another one by --port, or --port 0 for a free one"
        raise ValueError(f"{host} port {port} cannot be used ({error.strerror}); {advice}") from error
    return listener


def address_of(listener: socket.socket, host: str) -> str:
    """Return the address to open in a browser."""
    port = listener.getsockname()[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Answer until Ctrl-C or SIGTERM, which is the usual end and no error."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)  # it raises the signals again that it has caught, and one may come before it runs
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
