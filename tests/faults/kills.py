"""Kill the pipeline at random moments, give the same command again, and compare every byte with an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.material import contents, init_arguments, is_leftover, write_material
from tests.faults.tally import Tally

SIGNALS = ("KILL", "KILL group", "TERM", "INT", "INT twice")
STUCK_SECONDS = 600.0
MOST_KILLS = 6  # of one command; then it may end
ROOT = Path(__file__).parents[2]
# Ctrl-C raises KeyboardInterrupt, also where this process was started in the background and ignores it.
PROGRAM = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
PROGRAM += "from grappa.__main__ import main; sys.argv[0] = 'grappa'; main()"


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and whether the signal reached it before."""

    code: int
    seconds: float
    text: str
    hit: bool = False

    @property
    def tail(self) -> str:
        return " | ".join(self.text.strip().splitlines()[-3:])[-400:]


def campaign(work: Path, *, number: int, seed: int, tally: Tally, cache: str = "raw") -> None:
    """Make runs until ``number`` signals have hit; whatever is not as in an undisturbed run is a fault.

    cache: the setting ``images.cache`` of the runs.
    """
    table, weights = write_material(work)
    commands = _commands(work / "undisturbed", table, weights, cache)
    outcomes = [call(command) for command in commands]
    assert not any(outcome.code for outcome in outcomes), outcomes[-1].tail
    wanted, seconds = contents(work / "undisturbed"), [outcome.seconds for outcome in outcomes]
    start_up = call(["--version"]).seconds
    rng, run = random.Random(seed), work / "disturbed"
    while tally.counts["kills"] < number and not tally.is_over:
        for command, expected in zip(_commands(run, table, weights, cache), seconds, strict=True):
            _finish(command, start_up, expected, number, rng, tally)
        compare(run, wanted, tally)
        tally.count("finished runs")
        print(f"{tally.counts['kills']} kills in {tally.counts['finished runs']} runs", flush=True)
        shutil.rmtree(run)


def _commands(run: Path, table: Path, weights: Path, cache: str) -> list[list[str]]:
    return [init_arguments(run, table, weights, images__cache=cache), ["run", str(run)]]


def call(arguments: list[str], *, name: str = "", after: float = STUCK_SECONDS) -> Outcome:
    """Give a command to a new process; send it the signal ``name`` (of SIGNALS) ``after`` seconds, if it still runs."""
    start, environment = time.monotonic(), {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    hit = False
    try:
        output, _ = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        hit = bool(name)
        _send(process, name or "KILL group")
        output = _last_words(process)
    text = output.decode(errors="replace")
    return Outcome(process.returncode, time.monotonic() - start, text, hit)


def _send(process: subprocess.Popen[bytes], name: str) -> None:
    number = signal.Signals[f"SIG{name.split()[0]}"]
    (os.killpg if name.endswith("group") else os.kill)(process.pid, number)
    if name == "INT twice":
        time.sleep(0.05)
        if process.poll() is None:
            os.kill(process.pid, number)


def _last_words(process: subprocess.Popen[bytes]) -> bytes:
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return b"STUCK after the signal\n" + process.communicate()[0]


def _finish(
    command: list[str], start_up: float, expected: float, number: int, rng: random.Random, tally: Tally
) -> None:
    """Give a command until it ends by itself, hit on the way at moments that are drawn from the time it takes."""
    for tried in range(MOST_KILLS + 1):
        may_hit = tried < MOST_KILLS and tally.counts["kills"] < number
        name = rng.choice(SIGNALS) if may_hit else ""
        # Before this Python itself is starting, where an interrupt is its own traceback.
        first = start_up / 2 if name.startswith("INT") else 0.0
        outcome = call(command, name=name, after=rng.uniform(first, expected) if name else STUCK_SECONDS)
        _judge(command, outcome, name, tally)
        if outcome.code == 0 or not outcome.hit:
            return
        if command[0] == "run" and rng.random() < 0.25:
            _judge_status(call(["status", command[1]]), tally)


def _judge(command: list[str], outcome: Outcome, name: str, tally: Tally) -> None:
    if outcome.hit:
        tally.count("kills")
        tally.count(f"by {name}")
    if "STUCK" in outcome.text or outcome.seconds > STUCK_SECONDS:
        tally.fault("stuck", f"{command[0]}, {name}: {outcome.tail}")
    if "Traceback" in outcome.text:
        tally.fault("traceback", f"{command[0]}, {name}: {outcome.tail}")
    if outcome.code == 130 and "stopped" not in outcome.text:  # the code of a command that Ctrl-C has stopped
        tally.fault("refused", f"{command[0]}, {name}: it does not say that it stopped: {outcome.tail}")
    if outcome.code and not outcome.hit:
        tally.fault("refused", f"{' '.join(command[:2])}: exit {outcome.code}: {outcome.tail}")


def _judge_status(outcome: Outcome, tally: Tally) -> None:
    tally.count("status in between")
    if outcome.code or "Traceback" in outcome.text or "corrupt" in outcome.text:
        tally.fault("refused", f"status: exit {outcome.code}: {outcome.tail}")


def compare(run: Path, wanted: dict[str, str], tally: Tally) -> None:
    """Note every file that is lost, differs, or is left over."""
    found = contents(run)
    for path in sorted({*wanted, *found}):
        if path not in found:
            tally.fault("lost", path)
        elif path not in wanted:
            tally.fault("leftover", path)
        elif wanted[path] != found[path]:
            tally.fault("differs", path)
    for path in run.rglob("*"):
        if path.is_dir() and is_leftover(path.relative_to(run)):
            tally.fault("leftover", path.relative_to(run).as_posix())
