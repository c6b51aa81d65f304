"""Images and groups as the page gets them: JSON objects of plain texts and numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from grappa.images.originals import is_there
from grappa.pipeline.graph.models import find_entry
from grappa.pipeline.pages.explore.collection import Collection, Column
from grappa.pipeline.pages.explore.groups import NUM_MEDOIDS
from grappa.pipeline.pages.explore.web.guard import MAX_BODY_BYTES
from grappa.pipeline.pages.explore.workspace import Described, Workspace


def run_json(workspace: Workspace) -> dict[str, Any]:
    """Return what every view needs to know of the run."""
    collection = workspace.collection
    return {
        "name": collection.folder.root.resolve().name,
        "root": str(collection.folder.root.resolve()),
        "version": collection.version,
        "num_images": len(collection),
        "num_indexed": int(collection.indexed.sum()),
        "models": {"before": collection.before.model, "after": collection.after.model},
        "meanings": {model: find_entry(model).meaning for model in (collection.before.model, collection.after.model)},
        "domains": _legend(collection.domains),
        "splits": _legend(collection.splits),
        "num_labels": len(collection.labels.names),
        "granularities": [
            {"name": name, "num_groups": len(np.unique(labels))} for name, (labels, _) in workspace.clusterings.items()
        ],
        "has_attention": collection.attention is not None,
        "verdict": collection.verdict(),
        "read_only": workspace.editor.reason,
        "can_undo": workspace.editor.can_undo,
        "notices": workspace.notices(),
        "limits": {"bytes": MAX_BODY_BYTES, "pixels": collection.config.images.max_pixels},
    }


def _legend(column: Column) -> list[dict[str, Any]]:
    return [{"name": name, "count": count} for name, count in zip(column.names, column.counts(), strict=True)]


def image_json(collection: Collection, row: int, **more: Any) -> dict[str, Any]:
    """Return an image; ``more`` is added to it."""
    label = int(collection.labels.codes[row])
    split = int(collection.splits.codes[row])
    domain = collection.domains.names[collection.domains.codes[row]]
    return {
        "row": int(row),
        "image_id": collection.ids[row],
        "file": collection.files[row],
        "path": collection.paths[row],
        "domain": domain,
        "label": None if label < 0 else collection.labels.names[label].removeprefix(f"{domain}/"),
        "split": "" if split < 0 else collection.splits.names[split],
        **more,
    }


def image_details(workspace: Workspace, row: int) -> dict[str, Any]:
    """Return an image with its clusters, its attention and the images of the same bytes."""
    collection = workspace.collection
    clusters = []
    for name in workspace.granularities:
        groups = workspace.described(name).groups
        place = int(groups.of[row])
        number, distance = int(groups.numbers[place]), float(groups.distances[row])
        clusters.append({"granularity": name, "group": number, "name": groups.title(place), "distance": distance})
    width, height = (int(side) for side in collection.sizes[row])
    return image_json(
        collection,
        row,
        width=width,
        height=height,
        original=is_there(collection.files[row]),
        indexed=bool(collection.indexed[row]),
        clusters=clusters,
        same=[each for each in collection.rows_of_file[collection.sha256[row]] if each != row],
        attention=attention_json(workspace, None if collection.attention is None else collection.attention[row]),
    )


def attention_json(workspace: Workspace, attention: Any) -> dict[str, Any] | None:
    """Return the attention (L, G) of an image over the granularities by block, and its mean over the blocks."""
    if attention is None:
        return None
    values = np.asarray(attention, dtype=np.float64)
    return {
        "granularities": list(workspace.collection.fused),
        "mean": values.mean(axis=0).round(4).tolist(),
        "blocks": values.round(4).tolist(),
    }


def group_json(workspace: Workspace, found: Described, place: int) -> dict[str, Any]:
    """Return what a card shows of a group: its size, domains, purity and most typical images."""
    collection, groups, purity = workspace.collection, found.groups, found.purity
    domains = [(int(code), int(found.mix[place, code])) for code in np.argsort(-found.mix[place], kind="stable")]
    label = int(purity.label[place])
    return {
        "granularity": groups.name,
        "group": int(groups.numbers[place]),
        "name": groups.title(place),
        "size": int(groups.sizes[place]),
        "domains": [[code, count] for code, count in domains if count],
        "labelled": int(purity.labelled[place]),
        "purity": None if label < 0 else round(float(purity.share[place]), 4),
        "label": None if label < 0 else collection.labels.names[label],
        "medoids": [int(row) for row in groups.rows(place)[:NUM_MEDOIDS]],
    }
