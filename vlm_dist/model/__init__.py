"""The one encoder for video and text: the step from batches to hidden states."""
