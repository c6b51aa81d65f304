"""`grappa explore`: open a run, listen, say where, answer until Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def explore(root: Path, host: str, port: int, *, say: Callable[[str], None]) -> None:
    """Serve a run as a page until Ctrl-C; ValueError or OSError, in a sentence, where it cannot be."""
    from grappa.pipeline.pages.explore.web.guard import is_loopback
    from grappa.pipeline.pages.explore.web.server import address_of, listening, make_app, serve
    from grappa.pipeline.pages.explore.workspace import Workspace

    with listening(host, port) as listener:
        workspace = Workspace.open(root)
        try:
            for notice in workspace.notices():
                print(f"grappa: warning: {notice}", file=sys.stderr, flush=True)
            if not is_loopback(host):
                warning = "the page has no authentication: whoever reaches this address sees and changes what you can"
                print(f"grappa: warning: {warning}", file=sys.stderr, flush=True)
            workspace.encoder.load_in_background()
            say(f"{len(workspace.collection)} images at {address_of(listener, host)} (Ctrl-C ends it)")
            serve(make_app(workspace, host), listener)
        finally:
            workspace.close()
    say("ended")
