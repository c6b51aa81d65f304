"""Journals of shards: what was noted of a shard's rows once its pixels lay on disk, so that a broken pass goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from grappa.pixels import shard_file, write_whole

Record = dict[str, Any]


def fingerprint(settings: Any, part: Any) -> str:
    """Return the mark of what a shard is made of and how; both must be something that JSON can say."""
    return hashlib.sha256(json.dumps([settings, part]).encode()).hexdigest()


def note_shard(folder: Path, shard: int, journal: Path, mark: str, records: list[Record]) -> None:
    """Write a shard's journal; the shard itself has been written before."""
    num_bytes = shard_file(folder, shard).stat().st_size
    text = json.dumps({"mark": mark, "num_bytes": num_bytes, "records": records}, separators=(",", ":"))
    write_whole(journal, lambda file: file.write(text.encode()))


def noted_shard(folder: Path, shard: int, journal: Path, mark: str) -> list[Record] | None:
    """Return the records of a shard that an earlier pass wrote whole, under the same mark; else None."""
    try:
        noted = json.loads(journal.read_bytes())
        num_bytes = shard_file(folder, shard).stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    if (noted["mark"], noted["num_bytes"]) != (mark, num_bytes):
        return None
    records: list[Record] = noted["records"]
    return records
