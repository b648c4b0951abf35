"""Run `raymoe demo` from a checkout, or as a Ray job: see `raymoe/commands/demo.py`."""

import sys

from raymoe.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
