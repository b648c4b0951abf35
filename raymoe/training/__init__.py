"""Training on Ray: the loop of a worker, its checkpoints and records, and the driver that launches it."""
