"""The file of a sweep: which runs it names, how they are called, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grappa.pipeline.config.yaml_file import ConfigError, field_names
from grappa.pipeline.sweep.spec import SWEEPS, nested, points, read_sweep, varied


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def named(tmp_path: Path, text: str) -> dict[str, dict[str, object]]:
    """Return what each run changes, by its name."""
    return {point.name: dict(point.changes) for point in points(read_sweep(written(tmp_path, text))[0])}


def test_runs_alone_keep_their_names_and_order(tmp_path: Path) -> None:
    found = named(tmp_path, "runs:\n  wide: {adaptors.bottleneck_dim: 96}\n  base:\n")
    assert found == {"wide": {"adaptors.bottleneck_dim": 96}, "base": {}}
    assert list(found) == ["wide", "base"]


def test_a_grid_alone_names_runs_by_their_values(tmp_path: Path) -> None:
    text = "grid: {adaptors.bottleneck_dim: [16, 48], clusters.num_clusters: [auto, [20, 40]]}\n"
    assert list(named(tmp_path, text)) == [
        "bottleneck_dim=16-num_clusters=auto",
        "bottleneck_dim=16-num_clusters=20+40",
        "bottleneck_dim=48-num_clusters=auto",
        "bottleneck_dim=48-num_clusters=20+40",
    ]


def test_keys_with_the_same_field_are_named_whole(tmp_path: Path) -> None:
    found = named(tmp_path, "grid: {adaptors.min_crop: [0.5], fusion.min_crop: [0.9]}\n")
    assert list(found) == ["adaptors.min_crop=0.5-fusion.min_crop=0.9"]


def test_every_run_is_multiplied_by_grid_and_seeds_and_the_first_seed_comes_first(tmp_path: Path) -> None:
    text = "runs: {a: {}, b: {fusion.flip: 0}}\ngrid: {fusion.num_epochs: [1, 2]}\nseeds: {fusion.seed: [0, 7]}\n"
    found = named(tmp_path, text)
    assert list(found)[:5] == [
        "a-num_epochs=1-seed=0",
        "a-num_epochs=2-seed=0",
        "b-num_epochs=1-seed=0",
        "b-num_epochs=2-seed=0",
        "a-num_epochs=1-seed=7",
    ]
    assert found["b-num_epochs=2-seed=7"] == {"fusion.flip": 0, "fusion.num_epochs": 2, "fusion.seed": 7}


def test_the_nth_seeds_go_together(tmp_path: Path) -> None:
    text = "seeds: {adaptors.seed: [0, 1, 2], fusion.seed: [0, 1, 5]}\n"
    found = named(tmp_path, text)
    assert list(found) == ["base-seed=0", "base-seed=1", "base-seed=2+5"]
    assert found["base-seed=2+5"] == {"adaptors.seed": 2, "fusion.seed": 5}


def test_a_variant_is_the_run_without_its_seed_and_columns_are_what_is_changed(tmp_path: Path) -> None:
    sweep, _ = read_sweep(written(tmp_path, "runs: {a: {fusion.flip: 0}}\nseeds: {fusion.seed: [0, 1]}\n"))
    assert [point.variant for point in points(sweep)] == ["a", "a"]
    assert varied(sweep) == ("fusion.flip", "fusion.seed")
    assert nested({"fusion.flip": 0, "fusion.seed": 1, "index.rows": "all"}) == {
        "fusion": {"flip": 0, "seed": 1},
        "index": {"rows": "all"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {a: {}}", "unknown key run: expected one of base, runs, grid, seeds, until, rows"),
        ("base: {image: [x]}", "unknown key base.image: expected one of config, images, set"),
        ("- a", "found ['a'], expected keys such as `runs:`"),
        ("runs: {a: {seed: 1}}", "runs.a: found the key 'seed', expected section.key such as fusion.seed"),
        ("base: {set: {fusion: {seed: 1}}}", "base.set: found the key 'fusion', expected section.key"),
        ("runs: {a: [fusion.seed]}", "runs.a: found ['fusion.seed'], expected a valid dictionary"),
        ("runs: {a/b: {}}", "runs: found the name 'a/b'; it names a folder"),
        ("runs: {..: {}}", "runs: found the name '..'; it names a folder"),
        ("runs: {sweep.csv: {}}", "runs: found the name 'sweep.csv'; it names a folder"),
        ("runs: {a: {}, a: {}}", "`a` is written twice"),
        ("grid: {fusion.seed: 1}", "grid.fusion.seed: found 1, expected a list in brackets"),
        ("grid: {fusion.seed: []}", "grid: found [] for fusion.seed; give one or more different values"),
        ("seeds: {fusion.seed: [1, 1]}", "seeds: found [1, 1] for fusion.seed; give one or more different values"),
        (
            "seeds: {fusion.seed: [1, 2], clusters.seed: [1]}",
            "seeds: found {'fusion.seed': 2, 'clusters.seed': 1} values, expected as many for each key",
        ),
        (
            "runs: {a: {fusion.seed: 1}}\nseeds: {fusion.seed: [1, 2]}",
            "runs.a: fusion.seed is set by the seeds too; drop one of them",
        ),
        (
            "base: {set: {fusion.flip: 1}}\ngrid: {fusion.flip: [0, 1]}",
            "base.set: fusion.flip is set by the grid too; drop one of them",
        ),
        ("until: the end", "until: no stage is called 'the end'; the stages are backbone"),
        ("runs: {a: {}}\nrows: 3", "rows: found 3, expected a list in brackets"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_sweep(written(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "sweep.yaml"))


def test_what_names_no_run_or_one_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to sweep: give runs, a grid or seeds"):
        named(tmp_path, "base: {config: small}\n")
    with pytest.raises(ConfigError, match="two runs would both be called name=a_b; name them"):
        named(tmp_path, "grid: {backbone.name: [a b, a_b]}\n")
    with pytest.raises(ConfigError, match="no such file, and no sweep of that name"):
        read_sweep("nowhere")


def test_the_ablation_names_known_keys_and_says_what_it_is() -> None:
    path = SWEEPS / "ablation.yaml"
    sweep, where = read_sweep("ablation")
    assert where == str(path)
    assert set(varied(sweep)) <= set(field_names())
    assert len(points(sweep)) == 3 * len(yaml.safe_load(path.read_text())["runs"])
    for word in ("Purpose:", "Time:", "Result:", "Command:"):
        assert f"# {word}" in path.read_text().split("\n\n")[0]
