"""The manifests of shards: what became of each file of a shard, by which an interrupted pass goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grappa.core.notes import Claim, UntrustedError, check_claim, read_note, write_note
from grappa.images.pixels import shard_file

Record = dict[str, Any]  # of one file


def fingerprint(settings: Any, part: Any) -> str:
    """Return the SHA-256 of what a shard is made of: ``settings`` and the files of its ``part``, both as JSON."""
    return hashlib.sha256(json.dumps([settings, part]).encode()).hexdigest()


@dataclass(frozen=True)
class ShardManifests:
    """The manifests in the folder ``manifests`` about the shards in ``folder``.

    dropped: called with a sentence for a shard of an earlier pass that is damaged. written: called with the file, size
    and digest of each shard that is whole, so that whoever publishes it need not read it. checked: the shards were
    written or checked just now, perhaps by other processes: only their sizes are compared.
    """

    folder: Path
    manifests: Path
    dropped: Callable[[str], None] | None = None
    written: Callable[[Path, Claim], None] | None = None
    checked: bool = False

    def __post_init__(self) -> None:
        for place in (self.folder, self.manifests):
            place.mkdir(parents=True, exist_ok=True)

    def write(self, shard: int, mark: str, pixels: Claim | None, records: list[Record]) -> None:
        """Write the manifest of a shard whose pixels have been written before.

        mark: the shard's :func:`fingerprint`. pixels: size and digest of the file; None: the shard has none. records:
        what became of each file, in order.
        """
        write_note(self._manifest(shard), {"mark": mark, "pixels": pixels, "records": records})
        self._tell(shard, pixels)

    def read(self, shard: int, mark: str) -> list[Record] | None:
        """Return the records of a shard that an earlier pass wrote whole, with the same mark; else None."""
        try:
            found = read_note(self._manifest(shard))
            if found is None or found.get("mark") != mark:
                return None
            pixels: Claim | None = found.get("pixels")
            if pixels is not None:
                check_claim(shard_file(self.folder, shard), pixels, size_only=self.checked)
        except UntrustedError as error:
            if self.dropped:
                self.dropped(f"{error}; the images of shard {shard} are decoded again")
            return None
        self._tell(shard, pixels)
        records: list[Record] = found["records"]
        return records

    def _manifest(self, shard: int) -> Path:
        return self.manifests / f"{shard:05d}.json"

    def _tell(self, shard: int, pixels: Claim | None) -> None:
        if self.written and pixels is not None:
            self.written(shard_file(self.folder, shard), pixels)
