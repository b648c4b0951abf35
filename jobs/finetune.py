"""Run `raymoe finetune` from a checkout, or as a Ray job: see `raymoe/commands/finetune.py`."""

import sys

from raymoe.commands.finetune import main

if __name__ == "__main__":
    sys.exit(main())
