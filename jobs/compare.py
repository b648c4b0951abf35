"""Run `raymoe compare` from a checkout: see `raymoe/commands/compare.py`."""

import sys

from raymoe.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
