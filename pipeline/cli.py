"""The command line `grappa`: arguments, help texts, calls. A heavy package is imported when a command needs it.

Annotations are no texts in the modules of commands: typer would compile each of them again at every start.
"""

import json
import os
import sys
from copy import copy
from pathlib import Path
from typing import Annotated

import typer

from grappa import __version__
from grappa.core.home import expanded
from grappa.pipeline.commands.collection import COMMANDS
from grappa.pipeline.commands.output import Run, say, warn, warn_if_stale, warn_of_additions
from grappa.pipeline.errors import one_sentence_errors

app = typer.Typer(
    name="grappa",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]


def _say_version(wanted: bool) -> None:
    if wanted:
        say(f"grappa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="print the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Adapt one pretrained vision model to several retrieval domains at once, without labels."""


@app.command()
@one_sentence_errors
def init(
    run: Run,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR_OR_TABLE", help="a folder, a table (.csv, .parquet), a tar, or a URL; repeatable"),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FILE", help="a preset (grappa, small ...) or a YAML file")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="change one setting; can be repeated"),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option("--from", metavar="OTHER_RUN", help="reuse artifacts of this run that have the same fingerprint"),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="what the folders are: domain/class, class, flat, split/class ... (default: recognised)",
        ),
    ] = None,
    domains: Annotated[
        list[str] | None,
        typer.Option("--domain", metavar="NAME=DIR", help="a folder whose images are one domain; can be repeated"),
    ] = None,
) -> None:
    """Make a run folder, or change one.

    List the images, write the configuration and say what becomes stale. A run folder that exists keeps the images and
    the settings that are not given.
    """
    from grappa.pipeline.commands.init import Request, initialize

    initialize(run, Request(images or (), config, assignments or (), other, domains or (), layout), say=say)


@app.command()
@one_sentence_errors
def backbones(
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="[PATTERN]", help="a part of the name, or a pattern with wildcards, such as '*dinov2*'"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the pretrained models that can be backbones.

    Print name, pixels of the input, width of the embeddings (-: it is known when the model is built), family, and the
    size of the weights' file where it is on this machine. No network is needed.
    """
    from grappa.pipeline.commands.backbones import found_backbones, say_backbones, to_json

    found = found_backbones(pattern)
    if as_json:
        _say_json([to_json(each) for each in found])
    else:
        say_backbones(found, say=say)


@app.command("run")
@one_sentence_errors
def run_command(
    run: Run,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="run only this stage")] = None,
    instance: Annotated[str | None, typer.Option(metavar="NAME", help="run only this instance of the stage")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="run all stages up to this one")] = None,
    force: Annotated[bool, typer.Option("--force", help="run fresh artifacts again too")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="read every byte of artifacts and images first; make damaged ones again"),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be run, and why; run nothing")] = False,
) -> None:
    """Run the stages that are not fresh; resume interrupted work."""
    from grappa.pipeline.commands.run import run_and_report, say_plan
    from grappa.pipeline.engine.execution import Selection
    from grappa.pipeline.engine.progress import Progress
    from grappa.pipeline.store.artifacts import RunFolder

    selection = Selection(stage, instance, until, force, verify)
    folder = RunFolder.open(run, writable=not dry_run)
    if dry_run:
        say_plan(folder, selection, say=say)
    else:
        run_and_report(folder, selection, progress=Progress(), say=say)


@app.command()
@one_sentence_errors
def status(
    run: Run,
    verify: Annotated[bool, typer.Option("--verify", help="read every byte of artifacts and images again")] = False,
    long: Annotated[bool, typer.Option("--long", help="a line for every artifact, with all reasons")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="repeat every half minute until no job is left")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which artifacts are fresh, and what their jobs do.

    An artifact is missing, fresh, stale (with the cause) or corrupt (with the files). With --verify the exit code is 1
    when something is corrupt; the last line names the command that repairs it.
    """
    from grappa.pipeline.engine.glance import short_lines
    from grappa.pipeline.engine.status import cure_lines, read_config, states, status_lines
    from grappa.pipeline.store.artifacts import RunFolder

    folder = RunFolder.open(run)
    if (folder.root / "jobs").is_dir():
        from grappa.slurm.commands import say_status

        damaged = say_status(folder, verify=verify, watch=watch, long=long, as_json=as_json, say=say)
    else:
        found = states(folder, read_config(folder), verify=verify)
        damaged = cure_lines(folder, found)
        if as_json:
            _say_json([each.to_json() for each in found])
        else:
            for line in (status_lines if long else short_lines)(found) + _additions(folder.root) + damaged:
                say(line)
    if damaged and verify:
        raise typer.Exit(1)


@app.command()
@one_sentence_errors
def submit(
    run: Run,
    cluster: Annotated[
        str,
        typer.Option(metavar="PROFILE", envvar="GRAPPA_CLUSTER", help="a profile (slurm, local, debug) or a YAML file"),
    ] = "slurm",
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="submit only this stage")] = None,
    instance: Annotated[str | None, typer.Option(metavar="NAME", help="submit only this instance of the stage")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="submit all stages up to this one")] = None,
    force: Annotated[bool, typer.Option("--force", help="submit fresh artifacts too")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the jobs and their scripts; submit nothing")
    ] = False,
) -> None:
    """Submit the stages that are not fresh as jobs of a cluster.

    Artifacts that a queued or running job makes are not submitted again.
    """
    from grappa.pipeline.engine.execution import Selection
    from grappa.slurm.submit import submit as send

    send(run, Selection(stage, instance, until, force), cluster, say=say, dry_run=dry_run)


@app.command()
@one_sentence_errors
def logs(
    run: Run,
    stage: Annotated[str, typer.Argument(metavar="STAGE")],
    instance: Annotated[str | None, typer.Argument(metavar="[INSTANCE]")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print new lines until the job ends")] = False,
    number: Annotated[int | None, typer.Option("--range", help="the job of this range of its rows, from 1")] = None,
) -> None:
    """Print the log of the newest job of a stage or an instance."""
    from grappa.slurm.commands import logs as print_logs

    print_logs(run, stage, instance, follow=follow, say=say, number=number)


@app.command()
@one_sentence_errors
def cancel(
    run: Run,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]")] = None,
    instance: Annotated[str | None, typer.Argument(metavar="[INSTANCE]")] = None,
) -> None:
    """Cancel the jobs of a run, a stage or an instance.

    A later job resumes their unfinished work.
    """
    from grappa.slurm.commands import cancel as cancel_jobs

    cancel_jobs(run, stage, instance, say=say)


@app.command()
@one_sentence_errors
def search(
    run: Run,
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="an image file, a URL, or TAR::MEMBER as results name it")
    ],
    k: Annotated[int, typer.Option("-k", min=1, help="the number of images to find")] = 10,
    as_json: AsJson = False,
) -> None:
    """Find the images of a run that are nearest to an image.

    Print the similarity, domain, file and id of these images, the nearest first. An image of the run is not its own
    nearest one: files with the bytes of IMAGE are left out.
    """
    from grappa.pipeline.commands.search import onnx_notice
    from grappa.pipeline.commands.search import search as find

    warn_if_stale(run, "model", "index")
    warn_of_additions(run)
    warn(onnx_notice(run))
    found = find(run, image, k)
    if as_json:
        _say_json(found)
        return
    for each in found:
        say(f"{each['similarity']:.4f}  {each['domain']}  {each['file']}  {each['image_id']}")


@app.command()
@one_sentence_errors
def embed(
    run_or_model: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="a run folder or an exported model")],
    images: Annotated[
        str,
        typer.Option(metavar="DIR_OR_TABLE", help="the new images: a folder, a table, a tar, a Parquet file, or a URL"),
    ],
    out: Annotated[
        Path, typer.Option(metavar="OUT", help="a new folder for the embeddings, or a new .npy or .parquet file")
    ],
) -> None:
    """Embed new images with an adapted model.

    Write a folder of embeddings.npy and ids.parquet, or OUT.npy with OUT.ids.parquet beside it, or one table with all
    (OUT.parquet). After a kill the same command goes on.
    """
    from grappa.pipeline.commands.embed import embed as write_embeddings
    from grappa.pipeline.engine.progress import Progress, totals

    warn_if_stale(run_or_model, "model")
    with totals(Progress(), "embedding") as report:
        sentence = write_embeddings(run_or_model, images, out, report)
    say(sentence)


@app.command()
@one_sentence_errors
def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a new folder for the model")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help="safetensors, or onnx")] = "safetensors",
    half: Annotated[bool, typer.Option("--half", help="numbers of 16 bits (onnx)")] = False,
) -> None:
    """Write the adapted model of a run to a folder of its own, with a model card.

    `grappa.load_model` opens the folder of safetensors. Size and time of an image are said.
    """
    from grappa.pipeline.commands.export import export as write_model

    warn_if_stale(run, "model")
    say(write_model(run, folder, format=format, half=half))


@app.command()
@one_sentence_errors
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a folder of `grappa export`")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="a repository of the Hugging Face hub")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
) -> None:
    """Put an exported model on the Hugging Face hub.

    `grappa.load_model("hf-hub:OWNER/NAME")` opens it. Log in first: `hf auth login`.
    """
    from grappa.pipeline.commands.export import push as send

    say(send(folder, name, private=private))


for command in COMMANDS:
    app.command()(command)


@app.command()
@one_sentence_errors
def report(
    run: Run,
    target: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="the page, a name in .html (default: RUN_report.html)")
    ] = None,
    folder: Annotated[
        bool, typer.Option("--folder", help="write a folder: index.html, its pictures as files, results.md")
    ] = False,
    open_it: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
) -> None:
    """Write the report of a finished run.

    One page with everything inside: the verdict, the table that matters, and, folded, neighbours before and after,
    clusters in pictures, all results, their cost, and the tables as Markdown. An older report of that name is replaced.
    """
    from grappa.pipeline.pages.report.page import PAGE, default_target, show, write_report

    warn_if_stale(run, "evaluation")
    written = target or default_target(run, folder)
    say(write_report(run, written, folder))
    if open_it:
        warn(show(written / PAGE if folder else written))


@app.command()
@one_sentence_errors
def explore(
    run: Run,
    port: Annotated[int, typer.Option(min=0, max=65535, help="the port; 0 takes a free one")] = 8421,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="where to listen; only this machine can open the default")
    ] = "127.0.0.1",
) -> None:
    """Look at a finished run in the browser.

    Serve a page with the clusters (to name, merge and split them), a map, the nearest images before and after
    adaptation, also of images of your own, duplicates and outliers. Ctrl-C ends it.
    """
    from grappa.pipeline.pages.explore.command import explore as serve_page

    serve_page(run, host, port, say=say)


@app.command()
@one_sentence_errors
def sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP", help="a sweep (ablation, dva) or a YAML file")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="the folder for runs and table; default: runs/SWEEP")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR_OR_TABLE", help="use these images, not those of the file; can be repeated"),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FILE", help="use this preset or YAML file, not that of the file")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="change one setting of the base; can be repeated"),
    ] = None,
    other: Annotated[
        Path | None, typer.Option("--from", metavar="OTHER_RUN", help="reuse the artifacts of this run too")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the sweep and say what its runs are; run nothing")
    ] = False,
) -> None:
    """Run several configurations from one file, and compare them.

    Artifacts that several runs share are computed once. The results become one table.
    """
    from grappa.pipeline.engine.progress import Progress
    from grappa.pipeline.sweep.command import run_sweep, say_sweep
    from grappa.pipeline.sweep.runs import SweepRequest

    request = SweepRequest(file, out, config, images or (), assignments or (), other)
    if dry_run:
        say_sweep(request, say=say)
    else:
        run_sweep(request, progress=Progress(), say=say)


@app.command()
@one_sentence_errors
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="the run folder")] = Path("runs/demo"),
) -> None:
    """Run the whole pipeline on drawn images, without a network."""
    from grappa.pipeline.commands.init import Request, initialize
    from grappa.pipeline.commands.run import run_and_report
    from grappa.pipeline.demo.dataset import WEIGHTS, write_demo_images
    from grappa.pipeline.engine.execution import Selection
    from grappa.pipeline.engine.progress import Progress
    from grappa.pipeline.pages.report.page import default_target, write_report
    from grappa.pipeline.store.artifacts import RunFolder

    table = write_demo_images(folder.with_name(f"{folder.name}_images"))
    weights = [f"backbone.weights={WEIGHTS}"]
    initialize(folder, Request([os.fspath(table)], "demo", weights), say=say)
    run_and_report(RunFolder.open(folder, writable=True), Selection(), progress=Progress(), say=say)
    say(write_report(folder, default_target(folder, False)))
    say("With your own images (a folder, or a table with path, domain and perhaps label, split):")
    say("  grappa init runs/mine --images DIR_OR_TABLE --config small --set backbone.weights=FILE")
    say("  grappa run runs/mine && grappa explore runs/mine")


def _additions(run: Path) -> list[str]:
    if not (run / "additions").is_dir():  # most runs have none, and their module need not be loaded
        return []
    from grappa.pipeline.engine.live.additions import addition_lines
    from grappa.pipeline.store.artifacts import RunFolder

    return addition_lines(RunFolder.open(run))


def _say_json(value: object) -> None:
    """Print a value as JSON, in which every character of a name that is not ASCII is written out."""
    print(json.dumps(value, indent=2), flush=True)


def _from_home(argument: str) -> str:
    """Return an argument with its ``~`` expanded where shells leave it: ``--out=~/x``, or quoted."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{expanded(value)}"


def command_for(arguments: list[str]) -> typer.Typer:
    """Return the app with the command of these arguments alone, or with all where they name none.

    Typer makes the options of all commands that an app has before it reads an argument.
    """
    name = next((text for text in arguments if not text.startswith("-")), "")
    asked = [each for each in app.registered_commands if name == (each.name or getattr(each.callback, "__name__", ""))]
    found = copy(app)
    found.registered_commands = asked or app.registered_commands
    return found


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = [_from_home(text) for text in sys.argv[1:]]
    # The name is this one also as `python -m grappa`: completion is installed for it.
    command_for(arguments)(arguments, prog_name="grappa")
