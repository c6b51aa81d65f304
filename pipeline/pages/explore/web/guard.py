"""Who may ask the explorer, and how much: the Host of a request, its origin, the size of its body; answers as JSON.

A page of another site must not reach this server through the browser of its user. Such a page can have its own name
lead to 127.0.0.1 (DNS rebinding), so a request must name this machine; and it can send requests without reading the
answers, so one that changes something must come from our own page.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 32 * 2**20
DRAIN_BYTES, DRAIN_SECONDS = 256 * 2**20, 20.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class ApiError(Exception):
    """A request that cannot be answered: the status, and a sentence for people."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def answer(content: object, status: int = 200) -> Response:
    """Return JSON in ASCII: a file name need not be UTF-8."""
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
    return Response(body, status, {"Cache-Control": "no-store"}, "application/json")


def refusal(error: ApiError) -> Response:
    return answer({"error": error.sentence}, error.status)


async def limited_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """Return the body of a request; ApiError 413 for one that is larger, of which only ``limit`` bytes are kept."""
    data, found, until = bytearray(), 0, time.monotonic() + DRAIN_SECONDS
    too_large = _announced(request.headers) > limit
    try:
        async for chunk in request.stream():  # the rest is read too, and dropped: a client listens when all is sent
            found += len(chunk)
            too_large = too_large or found > limit
            if not too_large:
                data += chunk
            elif found > DRAIN_BYTES or time.monotonic() > until:
                break
    except ClientDisconnect:
        raise ApiError(400, "the request ended before its body") from None
    if too_large:
        raise ApiError(413, f"the body is larger than {limit // 2**20} MiB; send a smaller image")
    return bytes(data)


def _announced(headers: Mapping[str, str]) -> int:
    text = headers.get("content-length", "")
    return int(text) if text.isdecimal() and len(text) < 20 else 0


class Guard:
    """Refuses requests of other hosts and sites, and gives every answer the headers of ``HEADERS``."""

    def __init__(self, app: ASGIApp, *, names: frozenset[str], loopback: bool) -> None:
        self._app, self._names, self._loopback = app, names, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end of the server
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        problem = self._problem(Request(scope))
        await (refusal(problem) if problem else self._app)(scope, receive, with_headers)

    def _problem(self, request: Request) -> ApiError | None:
        host = request.headers.get("host", "")
        if not self._is_known(host):
            return ApiError(403, f"the host {host[:100]!r} is not this explorer; open it by the address it has printed")
        origin = request.headers.get("origin")
        site = request.headers.get("sec-fetch-site", "same-origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if request.method not in ("GET", "HEAD") and (foreign or site not in ("same-origin", "none")):
            return ApiError(403, "the request comes from another site; only the explorer's own page may change things")
        return None

    def _is_known(self, host: str) -> bool:
        """Tell whether a Host header names this server: no other site can have an address for its name."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return address.is_loopback or not self._loopback


def known_names(host: str) -> frozenset[str]:
    """Return the names by which the server may be asked; an address needs no name."""
    loopback = is_loopback(host)
    own: tuple[Any, ...] = () if loopback else (socket.gethostname(), socket.getfqdn())
    return frozenset(each.lower() for each in ("localhost", host, *own))


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
