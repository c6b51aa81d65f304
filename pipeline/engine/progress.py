"""Progress of long work: a bar on a terminal, elsewhere a line every ten seconds; both with speed and time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TextIO

LINE_SECONDS = 10.0

Advance = Callable[[int], None]


class Meter:
    """How far a task is: ``done`` of ``total`` items; the speed counts only items done since the task began here."""

    def __init__(self, total: int, *, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, done
        self._first, self._clock, self._start = done, clock, clock()

    @property
    def seconds(self) -> float:
        """Seconds since the task began in this process."""
        return self._clock() - self._start

    @property
    def new(self) -> int:
        """Number of items done since the task began in this process."""
        return self.done - self._first

    @property
    def speed(self) -> float:
        """Items a second; 0 before the first item."""
        return self.new / self.seconds if self.new and self.seconds > 0 else 0.0

    @property
    def left(self) -> str:
        """Time left, such as ``2:05`` or ``1:02:05``; ``-:--`` before the first item."""
        return duration((self.total - self.done) / self.speed) if self.speed else "-:--"


@dataclass(frozen=True)
class Snapshot:
    """How far a task was at one moment; ``artifact``: the name of the artifact that it makes, or ""."""

    artifact: str
    task: str
    unit: str
    done: int
    total: int
    per_second: float
    left: str

    @property
    def text(self) -> str:
        """Return ``training: 120/400 images, 33.1 images/s, 0:09 left``."""
        return (
            f"{self.task}: {self.done}/{self.total} {self.unit}, {self.per_second:.1f} {self.unit}/s, {self.left} left"
        )


class Progress:
    """Shows tasks on ``stream``. ``terminal``: whether to draw a bar; None: where the stream is a terminal.

    ``listener`` gets a snapshot whenever a line is printed.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        terminal: bool | None = None,
        line_seconds: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        listener: Callable[[Snapshot], None] | None = None,
    ) -> None:
        self._listener = listener
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty() if terminal is None else terminal
        self._line_seconds, self._clock = line_seconds, clock

    @contextmanager
    def task(
        self, description: str, total: int, *, artifact: str = "", unit: str = "images", done: int = 0
    ) -> Iterator[tuple[Advance, Meter]]:
        """Show one task; any thread may call the yielded ``advance(n)``, the yielded meter holds the speed."""
        meter, lock = Meter(total, done=done, clock=self._clock), threading.Lock()
        showing = self._bar if self._terminal else self._lines
        with showing(artifact, description, unit, meter) as show:

            def advance(num_new: int) -> None:
                with lock:
                    meter.done += num_new
                    show()

            yield advance, meter

    def say(self, line: str) -> None:
        """Print a line of its own, where the tasks are shown."""
        print(line, file=self._stream, flush=True)

    @contextmanager
    def _bar(self, artifact: str, description: str, unit: str, meter: Meter) -> Iterator[Callable[[], None]]:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        numbers = TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[rest]}")
        columns = (TextColumn("{task.description}"), BarColumn(), numbers)
        with Bars(*columns, console=Console(file=self._stream, force_terminal=True), transient=True) as bars:
            task = bars.add_task(
                escape(_titled(artifact, description)), total=meter.total, completed=meter.done, rest=unit
            )

            def show() -> None:
                rest = f"{unit}, {meter.speed:.1f} {unit}/s, {meter.left} left"
                bars.update(task, completed=meter.done, rest=rest)

            yield show

    @contextmanager
    def _lines(self, artifact: str, description: str, unit: str, meter: Meter) -> Iterator[Callable[[], None]]:
        last = 0.0

        def show() -> None:
            nonlocal last
            if meter.seconds - last < self._line_seconds:
                return
            last = meter.seconds
            now = Snapshot(artifact, description, unit, meter.done, meter.total, round(meter.speed, 3), meter.left)
            print(_titled(artifact, now.text), file=self._stream, flush=True)
            if self._listener:
                self._listener(now)

        yield show


def _titled(artifact: str, text: str) -> str:
    return f"{artifact}: {text}" if artifact else text


@contextmanager
def totals(progress: Progress, description: str) -> Iterator[Callable[[int, int], None]]:
    """Show one task whose size is known only with its first report: the yielded function takes (done, total)."""
    with ExitStack() as stack:
        tasks: list[tuple[Advance, Meter]] = []

        def report(done: int, total: int) -> None:
            if not tasks:
                tasks.append(stack.enter_context(progress.task(description, total)))
            advance, meter = tasks[0]
            advance(done - meter.done)

        yield report


def duration(seconds: float) -> str:
    """Return ``2:05`` for 125 seconds, ``1:02:05`` above an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
