"""Run `raymoe train` from a checkout, or as a Ray job: see `raymoe/commands/train.py`."""

import sys

from raymoe.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
