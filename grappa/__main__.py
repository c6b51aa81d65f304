"""`python -m grappa` is the command `grappa`."""

from __future__ import annotations

from grappa.pipeline.cli import main

if __name__ == "__main__":
    main()
