"""Parts of `benchmarks/parity.py`."""
