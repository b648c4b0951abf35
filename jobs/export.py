"""Run `raymoe export` from a checkout, or as a Ray job: see `raymoe/commands/export.py`."""

import sys

from raymoe.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
