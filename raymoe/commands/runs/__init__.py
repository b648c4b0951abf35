"""Sets of runs: their definition as a file, their execution side by side through Ray, and their results."""
