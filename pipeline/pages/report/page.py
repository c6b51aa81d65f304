"""Writing a report: one page with all pictures inside, or a folder with the pictures and a results.md beside it."""

from __future__ import annotations

import base64
import hashlib
import re
import webbrowser
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from grappa.pipeline.pages.report.content import collect, draw, limits, rows_shown
from grappa.pipeline.pages.report.pictures import Pictures
from grappa.pipeline.pages.report.summary import number, plain_markdown
from grappa.pipeline.store.artifacts import RunFolder
from grappa.pipeline.store.storage import atomic_write_bytes, new_folder, refuse_existing, storage_errors

PAGE, MARKDOWN = "index.html", "results.md"
TEMPLATES = Path(__file__).parent
SHARED_STYLE = TEMPLATES.parent / "explore" / "web" / "static" / "base.css"
SUFFIXES = (".html", ".htm")
MARK = b'<meta name="generator" content="grappa report">'
HEAD_BYTES = 1024


def default_target(run: Path, folder: bool) -> Path:
    """Return where the report of a run is written if nothing else is said: beside the run."""
    home = run if run.name not in ("", "..") else run.resolve()
    return home.with_name(f"{home.name}_report" + ("" if folder else SUFFIXES[0]))


def write_report(run: Path, target: Path, folder: bool = False) -> str:
    """Write the report of a finished run, whole or not at all; return a sentence.

    ``target``: the page, a file that may only exist if it is a report; or with ``folder`` a new folder, which gets
    ``PAGE``, its pictures and ``MARKDOWN``. The same run gives the same bytes. ValueError, with the command that helps,
    when an artifact is missing or when artifacts were made from different inputs.
    """
    _check(target, folder)
    content = collect(run)
    if folder:
        with new_folder(target) as draft:
            (draft / PAGE).write_bytes(_page(run, content, draft))
            (draft / MARKDOWN).write_bytes(_bytes(_render("results.md.j2", content)))
        return f"wrote the report to {target / PAGE}; its tables for a README are in {target / MARKDOWN}"
    page = _page(run, content, None)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(target, page)
    return f"wrote the report to {target} ({len(page) / 2**20:.1f} MiB, in one file)"


def show(page: Path) -> str | None:
    """Open a page in the browser; return a sentence where there is none."""
    address = page.resolve().as_uri()
    return None if webbrowser.open(address) else f"no browser could be started here; open {address} in yours"


def _check(target: Path, folder: bool) -> None:
    """Refuse a target of the wrong kind, and one that exists and is no report, before long work begins in vain."""
    if folder:
        refuse_existing(target)
        return
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"the report is one page: {target} does not end in .html; give a name that does, or --folder for a folder "
            f"with {PAGE}, its pictures and {MARKDOWN}"
        )
    if target.is_file():
        with target.open("rb") as file:
            if MARK in file.read(HEAD_BYTES):
                return
    refuse_existing(target)


def _page(run: Path, content: dict[str, Any], folder: Path | None) -> bytes:
    pictures = Pictures(RunFolder.open(run), folder)
    pictures.check(rows_shown(content))
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    content = content | {
        "style": SHARED_STYLE.read_text(encoding="utf-8") + (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "script": script,
        "policy": f"default-src 'none'; img-src data: file: 'self'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        "figures": draw(run, content, pictures),
        "picture": pictures.image,
        "limits": limits(),
        "markdown": _render("results.md.j2", content),
    }
    return _bytes(_render("page.html.j2", content))


def _bytes(text: str) -> bytes:
    """Return a text as UTF-8; what UTF-8 or HTML cannot hold (halves of pairs, NUL) is written out."""
    return text.replace("\0", "\\x00").encode("utf-8", errors="backslashreplace")


def _soft(text: str) -> Markup:
    """Return a text that may break behind an underscore or a slash."""
    return Markup(re.sub("([_/])(?=.)", r"\1<wbr>", str(escape(text))))


def _render(template: str, content: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "plain": plain_markdown, "soft": _soft}
    return environment.get_template(template).render(content) + "\n"
