"""The graph as jobs, without a cluster: plans, pins, jobs in this process, what status says of recorded jobs."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from grappa.pipeline import tables
from grappa.pipeline.cli import app
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.execution import NotReadyError, Selection
from grappa.pipeline.engine.progress import Snapshot
from grappa.pipeline.engine.status import read_config, states
from grappa.pipeline.store import checkpoints
from grappa.pipeline.store.locks import acquire
from grappa.slurm import scheduler
from grappa.slurm.jobs import Code, JobRefusedError, StageJob, code_here, refuse_other_fingerprint
from grappa.slurm.notes import JobNote, job_notes
from grappa.slurm.plan import PlannedJob, plan
from grappa.slurm.profiles import load_profile
from grappa.slurm.records import JobRecord, Pin, Task, all_tasks, append_event
from grappa.slurm.states import live_tasks
from grappa.slurm.submission import Submission
from tests.helpers.fake_stages import FakeStages, fake_stages
from tests.helpers.tiny import digests, draw_images, make_run, run_all, write_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    return fake_stages(tmp_path / "run", monkeypatch)


@pytest.fixture
def stop() -> Iterator[None]:
    yield
    checkpoints.withdraw_stop()


def grappa(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned(fakes: FakeStages, live: dict[str, Task] | None = None, **selection: object) -> list[PlannedJob]:
    return plan(fakes.run, fakes.config, Selection(**selection), load_profile("slurm"), live or {})  # type: ignore[arg-type]


def test_the_whole_graph_as_jobs(fakes: FakeStages) -> None:
    jobs = planned(fakes)
    assert [job.title for job in jobs] == [
        "backbone+images",
        "features",
        "frozen_views",
        "whitening",
        "neighbors",
        "clusters (array of 2)",
        "adaptors (array of 2)",
        "fusion",
        "student",
        "embeddings (array of 7)",
        "views (array of 5)",
        "heads+verdict+model",
        "retrieval (array of 9)",
        "evaluation",
        "index",
        "attention",
    ]
    needs = {job.title: job.needs for job in jobs}
    assert needs["backbone+images"] == ()
    assert needs["features"] == ("images", "backbone")
    assert needs["fusion"] == ("images", "backbone", "neighbors", "adaptors/k00002", "adaptors/k00004")


def test_what_reads_another_instance_of_its_stage_follows_the_array_of_these(fakes: FakeStages) -> None:
    fakes.configure(evaluation={"extra_rows": ["concat"]})
    array, late = [job for job in planned(fakes) if job.stages == ("embeddings",)]
    assert len(array.tasks) == 7
    assert late.artifacts == ("embeddings/concat",)
    assert late.needs == ("embeddings/k00002", "embeddings/k00004")


def test_only_what_is_not_fresh_is_planned_and_its_inputs_are_pinned(fakes: FakeStages) -> None:
    fakes.execute(until="clusters")
    jobs = planned(fakes)
    assert [job.stages[0] for job in jobs] == [
        "adaptors",
        "fusion",
        "student",
        "embeddings",
        "views",
        "heads",
        "retrieval",
        "evaluation",
        "index",
        "attention",
    ]
    (first, *_), (fusion,) = jobs[0].tasks, jobs[1].tasks
    assert first[0].fingerprint is not None
    assert set(first[0].fingerprint["inputs"]) == {"images", "backbone", "features", "clusters/k00002"}
    assert fusion[0].fingerprint is None
    assert jobs[0].reasons == {"adaptors/k00002": "missing", "adaptors/k00004": "missing"}


def test_what_is_on_its_way_is_not_planned_again_but_waited_for(fakes: FakeStages) -> None:
    fakes.execute(until="clusters")
    submission = submitted(fakes, planned(fakes, stage="adaptors"))
    live = {name: task for task in all_tasks(fakes.run) for name in task.artifacts}
    assert set(live) == {"adaptors/k00002", "adaptors/k00004"}
    jobs = planned(fakes, live, until="fusion")
    assert [job.title for job in jobs] == ["fusion"]
    assert jobs[0].needs == ("adaptors/k00002", "adaptors/k00004")
    assert submission.folder.is_dir()


def test_jobs_on_their_way_with_other_settings_are_named(fakes: FakeStages) -> None:
    fakes.execute(until="clusters")
    submitted(fakes, planned(fakes, stage="adaptors"))
    live = {name: task for task in all_tasks(fakes.run) for name in task.artifacts}
    fakes.configure(fusion={"seed": 1})
    assert planned(fakes, live)
    fakes.configure(adaptors={"seed": 1})
    with pytest.raises(NotReadyError, match=r"on its way as job 7_0 with other settings \(adaptors.seed: 0 -> 1\)"):
        planned(fakes, live)


def test_a_stage_whose_inputs_are_neither_fresh_nor_on_their_way_is_refused(fakes: FakeStages) -> None:
    with pytest.raises(NotReadyError, match=r"features cannot be submitted: upstream images is missing; submit it too"):
        planned(fakes, stage="features")


def submitted(fakes: FakeStages, jobs: list[PlannedJob], cluster: str = "slurm") -> Submission:
    """Write down a submission of these jobs as 7, 8, ..., as if Slurm had given these numbers."""
    profile = load_profile(cluster)
    submission = Submission(fakes.run, fakes.config, profile, fakes.root / "jobs" / "2026-x", "mark", code_here())
    submission.prepare()
    records, makers = [], dict[str, str]()
    for number, job in enumerate(jobs, 7):
        ids = tuple(f"{number}_{task}" if len(job.tasks) > 1 else f"{number}" for task in range(len(job.tasks)))
        makers |= {pin.name: task for task, pins in zip(ids, job.tasks, strict=True) for pin in pins}
        records.append(submission.record(job, ids, tuple(makers[name] for name in job.needs)))
    submission.write(records)
    return submission


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOSPC])
def test_a_disk_that_takes_no_progress_ends_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path, content: object) -> None:
        raise OSError(number, "the disk is ill", str(path))

    monkeypatch.setattr("grappa.slurm.jobs.atomic_write_json", fail)
    job = StageJob(str(tmp_path), str(tmp_path), (), Code(None, ""), 1, 0, task="1")
    job._note_progress(Snapshot("features", "embedding", "images", 1, 2, 1.0, "0:01"))


def test_jobs_in_this_process_make_what_a_run_makes(fakes: FakeStages) -> None:
    result = grappa("submit", fakes.root, "--cluster", "debug", "--until", "adaptors")
    assert result.exit_code == 0, result.stderr
    sets = ["adaptors/k00002", "adaptors/k00004"]
    assert fakes.ran == [
        *"backbone images features frozen_views whitening/features neighbors clusters/k00002 clusters/k00004".split(),
        *sets,
    ]
    jobs = tables.load_jobs(fakes.root)
    assert list(jobs["artifact"]) == fakes.ran
    assert set(jobs["state"]) == {"made"}
    assert list(jobs["exit"]) == [0] * 10
    assert jobs["recipe"].str.fullmatch("[0-9a-f]{64}").all()
    assert (jobs["peak_memory_bytes"] > 1_000_000).all()
    assert "fresh" in grappa("status", fakes.root).stdout
    again = grappa("submit", fakes.root, "--cluster", "debug", "--until", "adaptors")
    assert again.stdout == "nothing to submit: all is fresh\n"


def test_a_failing_job_blocks_what_needs_it_and_nothing_else(fakes: FakeStages) -> None:
    def fail(context: StageContext) -> None:
        raise ValueError("the loss became nan")

    fakes.hooks["adaptors/k00002"] = fail
    result = grappa("submit", fakes.root, "--cluster", "debug")
    assert result.exit_code == 1
    assert "fusion: blocked by adaptors/k00002" in result.stdout
    assert "adaptors/k00002 (the loss became nan)" in result.stderr
    status = {each["stage"] + "/" + str(each["instance"]): each for each in json.loads(_status(fakes))}
    assert status["adaptors/k00004"]["state"] == "fresh"
    assert status["adaptors/k00002"]["job"].startswith("failed: the loss became nan (job here")
    fakes.hooks.clear()
    assert grappa("submit", fakes.root, "--cluster", "debug").exit_code == 0
    assert "adaptors/k00004" not in fakes.ran[-14:]
    assert not fakes.not_fresh()


def test_jobs_as_processes_of_this_machine(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [draw_images(tmp_path / "images")], write_weights(tmp_path / "w.safetensors"))
    result = grappa("submit", run.root, "--cluster", "local", "--until", "images")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == ["backbone+images: started"]
    assert {each.name for each in states(run, read_config(run)) if each.state.kind == "fresh"} == {"backbone", "images"}
    assert "60 images" in grappa("logs", run.root, "images").stdout
    shutil.rmtree(tmp_path / "images")
    result = grappa("submit", run.root, "--cluster", "local", "--stage", "images", "--force")
    assert result.exit_code == 1
    assert "not made: images (images changed: " in result.stderr
    assert f"; log: {_newest_log(run.root)})" in result.stderr


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("exit 3", "its process ended before it began and left no log: a command of the profile's `setup` failed"),
        ("export PYTHONPATH={}", "its process ended before it began; the last line of its log: SystemExit: no"),
        ("export PYTHONPATH={} KILL=1", "its process ended before it began without a word (killed?)"),
    ],
)
def test_a_process_that_ends_at_once_is_told_with_the_reason_and_its_log(
    fakes: FakeStages, tmp_path: Path, setup: str, reason: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'grappa.slurm.entry' in sys.orig_argv and 'KILL' in os.environ:\n    os.kill(os.getpid(), 9)\n"
        "if 'grappa.slurm.entry' in sys.orig_argv:\n    raise SystemExit('no such device')\n"
    )
    path = f"{tmp_path}:{ROOT}"
    (tmp_path / "own.yaml").write_text(json.dumps({"cluster": "local", "setup": [setup.format(path)]}))
    result = grappa("submit", fakes.root, "--cluster", tmp_path / "own.yaml", "--stage", "backbone")
    assert result.exit_code == 1
    log = _newest_log(fakes.root)
    where = f"; log: {log}" if log else ""
    assert f"grappa: not made: backbone ({reason}" in result.stderr and f"{where})" in result.stderr
    (line,) = (line for line in grappa("status", fakes.root).stdout.splitlines() if line.startswith("backbone"))
    assert f"failed: {reason}" in line
    (job,) = tables.load_jobs(fakes.root).to_dict("records")
    assert job["state"] == "not begun" and job["error"].startswith(reason)


def _newest_log(root: Path) -> Path | None:
    return max((root / "jobs").glob("*/*_0_log.out"), default=None)


def test_a_job_of_two_processes_on_this_machine(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [draw_images(tmp_path / "images")], write_weights(tmp_path / "w.safetensors"))
    profile = tmp_path / "two.yaml"
    profile.write_text("{cluster: local, tasks: 2, shared: [[backbone, images, features]]}")
    result = grappa("submit", run.root, "--cluster", profile, "--until", "features")
    assert result.exit_code == 0, result.stderr
    manifests = {name: run.artifact(name).manifest() for name in ("backbone", "images", "features")}
    processes = {name: found.provenance["processes"] for name, found in manifests.items() if found}
    assert processes == {"backbone": 1, "images": 2, "features": 2}
    assert list(tables.load_jobs(run.root)["state"]) == ["made"] * 3
    together = digests(run)
    run_all(run, until="images", force=True)
    run_all(run, stage="features", force=True)
    assert digests(run) == together


def test_status_of_a_run_with_jobs_names_the_cure_of_damage(fakes: FakeStages) -> None:
    fakes.execute()
    (fakes.root / "jobs").mkdir()
    assert grappa("status", fakes.root, "--verify").exit_code == 0
    path = fakes.root / "features" / "features.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    told = grappa("status", fakes.root, "--verify")
    assert told.exit_code == 1
    assert told.stdout.splitlines()[-1] == f"features: damaged; repair by `grappa run {fakes.root} --verify`"


def _status(fakes: FakeStages) -> str:
    return grappa("status", fakes.root, "--json").stdout


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 9}, "stage version: 9 -> 1"),
        ({"seed": 1}, "config adaptors.seed: 0 -> 1"),
        ({"clusters": 1}, "input clusters/k00002: content changed"),
    ],
)
def test_a_job_refuses_to_compute_something_else(fakes: FakeStages, change: dict[str, int], reason: str) -> None:
    fakes.execute(until="clusters")
    pin = planned(fakes, stage="adaptors")[0].tasks[0][0]
    config = fakes.config
    refuse_other_fingerprint(fakes.run, config, pin)
    if "seed" in change:
        fakes.configure(adaptors=change)
    if "clusters" in change:
        fakes.configure(clusters={"seed": 5})
        fakes.execute(stage="clusters", instance="k00002")
    pin = dataclasses.replace(pin, version=change.get("version", pin.version))
    with pytest.raises(JobRefusedError, match=f"adaptors/k00002 is no longer what was submitted: .*{reason}"):
        refuse_other_fingerprint(fakes.run, config, pin)


def test_a_job_refuses_other_code_and_an_endless_return_to_the_queue(
    fakes: FakeStages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted(fakes, planned(fakes, until="backbone"), "debug").folder
    job = StageJob(
        str(fakes.root), str(folder), (Pin("backbone", 1, False, None),), Code("another", ""), 1, 2, task="7"
    )
    with pytest.raises(SystemExit):
        job()
    assert "submitted with the code at another, found other code, at " in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(SystemExit):
        job()
    assert "put back into the queue 3 times, the profile allows 2" in capsys.readouterr().err
    assert not fakes.ran


def test_a_forced_job_that_comes_back_does_not_begin_again(fakes: FakeStages) -> None:
    fakes.execute()
    grappa("submit", fakes.root, "--cluster", "debug", "--stage", "index", "--force")
    task = all_tasks(fakes.run)[0]
    fakes.ran.clear()
    pins = (Pin("index", 1, True, None),)
    StageJob(str(fakes.root), str(task.submission), pins, code_here(), 1, 2, task=task.id)()
    assert not fakes.ran


def test_a_signal_ends_a_training_after_its_checkpoint(tmp_path: Path, stop: None) -> None:
    checkpoint = checkpoints.FileCheckpoint(tmp_path, seconds=1e9)
    rows = checkpoints.RowCheckpoint(tmp_path, seconds=1e9)
    array = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.float32, shape=(5, 2))
    assert not checkpoint.due()
    rows.offer(3, array)
    checkpoints.request_stop()
    assert checkpoint.due()
    with pytest.raises(checkpoints.Stopped):
        checkpoint.save({}, {"step": 7})
    assert checkpoint.steps_done() == 7
    with pytest.raises(checkpoints.Stopped):
        rows.offer(4, array)
    assert checkpoints.RowCheckpoint(tmp_path, seconds=1e9).load(tmp_path / "a.npy", (5, 2)) == 4


def test_status_of_200_jobs_asks_slurm_twice(
    fakes: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    _fake_command(tmp_path / "bin" / "squeue", calls, "14|grappa-fusion-mark|PENDING|Priority||1:00")
    _fake_command(tmp_path / "bin" / "sacct", calls, "13_5|grappa-adaptors-mark|NODE_FAIL|1:0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    fakes.configure(clusters={"num_clusters": list(range(2, 202))}, selection={"sets": "all"})
    submission = submitted(fakes, planned(fakes))
    for task in range(200):
        append_event(submission.folder / "events" / f"13_{task}.jsonl", "start", restarts=0, node="n1")
    notes, warning = job_notes(fakes.run, states(fakes.run, fakes.config))
    assert not warning
    assert calls.read_text().split() == ["squeue", "sacct"]
    assert notes["fusion/neighbors"] == JobNote("pending", "pending: Priority (job 14)")
    assert notes["adaptors/k00007"].text.startswith("failed: NODE_FAIL 1:0 (job 13_5, ")
    assert notes["adaptors/k00002"].text.startswith("failed: job 13_0 ended without a word")
    assert notes["adaptors/k00002"].lost and not notes["adaptors/k00002"].alive
    assert "NODE_FAIL" in (submission.folder / "outcomes.json").read_text()


def test_what_a_running_job_has_made_already_needs_no_note(
    fakes: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_command(tmp_path / "bin" / "squeue", tmp_path / "calls", "7|grappa-backbone-mark|RUNNING|None|n1|1:00")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    events = submitted(fakes, planned(fakes, until="images")).folder / "events" / "7.jsonl"
    fakes.execute(until="backbone")
    for event, name in (("artifact", "backbone"), ("made", "backbone"), ("artifact", "images")):
        append_event(events, event, artifact=name)
    notes, _ = job_notes(fakes.run, states(fakes.run, fakes.config))
    assert notes == {"images": JobNote("running", "running on n1, limit in 1:00 (job 7)")}
    progress = Snapshot("images", "decoding", "images", 3, 9, 0.5, "0:12")
    events.parents[1].joinpath("progress", "7.json").write_text(json.dumps(asdict(progress)))
    notes, _ = job_notes(fakes.run, states(fakes.run, fakes.config))
    at = "decoding: 3/9 images, 0.5 images/s, 0:12 left"
    assert notes["images"].text == f"running on n1, {at}, limit in 1:00 (job 7)"


def _fake_command(path: Path, calls: Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {path.name} >> {calls}\necho '{line}'\n")
    path.chmod(0o755)


def test_a_job_that_slurm_is_about_to_cancel_is_not_on_its_way(
    fakes: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.execute(until="clusters")
    submission = submitted(fakes, planned(fakes, until="fusion"))  # jobs 7 (two sets) and 8 (fusion)
    queue = "7_1|grappa-adaptors-mark|RUNNING|None|n1|1:00\n8|grappa-fusion-mark|PENDING|Dependency||1:00"
    _fake_command(tmp_path / "bin" / "squeue", tmp_path / "calls", queue)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    first = submission.folder / "events" / "7_0.jsonl"
    append_event(first, "made", artifact="adaptors/k00002")
    assert set(live_tasks(fakes.run)) == {"adaptors/k00004", "fusion/neighbors"}
    first.unlink()
    append_event(first, "end", exit=1, error="failed")
    assert set(live_tasks(fakes.run)) == {"adaptors/k00004"}


def test_a_scheduler_that_does_not_answer_is_waited_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(scheduler.SchedulerError, match="sleep did not answer within 0 s; try again later"):
        scheduler.call("sleep", "60", seconds=0.1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(scheduler.SchedulerError, match="squeue is not on the PATH"):
        scheduler.queued(["grappa-x"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", ["7"]), ("7_3", ["7_3"]), ("7_[0-2,5%4]", ["7_0", "7_1", "7_2", "7_5"]), ("7_[4]", ["7_4"])],
)
def test_tasks_that_never_started_are_told_apart(text: str, expected: list[str]) -> None:
    assert scheduler._expanded(text) == expected


def test_a_torn_event_and_a_damaged_submission_spoil_nothing(fakes: FakeStages) -> None:
    submission = submitted(fakes, planned(fakes, until="backbone"))
    events = submission.folder / "events" / "7.jsonl"
    append_event(events, "start", restarts=0, node="n1")
    with events.open("a") as file:
        file.write('{"event": "end", "ti')
    (task,) = all_tasks(fakes.run)
    assert [each["event"] for each in task.events] == ["start"]
    record = submission.folder / "submission.json"
    for damaged in ("{", "[" * 100_000, '{"format": 1}', record.read_text().replace('"ids"', '"idz"')):
        record.write_text(damaged)
        assert all_tasks(fakes.run) == []
        assert f"{record} is damaged, so its jobs are not known" in job_notes(fakes.run, [])[1]


def test_damaged_events_and_progress_of_a_job_are_passed_over(fakes: FakeStages) -> None:
    submission = submitted(fakes, planned(fakes, until="backbone"))
    events = submission.folder / "events" / "7.jsonl"
    lines = (
        "[",
        "[" * 100_000,
        "7",
        '{"event": []}',
        '{"event": "made", "time": "t"}',
        '{"event": "end", "time": "t"}',
    )
    events.write_bytes("\n".join(lines).encode() + b'\n\xff\n{"event": "start"}\n')
    append_event(events, "start", restarts=0, node="n1")
    (task,) = all_tasks(fakes.run)
    assert [each["event"] for each in task.events] == ["start"]
    for damaged in ("[1]", '{"artifact": 1}', '{"artifact": "a", "task": "b", "unit": "c", "done": "x"}'):
        (submission.folder / "progress" / "7.json").write_text(damaged)
        assert task.progress is None


@pytest.mark.parametrize(("name", "shown"), [("50%", "'%'"), ("a\\b", "'\\\\'"), ("two\nlines", "'\\n'")])
def test_folders_that_slurm_cannot_name_are_refused(fakes: FakeStages, name: str, shown: str) -> None:
    odd = fakes.root.rename(fakes.root.with_name(name))
    result = grappa("submit", odd, "--cluster", "debug")
    assert result.exit_code == 1
    assert f"has {shown} in its name" in result.stderr


def test_a_second_submission_waits_for_the_first(fakes: FakeStages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grappa.slurm.submit.LOCK_SECONDS", 0.0)
    (fakes.root / "jobs").mkdir()
    with acquire(fakes.root / "jobs" / "submit.lock", what="test"):
        result = grappa("submit", fakes.root, "--cluster", "debug")
    assert result.exit_code == 1
    assert "the queue of" in result.stderr and "is being written by process" in result.stderr


def test_logs_and_cancel_say_what_they_lack(fakes: FakeStages) -> None:
    assert "no job was submitted for features" in grappa("logs", fakes.root, "features").stderr
    assert "adaptors has several instances; name one of k00002, k00004" in grappa("logs", fakes.root, "adaptors").stderr
    assert grappa("cancel", fakes.root).stdout == "nothing to cancel: no such job is queued or running\n"


def test_submit_and_status_load_nothing_slow() -> None:
    code = (
        "import sys, grappa.slurm.submit, grappa.slurm.commands; print(*{'torch', 'timm', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_status_of_jobs_loads_nothing_that_only_submit_needs() -> None:
    late = {"submitit", "asyncio", "logging", "rich", "numpy", "grappa.slurm.submit"}
    code = f"import sys, grappa.slurm.commands; print(*{late!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_records_survive_the_way_to_the_disk(fakes: FakeStages) -> None:
    submission = submitted(fakes, [])
    record = JobRecord(
        "grappa-x-mark", ("7_0", "7_1"), ((Pin("a", 1, False, None),), (Pin("b", 1, True, {}),)), ("6",), {}
    )
    submission.write([record])
    first, second = all_tasks(fakes.run)
    assert (first.id, first.artifacts, first.after) == ("7_0", ("a",), ("6",))
    assert second.log.name == "7_1_0_log.out"
