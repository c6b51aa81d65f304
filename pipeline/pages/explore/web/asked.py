"""What a request asks for, checked: numbers, rows, granularities, groups, domains; ApiError 4xx for anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from grappa.pipeline.pages.explore.web.guard import ApiError, limited_body
from grappa.pipeline.pages.explore.workspace import Described, Workspace

MAX_ROWS = 200_000
MAX_JSON_BYTES = 4 * 2**20


def workspace_of(request: Request) -> Workspace:
    found: Workspace = request.app.state.workspace
    return found


def whole_number(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """Return a whole number from ``low`` to ``high``, given as such or as a text."""
    value = given.get(name, default)
    text = str(value)
    digits = text.removeprefix("-")
    if isinstance(value, bool) or not (digits.isascii() and digits.isdecimal()) or len(digits) > 12:
        raise ApiError(400, f"{name} is {text[:40]!r}; give a whole number from {low} to {high}")
    if not low <= int(text) <= high:
        raise ApiError(400, f"{name} is {int(text)}; give a number from {low} to {high}")
    return int(text)


def share(given: Mapping[str, Any], name: str, default: float) -> float:
    text = str(given.get(name, default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ApiError(400, f"{name} is {text[:40]!r}; give a number from 0 to 1")
    return value


def one_of(given: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    """Return one of the known words; without any the first."""
    found = given.get(name, known[0])
    if found not in known:
        raise ApiError(400, f"{name} is {str(found)[:40]!r}; it is one of {', '.join(known)}")
    return str(found)


def row_in(workspace: Workspace, given: Mapping[str, Any], name: str = "row") -> int:
    """Return the number of an image of the run; 404 for any other."""
    row = whole_number(given, name, -1, -1, 2**40)
    if not 0 <= row < len(workspace.collection):
        raise ApiError(404, f"there is no image {row}; the run has {len(workspace.collection)}")
    return row


def rows_in(workspace: Workspace, given: Mapping[str, Any], most: int = MAX_ROWS) -> list[int]:
    """Return the different numbers of images under ``rows``, at least one."""
    rows = given.get("rows")
    number = len(workspace.collection)
    right = isinstance(rows, list) and all(type(row) is int and 0 <= row < number for row in rows)
    if not right or not rows or len(rows) > most:
        raise ApiError(400, f"rows is a list of 1 to {most} numbers of images, from 0 to {number - 1}")
    return sorted(set(rows))


def granularity_in(workspace: Workspace, given: Mapping[str, Any]) -> str:
    name = given.get("granularity")
    if not workspace.granularities:
        raise ApiError(404, "the run has no clusters: its adaptors are trained on labels")
    if name not in workspace.clusterings:
        raise ApiError(
            404, f"there is no granularity {str(name)[:40]!r}; the run has {', '.join(workspace.granularities)}"
        )
    return str(name)


def group_in(described: Described, given: Mapping[str, Any], name: str = "group") -> int:
    """Return the position of a group that is named by its number; 404 where no image is in such a group."""
    return _place(described, whole_number(given, name, -1, -1, 2**40))


def groups_in(described: Described, given: Mapping[str, Any]) -> list[int]:
    """Return the numbers of two or more different groups under ``groups``."""
    numbers = given.get("groups")
    if not isinstance(numbers, list) or not all(type(each) is int for each in numbers) or len(set(numbers)) < 2:
        raise ApiError(400, "groups is a list of the numbers of two or more clusters")
    for each in numbers:
        _place(described, each)
    return list(dict.fromkeys(numbers))


def _place(described: Described, number: int) -> int:
    place = described.groups.place(number)
    if place is None:
        raise ApiError(404, f"no image is in the cluster {number} of {described.groups.name}")
    return place


def space_in(given: Mapping[str, Any]) -> str:
    found = given.get("space", "after")
    if found not in ("before", "after"):
        raise ApiError(400, f"space is {str(found)[:40]!r}; it is before (zero_shot) or after (the deployed model)")
    return str(found)


def domain_in(workspace: Workspace, given: Mapping[str, Any]) -> str | None:
    """Return the domain that is asked for, or None for all of them."""
    found, names = given.get("domain"), workspace.collection.domains.names
    if found in (None, ""):
        return None
    if found not in names:
        raise ApiError(400, f"there is no domain {str(found)[:80]!r}; the run has {', '.join(names)[:300]}")
    return str(found)


async def json_in(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body of a request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body is {kind[:60] or 'of no type'}; send JSON (Content-Type: application/json)")
    body = await limited_body(request, MAX_JSON_BYTES)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is no JSON object")
    return found
