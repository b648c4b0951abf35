"""Where weights rest: checkpoints of a run, and the artifact that it exports. Never pickle."""
