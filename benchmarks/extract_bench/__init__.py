"""Parts of `benchmarks/extract.py`."""
