"""Run `raymoe generate` from a checkout, or as a Ray job: see `raymoe/commands/generate.py`."""

import sys

from raymoe.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
