"""The home folder in paths that users write; this module loads nothing, so that the command line may import it."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> str:
    """Return a path with the home folder in place of ``~`` (or ``~name``) at its beginning.

    A folder that is truly called ``~`` is ``./~``. A Path has lost this ``./``, so only a text is changed.
    """
    return os.path.expanduser(path) if isinstance(path, str) else os.fspath(path)
