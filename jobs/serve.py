"""Run `raymoe serve` from a checkout, or as a Ray job: see `raymoe/commands/serve.py`."""

import sys

from raymoe.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
