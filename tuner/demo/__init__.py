"""A small world of dialogues that the project writes itself, to learn from without a download."""
