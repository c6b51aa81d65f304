"""Damage each file of a finished run: readers refuse it or give what they gave before, and one command repairs it."""

from __future__ import annotations

import random
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner, Result

from grappa.pipeline.cli import app
from grappa.pipeline.store.digests import forget_digests
from tests.faults.material import contents, init_arguments, write_material
from tests.faults.tally import Tally

DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": lambda content, rng: _flipped(content, rng.randrange(len(content))),
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "emptied": lambda content, rng: b"",
}
UNHASHED = ("log.jsonl",)  # times and speeds: no part of a result


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def campaign(work: Path, *, number: int, seed: int, tally: Tally, cache: str = "raw") -> None:
    """Damage ``number`` files at most, one after another, each of them in all ways; cache: ``images.cache``."""
    table, weights = write_material(work)
    run, rng = work / "run", random.Random(seed)
    for arguments in (init_arguments(run, table, weights, images__cache=cache), ["run", str(run)]):
        done = grappa(*arguments)
        assert done.exit_code == 0, done.output
    image = next((work / "images").rglob("*.png"))
    wanted, before = contents(run), _read(run, image, work)
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.parent != run]
    for path in rng.sample(files, min(number, len(files))):
        for damage, change in DAMAGES.items():
            content = path.read_bytes()
            if tally.is_over or not content:
                continue
            path.write_bytes(change(content, rng))
            tally.count(f"files {damage}")
            _judge(run, path, damage, before, _read(run, image, work), tally)
            _repair(run, path, damage, wanted, tally)


def grappa(*arguments: str) -> Result:
    """Give a command, as to a new process, which knows no digest."""
    forget_digests()
    return CliRunner().invoke(app, list(arguments))


def _read(run: Path, image: Path, work: Path) -> dict[str, str]:
    """Return what each reader says or writes: the text of its results, or the sentence with which it refuses."""
    found = {"search": _said(grappa("search", str(run), str(image), "-k", "3", "--json"))}
    for command, (results, *options) in {"export": (_exported,), "report": (_reported, "--folder")}.items():
        folder = work / command
        shutil.rmtree(folder, ignore_errors=True)
        said = _said(grappa(command, str(run), str(folder), *options))
        found[command] = results(folder) if folder.exists() else said
    return found


def _exported(folder: Path) -> str:
    return str([path.read_bytes() for path in sorted(folder.iterdir())])


def _reported(folder: Path) -> str:
    """Return the results of a report, without its facts and times: they tell of damage and of repairs."""
    text = (folder / "results.md").read_text()
    results, _, rest = text[text.index("\n## ") :].partition("## Time")
    pictures = [path.read_bytes() for name in ("images", "figures") for path in sorted((folder / name).iterdir())]
    return str([results, rest.partition("## ")[2], pictures])


def _said(done: Result) -> str:
    if done.exception and not isinstance(done.exception, SystemExit):
        return f"Traceback: {type(done.exception).__name__}: {done.exception}"
    return done.stderr if done.exit_code else done.stdout


def _judge(run: Path, path: Path, damage: str, before: dict[str, str], now: dict[str, str], tally: Tally) -> None:
    """A reader may refuse with the command that helps, or give what it gave before: it did not read the file."""
    where = f"{path.relative_to(run)} {damage}"
    for command, said in now.items():
        tally.count("reads")
        if said.startswith("Traceback"):
            tally.fault("traceback", f"{command}, {where}: {said[:300]}")
        elif said.startswith("grappa: "):
            tally.count("refused reads")
            if "`grappa " not in said:
                tally.fault("no cure named", f"{command}, {where}: {said.strip()[:300]}")
        elif said != before[command]:
            tally.fault("silently used", f"{command}, {where}")


def _repair(run: Path, path: Path, damage: str, wanted: dict[str, str], tally: Tally) -> None:
    """Follow the commands that are named; then all bytes must be as they were."""
    where = f"{path.relative_to(run)} {damage}"
    told = grappa("status", str(run), "--verify")
    for line in told.stdout.splitlines():
        if "damaged; repair by `" in line:
            command = shlex.split(line.rpartition("by `")[2].rstrip("`"))
            done = grappa(*command[1:])
            if done.exit_code:
                tally.fault("refused", f"{where}: {' '.join(command)}: {_said(done).strip()[:300]}")
    if told.exit_code:
        tally.count("repairs")
    elif "damaged" in told.stdout or "Traceback" in _said(told):
        tally.fault("no cure named", f"{where}: {_said(told)[-300:]}")
    grappa("run", str(run))  # a damaged manifest may make what follows stale
    found = contents(run)
    for name in sorted({*wanted, *found}):
        if name in UNHASHED or Path(name).name in UNHASHED:
            continue
        if wanted.get(name) != found.get(name):
            tally.fault("differs", f"{where}: {name} after the repair")
