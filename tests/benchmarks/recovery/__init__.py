"""The parts of `compare_recovery.py`: one family in memory, one loop for all trained methods, the methods."""
