"""Parts of `benchmarks/executors.py`."""
