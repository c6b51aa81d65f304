"""Names that mean something elsewhere come out as they are: figures, pages, Markdown, CSV, terminal."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.text import Text
from typer.testing import CliRunner

from grappa.core.printing import printable, sentence, shown
from grappa.objects.sheet import contact_sheet
from grappa.pipeline import tables
from grappa.pipeline.cli import app
from grappa.pipeline.commands.run import print_rows, read_table
from grappa.pipeline.errors import sentence_and_code
from grappa.pipeline.open_run import read_metrics
from grappa.pipeline.pages.report import figures
from grappa.pipeline.pages.report.page import write_report
from grappa.pipeline.pages.report.summary import Table, plain_markdown
from grappa.pipeline.store.csv_cells import csv_bytes, guarded, unguarded, with_unguarded
from grappa.slurm.commands import _print_from
from tests.helpers.hostile import ACTIVE, NAMES
from tests.helpers.tiny import draw_images, make_run, run_all, split_of, tiny_cache, write_table, write_weights

TEXTS = st.text(max_size=40) | st.sampled_from(NAMES)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")

# ---------------------------------------------------------------- terminal


@given(TEXTS)
def test_a_terminal_only_prints(text: str) -> None:
    for line in (printable(text), sentence(text), shown(text), shown([text, {text: text}])):
        assert not ACTIVE.search(line) and "\n" not in line
        assert len(line) <= max(6 * len(text), 200)
    if text.isprintable():
        assert printable(text) == text


@pytest.mark.parametrize("text", NAMES)
def test_an_error_is_one_printable_line(text: str) -> None:
    for error in (ValueError(text), OSError(2, "No such file", f"/x/{text}"), MemoryError(text), OSError(text)):
        said, code = sentence_and_code(error)
        assert code == 1 and said and not ACTIVE.search(said) and "\n" not in said


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_is_printed_line_by_line(terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    print_rows(["model", *NAMES], [[name, *NAMES] for name in NAMES], stream)
    assert not ACTIVE.search(stream.getvalue())
    if not terminal:
        assert len(stream.getvalue().splitlines()) == 1 + len(NAMES)


# ---------------------------------------------------------------- CSV


@given(TEXTS)
def test_no_cell_is_a_formula_and_each_is_read_as_it_was(text: str) -> None:
    assert unguarded(guarded(text)) == text
    cell = guarded(text)
    assert not cell.startswith(FORMULA) or float(cell) is not None, "only a number may begin like a formula"


def test_a_table_survives_csv() -> None:
    table = pd.DataFrame({"name": [*NAMES], "kind": pd.Categorical(NAMES), "number": np.arange(len(NAMES)) - 3.5})
    written = csv_bytes(table).decode()
    for row in csv.reader(io.StringIO(written, newline="")):
        for cell in row:
            assert not cell.startswith(FORMULA) or float(cell) is not None
    found = pd.read_csv(io.StringIO(written, newline=""), keep_default_na=False, dtype={"name": str, "kind": str})
    found = with_unguarded(found, ["name", "kind"])
    assert [*found["name"]] == [*found["kind"]] == [name.replace("\x00", "\x00") for name in NAMES]
    np.testing.assert_array_equal(found["number"], table["number"])


# ---------------------------------------------------------------- Markdown


class Words(HTMLParser):
    """Collects the tags of a page, and the text of each heading, list item and cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.places: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in ("h1", "li", "th", "td"):
            self.places.append("")

    def handle_data(self, data: str) -> None:
        if self.places:
            self.places[-1] += data


def _rendered(markdown: str) -> Words:
    return Words(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))


def _one_line(text: str) -> str:
    return " ".join(text.split())


@given(TEXTS)
@example("a\\")
def test_markdown_prints_a_name_as_it_is(text: str) -> None:
    name = _one_line(printable(text))
    table = Table("t", ["", text], [[text, ".5"], ["x", text]], frozenset({(1, 1)})).markdown()
    found = _rendered(f"# Results of {plain_markdown(text)} x\n\n- key: {plain_markdown(text)}\n\n{table}\n")
    assert [_one_line(place) for place in found.places] == [
        *(f"Results of {name} x".replace("  ", " "), f"key: {name}".rstrip()),
        *("", name, name, ".5", "x", name),
    ]
    assert found.tags <= {"h1", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "strong"}


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("style", [{}, {"text.usetex": True, "text.parse_math": True}], ids=["plain", "user's style"])
def test_figures_draw_names_as_they_are(tmp_path: Path, style: dict[str, bool]) -> None:
    names, few = list(dict.fromkeys(NAMES)), [*NAMES[:12]]
    mix = pd.DataFrame({"granularity": "k00004", "pseudo_label": 0, "domain": few, "share": 1 / len(few)})
    table = pd.DataFrame({"block": 0, "domain": names, "granularity": "k00004", "mean": 0.5})
    with matplotlib.rc_context(style):
        made = [figures.shared_clusters(mix.assign(num_images=2)), figures.attention(table)]
        for number, figure in enumerate(made):
            figures.save(figure, tmp_path / f"{number}.svg")
            texts = [text for text in figure.findobj(Text) if text.get_text()]
            assert len(texts) > len(few)
            assert not any(text.get_parse_math() or text.get_usetex() for text in texts)
            assert not any(ACTIVE.search(text.get_text()) or "\n" in text.get_text() for text in texts)
            xml.etree.ElementTree.parse(tmp_path / f"{number}.svg")


def test_a_contact_sheet_has_a_title_for_each_name(tmp_path: Path) -> None:
    cache, box = tiny_cache(tmp_path, 12), dict.fromkeys(("box_x0", "box_y0", "box_x1", "box_y1"), 1.0)
    for start in range(0, len(NAMES), 12):
        names = [*NAMES[start : start + 12]]
        table = pd.DataFrame({"domain": names, "height": 40, "width": 48, "confidence": 0.5, "reason": "", **box})
        assert contact_sheet(table, cache).height > 100 * len(set(names))


# ---------------------------------------------------------------- a whole run

DOMAINS = {"stripes": "=1+1|<b>$x$</b>_$2_", "checks": "\x1b[31ma\nb\u202e*c*", "discs": "'@[x](y)`~%s{{1}}"}


def test_a_run_with_such_names_prints_and_reports_them(tmp_path: Path) -> None:
    draw_images(tmp_path / "images")
    table = write_table(
        tmp_path / "images", tmp_path / "table.csv", label=lambda path: path.parent.name, split=split_of
    )
    frame = pd.read_csv(table)
    frame["label"] = frame["domain"].map(DOMAINS) + frame["label"]
    frame.assign(domain=frame["domain"].map(DOMAINS)).to_csv(table, index=False)
    weights = write_weights(tmp_path / "weights.safetensors")
    run = make_run(tmp_path / "run", [table], weights)
    run_all(run)

    assert set(tables.load_metrics(run.root)["domain"]) == {*DOMAINS.values(), "_mean"}
    metrics = run.artifact("evaluation").path / "metrics.csv"
    assert set(read_metrics(metrics)["domain"]) == {*DOMAINS.values(), "_mean"}
    assert {*DOMAINS.values()} <= set(read_table(metrics)[0])
    with metrics.open(newline="") as file:
        assert not any(row["domain"].startswith(FORMULA) for row in csv.DictReader(file))

    image = str(next((tmp_path / "images").rglob("*.png")))
    commands = (["init", str(run.root), "--images", str(table)], ["run", str(run.root)], ["status", str(run.root)])
    for command in (
        *commands,
        ["search", str(run.root), image],
        ["run", str(run.root), "--stage", "evaluation", "--force"],
    ):
        called = CliRunner().invoke(app, command)
        assert called.exit_code == 0 and not ACTIVE.search(called.output), called.output
    found = json.loads(CliRunner().invoke(app, ["search", str(run.root), image, "--json"]).stdout)
    assert {each["domain"] for each in found} <= {*DOMAINS.values()}

    write_report(run.root, tmp_path / "report", folder=True)
    words = _rendered((tmp_path / "report" / "results.md").read_text())
    assert not words.tags & {"b", "em", "a", "code", "img", "s"}
    assert {printable(name) for name in DOMAINS.values()} <= {_one_line(place) for place in words.places}
    page = Words((tmp_path / "report" / "index.html").read_text())
    shown_there = {_one_line(place) for place in page.places}
    assert "b" not in page.tags and {_one_line(name) for name in DOMAINS.values()} <= shown_there


def test_a_log_is_printed_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "1.log"
    log.write_bytes("\n".join(NAMES).encode(errors="surrogateescape") + b"\xff\r\nlast\n")
    assert _print_from(log, 0) == log.stat().st_size
    printed = capsys.readouterr().out
    assert not ACTIVE.search(printed.replace("\t", "")) and printed.endswith("\nlast\n")
