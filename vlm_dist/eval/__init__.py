"""Evaluation: predictions, per-example tables, pictures."""
