"""A node of the graph: one instance of a stage, and the name of the artifact that it makes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

RANGES = ".ranges"  # ends the name of the folder of an artifact's ranges
_NAME = re.compile("[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class RowRange:
    """A range of the rows of an artifact: number ``number``, from 1, of ``total`` ranges of about equal length."""

    number: int
    total: int

    @property
    def name(self) -> str:
        """The name of the range's folder, such as ``03-of-16``."""
        return f"{self.number:0{len(str(self.total))}d}-of-{self.total}"

    def bounds(self, num_rows: int, batch_size: int) -> tuple[int, int]:
        """Return the first row of the range and the row after its last one, (0, 0) <= bounds <= (num_rows, num_rows).

        Both are multiples of ``batch_size`` (but for the end of all rows), so that the batches are those of one pass
        over all rows. Where there are fewer batches than ranges, some ranges are empty.
        """
        batches = -(-num_rows // batch_size)
        first, after = (batches * number // self.total for number in (self.number - 1, self.number))
        return min(first * batch_size, num_rows), min(after * batch_size, num_rows)

    @classmethod
    def parse(cls, name: str) -> RowRange:
        """Return the range of a folder's name; ValueError where it is none."""
        found = re.fullmatch(r"([0-9]+)-of-([0-9]+)", name)
        rows = cls(int(found[1]), int(found[2])) if found else None
        if rows is None or rows.name != name or not 1 <= rows.number <= rows.total:
            raise ValueError(f"{name!r} is no range of rows, expected a name such as 03-of-16")
        return rows


@dataclass(frozen=True)
class Node:
    """One instance of a stage; ``instance`` is None where the stage has only one.

    A node names its artifact; ``graph.stages`` says what it reads. With ``rows`` it is a range of the artifact's rows,
    which is made into a folder of its own beside the artifact. ValueError where stage or instance have other
    characters than letters, digits, '_' and '-'.
    """

    stage: str
    instance: str | None = None
    rows: RowRange | None = None

    def __post_init__(self) -> None:
        for part in (self.stage, self.instance):
            if part is not None and not _NAME.fullmatch(part):
                raise ValueError(f"Artifact name {part!r} may hold letters, digits, '_' and '-' only.")

    @property
    def name(self) -> str:
        """The artifact's name: ``features``, ``clusters/k00256``; of a range ``features.ranges/03-of-16``."""
        name = self.stage if self.instance is None else f"{self.stage}/{self.instance}"
        return name if self.rows is None else f"{name}{RANGES}/{self.rows.name}"

    def __str__(self) -> str:
        return self.name

    @property
    def whole(self) -> Node:
        """The artifact of which this is a range; the node itself where it is none."""
        return replace(self, rows=None)

    def ranges(self, total: int) -> list[Node]:
        """Return the ranges of this artifact's rows."""
        return [replace(self, rows=RowRange(number, total)) for number in range(1, total + 1)]

    @classmethod
    def parse(cls, name: str) -> Node:
        """Return the node of an artifact's name."""
        whole, _, rows = name.partition(f"{RANGES}/")
        stage, _, instance = whole.partition("/")
        return cls(stage, instance or None, RowRange.parse(rows) if rows else None)
