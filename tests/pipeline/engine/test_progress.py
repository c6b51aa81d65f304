"""Progress: throttled lines without a terminal, a bar on one, speed and time left in both."""

from __future__ import annotations

import threading
from io import StringIO

import pytest

from grappa.pipeline.engine.progress import Meter, Progress, duration, totals


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_now_and_then_with_speed_and_time_left() -> None:
    stream, clock = StringIO(), Clock()
    with Progress(stream, terminal=False, line_seconds=10, clock=clock).task("decoding", 1000) as (advance, _):
        for _ in range(25):
            clock.now += 1
            advance(10)
    assert stream.getvalue().splitlines() == [
        "decoding: 100/1000 images, 10.0 images/s, 1:30 left",
        "decoding: 200/1000 images, 10.0 images/s, 1:20 left",
    ]


def test_resumed_items_do_not_count_for_the_speed() -> None:
    clock = Clock()
    meter = Meter(100, done=60, clock=clock)
    assert (meter.speed, meter.left) == (0.0, "-:--")
    clock.now += 10
    meter.done += 20
    assert (meter.new, meter.speed, meter.left) == (20, 2.0, "0:10")


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    stream, clock = StringIO(), Clock()
    with Progress(stream, terminal=True, clock=clock).task("adaptors/k00002: [training]", 10, done=4) as (advance, _):
        clock.now += 3
        advance(6)
    text = stream.getvalue()
    assert "adaptors/k00002: [training]" in text
    assert "10/10 images, 2.0 images/s, 0:00 left" in text


def test_threads_may_advance_at_once() -> None:
    with Progress(StringIO(), terminal=False).task("decoding", 8000) as (advance, meter):
        threads = [threading.Thread(target=lambda: [advance(1) for _ in range(1000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert meter.done == 8000


def test_errors_in_a_task_go_through() -> None:
    with pytest.raises(KeyError), Progress(StringIO(), terminal=False).task("decoding", 1):
        raise KeyError


def test_a_task_whose_size_comes_with_its_reports() -> None:
    stream, clock = StringIO(), Clock()
    with totals(Progress(stream, terminal=False, line_seconds=1, clock=clock), "embedding") as report:
        report(0, 50)
        clock.now += 2
        report(20, 50)
    assert stream.getvalue() == "embedding: 20/50 images, 10.0 images/s, 0:03 left\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (125, "2:05"), (3725, "1:02:05")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
