"""Clips, masks and batches: the step from the feature store to the model."""
