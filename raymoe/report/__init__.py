"""Records of a run in, HTML out. Imports neither torch nor ray."""
