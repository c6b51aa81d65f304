"""The handlers of the explorer's JSON API: read what is asked, look it up, describe it."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from grappa.pipeline.pages.explore.editing import ReadOnlyError
from grappa.pipeline.pages.explore.groups import largest_overlaps
from grappa.pipeline.pages.explore.similar import LEAST_SIMILARITY, Near, near_duplicates, same_files
from grappa.pipeline.pages.explore.thumbnails import NoPictureError, large
from grappa.pipeline.pages.explore.web import asked
from grappa.pipeline.pages.explore.web.asked import workspace_of
from grappa.pipeline.pages.explore.web.described import group_json, image_details, image_json, run_json
from grappa.pipeline.pages.explore.web.guard import ApiError, answer
from grappa.pipeline.pages.explore.workspace import Described, Workspace

MAX_PAGE = 200
NUM_RELATED = 12
FOREVER = "private, max-age=31536000, immutable"
Edit = Callable[[Workspace, str, Described, dict[str, Any]], list[int]]


def run(request: Request) -> Response:
    return answer(run_json(workspace_of(request)))


# ---------------------------------------------------------------- clusters


def clusters(request: Request) -> Response:
    """A page of the groups of a granularity, in the order that is asked for."""
    workspace, given = workspace_of(request), {**request.query_params, **request.path_params}
    found = workspace.described(asked.granularity_in(workspace, given))
    places = _ordered(workspace, found, given)
    return _page(places.tolist(), given, lambda place: group_json(workspace, found, place))


def _ordered(workspace: Workspace, found: Described, given: dict[str, Any]) -> Any:
    groups, order = found.groups, given.get("sort", "size")
    everyone = range(len(groups))
    keys = {
        "size": -groups.sizes,
        "number": groups.numbers,
        "purity": np.nan_to_num(-found.purity.share, nan=1.0),
        "mixed": (found.mix.max(axis=1, initial=0) / np.maximum(groups.sizes, 1)),
        "domain": found.mix.argmax(axis=1) * len(workspace.collection) - groups.sizes,
    }
    if order not in keys:
        raise ApiError(400, f"sort is {str(order)[:40]!r}; it is one of {', '.join(keys)}")
    wanted = str(given.get("q", "")).casefold().strip()
    chosen = [place for place in everyone if wanted in _words(workspace, found, place)] if wanted else everyone
    order_key = np.asarray(keys[order])[chosen]
    return np.asarray(chosen, dtype=np.int64)[np.argsort(order_key, kind="stable")]


def _words(workspace: Workspace, found: Described, place: int) -> str:
    label = int(found.purity.label[place])
    known = workspace.collection.labels.names[label] if label >= 0 else ""
    domains = (workspace.collection.domains.names[code] for code in np.flatnonzero(found.mix[place]))
    number = found.groups.numbers[place]
    return " ".join([found.groups.title(place), f"cluster {number}", known, *domains]).casefold()


def cluster(request: Request) -> Response:
    """One group: its neighbours at the same granularity, and its parents and children at the ones beside it."""
    workspace, given = workspace_of(request), request.path_params
    name = asked.granularity_in(workspace, given)
    found = workspace.described(name)
    place = asked.group_in(found, given)
    similarities = found.centroids @ found.centroids[place]
    similarities[place] = -np.inf
    nearest = np.argsort(-similarities, kind="stable")[: min(NUM_RELATED, len(found.groups) - 1)]
    level = workspace.granularities.index(name)
    return answer(
        {
            **group_json(workspace, found, place),
            "neighbors": [
                {**group_json(workspace, found, int(each)), "similarity": round(float(similarities[each]), 4)}
                for each in nearest
            ],
            "children": _related(workspace, found, place, level + 1),
            "parents": _related(workspace, found, place, level - 1),
        }
    )


def _related(workspace: Workspace, found: Described, place: int, level: int) -> list[dict[str, Any]]:
    if not 0 <= level < len(workspace.granularities):
        return []
    other = workspace.described(workspace.granularities[level])
    overlaps = largest_overlaps(found.groups, place, other.groups)[:NUM_RELATED]
    return [{**group_json(workspace, other, each), "overlap": count} for each, count in overlaps]


def cluster_images(request: Request) -> Response:
    workspace, given = workspace_of(request), {**request.query_params, **request.path_params}
    found = workspace.described(asked.granularity_in(workspace, given))
    rows = found.groups.rows(asked.group_in(found, given))
    if asked.one_of(given, "order", ("typical", "atypical")) == "atypical":
        rows = rows[::-1]
    distances = found.groups.distances
    return _page(
        rows, given, lambda row: image_json(workspace.collection, row, distance=round(float(distances[row]), 4))
    )


# ---------------------------------------------------------------- edits


def edit(make: Edit) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of an edit, which answers with the numbers of the groups that it made or changed."""

    @functools.wraps(make)
    async def handle(request: Request) -> Response:
        workspace, given = workspace_of(request), await asked.json_in(request)
        name = asked.granularity_in(workspace, request.path_params)
        return await run_in_threadpool(lambda: _edited(workspace, name, given))

    def _edited(workspace: Workspace, name: str, given: dict[str, Any]) -> Response:
        try:
            groups = make(workspace, name, workspace.described(name), given)
        except ReadOnlyError as error:
            raise ApiError(409, str(error)) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        return answer({"groups": groups})

    return handle


@edit
def rename(workspace: Workspace, name: str, found: Described, given: dict[str, Any]) -> list[int]:
    number, text = int(found.groups.numbers[asked.group_in(found, given)]), given.get("name")
    if not isinstance(text, str):
        raise ApiError(400, "name is a text; an empty one takes the name away")
    workspace.edit(name, lambda edits: edits.named(number, text))
    return [number]


@edit
def merge(workspace: Workspace, name: str, found: Described, given: dict[str, Any]) -> list[int]:
    groups = asked.groups_in(found, given)
    workspace.edit(name, lambda edits: edits.merging(groups))
    return groups[:1]


@edit
def split(workspace: Workspace, name: str, found: Described, given: dict[str, Any]) -> list[int]:
    place = asked.group_in(found, given)
    size = int(found.groups.sizes[place])
    if size < 2:
        raise ApiError(400, "the cluster has one image; there is nothing to split")
    num_parts = asked.whole_number(given, "parts", 2, 2, min(16, size))
    return workspace.split(name, place, num_parts)


@edit
def split_off(workspace: Workspace, name: str, found: Described, given: dict[str, Any]) -> list[int]:
    rows, text = asked.rows_in(workspace, given), given.get("name", "")
    if not isinstance(text, str):
        raise ApiError(400, "name is a text")
    return workspace.split_off(name, [np.array(rows)], text)


async def undo(request: Request) -> Response:
    workspace = workspace_of(request)
    await asked.json_in(request)
    try:
        granularity = await run_in_threadpool(workspace.undo)
    except ReadOnlyError as error:
        raise ApiError(409, str(error)) from error
    return answer({"granularity": granularity, "can_undo": workspace.editor.can_undo})


# ---------------------------------------------------------------- images


def image(request: Request) -> Response:
    workspace = workspace_of(request)
    return answer(image_details(workspace, asked.row_in(workspace, request.path_params)))


def find_images(request: Request) -> Response:
    """A page of the run's images whose path, id, label or domain holds a text."""
    workspace, given = workspace_of(request), dict(request.query_params)
    collection, domain = workspace.collection, asked.domain_in(workspace, given)
    wanted = str(given.get("q", "")).casefold().strip()
    rows = [row for row, text in enumerate(collection.words) if wanted in text] if wanted else range(len(collection))
    if domain is not None:
        code = collection.domains.names.index(domain)
        rows = [row for row in rows if collection.domains.codes[row] == code]
    return _page(rows, given, lambda row: image_json(collection, row))


async def images(request: Request) -> Response:
    """The images of some rows, in the order of the list."""
    workspace, given = workspace_of(request), await asked.json_in(request)
    asked.rows_in(workspace, given, MAX_PAGE)
    return answer({"items": [image_json(workspace.collection, row) for row in given["rows"]]})


def thumbnail(request: Request) -> Response:
    return _picture(request, "s", lambda workspace, row: workspace.thumbnails.small(row))


def picture(request: Request) -> Response:
    return _picture(request, "m", lambda workspace, row: workspace.thumbnails.whole(row))


def original(request: Request) -> Response:
    return _picture(request, "l", lambda workspace, row: large(workspace.collection.originals, row))


def _picture(request: Request, size: str, make: Callable[[Workspace, int], bytes]) -> Response:
    """A JPEG; a browser that has it keeps it: the ``v`` of its address changes with the run's images."""
    workspace = workspace_of(request)
    row = asked.row_in(workspace, request.path_params)
    tag = f'"{workspace.collection.version}-{row}-{size}"'
    named = request.query_params.get("v") == workspace.collection.version
    headers = {"ETag": tag, "Cache-Control": FOREVER if named else "private, no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    try:
        return Response(make(workspace, row), 200, headers, "image/jpeg")
    except NoPictureError as error:
        raise ApiError(404, str(error)) from error


# ---------------------------------------------------------------- map


def positions(request: Request) -> Response:
    """The places of all images on the map: (N, 2) float32 in the byte order of little-endian machines."""
    workspace, given = workspace_of(request), dict(request.query_params)
    method = given.get("method", "pca")
    if method not in ("pca", "tsne"):
        raise ApiError(400, f"method is {method[:40]!r}; it is pca or tsne")
    found = workspace.positions(asked.space_in(given), method)
    if not isinstance(found, np.ndarray):
        raise ApiError(409, "t-SNE is not ready; start it, and ask for its progress")
    return _numbers(found.astype("<f4"))


async def start_tsne(request: Request) -> Response:
    given = await asked.json_in(request)
    return answer(workspace_of(request).start_tsne(asked.space_in(given)).to_json())


def tsne_progress(request: Request) -> Response:
    workspace, space = workspace_of(request), asked.space_in(dict(request.query_params))
    job = workspace.jobs.get(f"tsne {space}")
    return answer(job.to_json() if job else {"state": "none", "progress": 0, "error": ""})


def column(request: Request) -> Response:
    """The code of each image in a property: (N,) int32, little-endian; -1: not known."""
    return _numbers(_column(request).codes.astype("<i4"))


def legend(request: Request) -> Response:
    """The names behind the codes; ``key``: of a granularity the group's number."""
    found, name = _column(request), request.path_params["name"]
    workspace = workspace_of(request)
    keys = (
        workspace.described(name).groups.numbers.tolist() if name in workspace.clusterings else range(len(found.names))
    )
    parts = zip(found.names, found.counts(), keys, strict=True)
    items = [{"name": title, "count": count, "key": key} for title, count, key in parts]
    return answer({"items": items, "unknown": int((found.codes < 0).sum())})


def _column(request: Request) -> Any:
    workspace, name = workspace_of(request), request.path_params["name"]
    found = workspace.column(name)
    if found is None:
        known = ", ".join(["domain", "label", "split", *workspace.granularities])
        raise ApiError(404, f"images have no property {name[:40]!r}; they have {known}")
    return found


def _numbers(values: Any) -> Response:
    return Response(values.tobytes(), 200, {"Cache-Control": "no-store"}, "application/octet-stream")


# ---------------------------------------------------------------- duplicates and outliers


def duplicates(request: Request) -> Response:
    """Groups of images that are the same, by their bytes (``kind=files``) or by similarity (``kind=near``)."""
    workspace, given = workspace_of(request), dict(request.query_params)
    if asked.one_of(given, "kind", ("files", "near")) == "files":
        found = [(rows, 1.0) for rows in same_files(workspace.collection.sha256)]
    else:
        near = _near(workspace)
        if isinstance(near, Response):
            return near
        threshold = max(asked.share(given, "threshold", 0.95), LEAST_SIMILARITY)
        found = near_duplicates(near, threshold)

    def describe(group: tuple[list[int], float]) -> dict[str, Any]:
        shown = [image_json(workspace.collection, row) for row in group[0][:24]]
        return {"size": len(group[0]), "similarity": round(group[1], 4), "images": shown}

    return _page(found, given, describe)


def outliers(request: Request) -> Response:
    """The images that are least like their nearest neighbours, the loneliest first."""
    workspace, given = workspace_of(request), dict(request.query_params)
    near = _near(workspace)
    if isinstance(near, Response):
        return near
    domain = asked.domain_in(workspace, given)
    rows = np.argsort(-near.loneliness, kind="stable")
    if domain is not None:
        domains = workspace.collection.domains
        rows = rows[domains.codes[rows] == domains.names.index(domain)]
    return _page(
        rows,
        given,
        lambda row: image_json(workspace.collection, row, loneliness=round(float(near.loneliness[row]), 4)),
    )


def _near(workspace: Workspace) -> Near | Response:
    """Return the nearest images of all images, or the answer 202 with the progress while they are looked for."""
    job = workspace.near()
    if job.state == "failed":
        raise ApiError(500, f"the neighbours of all images could not be found: {job.error}")
    if job.state == "running":
        return answer(job.to_json(), 202)
    found: Near = job.result
    return found


def _page(items: Any, given: dict[str, Any], describe: Callable[[Any], dict[str, Any]]) -> Response:
    offset = asked.whole_number(given, "offset", 0, 0, 2**40)
    limit = asked.whole_number(given, "limit", 60, 1, MAX_PAGE)
    shown = items[offset : offset + limit]
    return answer({"total": len(items), "offset": offset, "items": [describe(each) for each in shown]})


ROUTES = [
    Route("/api/run", run),
    Route("/api/clusters/{granularity}", clusters),
    Route("/api/clusters/{granularity}/{group}", cluster),
    Route("/api/clusters/{granularity}/{group}/images", cluster_images),
    Route("/api/clusters/{granularity}/name", rename, methods=["POST"]),
    Route("/api/clusters/{granularity}/merge", merge, methods=["POST"]),
    Route("/api/clusters/{granularity}/split", split, methods=["POST"]),
    Route("/api/clusters/{granularity}/split_off", split_off, methods=["POST"]),
    Route("/api/undo", undo, methods=["POST"]),
    Route("/api/images", find_images),
    Route("/api/images", images, methods=["POST"]),
    Route("/api/images/{row}", image),
    Route("/api/positions", positions),
    Route("/api/tsne", tsne_progress),
    Route("/api/tsne", start_tsne, methods=["POST"]),
    Route("/api/columns/{name}", column),
    Route("/api/legends/{name}", legend),
    Route("/api/duplicates", duplicates),
    Route("/api/outliers", outliers),
    Route("/thumbnails/{row}", thumbnail),
    Route("/pictures/{row}", picture),
    Route("/originals/{row}", original),
]
