"""Training on Ray: the loop of a worker, what it saves and logs, and the driver that launches it."""
