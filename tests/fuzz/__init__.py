"""Valid files, damaged at random, through every entry point that reads a file.

A few hundred cases run with a fixed seed in `tests/test_fuzz.py`. By hand:

    python -m tests.fuzz --cases 10000 [--seed 1] [--only NAME ...] [--again CASE]
"""
