"""The command line: exit codes, one sentence an error, JSON alone on stdout, nothing heavy loaded."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from grappa.pipeline.cli import app, command_for
from grappa.pipeline.engine.context import StageContext
from grappa.pipeline.store.locks import LockedError
from tests.helpers.fake_stages import FakeStages, fake_stages
from tests.helpers.tiny import draw_images

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "timm", "pandas", "pyarrow", "numpy", "faiss", "sklearn", "PIL")
SLOW = ("torch", "torchvision", "timm", "faiss")
NOBODY = 65534


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    return fake_stages(tmp_path / "run", monkeypatch)


def grappa(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """Return the one sentence on stderr of a command that must fail."""
    result = grappa(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("grappa: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def process(*arguments: str | Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in its own process; ``code`` is run in it first."""
    script = f"{code}\nimport sys\nfrom grappa.pipeline.cli import main\nsys.argv[0] = 'grappa'\nmain()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_command_is_made_without_the_others_and_is_the_same() -> None:
    names = [str(each.name or getattr(each.callback, "__name__", "")) for each in app.registered_commands]
    for name in names:
        alone = command_for([name, "--help"])
        assert len(alone.registered_commands) == 1, name
        assert CliRunner().invoke(alone, [name, "--help"]).output == grappa(name, "--help").output
    for arguments in ([], ["--help"], ["stats", "run"], ["--version"]):
        assert len(command_for(arguments).registered_commands) == len(names)
    assert len(command_for(["--debug", "status", "run"]).registered_commands) == 1


def test_run_status_and_run_again(fakes: FakeStages) -> None:
    result = grappa("run", fakes.root)
    assert result.exit_code == 0
    assert "clusters/k00002: 1 files (" in result.stdout
    page, times = result.stdout.splitlines()[-2:]
    assert times.startswith("times: backbone ") and page == f"look at it: grappa explore {fakes.root}"
    assert "missing" not in grappa("status", fakes.root).stdout
    again = grappa("run", fakes.root).stdout.splitlines()
    how = "sizes were compared, --verify reads every byte"
    assert again[0] == f"{len(fakes.ran)} fresh ({how}); --force runs them again"
    assert len(again) == 2 and again[1].startswith("verdict: helped. ")
    fakes.configure(model={"source": "mean"})
    lines = grappa("run", fakes.root).stdout.splitlines()
    assert "deployed is mean all the same, as model.source=mean says" in lines


def test_status_json_is_all_of_stdout(fakes: FakeStages) -> None:
    grappa("run", fakes.root, "--until", "features")
    fakes.configure(features={"precision": "float32"})
    records = json.loads(grappa("status", fakes.root, "--json", "--verify").stdout)
    assert all(set(record) == {"stage", "instance", "state", "reasons"} for record in records)
    by_name = {record["stage"]: record for record in records}
    assert by_name["features"]["state"] == "stale"
    assert by_name["features"]["reasons"] == ["config features.precision: auto -> float32"]
    assert by_name["clusters"]["instance"] == "k00004"


def test_dry_run_says_what_and_why(fakes: FakeStages) -> None:
    result = grappa("run", fakes.root, "--dry-run", "--until", "images")
    assert result.stdout == "would run backbone: missing\nwould run images: missing\n"
    assert fakes.ran == []
    grappa("run", fakes.root)
    assert grappa("run", fakes.root, "--dry-run").stdout == "nothing to run, all is fresh\n"


def test_one_stage_that_is_fresh_says_how_to_force_it(fakes: FakeStages) -> None:
    grappa("run", fakes.root)
    told = grappa("run", fakes.root, "--stage", "model", "--verify")
    assert told.stdout == "1 fresh (every byte was read); --force runs it again\n"
    fakes.ran.clear()
    assert grappa("run", fakes.root, "--stage", "model", "--force").exit_code == 0
    assert fakes.ran == ["model"]


def test_the_table_comes_at_the_end(fakes: FakeStages) -> None:
    def evaluate(context: StageContext) -> None:
        (context.path / "metrics.csv").write_text("model,domain,gallery,map\nfused,_mean,domain,0.5\n")

    fakes.hooks["evaluation"] = evaluate
    lines = grappa("run", fakes.root).stdout.splitlines()
    assert ["fused", "0.500", "-", "-"] in [line.split() for line in lines]
    assert "fused" not in grappa("run", fakes.root, "--stage", "clusters", "--force").stdout.replace("fusion", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["init", "RUN", "--set", "clusters.sead=1"], "unknown key clusters.sead: did you mean clusters.seed?"),
        (["init", "RUN", "--set", "clusters.seed=x"], "clusters.seed: found 'x', expected a valid integer"),
        (["init", "NEW", "--config", "nothing"], "--config nothing: no such file, and no preset of that name"),
        (["run", "NEW"], "There is no run folder"),
        (["run", "RUN", "--stage", "index"], "index cannot run: upstream images is missing"),
        (["run", "RUN", "--stage", "indexes"], "no stage is called 'indexes'"),
        (["status", "EMPTY"], "is not a run folder"),
        (["search", "RUN", "NEW"], "new: No such file or directory"),
        (["search", "RUN", "EMPTY"], "empty is a folder, and one image is searched with; `grappa embed "),
        (["export", "RUN", "NEW"], "model is missing in"),
        (["report", "RUN"], "evaluation is missing in"),
        (["report", "RUN", "NEW"], "new does not end in .html; give a name that does, or --folder"),
    ],
)
def test_errors_are_one_sentence(fakes: FakeStages, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    folders = {"RUN": str(fakes.root), "NEW": str(tmp_path / "new"), "EMPTY": str(tmp_path / "empty")}
    assert sentence in refused(*(folders.get(argument, argument) for argument in arguments))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full at "),
        (LockedError("features is being written by process 7 on node1"), "features is being written by process 7"),
        (ValueError("weights do not fit:\n  blocks.0"), "weights do not fit: blocks.0"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x.png"), "/data/x.png: Permission denied"),
    ],
)
def test_errors_of_a_stage_are_one_sentence(fakes: FakeStages, error: Exception, sentence: str) -> None:
    fakes.hooks["features"] = lambda context: (_ for _ in ()).throw(error)
    assert sentence in refused("run", fakes.root)
    del fakes.hooks["features"]
    assert grappa("run", fakes.root).exit_code == 0


def test_unexpected_errors_keep_their_traceback(fakes: FakeStages, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.hooks["features"] = lambda context: (_ for _ in ()).throw(ZeroDivisionError("by zero"))
    assert isinstance(grappa("run", fakes.root).exception, ZeroDivisionError)
    fakes.hooks["features"] = lambda context: (_ for _ in ()).throw(ValueError("expected"))
    monkeypatch.setattr(sys, "argv", ["grappa", "--debug", "run"])
    assert isinstance(grappa("--debug", "run", fakes.root).exception, ValueError)


def test_ctrl_c_says_how_to_go_on(fakes: FakeStages) -> None:
    fakes.hooks["features"] = lambda context: (_ for _ in ()).throw(KeyboardInterrupt)
    result = grappa("run", fakes.root)
    assert (result.exit_code, result.stderr) == (130, "grappa: stopped; the same command resumes\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["status", "RUN"], ["backbones", "dino"], ["run", "RUN", "--dry-run"]]
)
def test_nothing_heavy_is_loaded(fakes: FakeStages, arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('loaded', *({set(HEAVY)!r} & set(sys.modules)), file=sys.stderr))"
    )
    done = process(*(str(fakes.root) if argument == "RUN" else argument for argument in arguments), code=code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loaded\n"


def test_typer_compiles_no_annotation_at_the_start() -> None:
    commands: list[Callable[..., object]] = [each.callback for each in app.registered_commands if each.callback]
    assert len(commands) > 20
    texts = [each.__name__ for each in commands if str in map(type, inspect.unwrap(each).__annotations__.values())]
    assert not texts, f"typer would compile the annotations of {', '.join(texts)} at every start"


def test_garbage_is_collected_while_a_command_runs_and_not_at_the_end(fakes: FakeStages) -> None:
    entry = (
        "import atexit, gc, sys\n"
        "from grappa.pipeline.engine import glance\n"
        "glance.short_lines = lambda found: [f'in the command: {gc.isenabled()}']\n"
        "atexit.register(lambda: print('kept at the end:', gc.get_freeze_count() > len(gc.get_objects())))\n"
        "from grappa.__main__ import main; main()"
    )
    command = [sys.executable, "-c", entry, "status", str(fakes.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "in the command: True\nkept at the end: True\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", "--help"],
        ["init", "NEW", "--images", "IMAGES", "--set", "clusters.num_clusters=[2, 4]"],
        ["submit", "RUN", "--dry-run"],
        ["sweep", "SWEEP", "--out", "RUNS", "--images", "IMAGES", "--dry-run"],
    ],
)
def test_nothing_slow_is_loaded_before_a_stage_runs(fakes: FakeStages, tmp_path: Path, arguments: list[str]) -> None:
    draw_images(tmp_path / "images")
    (tmp_path / "sweep.yaml").write_text("base: {config: small}\nseeds: {clusters.seed: [0, 1]}\n")
    places = {"RUN": fakes.root, "SWEEP": tmp_path / "sweep.yaml", "IMAGES": tmp_path / "images"}
    places |= {"NEW": tmp_path / "new", "RUNS": tmp_path / "runs"}
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('loaded', *({set(SLOW)!r} & set(sys.modules)), file=sys.stderr))"
    )
    done = process(*(str(places.get(argument, argument)) for argument in arguments), code=code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loaded\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_at_work_is_resumed(fakes: FakeStages, number: signal.Signals) -> None:
    slow = (
        "import signal, sys, time, types\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background inherits "ignore"
        "def run(context):\n"
        "    (context.path / 'begun').write_bytes(b'')\n"
        "    time.sleep(60)\n"
        "sys.modules['grappa.pipeline.stages.backbone'] = types.SimpleNamespace(run=run)\n"
        "from grappa.pipeline.cli import main\n"
        "sys.argv[0] = 'grappa'\n"
        "main()"
    )
    command = [sys.executable, "-c", slow, "run", str(fakes.root)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        while not list(fakes.root.glob("backbone.partial.*/begun")) and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(number)
        _, stderr = child.communicate(timeout=30)
    if number == signal.SIGINT:
        assert (child.returncode, stderr) == (130, "grappa: stopped; the same command resumes\n")
    resumed: list[bool] = []
    fakes.hooks["backbone"] = lambda context: resumed.append(context.resumed)
    assert grappa("run", fakes.root, "--until", "backbone").exit_code == 0
    assert resumed == [True]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_run_folder_of_somebody_else_can_be_looked_at_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python itself may lie where nobody else can read: all is imported (by a first status) before the user changes.
    drop = (
        "import contextlib, io, os, sys\n"
        "import grappa.pipeline.cli, grappa.pipeline.engine.execution\n"
        "import grappa.pipeline.commands.init, grappa.pipeline.commands.run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    grappa.pipeline.cli.app(['status', sys.argv[2]], standalone_mode=False)\n"
        f"os.setgid({NOBODY})\nos.setuid({NOBODY})"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        fakes = fake_stages(Path(folder) / "run", monkeypatch)
        for command in ("run", "init"):
            done = process(command, fakes.root, code=drop)
            assert done.returncode == 1
            assert done.stderr.startswith("grappa: ") and "cannot be written" in done.stderr
            assert done.stderr.count("\n") == 1
        assert process("status", fakes.root, code=drop).returncode == 0


def test_odd_bytes_in_paths_are_printed_safely(fakes: FakeStages) -> None:
    odd = fakes.root.with_name(os.fsdecode(b"caf\xe9 'it\"s'"))
    fakes.root.rename(odd)
    done = process("run", odd, "--dry-run", "--stage", "index")
    assert done.returncode == 1
    assert "\\udce9" in done.stderr and done.stderr.count("\n") == 1


def test_the_module_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "grappa", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: grappa ")
    for name in ("init", "run", "status", "search", "embed", "export", "demo"):
        assert f"  {name} " in done.stdout


def test_wrong_usage_exits_with_two() -> None:
    assert grappa("run").exit_code == 2
    assert grappa("fly").exit_code == 2


def test_output_that_nobody_reads_any_more_ends_the_command_silently(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "images" / "birds").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "images" / "birds" / f"{number}.jpg").write_bytes(bytes([number]))
    assert grappa("init", run, "--images", tmp_path / "images").exit_code == 0
    command = [sys.executable, "-m", "grappa", "status", str(run)]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
