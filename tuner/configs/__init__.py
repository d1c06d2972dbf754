"""Presets: recipes and the models that fill them in."""
