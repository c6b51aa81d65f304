"""The Chromium of this machine, driven by playwright, and a page that remembers what its console said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Root has no sandbox; nothing of the browser itself goes to the network.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def program() -> str | None:
    """Return the Chromium to run: GRAPPA_CHROMIUM, or the first of ``PROGRAMS`` on PATH."""
    return os.environ.get("GRAPPA_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


def missing_reason() -> str | None:
    """Return why no browser can be started here, or None."""
    if find_spec("playwright") is None:
        return "the package playwright (extra dev) is not installed"
    found = program()
    if found is None:
        return f"none of {', '.join(PROGRAMS)} is on PATH (tests/browser/install.sh), and GRAPPA_CHROMIUM is not set"
    return None if Path(found).is_file() else f"GRAPPA_CHROMIUM names {found}, which is no file"


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program(), args=ARGUMENTS)
        try:
            yield started
        finally:
            started.close()


@contextmanager
def quiet_page(started: Any, *, expected: str = "\0", **options: Any) -> Iterator[Any]:
    """Yield a page of a new browser profile; AssertionError at the end if its console has said an error.

    expected: what the errors that are meant to be there hold.
    """
    context = started.new_context(**options)
    page, said = context.new_page(), list[str]()
    page.set_default_timeout(15_000)
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    try:
        yield page
        assert not [text for text in said if expected not in text], said
    finally:
        context.close()
