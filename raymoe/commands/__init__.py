"""The commands of `raymoe`: parse arguments, call the rooms below, print, and return the exit status.

Each module has `parser(program)` and `main(arguments, program)`. `python jobs/X.py` calls `main()`; `raymoe X`
calls it through `raymoe/__main__.py`. Imports of torch and Ray are inside `main`, so that `--help` is fast.
"""
