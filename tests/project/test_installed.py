"""What is installed: one top-level name, all its files, and only the packages that the work at hand needs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from grappa.core.extras import EXTRAS
from tests.helpers.tiny import digests, draw_images, make_run, run_all, settings, tiny_backbone, tiny_set, write_weights

ROOT = Path(__file__).parents[2]
FOLDERS = {"grappa": "grappa/", "pipeline": "grappa/pipeline/", "slurm": "grappa/slurm/"}  # here: in the wheel
EXTRA_ONLY = tuple(name for name in EXTRAS if name != "yaml")  # which comes with timm
HEAVY = ("numpy", "torch", "pandas", "pydantic", "typer", "PIL")


def python(code: str, *arguments: str | Path, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that cannot import some packages, and that sees the grappa of this checkout."""
    script = f"import sys\nsys.modules.update(dict.fromkeys({without!r}))\n{code}"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, env=environment)


def test_importing_grappa_loads_nothing_heavy() -> None:
    code = f"""
import grappa
assert not {set(HEAVY)!r} & set(sys.modules), set(sys.modules)
assert {{'load_model', 'open_run', 'run', 'Run', 'GrappaModel'}} <= set(dir(grappa))
try:
    grappa.fly
except AttributeError as error:
    print(error)
"""
    done = python(code)
    assert (done.returncode, done.stdout) == (0, "module 'grappa' has no attribute 'fly'\n"), done.stderr


def test_an_exported_model_needs_no_extra(tmp_path: Path) -> None:
    from grappa.model import save_model

    save_model(tmp_path, tiny_backbone(), {"k00004": tiny_set(0)}, None, cache_size=40)
    code = """
import grappa, numpy
from PIL import Image
model = grappa.load_model(sys.argv[1])
image = Image.fromarray(numpy.zeros((50, 60, 3), numpy.uint8))
image.save(sys.argv[1] + '/black.png')
assert model.encode([image, sys.argv[1] + '/black.png']).shape == (2, 32)
print(tuple(model(model.preprocess(image)[None]).shape))
for ask in (lambda: grappa.open_run, lambda: grappa.load_model(sys.argv[2])):
    try:
        ask()
    except ModuleNotFoundError as error:
        print(error)
"""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    done = python(code, tmp_path, run, without=EXTRA_ONLY)
    assert done.returncode == 0, done.stderr
    shape, *sentences = done.stdout.splitlines()
    assert shape == "(1, 32)"
    for name, sentence in zip(("open_run", "load_model"), sentences, strict=True):
        assert sentence.startswith(f"grappa.{name}: the package ")
        assert sentence.endswith("is missing; install it by `pip install 'grappa-retrieval[pipeline]'`")


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("typer", ["--help"], "pipeline"),
        ("pydantic", ["status", "RUN"], "pipeline"),
        ("jinja2", ["report", "RUN", "NEW"], "report"),
        ("matplotlib", ["demo", "NEW"], "report"),
        ("submitit", ["submit", "RUN"], "slurm"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(
    tmp_path: Path, package: str, arguments: list[str], extra: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"format": 1}')
    folders = {"RUN": str(tmp_path / "run"), "NEW": str(tmp_path / "new")}
    code = "import runpy\nsys.argv[0] = 'grappa'\nrunpy.run_module('grappa', run_name='__main__', alter_sys=True)"
    done = python(code, *(folders.get(each, each) for each in arguments), without=(package,))
    wanted = f"grappa: the package {package} is missing; install it by `pip install 'grappa-retrieval[{extra}]'`\n"
    assert (done.returncode, done.stderr) == (1, wanted)


def test_without_faiss_it_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grappa.pipeline.commands.init import Request, initialize
    from grappa.pipeline.engine.execution import Selection
    from grappa.slurm.submit import submit

    images, weights = draw_images(tmp_path / "images"), write_weights(tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "faiss", None)
    lines: list[str] = []
    initialize(tmp_path / "run", Request([str(images)], None, settings(weights)), say=lines.append)
    warning = "warning: stage index cannot run: the package faiss is missing; install it by `pip install "
    assert [line for line in lines if line.startswith(warning)]
    run = make_run(tmp_path / "run", [], weights)
    for call in (lambda: run_all(run), lambda: submit(run.root, Selection(), "local", say=lines.append)):
        with pytest.raises(ValueError, match="^stage index cannot run: the package faiss is missing"):
            call()
    assert not digests(run), "nothing was begun"
    assert run_all(run, until="backbone"), "what does not need it can be run"


@pytest.mark.parametrize("form", ["grappa", "python -m grappa", "torchrun"])
def test_files_of_a_user_called_like_our_folders_do_not_matter(tmp_path: Path, form: str) -> None:
    for name in ("pipeline", "slurm", "run", "cli", "tests"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the user was run')\n")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise SystemExit('the folder of the user was run')\n")
    run = tmp_path / "made"
    run.mkdir()
    (run / "run.json").write_text('{"format": 1}')
    entry = "import sys; from grappa.__main__ import main; sys.argv[0] = 'grappa'; main()"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "grappa", "run"]
    start = {"grappa": [sys.executable, "-c", entry, "status"], "torchrun": torchrun}
    command = [*start.get(form, [sys.executable, "-m", "grappa", "status"]), str(run)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert f"grappa: {run / 'config.yaml'} is missing; write one by `grappa init" in done.stderr
    assert "of the user was run" not in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy of the checkout."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed; nothing is fetched for a test")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "copy")], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_one_name_and_every_file(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"grappa"}
    assert names == {prefix + name for folder, prefix in FOLDERS.items() for name in product(ROOT / folder)}


def product(folder: Path) -> list[str]:
    """Return the files of a folder but its text and those that Python writes; links are not followed."""
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return [file.relative_to(folder).as_posix() for file in files if file.suffix != ".pyc" and file.name != "README.md"]


def test_the_wheel_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    code = """
import grappa.pipeline.config.yaml_file as config, grappa.slurm.profiles as profiles, grappa, json
presets = sorted(path.stem for path in config.PRESETS.glob('*.yaml'))
print(json.dumps([grappa.__file__, presets, sorted(path.stem for path in profiles.CLUSTERS.glob('*.yaml'))]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    file, presets, profiles = json.loads(done.stdout)
    assert Path(file).is_relative_to(tmp_path)
    assert {"small", "grappa", "demo"} <= set(presets)
    assert "slurm" in profiles
