"""Machines and Ray: the connection to Ray, a private head, and checks of a cluster before a run."""
