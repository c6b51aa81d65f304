"""`POST /search`: the images of the run nearest to an image, which is sent, or named by its id.

The gallery is that of `grappa search`: the indexed images, by the deployed model. An image is never its own result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from grappa.pipeline.commands.search import decoded
from grappa.pipeline.pages.explore.collection import Space
from grappa.pipeline.pages.explore.web import asked
from grappa.pipeline.pages.explore.web.described import attention_json, image_json
from grappa.pipeline.pages.explore.web.guard import ApiError, answer, limited_body
from grappa.pipeline.pages.explore.workspace import Workspace

MAX_RESULTS = 200
Query = Callable[[Space], NDArray[np.float32]]


async def search(request: Request) -> Response:
    """Answer with the nearest images: ``results`` by the deployed model, with ``compare`` also ``zero_shot``.

    The body is an image file, or JSON ``{"id": IMAGE_ID, "k": 10, "domain": NAME, "compare": true}``; with an image
    the last three stand in the query of the address.
    """
    workspace = asked.workspace_of(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        given = await asked.json_in(request)
        return await run_in_threadpool(lambda: _by_id(workspace, given))
    if not (kind.startswith("image/") or kind in ("", "application/octet-stream")):
        raise ApiError(415, f"the body is {kind[:60]}; send the bytes of an image file, or JSON with an id")
    body, given = await limited_body(request), dict(request.query_params)
    return await run_in_threadpool(lambda: _by_image(workspace, body, given))


def neighbors(request: Request) -> Response:
    """The same for an image of the run, by its row."""
    workspace = asked.workspace_of(request)
    given = {**request.query_params, **request.path_params, "compare": "1"}
    return answer(_by_row(workspace, asked.row_in(workspace, given), given))


def _by_id(workspace: Workspace, given: dict[str, Any]) -> Response:
    row = workspace.collection.row_of.get(given["id"]) if isinstance(given.get("id"), str) else None
    if row is None:
        raise ApiError(
            404, f"there is no image {str(given.get('id'))[:40]!r}; give the image_id of an image of the run"
        )
    return answer(_by_row(workspace, row, given))


def _by_row(workspace: Workspace, row: int, given: dict[str, Any]) -> dict[str, Any]:
    found = _found(workspace, given, [row], lambda space: np.asarray(space.embeddings[row]))
    return {"query": {"image_id": workspace.collection.ids[row], "row": row}, **found}


def _by_image(workspace: Workspace, data: bytes, given: dict[str, Any]) -> Response:
    _checked(workspace, given)  # before the image is embedded
    try:
        image = decoded(data, workspace.collection.config.images.max_pixels, "the image")
    except ValueError as error:
        raise ApiError(413 if "decompression bomb" in str(error) else 422, str(error)) from error
    digest = hashlib.sha256(data).hexdigest()
    same = workspace.collection.rows_of_file.get(digest, [])
    encoded = workspace.encoder.encode(image)
    before = workspace.collection.before
    found = _found(workspace, given, same, lambda space: encoded.before if space is before else encoded.after)
    query = {
        "sha256": digest,
        "width": image.width,
        "height": image.height,
        "same_file": [workspace.collection.ids[row] for row in same],
        "attention": attention_json(workspace, encoded.attention),
    }
    return answer({"query": query, **found})


def _checked(workspace: Workspace, given: dict[str, Any]) -> tuple[int, str | None, bool]:
    k = asked.whole_number(given, "k", 10, 1, MAX_RESULTS)
    compare = given.get("compare", False)
    if compare not in (True, False, "0", "1", "true", "false"):
        raise ApiError(400, f"compare is {str(compare)[:40]!r}; it is true or false")
    return k, asked.domain_in(workspace, given), compare in (True, "1", "true")


def _found(workspace: Workspace, given: dict[str, Any], without: list[int], query: Query) -> dict[str, Any]:
    k, domain, compare = _checked(workspace, given)
    collection = workspace.collection
    allowed = collection.allowed(domain, without)

    def results(space: Space) -> list[dict[str, Any]]:
        rows, similarities = space.nearest(query(space), k, allowed)
        found = zip(rows.tolist(), similarities.tolist(), strict=True)
        return [image_json(collection, row, similarity=round(value, 4)) for row, value in found]

    return {
        "model": collection.after.model,
        "results": results(collection.after),
        **({"zero_shot": results(collection.before)} if compare else {}),
        "stale": " ".join(workspace.stale()) or None,
    }


ROUTES = [
    Route("/search", search, methods=["POST"]),
    Route("/api/images/{row}/neighbors", neighbors),
]
