"""A corpus of narrated videos that is rendered here, and the whole way on it."""
