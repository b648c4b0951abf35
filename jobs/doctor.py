"""Run `raymoe doctor` from a checkout, or as a Ray job: see `raymoe/commands/doctor.py`."""

import sys

from raymoe.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
