"""What a model can do, measured on held-out rows."""
