"""Locks: one living holder, dead ones replaced, one winner."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from grappa.pipeline.store import locks
from grappa.pipeline.store.locks import Lock, LockedError, LockLostError, acquire, read_holder

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on: children only touch files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "features.lock"


def forge(path: Path, *, silent: float = 0.0, **changes: Any) -> None:
    """Leaves a lock as this process would have, with some fields changed, last touched `silent` seconds ago."""
    with acquire(path, what="features"):
        holder = read_holder(path)
    assert holder is not None
    path.write_text(json.dumps(asdict(holder) | changes))
    touched = time.time() - silent
    os.utime(path, (touched, touched))


def gone_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_living_holder_refuses_a_second_with_who_and_since(path: Path) -> None:
    with acquire(path, what="features", job="4711"):
        holder = read_holder(path)
        assert holder is not None and holder.pid == os.getpid() and holder.job == "4711"
        said = rf"^features is being written by process {os.getpid()} on {holder.host} \(Slurm job 4711\) since "
        with pytest.raises(LockedError, match=said):
            acquire(path, what="features")
        assert [entry.name for entry in path.parent.iterdir()] == ["features.lock"]
    assert list(path.parent.iterdir()) == []
    assert read_holder(path) is None
    acquire(path, what="features").release()


@pytest.mark.parametrize("sign", ["pid gone", "pid given to another process"])
def test_dead_process_of_this_host_is_replaced_at_once(path: Path, sign: str) -> None:
    forge(path, **({"pid": gone_pid()} if sign == "pid gone" else {"process_start": "another boot:1"}))
    with acquire(path, what="features"):
        holder = read_holder(path)
        assert holder is not None and holder.pid == os.getpid()
        assert [entry.name for entry in path.parent.iterdir()] == ["features.lock"]


def test_zombie_counts_as_dead(path: Path) -> None:
    child = os.fork()
    if child == 0:
        acquire(path, what="features")
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    acquire(path, what="features").release()
    os.waitpid(child, 0)


@pytest.mark.parametrize("place", [{"host": "elsewhere"}, {"pid_namespace": "pid:[another container]"}])
def test_other_hosts_and_containers_are_judged_by_silence_only(path: Path, place: dict[str, Any]) -> None:
    forge(path, silent=100, pid=gone_pid(), **place)
    with pytest.raises(LockedError, match=r"sign of life 10\d s ago.* replaced after 120 s of silence"):
        acquire(path, what="features")
    forge_again = time.time() - 125
    os.utime(path, (forge_again, forge_again))
    acquire(path, what="features").release()


def test_a_dead_holder_whose_clock_is_a_day_ahead_is_replaced_after_two_minutes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(path, silent=-86_400, host="elsewhere")
    with pytest.raises(LockedError):
        acquire(path, what="features")
    now = time.time()
    monkeypatch.setattr(locks, "_now", lambda draft: now + 125)
    acquire(path, what="features").release()


def test_a_living_holder_whose_clock_is_a_day_ahead_keeps_its_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(path, silent=-86_400, host="elsewhere")
    for minutes in range(1, 6):
        now = time.time() + 60 * minutes
        monkeypatch.setattr(locks, "_now", lambda draft, now=now: now)
        with pytest.raises(LockedError):
            acquire(path, what="features")
        os.utime(path, (time.time() + 86_400,) * 2)  # its next heartbeat


def test_silent_but_living_process_of_this_host_keeps_its_lock(path: Path) -> None:
    forge(path, silent=10_000)
    with pytest.raises(LockedError):
        acquire(path, what="features")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}'])
def test_unreadable_lock_is_replaced_after_silence(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(LockedError, match="an unknown process"):
        acquire(path, what="features")
    os.utime(path, (1, 1))
    acquire(path, what="features").release()


def test_killed_taker_does_not_block_the_next(path: Path) -> None:
    forge(path.with_name("features.lock.take"), pid=gone_pid())
    forge(path, pid=gone_pid())
    acquire(path, what="features").release()
    assert list(path.parent.iterdir()) == []


def test_remains_of_killed_takers_are_swept(path: Path) -> None:
    for name, age in (("features.lock.0123.tmp", 500), ("features.lock.4567.tmp", 5), ("features.lockless", 500)):
        (path.parent / name).write_text("")
        os.utime(path.parent / name, (time.time() - age,) * 2)
    acquire(path, what="features").release()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["features.lock.4567.tmp", "features.lockless"]


def _take_and_report(path: Path, start: int, report: int, finish: int) -> None:
    os.read(start, 1)  # returns for all at once, when the other end is closed
    try:
        acquire(path, what="features")
        os.write(report, b"W")
    except LockedError:
        os.write(report, b"r")
    os.read(finish, 1)  # a winner lives until all have tried
    os._exit(0)


@pytest.mark.parametrize("dead", [True, False])
def test_of_simultaneous_takers_exactly_one_wins(path: Path, dead: bool) -> None:
    for _ in range(10):
        if dead:
            forge(path, pid=gone_pid())
        (start, go), (result, report), (finish, end) = os.pipe(), os.pipe(), os.pipe()
        takers = []
        for _ in range(6):
            takers.append(os.fork())
            if takers[-1] == 0:
                os.close(go)
                os.close(end)
                _take_and_report(path, start, report, finish)
        os.close(go)
        outcome = b"".join(os.read(result, 1) for _ in takers)
        os.close(end)
        for taker in takers:
            os.waitpid(taker, 0)
        for descriptor in (start, result, report, finish):
            os.close(descriptor)
        assert sorted(outcome) == sorted(b"Wrrrrr")
        path.unlink()


def test_taker_that_saw_a_dead_holder_too_late_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the dead lock and guarding the take-over, another process has taken it."""
    forge(path, pid=gone_pid())
    take_over = locks._take_over
    winner: list[Lock] = []

    def late(*arguments: Any) -> bool:
        monkeypatch.setattr(locks, "_take_over", take_over)
        winner.append(acquire(path, what="features"))
        return take_over(*arguments)

    monkeypatch.setattr(locks, "_take_over", late)
    with pytest.raises(LockedError):
        acquire(path, what="features")
    winner[0].check()
    winner[0].release()


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_heartbeat_renews_the_time_and_survives_errors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    read, failures = locks._read, iter(range(3))

    def flaky(place: Path) -> Any:
        if next(failures, None) is not None:
            raise OSError(116, "Stale file handle")
        return read(place)

    monkeypatch.setattr(locks, "_read", flaky)
    with acquire(path, what="features"):
        os.utime(path, (1, 1))
        _wait_for(lambda: path.stat().st_mtime > 1)


def test_heartbeat_stops_and_release_keeps_off_when_the_lock_was_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    lock = acquire(path, what="features")
    lock.check()
    os.replace(path, path.with_name("stolen"))
    path.write_text("another's")
    os.utime(path, (1, 1))
    time.sleep(0.1)
    assert path.stat().st_mtime == 1
    with pytest.raises(LockLostError, match="taken over"):
        lock.check()
    lock.release()
    assert path.read_text() == "another's"


def test_forked_child_does_not_release_its_parents_lock(path: Path) -> None:
    with acquire(path, what="features") as lock:
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        lock.check()
