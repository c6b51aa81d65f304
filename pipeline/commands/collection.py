"""The commands for a collection that lives: it grows and shrinks, is kept clean, and is handed over to other tools."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from grappa.pipeline.commands.output import Run, say, warn_if_stale, warn_of_additions
from grappa.pipeline.errors import one_sentence_errors

Out = Annotated[Path | None, typer.Option(metavar="FILE", help="a new .parquet file for the whole table")]


@one_sentence_errors
def add(
    run: Run,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR_OR_TABLE", help="the new images, as for `init`; can be repeated"),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="LAYOUT", help="what the folders are (default: as `init` was told)")
    ] = None,
) -> None:
    """Add images to a finished run, so that they are found.

    Embed them with the deployed model, give them clusters, and say whether adapting again is worth it. Nothing of the
    run is made again. Without --images, earlier additions are brought up to date.
    """
    from grappa.pipeline.commands.add import add as add_images
    from grappa.pipeline.engine.progress import Progress

    warn_if_stale(run, "model", "index")
    add_images(run, images or (), layout=layout, progress=Progress(), say=say)


@one_sentence_errors
def remove(
    run: Run,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE]...", help="ids, as `grappa search` prints them, or files")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a .csv or .parquet table whose column image_id names more")
    ] = None,
) -> None:
    """Take images out of a run, so that they are not found.

    Nothing of the run is made again; `grappa add` of the same file brings an image back.
    """
    from grappa.pipeline.commands.add import ids_of_table
    from grappa.pipeline.commands.add import remove as remove_images

    remove_images(run, [*(images or ()), *(ids_of_table(table) if table else ())], say=say)


@one_sentence_errors
def duplicates(
    run: Run,
    out: Out = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="COSINE", help="the least cosine of a near-duplicate, above 0, at most 1")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="whose embeddings are compared (default: the frozen backbone)")
    ] = None,
) -> None:
    """Find copies and near-duplicates among the images.

    Print the first pairs, and write all of them as a table.
    """
    from grappa.pipeline.commands.curate import duplicates as find

    warn_of_additions(run)
    find(run, out, threshold=threshold, model=model, say=say)


@one_sentence_errors
def outliers(run: Run, out: Out = None) -> None:
    """Find images that are like no others.

    Print the first ones, and write all images as a table, those farthest from others first. Images that were removed
    are left out, images that were added are not ranked.
    """
    from grappa.pipeline.commands.curate import outliers as find

    find(run, out, say=say)


@one_sentence_errors
def sample(
    run: Run,
    number: Annotated[int, typer.Option("-n", min=1, help="the number of images")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="a new .parquet file; init --images takes it")],
    seed: Annotated[int, typer.Option(min=0, help="another seed draws other images")] = 0,
    rows: Annotated[Literal["all", "train", "test"], typer.Option(help="from which images")] = "all",
) -> None:
    """Choose images evenly over the clusters of all granularities.

    Copies are left out, rare kinds of images stay. The same seed gives the same images.
    """
    from grappa.pipeline.commands.curate import sample as choose

    warn_of_additions(run)
    choose(run, number, out, seed=seed, rows=rows, say=say)


@one_sentence_errors
def vectors(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="OUT", help="a new .parquet file; of fiftyone a new folder")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="whose embeddings (default: the deployed model)")
    ] = None,
    format: Annotated[
        Literal["parquet", "fiftyone"], typer.Option(help="a table, or a data set that FiftyOne loads")
    ] = "parquet",
) -> None:
    """Write images, clusters and embeddings for other tools.

    They get one Parquet file, which most of them read, or a FiftyOneDataset, which also has each image's nearest ones.
    """
    from grappa.pipeline.commands import hand_over

    warn_of_additions(run)
    write = hand_over.fiftyone if format == "fiftyone" else hand_over.vectors
    write(run, out, model=model, say=say)


@one_sentence_errors
def links(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a new folder for the links")],
    granularity: Annotated[
        str | None, typer.Option(metavar="NAME", help="such as k00256 (default: all, each in a folder)")
    ] = None,
) -> None:
    """Make a folder for each cluster, with links to its images.

    Any file manager shows the clusters then; images nearest to the centroid come first.
    """
    from grappa.pipeline.commands.hand_over import links as make_links

    warn_of_additions(run)
    make_links(run, folder, granularity=granularity, say=say)


COMMANDS = (add, remove, duplicates, outliers, sample, vectors, links)
