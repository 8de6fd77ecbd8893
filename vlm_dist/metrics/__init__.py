"""Metrics as pure functions of arrays, so that stored predictions can be scored again."""
