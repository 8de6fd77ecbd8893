"""Model + loss + batches -> weights: the one training loop, its engine, its checkpoints, its workers."""
