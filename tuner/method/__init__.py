"""Training objectives: logits to a loss."""
