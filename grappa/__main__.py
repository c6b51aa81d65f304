"""The command ``grappa``, which is ``python -m grappa`` too."""

from __future__ import annotations

import gc
import sys

from grappa.core import interrupts
from grappa.core.extras import missing_sentence


def main() -> None:
    """Run the command line; where a package of it is not installed, say in one sentence how to install it.

    Garbage is collected from the beginning of the command to its end: what is imported before is none, and what is left
    then goes with the process, at once. Both would be a fifth of the time of `grappa status`.
    """
    interrupts.start()
    gc.disable()
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
        gc.freeze()


if __name__ == "__main__":
    main()
