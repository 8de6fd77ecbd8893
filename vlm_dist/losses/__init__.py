"""Training losses: the step from hidden states to one number."""
