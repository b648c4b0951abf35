"""A run becomes an artifact; runs and artifacts are opened and evaluated."""
