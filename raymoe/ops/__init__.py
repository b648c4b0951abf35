"""Machines and Ray: a Ray head, and checks of a cluster before a run."""
