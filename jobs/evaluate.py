"""Run `raymoe evaluate` from a checkout, or as a Ray job: see `raymoe/commands/evaluate.py`."""

import sys

from raymoe.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
