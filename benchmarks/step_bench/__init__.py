"""Parts of `benchmarks/pretrain_step.py`."""
