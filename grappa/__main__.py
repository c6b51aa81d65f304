"""The command ``grappa``, which is ``python -m grappa`` too."""

from __future__ import annotations

import sys

from grappa.core import interrupts
from grappa.core.extras import missing_sentence


def main() -> None:
    """Run the command line; where a package of it is not installed, say in one sentence how to install it."""
    interrupts.start()
    try:
        from grappa.pipeline.cli import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        sentence = missing_sentence(error.name)
        if sentence is None or "--debug" in sys.argv:
            raise
        sys.exit(f"grappa: {sentence}")
    finally:
        interrupts.end()


if __name__ == "__main__":
    main()
