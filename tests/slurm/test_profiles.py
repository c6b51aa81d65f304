"""Profiles of clusters: what is shipped, what is refused and how it is said, what reaches sbatch."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from grappa.pipeline.config.yaml_file import ConfigError
from grappa.slurm.launch import Waits, sbatch_text
from grappa.slurm.plan import PlannedJob
from grappa.slurm.profiles import CLUSTERS, Profile, load_profile, minutes
from grappa.slurm.records import Pin
from tests.helpers.hostile import ACTIVE, NAMES


def written(tmp_path: Path, text: str) -> Profile:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return load_profile(str(file))


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        written(tmp_path, text)
    where, _, sentence = str(caught.value).partition("mine.yaml: ")
    assert where
    return sentence


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_are_valid_and_commented(path: Path) -> None:
    assert load_profile(path.stem).cluster == path.stem
    assert path.read_text().startswith("# ")


def test_a_name_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"no such file, and no profile of that name \(debug, local, slurm\)"):
        load_profile("lumi")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("partitoin: gpu", "unknown key partitoin: did you mean partition?"),
        ("stages: {adaptors: {gpu: 1}}", "unknown key stages.adaptors.gpu: did you mean gpus?"),
        ("stages: {adaptor: {gpus: 1}}", "unknown key stages.adaptor: did you mean adaptors?"),
        ("stages: {adaptors: {shared: 1}}", "unknown key stages.adaptors.shared: expected one of partition, "),
        ("cpus: 0", "cpus: found 0, expected greater than or equal to 1"),
        ("gpus: yes", "gpus: found True, expected a valid integer"),
        ("time: 4:00:00", "time: found 14400, expected a time such as 4h, 90m or 1d12h (at least 1m)"),
        ("memory: lots", "memory: found 'lots', expected a size such as 32G or 500M"),
        (
            "shared: [[images, adaptors]]",
            "shared: found ['images', 'adaptors'], expected stages that follow one another",
        ),
        ("shared: [[]]", "shared: found [], expected stages that follow one another"),
        ("shared: [[retrieval, evaluation], [evaluation, index]]", "shared: evaluation is in two groups"),
        (
            "{shared: [[evaluation, index]], stages: {evaluation: {partition: cpu}}}",
            "shared: evaluation, index share a job but differ in partition",
        ),
        ("sbatch: {dependency: afterok:1}", "sbatch: dependency is set by grappa"),
        ("stages: {evaluation: {tasks: 2}}", "stages.evaluation.tasks: found 2, expected 1: evaluation is computed by"),
        ("{cluster: local, nodes: 2}", "nodes: found more than 1, expected 1 with `cluster: local`"),
        ("{cluster: debug, stages: {images: {tasks: 2}}}", "tasks: found more than 1, expected 1 with"),
        ("- partition", "found ['partition'], expected keys such as `partition:`"),
        ("cluster: sge", "cluster: found 'sge', expected 'slurm', 'local' or 'debug'"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    assert refused(tmp_path, text).startswith(sentence)


def test_a_group_that_leaves_a_stage_out_is_told_which(tmp_path: Path) -> None:
    sentence = refused(tmp_path, "shared: [[heads, verdict, model, evaluation, index]]")
    assert sentence.endswith("'attention']; retrieval left out in between")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90m", 90), ("4h", 240), ("1d12h30m", 2190), ("04:00:00", 240), ("2-01:30:00", 2970)],
)
def test_times(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0m", "4", "h", "-1h", "04:00", "4h 30m"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="expected a time"):
        minutes(text)


def test_stages_that_share_a_job_get_the_most_that_any_of_them_asks_for(tmp_path: Path) -> None:
    profile = written(
        tmp_path,
        "{cpus: 2, memory: 900M, time: 1h, shared: [[heads, verdict, model, retrieval]],"
        " stages: {heads: {cpus: 8}, model: {memory: 2G, time: 30m}, retrieval: {time: 2h}}}",
    )
    found = profile.resources(profile.group_of("model"))
    assert (found.cpus, found.memory, found.time) == (8, "2G", 120)
    assert profile.resources(profile.group_of("adaptors")).cpus == 2


def test_several_processes_go_only_to_stages_that_can_use_them(tmp_path: Path) -> None:
    profile = written(tmp_path, "{nodes: 2, tasks: 4, shared: [[backbone, images], [heads, verdict, model]]}")
    asked = {
        stage: profile.resources(profile.group_of(stage)) for stage in ("images", "clusters", "whitening", "heads")
    }
    assert {stage: (found.nodes, found.tasks) for stage, found in asked.items()} == {
        "images": (2, 4),
        "clusters": (2, 4),
        "whitening": (1, 1),
        "heads": (1, 1),
    }


def test_the_sbatch_request_holds_what_the_profile_asks_for(tmp_path: Path) -> None:
    profile = written(
        tmp_path,
        "{partition: gpu, account: me, qos: high, constraint: a100, gpus: 4, cpus: 6, memory: 64G, time: 1d, nodes: 2,"
        " tasks: 4, mail: me@example.org, mail_events: [FAIL], setup: [module load cuda], array_parallelism: 3,"
        " signal_seconds: 60, sbatch: {nice: 100, exclusive: true}}",
    )
    tasks = tuple((Pin(f"adaptors/k0000{number}", 1, False, None),) for number in range(2, 7))
    job = PlannedJob(("adaptors",), tasks, {}, (), profile.resources(("adaptors",)))
    lines = sbatch_text(profile, job, tmp_path / "it's here", "grappa-adaptors-1", Waits(("7", "8_1"))).splitlines()
    asked = (
        "--partition=gpu --account=me --qos=high --constraint=a100 --gpus-per-node=4 --cpus-per-task=6 --mem=64G "
        "--time=1440 --nodes=2 --ntasks-per-node=4 --mail-user=me@example.org --mail-type=FAIL --array=0-4%3 "
        "--signal=USR2@60 --nice=100 --exclusive --requeue --kill-on-invalid-dep=yes --dependency=afterok:7:8_1 "
        "--job-name=grappa-adaptors-1 --open-mode=append"
    ).split()
    assert {f"#SBATCH {option}" for option in asked} <= set(lines)
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun "))
    assert "--cpus-per-task=6" in next(line for line in lines if line.startswith("srun "))


def _directives(profile: Profile, tmp_path: Path) -> list[str]:
    tasks = ((Pin("features", 1, False, None),),)
    job = PlannedJob(("features",), tasks, {}, (), profile.resources(("features",)))
    lines = sbatch_text(profile, job, tmp_path / "here", "grappa-features-1", Waits()).splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.lstrip().startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("key", "option"),
    [
        *((key, f"--{key}") for key in ("partition", "account", "qos", "constraint")),
        ("mail", "--mail-user"),
        ("sbatch", "--comment"),
        ("setup", ""),
        ("name", ""),
    ],
)
def test_a_value_of_a_profile_is_one_option_or_is_refused(tmp_path: Path, key: str, option: str) -> None:
    made = {"sbatch": lambda text: {"comment": text}, "setup": lambda text: [text], "name": lambda text: {text: 1}}
    for text in (*NAMES, "a\x85b", "a\x0bb", "a b", "--uid=0", "x #y", "'x", '"x', "", " "):
        value = made[key](text) if key in made else text
        asked = yaml.safe_dump({"sbatch" if key == "name" else key: value})
        try:
            found = _directives(written(tmp_path, asked), tmp_path)
        except ConfigError as error:
            assert not ACTIVE.search(str(error)) and len(str(error)) < 500
            continue
        plain = _directives(
            written(tmp_path, "{mail: a, sbatch: {x: 1}}" if key in ("mail", "name") else "{}"), tmp_path
        )
        assert len(found) <= len(plain) + (key != "setup" and key != "name" and key != "mail")
        if option:
            assert f"{option}={text}" in [shlex.split(line)[0] for line in found]
            assert all(len(shlex.split(line)) == 1 for line in found)


def test_an_ordinary_value_is_taken(tmp_path: Path) -> None:
    profile = written(tmp_path, "{partition: 'gpu,cpu', constraint: '[a100|h100]&ib', sbatch: {comment: Straße 5}}")
    assert {"--partition=gpu,cpu", "--constraint='[a100|h100]&ib'", "--comment='Straße 5'"} <= set(
        _directives(profile, tmp_path)
    )
