"""Serving an artifact: deployments of Ray Serve, replica discovery, residency, autoscaling and rollouts."""
