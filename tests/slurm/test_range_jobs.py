"""Ranges of rows as tasks of an array: profiles, plans, what status says, logs, cancelling, jobs on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from grappa.pipeline import tables
from grappa.pipeline.cli import app
from grappa.pipeline.config.yaml_file import ConfigError
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.engine.execution import Selection
from grappa.pipeline.engine.progress import Snapshot
from grappa.pipeline.engine.status import states
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import by_ranges, nodes
from grappa.pipeline.store.locks import acquire
from grappa.slurm.jobs import JobRefusedError, code_here, refuse_other_fingerprint
from grappa.slurm.launch import sbatch_text
from grappa.slurm.notes import JobNote, job_notes
from grappa.slurm.plan import PlannedJob, plan
from grappa.slurm.profiles import Profile, load_profile
from grappa.slurm.records import Task, all_tasks, append_event
from grappa.slurm.states import live_tasks
from grappa.slurm.submission import Submission
from grappa.slurm.submit import _waits
from tests.helpers.fake_stages import FakeStages, fake_stages
from tests.helpers.tiny import digests, draw_images, make_run, run_all, write_weights

THREE = "{cluster: CLUSTER, ranges: 3, shared: [[backbone, images]]}"


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    return fake_stages(tmp_path / "run", monkeypatch)


def profile_of(folder: Path, text: str = THREE, cluster: str = "slurm") -> Path:
    file = folder / f"{cluster}.yaml"
    file.write_text(text.replace("CLUSTER", cluster))
    return file


def grappa(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned(fakes: FakeStages, live: dict[str, Task] | None = None, **selection: object) -> list[PlannedJob]:
    profile = load_profile(str(profile_of(fakes.root.parent)))
    return plan(fakes.run, fakes.config, Selection(**selection), profile, live or {})  # type: ignore[arg-type]


def submitted(fakes: FakeStages, jobs: list[PlannedJob]) -> Submission:
    """Write down a submission of these jobs as 7, 8, ..., as if Slurm had given these numbers."""
    folder = fakes.root / "jobs" / "2026-x"
    submission = Submission(fakes.run, fakes.config, Profile(), folder, "mark", code_here())
    submission.prepare()
    records, makers = [], dict[str, str]()
    for number, job in enumerate(jobs, 7):
        ids = tuple(f"{number}_{task}" if len(job.tasks) > 1 else f"{number}" for task in range(len(job.tasks)))
        makers |= {pin.name: task for task, pins in zip(ids, job.tasks, strict=True) for pin in pins}
        records.append(submission.record(job, ids, _waits(job, makers).made))
    submission.write(records)
    return submission


def says(monkeypatch: pytest.MonkeyPatch, folder: Path, *lines: str) -> None:
    """Let squeue print these lines; sacct knows nothing, scancel writes what it was asked."""
    (folder / "bin").mkdir(exist_ok=True)
    printed = "".join(f"echo '{line}'\n" for line in lines)
    for name, text in (("squeue", printed), ("sacct", ""), ("scancel", f'echo "$@" > {folder}/cancelled\n')):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "stages: {images: {ranges: 4}}",
            "stages.images.ranges: found 4, expected 1: only the rows of features, object_features, embeddings are "
            "computed by ranges",
        ),
        (
            "stages: {features: {ranges: 4, tasks: 2}}",
            "stages.features.ranges: found 4 with nodes 1 and tasks 2, expected one process a range: give the stage "
            "either ranges or several processes",
        ),
        ("{nodes: 2, ranges: 4}", "stages.features.ranges: found 4 with nodes 2 and tasks 1, expected one process"),
        (
            "{shared: [[images, features]], ranges: 4}",
            "stages.features.ranges: found 4 in shared ['images', 'features']",
        ),
        ("ranges: 0", "ranges: found 0, expected greater than or equal to 1"),
    ],
)
def test_ranges_that_cannot_be_are_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile(str(profile_of(tmp_path, text)))
    assert str(caught.value).partition("slurm.yaml: ")[2].startswith(sentence)


def test_ranges_go_only_to_stages_whose_rows_are_computed_apart(tmp_path: Path) -> None:
    profile = load_profile(str(profile_of(tmp_path, "{ranges: 4, stages: {embeddings: {ranges: 1, tasks: 2}}}")))
    asked = {stage: profile.resources((stage,)).ranges for stage in ("images", "features", "embeddings", "fusion")}
    assert asked == {"images": 1, "features": 4, "embeddings": 1, "fusion": 1}


def test_what_is_copied_from_features_has_no_ranges(fakes: FakeStages) -> None:
    fakes.configure(objects={"provider": "backbone"})
    fakes.configure(evaluation={"extra_rows": ["concat", "zero_shot_objects", "adapted_objects"]})
    found = [str(node.instance or node) for node in nodes(fakes.config) if by_ranges(node, fakes.config)]
    assert found == "features object_features k00002 k00004 mean fused student fused_objects".split()


def test_ranges_are_an_array_before_the_job_that_joins_them(fakes: FakeStages, tmp_path: Path) -> None:
    jobs = {job.title: job for job in planned(fakes)}
    titles = list(jobs)
    assert titles[:3] == ["backbone+images", "features ranges (array of 3)", "features"]
    assert [each for each in titles if each.startswith("embeddings")] == [
        "embeddings (array of 2)",
        "embeddings ranges (array of 15)",
        "embeddings (array of 5)",
    ]
    array, joining = jobs[titles[1]], jobs["features"]
    assert array.artifacts == tuple(f"features.ranges/{number}-of-3" for number in (1, 2, 3))
    assert (array.needs, array.joins, array.reasons) == (joining.needs, (), {"features": "3 of 3 ranges"})
    assert joining.artifacts == ("features",) and joining.joins == array.artifacts
    waits = _waits(joining, dict.fromkeys(joining.needs, "7") | dict.fromkeys(joining.joins, "8_2"))
    profile = load_profile(str(profile_of(tmp_path)))
    text = sbatch_text(profile, joining, tmp_path, "grappa-features-1", waits)
    assert "#SBATCH --dependency=afterok:7,afterany:8\n" in text and "--kill-on-invalid-dep=yes" in text


def test_the_dry_run_shows_ranges(fakes: FakeStages) -> None:
    fakes.execute(until="images")
    said = grappa("submit", fakes.root, "--cluster", profile_of(fakes.root.parent), "--stage", "features", "--dry-run")
    lines = said.stdout.splitlines()
    assert [line for line in lines if not line.startswith("    |")] == [
        "job 1: features ranges (array of 3)",
        "    features: 3 of 3 ranges",
        "    nodes 1, tasks 1, gpus 0, cpus 1, time 60 min",
        "job 2: features, after <features ranges>",
        "    features: missing",
        "    nodes 1, tasks 1, gpus 0, cpus 1, time 60 min",
        "2 jobs, 4 tasks; nothing was submitted",
    ]
    assert "    | #SBATCH --array=0-2%3" in lines
    assert "    | #SBATCH --dependency='afterany:<features ranges>'" in lines
    assert any(line.startswith("    | #SBATCH --job-name=grappa-features-ranges-") for line in lines)


def test_the_dry_run_names_whole_the_stages_that_a_job_waits_for(fakes: FakeStages) -> None:
    profile = profile_of(fakes.root.parent, "cluster: slurm")
    said = grappa("submit", fakes.root, "--cluster", profile, "--until", "whitening", "--dry-run").stdout
    (job,) = (line for line in said.splitlines() if line.startswith("job ") and ": whitening" in line)
    assert job.endswith(": whitening, after <images>, <features>, <frozen_views>")


def test_ranges_that_are_made_or_on_their_way_are_not_submitted_again(fakes: FakeStages) -> None:
    fakes.execute(until="images")
    fakes.execute(stage="features", rows=Node.parse("features.ranges/2-of-3").rows)
    first = planned(fakes, until="features")
    assert [job.title for job in first] == ["features ranges (array of 2)", "features"]
    assert first[0].reasons == {"features": "2 of 3 ranges"}
    assert first[1].joins == ("features.ranges/1-of-3", "features.ranges/3-of-3")
    submitted(fakes, first)
    live = {name: task for task in all_tasks(fakes.run) for name in task.artifacts}
    assert planned(fakes, live, until="features") == []
    joining = live.pop("features")
    (again,) = planned(fakes, live, until="features")
    assert again.title == "features" and again.joins == first[1].joins and joining.after == ()
    assert [job.title for job in planned(fakes, force=True, stage="features")] == [
        "features ranges (array of 3)",
        "features",
    ]


def test_a_range_refuses_other_batches_than_were_submitted(fakes: FakeStages) -> None:
    fakes.execute(until="images")
    pin, config = planned(fakes, stage="features")[0].tasks[0][0], fakes.config
    refuse_other_fingerprint(fakes.run, config, pin)
    fakes.configure(compute={"inference_batch_size": 32})
    words = r"features.ranges/1-of-3 is no longer what was submitted: config compute.inference_batch_size: 64 -> 32"
    with pytest.raises(JobRefusedError, match=words):
        refuse_other_fingerprint(fakes.run, config, pin)


def test_status_tells_how_far_the_ranges_are(
    fakes: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.execute(until="images")
    submission = submitted(fakes, planned(fakes, stage="features"))
    name, at = "grappa-features-ranges-mark", "7_1"
    waiting = "8|grappa-features-mark|PENDING|Dependency||1:00"
    says(monkeypatch, tmp_path, f"7_0|{name}|RUNNING|None|n1|9:00", f"{at}|{name}|RUNNING|None|n2|9:00",
         f"7_2|{name}|PENDING|Resources||9:00", waiting)  # fmt: skip
    for task in (0, 1):
        events = submission.folder / "events" / f"7_{task}.jsonl"
        append_event(events, "start", restarts=0, node="n1")
        append_event(events, "artifact", artifact=f"features.ranges/{task + 1}-of-3")
        done = Snapshot(f"features.ranges/{task + 1}-of-3", "embedding", "images", 10 + task, 40, 2.5, "0:12")
        (submission.folder / "progress" / f"7_{task}.json").write_text(json.dumps(asdict(done)))
    assert _told(fakes) == JobNote(
        "running",
        "0 of 3 ranges made, 2 running, 1 pending, 21/80 images, 5.0 images/s; joining pending: Dependency (job 8)",
    )
    assert set(live_tasks(fakes.run)) == {"features", *(f"features.ranges/{number}-of-3" for number in (1, 2, 3))}
    fakes.execute(stage="features", rows=Node.parse("features.ranges/1-of-3").rows)
    for event in ("made", "end"):
        append_event(
            submission.folder / "events" / "7_0.jsonl", event, artifact="features.ranges/1-of-3", exit=0, error=""
        )
    append_event(submission.folder / "events" / "7_2.jsonl", "start", restarts=0, node="n2")
    append_event(submission.folder / "events" / "7_2.jsonl", "artifact", artifact="features.ranges/3-of-3")
    append_event(submission.folder / "events" / "7_2.jsonl", "end", exit=1, error="out of memory")
    says(monkeypatch, tmp_path, f"{at}|{name}|RUNNING|None|n2|9:00", waiting)
    log = submission.folder / "7_2_0_log.out"
    assert _told(fakes).text == (
        f"1 of 3 ranges made, 1 running, 1 failed: out of memory (job 7_2, {log}), 11/40 images, 2.5 images/s; "
        "joining pending: Dependency (job 8)"
    )
    assert not _told(fakes).lost
    says(monkeypatch, tmp_path, "8|grappa-features-mark|RUNNING|None|n1|1:00")
    append_event(submission.folder / "events" / "8.jsonl", "artifact", artifact="features")
    assert "; joining running on n1, limit in 1:00 (job 8)" in _told(fakes).text
    fakes.execute(stage="features")
    assert _told(fakes).text == "running on n1, limit in 1:00 (job 8)", "it is made, so no range matters any more"


def _told(fakes: FakeStages) -> JobNote:
    return job_notes(fakes.run, states(fakes.run, fakes.config))[0]["features"]


def test_cancel_takes_ranges_with_their_artifact(
    fakes: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.execute(until="images")
    submitted(fakes, planned(fakes, stage="features"))
    name = "grappa-features-ranges-mark"
    says(monkeypatch, tmp_path, f"7_1|{name}|RUNNING|None|n1|9:00", "8|grappa-features-mark|PENDING|Dependency||1:00")
    said = grappa("cancel", fakes.root, "features").stdout.splitlines()
    assert sorted(said) == ["cancelled job 7_1: features.ranges/2-of-3", "cancelled job 8: features"]
    assert sorted((tmp_path / "cancelled").read_text().split()) == ["7_1", "8"]


def test_logs_of_ranges_are_asked_for_by_number(fakes: FakeStages) -> None:
    fakes.execute(until="images")
    folder = submitted(fakes, planned(fakes, stage="features")).folder
    (folder / "7_1_0_log.out").write_text("features.ranges/2-of-3: embedding\n")
    assert grappa("logs", fakes.root, "features", "--range", "2").stdout.splitlines() == [
        f"# job 7_1, {folder / '7_1_0_log.out'}",
        "features.ranges/2-of-3: embedding",
    ]
    assert (
        "# it joins ranges of rows; --range prints the log of one of them: 1, 2, 3"
        in grappa("logs", fakes.root, "features").stdout
    )
    assert (
        "no job was submitted for range 4 of features; found 1, 2, 3"
        in grappa("logs", fakes.root, "features", "--range", "4").stderr
    )


def test_a_lost_range_is_made_by_the_job_that_joins(fakes: FakeStages) -> None:
    def fail_once(context: StageContext) -> None:
        del fakes.hooks[context.name]
        raise ValueError("the node is ill")

    fakes.hooks["features.ranges/2-of-3"] = fail_once
    fakes.execute(until="images")
    fakes.ran.clear()
    profile = profile_of(fakes.root.parent, cluster="debug")
    result = grappa("submit", fakes.root, "--cluster", profile, "--until", "features")
    assert result.exit_code == 0, result.stderr
    assert "features.ranges/2-of-3: failed: the node is ill" in result.stdout
    assert fakes.states()["features"] == "fresh" and not (fakes.root / "features.ranges").exists()
    jobs = tables.load_jobs(fakes.root).set_index("artifact")
    assert list(jobs["state"]) == ["made", "failed", "made", "made"]
    assert jobs.loc["features.ranges/2-of-3", "error"] == "the node is ill"
    assert grappa("submit", fakes.root, "--cluster", profile, "--until", "features").stdout.startswith("nothing")


def test_a_forced_submission_drops_ranges_and_joins_those_that_it_makes(fakes: FakeStages) -> None:
    fakes.execute(until="images")
    for name in ("features.ranges/1-of-2", "features.ranges/1-of-3"):
        fakes.execute(stage="features", rows=Node.parse(name).rows)
    fakes.ran.clear()
    profile, found = profile_of(fakes.root.parent, cluster="debug"), []

    def look(context: StageContext) -> None:
        found.append(sorted(each.name for each in (fakes.root / "features.ranges").glob("*/")))

    fakes.hooks |= {"features.ranges/2-of-3": look, "features": look}
    with acquire(fakes.root / "features.ranges" / "1-of-3.lock", what="features.ranges/1-of-3"):
        refused = grappa("submit", fakes.root, "--cluster", profile, "--stage", "features", "--force")
    assert refused.exit_code == 1 and "features.ranges/1-of-3 is being written by process" in refused.stderr
    result = grappa("submit", fakes.root, "--cluster", profile, "--stage", "features", "--force")
    assert result.exit_code == 0, result.stderr
    made = [f"{number}-of-3" for number in (1, 2, 3)]
    assert fakes.ran == [*(f"features.ranges/{each}" for each in made), "features"]
    assert [set(names) & {"1-of-2", *made} for names in found] == [{"1-of-3"}, set(made)]


def test_ranges_as_processes_of_this_machine(tmp_path: Path) -> None:
    images, weights = draw_images(tmp_path / "images"), write_weights(tmp_path / "w.safetensors")
    run = make_run(tmp_path / "run", [images], weights, compute__inference_batch_size=8)
    run_all(run, until="images")
    profile = profile_of(tmp_path, "{cluster: local, stages: {features: {ranges: 3}}}", "local")
    result = grappa("submit", run.root, "--cluster", profile, "--stage", "features")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == ["features ranges (array of 3): started", "features: started"]
    assert "60 features of 32 dimensions, joined from 3 ranges" in grappa("logs", run.root, "features").stdout
    assert "features.ranges/2-of-3: 24 features" in grappa("logs", run.root, "features", "--range", "2").stdout
    jobs = tables.load_jobs(run.root)
    assert list(jobs["artifact"]) == [*(f"features.ranges/{number}-of-3" for number in (1, 2, 3)), "features"]
    assert list(jobs["state"]) == ["made"] * 4
    joined = digests(run)
    run_all(run, stage="features", force=True)
    assert digests(run) == joined
