"""Shared by all tests: one compute thread, so that results and timings do not depend on the machine's cores."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import torch  # noqa: E402

torch.set_num_threads(1)
