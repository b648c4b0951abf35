"""Run `raymoe load` from a checkout, or as a Ray job: see `raymoe/commands/load.py`."""

import sys

from raymoe.commands.load import main

if __name__ == "__main__":
    sys.exit(main())
