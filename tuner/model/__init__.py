"""Models whose attention knows documents."""
