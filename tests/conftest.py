"""Shared by all tests: one compute thread, so that results and timings do not depend on the machine's cores."""

import torch

torch.set_num_threads(1)
