"""The faults of bench/faults.py, one file per place where they happen."""
