"""Run `raymoe experiment` from a checkout, or as a Ray job: see `raymoe/commands/experiment.py`."""

import sys

from raymoe.commands.experiment import main

if __name__ == "__main__":
    sys.exit(main())
