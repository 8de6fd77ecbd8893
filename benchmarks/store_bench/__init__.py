"""What `benchmarks/store.py` measures, a module for each section of its table; nothing runs on import."""
