"""The page of `grappa explore` in a real browser: what a person clicks through, and no error in the console."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

import grappa
from grappa.pipeline.pages.explore.web.server import address_of, listening, make_app
from grappa.pipeline.pages.explore.workspace import Workspace
from grappa.pipeline.store.artifacts import RunFolder
from tests.browser.chromium import browser, quiet_page
from tests.helpers.tiny import with_other_bytes
from tests.pipeline.explore.material import EVIL

pytestmark = pytest.mark.browser
PHONE = {"viewport": {"width": 375, "height": 720}, "has_touch": True, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def run(explored: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(explored.root, tmp_path_factory.mktemp("shown") / "run")))


@pytest.fixture(scope="module")
def home(run: RunFolder) -> Iterator[str]:
    """The address of an explorer of the run, served from a thread."""
    workspace = Workspace.open(run.root)
    with listening("127.0.0.1", 0) as listener:
        config = uvicorn.Config(make_app(workspace), lifespan="off", log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield address_of(listener, "127.0.0.1")
        server.should_exit = True
        thread.join(timeout=10)
    workspace.close()


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.fixture
def page(started: Any) -> Iterator[Any]:
    with quiet_page(started, viewport={"width": 1280, "height": 800}, accept_downloads=False) as quiet:
        yield quiet


def until(holds: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Wait for something to hold: the page's policy lets playwright wait for no expression of its own."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.03)
    return found


def test_from_the_clusters_to_an_image_and_its_neighbors(page: Any, home: str) -> None:
    page.goto(home)
    page.locator("a.card").nth(3).wait_for()
    assert page.locator("a.card").count() == 4
    page.get_by_role("link", name="8", exact=True).click()
    page.locator("a.card").nth(4).wait_for()
    page.locator("a.card").first.click()
    page.get_by_role("heading", name="Nearest clusters").wait_for()
    page.get_by_role("heading", name="Coarser").wait_for()
    page.locator(".grid a.tile").first.click()
    page.get_by_role("heading", name="After").wait_for()
    assert page.locator(".sides .side").count() == 2
    assert page.locator(".side").last.locator("a.tile").count() == 12
    assert page.get_by_role("heading", name="Attention over the granularities").is_visible()
    assert EVIL in page.locator(".query-image h1").inner_text(), "a label is text, whatever it looks like"
    until(lambda: page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)"))
    page.get_by_label("Of domain").select_option("checks")
    until(
        lambda: (
            {"checks"} == set(page.locator(".side a.tile img").evaluate_all("all => all.map(i => i.alt.split(',')[0])"))
        )
    )
    page.go_back()
    page.get_by_role("heading", name="Nearest clusters").wait_for()


def test_an_image_that_is_dropped_anywhere_is_searched_with(
    page: Any, home: str, run: RunFolder, tmp_path: Path
) -> None:
    images = grappa.open_run(run.root).images()
    copy = with_other_bytes(Path(images["file"].iloc[4]), tmp_path)
    page.goto(f"{home}#/outliers")
    page.locator("a.tile").first.wait_for()
    drop = """(bytes) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "<b>mine</b>.png", { type: "image/png" }));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, list(copy.read_bytes()))
    page.get_by_role("heading", name="<b>mine</b>.png").wait_for()
    first = page.locator(".side").last.locator("a.tile").first
    first.wait_for()
    assert first.get_attribute("data-row") == "4"


def test_a_file_that_is_no_image_is_refused_in_a_sentence(started: Any, home: str, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no image")
    with quiet_page(started, expected="status of 422") as page:
        page.goto(f"{home}#/search")
        page.set_input_files("#picker", str(tmp_path / "no.png"))
        page.get_by_text("not an image in JPEG").wait_for()


def test_a_cluster_is_named_merged_split_and_taken_back(page: Any, home: str, run: RunFolder) -> None:
    page.goto(f"{home}#/cluster/k00004/1")
    page.get_by_role("button", name="Name it").click()
    page.get_by_label("Name of the cluster").fill(EVIL)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=EVIL).wait_for()
    assert EVIL in set(grappa.open_run(run.root).assignments()["k00004_name"])
    page.goto(f"{home}#/clusters/k00004")
    page.get_by_text(EVIL, exact=True).wait_for()
    page.get_by_role("button", name="Select to merge").click()
    for place in (0, 1):
        page.locator("a.card").nth(place).click()
    page.get_by_role("button", name="Merge", exact=True).click()
    until(lambda: page.locator("a.card").count() == 3)
    page.locator(".toast").get_by_role("button", name="Undo").click()
    until(lambda: page.locator("a.card").count() == 4)
    page.locator("a.card").first.click()
    page.get_by_role("button", name="Select images").click()
    page.locator(".grid a.tile").first.click()
    page.get_by_role("button", name="Make a cluster of them").click()
    page.get_by_text("1 image ·").wait_for()
    assert set(grappa.open_run(run.root).assignments()["k00004_group"]) == {0, 1, 2, 3, 4}


def test_the_map_is_drawn_searched_by_pointer_and_selected_by_lasso(page: Any, home: str) -> None:
    page.goto(f"{home}#/map")
    page.locator(".legend .key").first.wait_for()
    painted = "document.querySelector('.stage canvas').toDataURL().length > 9000"
    until(lambda: page.evaluate(painted))
    box = page.locator(".overlay").bounding_box()
    for step in range(200):
        x, y = (
            box["x"] + box["width"] * (0.2 + 0.6 * (step % 20) / 20),
            box["y"] + box["height"] * (0.1 + 0.8 * step / 200),
        )
        page.mouse.move(x, y)
        if page.locator(".tip").is_visible():
            break
    page.locator(".tip img").wait_for()
    page.locator(".map-bar select").select_option("k00008")
    until(lambda: page.locator(".legend .key").count() == 8)
    page.get_by_role("button", name="Lasso").click()
    corners = [(0.02, 0.02), (0.9, 0.02), (0.9, 0.98), (0.02, 0.98)]
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
    page.get_by_text("images selected").wait_for()
    page.locator(".map-side a.tile").first.wait_for()
    page.get_by_role("button", name="Select none").click()
    page.locator(".overlay").focus()
    for key in ("+", "ArrowLeft", "-", "0", "Enter"):
        page.keyboard.press(key)
    page.get_by_role("heading", name="After").wait_for()


def test_a_finger_on_the_map_shows_the_image_and_its_link(started: Any, home: str) -> None:
    with quiet_page(started, **PHONE) as page:
        page.goto(f"{home}#/map")
        page.locator(".legend .key").first.wait_for()
        box = page.locator(".overlay").bounding_box()
        for step in range(150):
            x, y = box["width"] * (0.1 + 0.6 * (step % 10) / 10), box["height"] * (0.1 + 0.8 * (step // 10) / 15)
            page.touchscreen.tap(box["x"] + x, box["y"] + y)
            if page.locator(".tip").is_visible():
                break
        page.get_by_role("link", name="Nearest images").click()
        page.get_by_role("heading", name="After").wait_for()


def test_duplicates_and_the_keyboard(page: Any, home: str) -> None:
    page.goto(home)
    page.locator("a.card").first.wait_for()
    page.keyboard.press("4")
    page.locator(".dup").first.wait_for()
    assert page.locator(".dup").count() == 1 and page.locator(".dup a").count() == 2
    page.get_by_role("button", name="Nearly the same").click()
    page.get_by_label("Similarity at least").wait_for()
    until(lambda: page.locator(".dup").count() >= 1)
    page.keyboard.press("1")
    page.locator("a.card").first.wait_for()
    page.keyboard.press("/")
    page.keyboard.type("nothing is called so")
    page.get_by_text("No cluster is called so").wait_for()
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Colors").click()
    page.get_by_role("button", name="Colors").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_a_phone_scrolls_in_one_direction(started: Any, home: str) -> None:
    with quiet_page(started, **PHONE) as page:
        for view, shown in (
            ("clusters", "a.card"),
            ("cluster/k00004/2", ".strip a.card"),
            ("image/3", ".side a.tile"),
            ("map", ".legend .key"),
            ("search", "a.tile"),
            ("duplicates", ".dup"),
            ("outliers", "a.tile"),
        ):
            page.goto("about:blank")
            page.goto(f"{home}#/{view}")
            page.locator(shown).first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= 375, view
            assert page.locator("#tabs a").last.bounding_box()["x"] < 375
