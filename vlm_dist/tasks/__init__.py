"""End tasks: annotations, attention mask, head, loss, predictions and metrics of each."""
