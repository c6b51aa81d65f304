"""The verdict of a run: read whole or refused with the cure, said at the end of a whole run, absent in an older run."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

import grappa
from grappa.pipeline.commands.run import run_and_report
from grappa.pipeline.engine.execution import Report, Selection
from grappa.pipeline.engine.progress import Progress
from grappa.pipeline.engine.verdict_file import read_verdict
from grappa.pipeline.pages.report.summary import verdict_table
from grappa.pipeline.store.artifacts import RunFolder
from tests.helpers.fake_stages import FakeStages, fake_stages
from tests.helpers.verdicts import VERDICT, publish_verdict

SENTENCE = f"helped. {VERDICT['evidence']}"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def test_a_verdict_is_read_as_it_was_written(run: RunFolder) -> None:
    publish_verdict(run)
    found = read_verdict(run)
    assert found is not None and found.sentence == SENTENCE
    assert (found.verdict, found.choice, found.images, found.num_images) == ("helped", "fused", "test", 1024)
    pd.testing.assert_frame_equal(pd.DataFrame(found.models), pd.DataFrame(VERDICT["models"]))


def test_a_verdict_of_an_earlier_version_says_nothing_within_domains(run: RunFolder) -> None:
    models = [{key: value for key, value in each.items() if key != "low_within"} for each in VERDICT["models"]]
    publish_verdict(run, VERDICT | {"models": models})
    found = read_verdict(run)
    assert found is not None and [each.low_within for each in found.models] == [None] * 3


def test_a_run_without_a_verdict_has_none(run: RunFolder) -> None:
    assert read_verdict(run) is None
    with pytest.raises(ValueError, match="verdict is (missing|no part of the run)"):
        grappa.open_run(run.root).verdict()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (VERDICT | {"verdict": "won"}, r"verdict: found 'won', expected 'helped', 'no certain difference', 'hurt' or"),
        (VERDICT | {"models": [{"model": "fused"}]}, r"models: found .*'fused'.*, expected field required"),
        (VERDICT | {"num_images": "many"}, r"num_images: found 'many', expected a valid integer"),
        ({"verdict": "helped"}, "evidence: found .*, expected field required"),
        ([], r"found \[\], expected a dictionary or an instance of Verdict"),
        ("{", r"not JSON \(Expecting property name"),
    ],
)
def test_another_form_is_refused_with_the_cure(run: RunFolder, content: object, sentence: str) -> None:
    publish_verdict(run, content)
    with pytest.raises(ValueError, match=rf"verdict.json: {sentence}.*; make it again by `grappa run .* --stage verdi"):
        read_verdict(run)


def test_a_lost_file_is_refused_with_the_cure(run: RunFolder) -> None:
    publish_verdict(run)
    (run.root / "verdict" / "verdict.json").unlink()
    with pytest.raises(ValueError, match="verdict.json.* missing.*; .*`grappa run "):
        read_verdict(run)


def test_python_has_the_verdict_too(run: RunFolder) -> None:
    publish_verdict(run)
    found = grappa.open_run(run.root).verdict()
    assert found.sentence == SENTENCE
    assert [each.model for each in found.models] == ["zero_shot_head", "mean", "fused"]


def test_the_table_stresses_what_is_above_the_frozen_backbone(run: RunFolder) -> None:
    publish_verdict(run)
    found = read_verdict(run)
    assert found is not None
    table = verdict_table(found)
    assert table.header == ["", "neighbourhood standout", "difference"]
    assert table.rows == [
        ["zero_shot_head", "2.610", "-"],
        ["mean", "2.630", "+.020 [-.010,\u00a0+.050]"],
        ["fused", "2.950", "+.340 [+.290,\u00a0+.380]"],
    ]
    assert table.strong == {(2, 2)}


def _said(fakes: FakeStages, monkeypatch: pytest.MonkeyPatch, **selection: str) -> list[str]:
    """The lines after those of the stages, which are no part of this test."""
    report = Report({"fusion": 1.0}, 0)
    monkeypatch.setattr("grappa.pipeline.commands.run.run_stages", lambda *arguments, **options: report)
    lines: list[str] = []
    progress = Progress(StringIO(), terminal=False)
    run_and_report(fakes.run, Selection(**selection), progress=progress, say=lines.append)
    return lines


def test_a_whole_run_ends_with_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes, times = fake_stages(tmp_path / "run", monkeypatch), "times: fusion 1.0 s; together 1.0 s"
    assert _said(fakes, monkeypatch) == [times], "an older run has no verdict"
    publish_verdict(fakes.run)
    assert _said(fakes, monkeypatch) == [f"verdict: {SENTENCE}", times]
    assert _said(fakes, monkeypatch, until="fusion") == [times], "what was not made again may be stale"
    assert _said(fakes, monkeypatch, stage="index") == [times]
