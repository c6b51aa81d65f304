"""The report of a run: complete, self-contained, the same bytes twice, and right in its numbers."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from grappa.pipeline import tables
from grappa.pipeline.cli import app
from grappa.pipeline.engine.status import read_config
from grappa.pipeline.graph.models import evaluated_models
from grappa.pipeline.graph.node import Node
from grappa.pipeline.graph.stages import with_upstream
from grappa.pipeline.pages.report import costs, examples, medoids, summary
from grappa.pipeline.pages.report import page as page_module
from grappa.pipeline.pages.report.content import limits
from grappa.pipeline.pages.report.page import write_report
from grappa.pipeline.store.artifacts import RunFolder, quoted
from grappa.pipeline.store.edits import Edits, clustering_of, write_edits
from tests.helpers.tiny import draw_images, make_run, run_all, sign_again, split_of, write_table, write_weights
from tests.helpers.verdicts import VERDICT, publish_verdict


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    draw_images(folder / "images")
    write_weights(folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def run(material: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    table = material / "table.csv"
    write_table(material / "images", table, label=lambda path: path.parent.name, split=split_of)
    made = make_run(tmp_path_factory.mktemp("runs") / "run", [table], material / "weights.safetensors")
    run_all(made)
    return made


@pytest.fixture(scope="module")
def report(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "report"
    write_report(run.root, folder, folder=True)
    return folder


@pytest.fixture
def copy(run: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(run.root, tmp_path / "copy")))


class Page(HTMLParser):
    """Collects what a page points to, its headings' ids and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.text, self.tag = "", ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found, self.tag = dict(attrs), tag
        assert tag not in ("iframe", "object") and (tag != "script" or not attrs), "the one script is in the page"
        self.tags.add(tag)
        self.targets += [value for name in ("src", "href") if (value := found.get(name))]
        self.ids |= {value for name, value in found.items() if name == "id" and value}

    def handle_data(self, data: str) -> None:
        self.text += data if self.tag not in ("style", "script") else ""


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_report_needs_nothing_but_its_own_folder(report: Path) -> None:
    page = Page(report / "index.html")
    anchors = {target[1:] for target in page.targets if target.startswith("#")}
    assert anchors <= page.ids
    files = {target for target in page.targets if not target.startswith(("#", "data:"))}
    assert files == set(_files(report)) - {"index.html", "results.md"}
    assert {
        f"figures/{name}.svg" for name in ("attention", "cluster_sizes", "shared_clusters", "learning_curves")
    } < files
    for name in files:
        if name.endswith(".jpg"):
            assert Image.open(report / name).size == (47, 40), "tiny images are not enlarged"
        else:
            assert 'href="http' not in (report / name).read_text()


def test_the_same_run_gives_the_same_bytes(run: RunFolder, report: Path, tmp_path: Path) -> None:
    write_report(run.root, tmp_path / "again", folder=True)
    assert _files(tmp_path / "again") == _files(report)


def test_the_tables_hold_the_numbers_of_the_evaluation(run: RunFolder, report: Path) -> None:
    text = (report / "results.md").read_text(encoding="utf-8")
    metrics = tables.load_metrics(run.root).set_index(["model", "domain", "gallery"])
    for gallery in ("domain", "merged"):
        row = metrics.loc[("fused", "discs", gallery)]
        assert f"{summary.number(row['map'])} ± {summary.number(row['map_se'])}" in text
    assert summary.number(metrics.loc[("mean", "_mean", "merged"), "recall_at_1"]) in text
    page = Page(report / "index.html").text
    for model in metrics.index.unique("model"):
        assert f"| {model} |" in text and model in page
    for heading in ("mAP in each domain's own gallery", "mAP in the merged gallery", "What each model cost"):
        assert heading in page
    assert "Not up to date" not in page
    shown = (report / "index.html").read_text(encoding="utf-8")
    assert shown.count('class="photo right"') > 0 and shown.count('class="photo wrong"') > 0


def test_the_verdict_stands_on_top_beside_what_the_labels_say(copy: RunFolder, tmp_path: Path) -> None:
    publish_verdict(copy)
    write_report(copy.root, tmp_path / "report", folder=True)
    page = Page(tmp_path / "report" / "index.html").text
    text = (tmp_path / "report" / "results.md").read_text(encoding="utf-8")
    headline = "Adaptation helped: the deployed model is fused, the learned attention over the fused sets."
    order = [
        page.index(each)
        for each in (headline, VERDICT["evidence"], "best of what needs no training", "Neighbours before")
    ]
    assert order == sorted(order), "the verdict, its evidence, the one table, then all else"
    assert text.splitlines()[2] == f"**Verdict: helped.** {VERDICT['evidence']} The deployed model is fused."
    assert "| fused | 2.950 | **+.340 [+.290,\u00a0+.380]** |" in text
    assert "of 1,024 test images" in page and "of 1,024 test images" in text
    metrics, per_query = tables.load_metrics(copy.root), tables.load_per_query(copy.root)
    for gallery, where in summary.GALLERIES.items():
        found = summary.comparisons(metrics, per_query, gallery).set_index(["candidate", "against", "domain"])
        row = found.loc[("fused", "zero-shot", "_mean")]
        sentence = f"{row['reference']} ({row['relative']:+.1%}, {summary.gain_text(row)})"
        assert f"By labels, mean mAP in {where}: fused is " in page
        (line,) = [
            each
            for each in text.splitlines()
            if each.startswith(f"- by the labels of the test images, mean mAP in {where}")
        ]
        assert line.endswith(sentence)


def test_where_the_frozen_backbone_is_deployed_the_labels_tell_what_training_gave(
    copy: RunFolder, tmp_path: Path
) -> None:
    publish_verdict(copy, VERDICT | {"verdict": "hurt", "choice": "zero_shot"})
    text = copy.config_path.read_text()
    assert "  source: fused" in text
    copy.config_path.write_text(text.replace("  source: fused", "  source: auto"))
    write_report(copy.root, tmp_path / "report", folder=True)
    text = (tmp_path / "report" / "results.md").read_text(encoding="utf-8")
    told = [line.split(": ")[1].split()[0] for line in text.splitlines() if line.startswith("- by the labels of")]
    assert told == ["mean", "fused", "student"] * 2


def test_a_run_without_a_verdict_shows_nothing_of_it(copy: RunFolder, tmp_path: Path) -> None:
    shutil.rmtree(copy.root / "verdict", ignore_errors=True)
    write_report(copy.root, tmp_path / "report", folder=True)
    for file in ("index.html", "results.md"):
        written = (tmp_path / "report" / file).read_text(encoding="utf-8")
        assert "Verdict" not in written and "standout" not in written


def test_the_agreement_of_clusters_and_labels_is_shown(run: RunFolder, report: Path) -> None:
    found = tables.cluster_metrics(run.root).set_index(["granularity", "domain"])
    text = (report / "results.md").read_text(encoding="utf-8")
    assert "| AMI | checks | discs | stripes | mean | mean NMI | mean purity |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| k00008 | ") and len(line.split("|")) == 9]
    cells = line.replace("*", "").strip("| ").split(" | ")[1:]
    domains = ["checks", "discs", "stripes", "_mean"]
    expected = [found.loc[("k00008", domain), "ami"] for domain in domains]
    expected += [found.loc[("k00008", "_mean"), name] for name in ("nmi", "purity")]
    assert cells == [summary.number(value) for value in expected]
    assert "Agreement with the labels of the train images" in Page(report / "index.html").text


def test_a_run_that_an_older_version_evaluated_is_reported_as_before(copy: RunFolder, tmp_path: Path) -> None:
    (copy.root / "evaluation" / "clusters.csv").unlink()
    sign_again(copy.root / "evaluation")
    write_report(copy.root, tmp_path / "report", folder=True)
    assert "Agreement with the labels" not in Page(tmp_path / "report" / "index.html").text


def test_a_model_costs_what_it_depends_on(run: RunFolder, copy: RunFolder) -> None:
    config = read_config(run)
    found = costs.load_costs(run, config)
    stages = {model: set(own["stage"]) for model, own in found.groupby("model")}
    assert stages["zero_shot"] == {"images", "backbone", "features", "embeddings"}
    learned = {"frozen_views", "whitening", "neighbors", "clusters", "adaptors", "fusion", "heads"}
    assert stages["fused"] == stages["zero_shot"] | learned
    assert set(found[(found["model"] == "k00004") & (found["stage"] == "adaptors")]["instance"]) == {"k00004"}
    seconds = sum(
        run.artifact(node).manifest().provenance["seconds"]  # type: ignore[union-attr]
        for node in with_upstream([Node("heads", "fused")], config)
    )
    assert found[found["model"] == "fused"]["seconds"].sum() == pytest.approx(seconds)
    assert costs.partly_known(found) == []
    log = copy.root / "adaptors" / "k00004" / "log.jsonl"
    log.write_text(log.read_text().replace('"resumed": false', '"resumed": true'))
    again = costs.load_costs(copy, config)
    assert costs.partly_known(again) == ["adaptors/k00004"]
    by_model = {cells[0]: cells for cells in costs.cost_table(again, ["k00004", "k00008"]).rows}
    assert by_model["k00004"][-2].endswith("*") and not by_model["k00008"][-2].endswith("*")


def test_examples_are_nearest_images_marked_by_class(run: RunFolder) -> None:
    sources = evaluated_models(read_config(run))
    shown = {model: sources[model] for model in ("zero_shot", "fused")}
    found = examples.load_examples(run, shown, tables.load_per_query(run.root))
    assert {each.query.domain for each in found} == {"stripes", "checks", "discs"}
    assert sum(each.why == "drawn at random" for each in found) == 3
    assert len({each.query.row for each in found}) == len(found)
    images = pd.read_parquet(run.root / "images" / "images.parquet")
    embeddings = np.load(run.root / "heads" / "fused" / "embeddings.npy")
    for each in found:
        ranking = each.rankings[1]
        assert ranking.model == "fused" and ranking.average_precision is not None
        test = np.flatnonzero((images["split"] == "test").to_numpy())
        cosines = np.delete(embeddings[test] @ embeddings[each.query.row], np.flatnonzero(test == each.query.row))
        np.testing.assert_allclose([x.similarity for x in ranking.nearest], np.sort(cosines)[::-1][:8], rtol=1e-5)
        assert each.query.row not in [x.row for x in ranking.nearest]
        for x in ranking.nearest:
            assert x.right == ((x.domain, x.label) == (each.query.domain, each.query.label))


def test_examples_hold_the_largest_gain_and_the_largest_loss() -> None:
    table = pd.DataFrame({"image_id": [f"i{place}" for place in range(6)], "domain": ["a"] * 5 + ["b"]})
    precision = pd.DataFrame({"zero_shot": [0.5] * 5 + [np.nan], "fused": [0.5, 0.9, 0.4, 0.1, 0.5, np.nan]})
    chosen = examples.choose(table, precision)
    assert chosen == examples.choose(table, precision)
    assert {place for _, place in chosen} >= {1, 3, 5}, "the best, the worst, and what is drawn where nothing is known"
    unlabeled = examples.choose(table, pd.DataFrame(index=table.index))
    assert [why for why, _ in unlabeled] == ["drawn at random"] * 4, "more of a domain where nothing else is known"


def test_odd_names_and_a_run_without_labels(material: Path, tmp_path: Path) -> None:
    odd = {"stripes": 'a<b>&"c"', "checks": "$x|y$ 鳥", "discs": "d" * 60}
    lines = ["path,domain"]
    for path in sorted((material / "images").rglob("*.png")):
        name = odd[path.parts[-3]].replace('"', '""')
        lines.append(f'{path},"{name}"')
    (tmp_path / "odd.csv").write_text("\n".join(lines))
    made = make_run(tmp_path / "a<b>\"\n\u202e'", [tmp_path / "odd.csv"], material / "weights.safetensors")
    run_all(made)
    shutil.rmtree(made.root / "attention")
    publish_verdict(made, VERDICT | {"verdict": "hurt", "choice": "zero_shot", "images": "train"})
    write_report(made.root, tmp_path / "report", folder=True)
    page = Page(tmp_path / "report" / "index.html")
    for name in odd.values():
        assert name in page.text, "the page's text is the name, not a tag"
    assert "No image has a label: nothing was evaluated." in page.text
    assert "the images nearest to 9 images, by both models" in page.text and "Images, and the nearest" in page.text
    words = page.text.partition("config.yaml")[0].lower()
    assert "neighbours before and after" in words and "test image" not in words, "all images are learned from"
    assert "Adaptation hurt: the deployed model is fused" in page.text and "of 1,024 train images" in page.text
    assert "By labels" not in page.text
    assert (
        "✓ is" not in page.text
        and 'class="photo right"' not in page.source
        and "Agreement with the labels" not in page.text
    )
    assert "a<b>\"\\n\\u202e'" in page.text and "b" not in page.tags, "the run's name"
    assert f"grappa run {quoted(made.root)} --stage attention" in page.text
    assert "attention/neighbors missing" in page.text
    assert "not split: all to learn from and to test" in page.text
    assert not (tmp_path / "report" / "figures" / "attention.svg").exists()


def test_an_edited_setting_is_said(copy: RunFolder, material: Path, tmp_path: Path) -> None:
    make_run(copy.root, [], material / "weights.safetensors", evaluation__seed=5)
    write_report(copy.root, tmp_path / "report", folder=True)
    line = "retrieval/fused stale: config evaluation.seed: 0 -> 5"
    assert f"- {line}\n" in (tmp_path / "report" / "results.md").read_text(encoding="utf-8")
    page = Page(tmp_path / "report" / "index.html").text
    assert "Not up to date with the run's configuration:" in page and line in page
    assert "evaluation stale: config evaluation.seed: 0 -> 5; upstream retrieval/zero_shot is stale" in page


def test_what_cannot_be_reported_is_one_sentence(copy: RunFolder, material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    call = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--folder"])
    assert call.exit_code == 1 and "There is no run folder" in call.stderr
    make_run(copy.root, [], material / "weights.safetensors", fusion__seed=3)
    run_all(copy, until="model")
    with pytest.raises(ValueError, match="do not belong together: fusion/neighbors was made again in between"):
        write_report(copy.root, folder, folder=True)
    shutil.rmtree(copy.root / "evaluation")
    with pytest.raises(ValueError, match=r"evaluation is missing in .*; run `grappa run .* --until evaluation`"):
        write_report(copy.root, folder, folder=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"], "nothing half-written stays"
    folder.mkdir()
    with pytest.raises(ValueError, match="report exists already; give a new name"):
        write_report(copy.root, folder, folder=True)
    with pytest.raises(ValueError, match=r"the report is one page: .*/report does not end in \.html"):
        write_report(copy.root, folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the content of reports out."""
    monkeypatch.setattr(page_module, "collect", lambda run: {})
    monkeypatch.setattr(page_module, "_page", lambda run, content, folder: page_module.MARK + b"new")
    monkeypatch.setattr(page_module, "_render", lambda template, content: "")


@pytest.mark.usefixtures("quick")
def test_the_command_writes_the_report_beside_the_run(tmp_path: Path) -> None:
    run, page, folder = tmp_path / "mine", tmp_path / "mine_report.html", tmp_path / "mine_report"
    RunFolder.create(run)
    call = CliRunner().invoke(app, ["report", str(run)])
    assert call.stdout == f"wrote the report to {page} (0.0 MiB, in one file)\n", call.output
    call = CliRunner().invoke(app, ["report", str(run), "--folder"])
    results = folder / "results.md"
    assert call.stdout == f"wrote the report to {folder / 'index.html'}; its tables for a README are in {results}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine_report", "mine_report.html"]


@pytest.mark.usefixtures("quick")
def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    write_report(tmp_path, page)
    page.write_bytes(page_module.MARK + b"old")
    write_report(tmp_path, page)
    assert page.read_bytes().endswith(b"new")
    page.write_text("<!DOCTYPE html><title>mine</title>")
    with pytest.raises(ValueError, match="report.html exists already"):
        write_report(tmp_path, page)
    assert "mine" in page.read_text()


@pytest.mark.usefixtures("quick")
def test_open_opens_the_page_and_says_where_there_is_no_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)) or len(opened) == 1)
    page = tmp_path / "a b#c.html"
    RunFolder.create(tmp_path / "mine")
    for sentence in ("", f"grappa: warning: no browser could be started here; open {page.as_uri()} in yours\n"):
        call = CliRunner().invoke(app, ["report", str(tmp_path / "mine"), str(page), "--open"])
        assert call.exit_code == 0 and call.stderr.endswith(sentence)
    assert opened == [page.as_uri()] * 2


def test_one_page_holds_everything(run: RunFolder, report: Path, tmp_path: Path) -> None:
    write_report(run.root, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page_module.MARK in (tmp_path / "report.html").read_bytes()[: page_module.HEAD_BYTES]
    assert {target.partition(":")[0] for target in page.targets} == {"data"}
    assert "url(" not in page.source and "@import" not in page.source
    in_folder = Page(report / "index.html")
    assert page.text == in_folder.text and len(page.targets) == len(in_folder.targets)
    assert (report / "results.md").read_text(encoding="utf-8").strip() in page.text


def test_what_is_shown_is_bounded() -> None:
    number = 3000
    table = pd.DataFrame({"image_id": [f"i{place}" for place in range(number)], "domain": [""] * number})
    table["domain"] = [f"d{place % 100:02d}" for place in range(number)]
    precision = pd.DataFrame({"zero_shot": np.linspace(0, 1, number), "fused": np.linspace(1, 0, number)})
    assert len({place for _, place in examples.choose(table, precision)}) == examples.MAX_QUERIES
    table = table.assign(label=None, path="x").set_index("image_id")
    for place in range(20):
        table[f"k{place:05d}"], table[f"k{place:05d}_distance"] = np.arange(number) % 500, 0.5
    found = medoids.load_clusters(table, tuple(f"k{place:05d}" for place in range(20)))
    assert [found[0].name, found[-1].name, len(found)] == ["k00000", "k00019", medoids.MAX_GRANULARITIES]
    shown = sum(len(cluster.medoids) for each in found for cluster in each.clusters)
    most = limits()["pictures"]
    assert shown + examples.MAX_QUERIES * (1 + 2 * examples.NUM_NEAREST) <= most < 500


def test_clusters_are_shown_with_their_names_sizes_domains_and_purity(copy: RunFolder) -> None:
    table = tables.load_assignments(copy.root)
    edits = Edits(granularity="k00004", assignments=clustering_of(copy, "k00004"))
    write_edits(copy, {"k00004": edits.merging([0, 1]).named(0, "<i>mine</i>")})
    first, _ = medoids.load_clusters(tables.load_assignments(copy.root), ("k00004", "k00008"))
    assert first.num_clusters == 3 and [each.size for each in first.clusters] == sorted(
        (each.size for each in first.clusters), reverse=True
    )
    assert sum(each.size for each in first.clusters) == len(table)
    assert {each.title for each in first.clusters} == {"<i>mine</i>", "cluster 2", "cluster 3"}
    for each in first.clusters:
        assert sum(share.share for share in each.domains) == pytest.approx(1)
        assert each.purity is not None and 0 < each.purity <= 1 and each.label.startswith("class_")
        assert each.share == f"{each.purity:.0%}"
        assert 1 <= len(each.medoids) <= medoids.NUM_MEDOIDS


def test_where_few_images_have_a_label_the_share_says_of_how_many(copy: RunFolder) -> None:
    table = tables.load_assignments(copy.root)
    table["label"] = table["label"].where(table.index == table.index[0])
    (found,) = medoids.load_clusters(table, ("k00004",))
    assert sorted(each.share for each in found.clusters) == ["", "", "", "100% of 1 labelled"]
