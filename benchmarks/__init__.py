"""Benchmarks: `python -m benchmarks [train | overhead] --help`."""
