"""Run a fault campaign; the exit code is 1 when anything was lost, differed, was silently used or showed a traceback.

python -m tests.faults kills [--number 120] [--minutes 30] [--seed 0] [--cache raw] [--work FOLDER]
python -m tests.faults damage [--number 100000] [--minutes 60] [--seed 0] [--cache raw] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import damage, kills
from tests.faults.tally import Tally

CAMPAIGNS = {"kills": (kills.campaign, 120), "damage": (damage.campaign, 100_000)}


def main() -> int:
    """Run the campaign that the command line names, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--number", type=int, help="how many kills, or damaged files, at most")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", choices=("raw", "jpeg", "none"), default="raw", help="images.cache of the runs")
    parser.add_argument("--work", type=Path, help="a folder to work in, which is kept; default: a temporary one")
    options = parser.parse_args()
    campaign, number = CAMPAIGNS[options.campaign]
    tally = Tally(deadline=time.monotonic() + 60 * options.minutes)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        campaign(work, number=options.number or number, seed=options.seed, tally=tally, cache=options.cache)
    print(tally.summary(options.campaign))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
