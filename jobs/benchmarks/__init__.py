"""Benchmarks of `jobs/benchmark.py`, one module for each group of figures."""
