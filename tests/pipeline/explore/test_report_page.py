"""The report in a real browser: light and dark, on a phone, by keyboard, offline, and no error in the console."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from grappa.pipeline.pages.report.page import write_report
from grappa.pipeline.store.artifacts import RunFolder
from tests.browser.chromium import browser, quiet_page
from tests.helpers.tiny import run_all, sign_again
from tests.pipeline.explore.material import EVIL

pytestmark = pytest.mark.browser
DESK = {"viewport": {"width": 1280, "height": 800}, "offline": True}
PHONE = {"viewport": {"width": 360, "height": 720}, "offline": True, "has_touch": True, "color_scheme": "dark"}
LOADED = "[...document.images].filter((image) => image.src).every((image) => image.complete && image.naturalWidth > 0)"


@pytest.fixture(scope="module")
def report(explored: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report in one file."""
    page = tmp_path_factory.mktemp("reports") / "report.html"
    write_report(explored.root, page)
    return page.as_uri()


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.fixture
def page(started: Any, report: str) -> Iterator[Any]:
    with quiet_page(started, **DESK) as quiet:
        quiet.goto(report)
        yield quiet


def _open_all(page: Any) -> None:
    page.get_by_role("button", name="Open all").click()
    page.get_by_role("button", name="Close all").wait_for()


def test_it_opens_offline_with_all_but_the_verdict_and_the_table_folded(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    assert [each for each in asked if not each.startswith("data:")] == [page.url]
    assert page.locator("h1").count() == 1 and page.locator("table:visible").count() == 1
    assert page.locator("button.photo:visible").count() == 0
    _open_all(page)
    assert page.locator("button.photo:visible").count() > 50 and page.evaluate(LOADED)
    assert page.locator(".photo.right").count() > 0 and page.locator(".photo.wrong").count() > 0


def test_names_are_texts(page: Any) -> None:
    _open_all(page)
    assert EVIL in page.locator(".example").first.inner_text()
    assert page.locator("img[src='x']").count() == 0


def test_it_is_light_or_dark_as_the_system_is(page: Any) -> None:
    found = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        color = "(what) => getComputedStyle(document.querySelector(what)).backgroundColor"
        found[scheme] = {page.evaluate(color, what) for what in ("body", "details", "th")}
    assert not found["light"] & found["dark"]


def test_a_picture_enlarges_by_click(page: Any) -> None:
    _open_all(page)
    photo = page.locator("#pictures button.photo").first
    photo.click()
    viewer = page.locator("dialog")
    viewer.wait_for()
    shown, small = (each.locator("img").bounding_box()["width"] for each in (viewer, photo))
    assert shown > 1.5 * small
    assert EVIL in viewer.inner_text() and ".png" in viewer.inner_text()
    viewer.get_by_role("button", name="close").click()
    viewer.wait_for(state="hidden")
    photo.click()
    page.mouse.click(5, 5)
    viewer.wait_for(state="hidden")


def test_a_picture_enlarges_by_keyboard(page: Any) -> None:
    page.locator("#examples summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    place = "[...document.querySelectorAll('button.photo')].indexOf(document.activeElement)"
    assert page.evaluate(place) == 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is seen"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(place) == 1
    page.keyboard.press("Enter")
    page.locator("dialog").wait_for()
    source = "document.querySelector('dialog img').src"
    first = page.evaluate(source)
    page.keyboard.press("ArrowRight")
    assert page.evaluate(source) == page.locator("button.photo img").nth(2).get_attribute("src") != first
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(source) == first
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    page.wait_for_function(f"{place} === 2")  # where one stopped, once the dialog has said that it is closed
    assert page.locator("dialog").is_hidden()


def test_on_a_phone_no_column_is_lost_and_the_page_scrolls_in_one_direction(started: Any, report: str) -> None:
    with quiet_page(started, **PHONE) as page:
        page.goto(report)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        _open_all(page)
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        scrolling = 0
        for box in page.locator(".wide:has(table)").all():
            hint, first = box.locator("xpath=following-sibling::p"), box.locator("tbody th").first
            rest = box.evaluate("(box) => box.scrollWidth - box.clientWidth")
            assert hint.is_visible() == (rest > 1)
            if rest > 1:
                scrolling += 1
                left = first.bounding_box()["x"]
                box.evaluate("(box) => box.scrollTo(box.scrollWidth, 0)")
                hint.wait_for(state="hidden")
                assert first.bounding_box()["x"] == pytest.approx(left, abs=1), "the first column stays"
                last = box.locator("tbody tr").first.locator("td").last.bounding_box()
                assert last["x"] >= left + first.bounding_box()["width"] - 1 and last["x"] + last["width"] <= 360
        assert scrolling
        page.locator("#examples button.photo").first.tap()
        assert page.locator("dialog").bounding_box()["width"] <= 360


def test_without_labels_the_indicator_is_the_table_and_is_explained(
    started: Any, explored: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder.open(Path(shutil.copytree(explored.root, tmp_path / "run")))
    labels = run.root / "images" / "labels.parquet"
    pd.read_parquet(labels).assign(label=pd.Series(dtype="string")).to_parquet(labels)
    sign_again(labels.parent)
    run_all(run, until="evaluation")
    write_report(run.root, tmp_path / "report", folder=True)
    with quiet_page(started, **DESK) as page:
        page.goto((tmp_path / "report" / "index.html").as_uri())
        assert "neighbourhood standout" in page.locator("table:visible").inner_text()
        assert "take an image and alter it slightly" in page.locator("main").inner_text()
        _open_all(page)
        assert page.evaluate(LOADED), "pictures that lie beside the page are shown too"
        assert page.locator(".photo.right, .photo.wrong").count() == 0
        assert page.locator("#examples .mark.new").count() > 0
        assert page.get_by_role("heading", name="Reciprocity, without labels").is_visible()
