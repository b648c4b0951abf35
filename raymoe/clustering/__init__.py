"""Statistics in, a plan out: pure functions in numpy, which decide which experts change clusters and move nothing."""
