"""Trainers for what must be learned, on top of the public API: ``mmfast train RECIPE.toml --out FOLDER``."""
