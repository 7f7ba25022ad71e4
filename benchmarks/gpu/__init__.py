"""The kernel benchmark on a GPU: `python -m benchmarks gpu --help`."""
