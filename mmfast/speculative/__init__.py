"""Drafting: several tokens per forward of the model, the same answer."""
