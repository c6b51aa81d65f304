"""Staleness in one glance: the cause once, how many follow; and commands that read what is stale say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from grappa.pipeline.cli import app
from grappa.pipeline.engine.glance import short_lines, stale_notice
from grappa.pipeline.engine.status import states
from tests.helpers.fake_stages import FakeStages, fake_stages


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fakes = fake_stages(tmp_path / "run", monkeypatch)
    fakes.execute()
    return fakes


def glance(fakes: FakeStages, notes: dict[str, str] | None = None) -> list[str]:
    return short_lines(states(fakes.run, fakes.config), notes)


def grappa(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_fresh_run_is_one_line(complete: FakeStages) -> None:
    number = len(complete.states())
    assert glance(complete) == [f"{number} artifacts: {number} fresh"]


def test_a_cause_is_said_once_and_what_follows_is_counted(complete: FakeStages) -> None:
    complete.configure(fusion={"seed": 1})
    number = len(complete.not_fresh()) - 1
    first, second, last = glance(complete)
    assert first == "fusion/neighbors is stale: config fusion.seed: 0 -> 1"
    assert second.startswith(f"{number} artifacts follow (`grappa status --long` names all): student, embeddings 2")
    assert last.endswith(f" fresh, {number + 1} stale")


def test_artifacts_with_one_cause_share_a_line(complete: FakeStages) -> None:
    complete.configure(clusters={"seed": 1})
    assert glance(complete)[0] == "clusters/k00002, clusters/k00004 are stale: config clusters.seed: 0 -> 1"


def test_two_causes_are_two_lines(complete: FakeStages) -> None:
    complete.configure(clusters={"seed": 1}, index={"rows": "test"})
    (complete.root / "features" / "features.npy").write_bytes(b"")
    causes = [line for line in glance(complete) if " is " in line or " are " in line]
    assert causes[0].startswith("features is corrupt: features.npy: 0 bytes")
    assert causes[1:] == [
        "clusters/k00002, clusters/k00004 are stale: config clusters.seed: 0 -> 1",
        "index is stale: config index.rows: all -> test",
    ]


def test_what_is_missing_is_counted_by_stage(complete: FakeStages) -> None:
    shutil.rmtree(complete.root / "adaptors")
    lines = glance(complete)
    assert "2 missing: adaptors 2" in lines
    assert any(" artifacts follow " in line for line in lines)


def test_artifacts_with_jobs_have_a_line_of_their_own(complete: FakeStages) -> None:
    complete.configure(index={"rows": "test"})
    lines = glance(complete, {"index": "pending: Priority (job 12)"})
    assert lines[0] == "index  stale   pending: Priority (job 12)"
    assert lines[1] == "index is stale: config index.rows: all -> test"


def test_long_and_json_have_all(complete: FakeStages) -> None:
    complete.configure(fusion={"seed": 1})
    short, long = (grappa("status", complete.root, *option).stdout.splitlines() for option in ([], ["--long"]))
    assert len(short) == 3
    assert "upstream fusion/neighbors is stale" in {line.strip() for line in long}
    records = json.loads(grappa("status", complete.root, "--json").stdout)
    assert len(records) == len(complete.states())
    assert all(record["reasons"] for record in records if record["state"] == "stale")


def test_the_notice_names_artifacts_cause_and_command(complete: FakeStages) -> None:
    assert stale_notice(complete.root, "model", "index") == ""
    complete.configure(index={"rows": "test"})
    assert stale_notice(complete.root, "model") == ""
    complete.configure(clusters={"seed": 1}, index={"rows": "all"})
    assert stale_notice(complete.root, "model", "index") == (
        "model, index are not up to date: clusters/k00002, clusters/k00004 are stale: config clusters.seed: 0 -> 1; "
        f"`grappa run {complete.root}` brings them up to date"
    )
    complete.configure(clusters={"seed": 0})
    shutil.rmtree(complete.root / "attention")
    assert stale_notice(complete.root, "model") == "", "the model reads no attention"
    shutil.rmtree(complete.root / "fusion")
    assert "an artifact that it is made from is missing; `grappa run" in stale_notice(complete.root, "model")
    shutil.rmtree(complete.root / "model")
    assert stale_notice(complete.root, "model") == "", "what is missing is another sentence"


def test_where_the_configuration_is_broken_the_notice_says_that(complete: FakeStages) -> None:
    complete.run.config_path.write_text("fusion: {sed: 1}")
    notice = stale_notice(complete.root, "model")
    assert notice.startswith("whether model of ") and "unknown key fusion.sed" in notice
    assert stale_notice(complete.root.parent, "model") == ""


@pytest.mark.parametrize("command", ["search", "embed", "export", "report"])
def test_commands_that_read_a_stale_model_say_so_on_stderr(
    complete: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("grappa.pipeline.commands.search.search", lambda *arguments: [])
    monkeypatch.setattr("grappa.pipeline.commands.export.export", lambda *arguments, **options: "done")
    monkeypatch.setattr("grappa.pipeline.commands.embed.embed", lambda *arguments: "done")
    monkeypatch.setattr("grappa.pipeline.pages.report.page.write_report", lambda *arguments: "done")
    arguments = {
        "search": [complete.root, tmp_path / "photo.jpg", "--json"],
        "embed": [complete.root, "--images", tmp_path, "--out", tmp_path / "out"],
    }.get(command, [complete.root, tmp_path / "out"])
    assert "not up to date" not in grappa(command, *arguments).output
    complete.configure(fusion={"seed": 1})
    result = grappa(command, *arguments)
    assert result.exit_code == 0
    assert "fusion/neighbors is stale: config fusion.seed: 0 -> 1; `grappa run" in result.stderr
    assert "stale" not in result.stdout
