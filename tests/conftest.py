"""Shared by all tests: signals as in a foreground shell; one compute thread, so that results and timings do not depend on the machine's cores."""

import os
import signal

# A shell starts background jobs with SIGINT ignored, and nohup SIGHUP; the commands that tests start would inherit that.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # commands start with the default

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import torch  # noqa: E402

torch.set_num_threads(1)
