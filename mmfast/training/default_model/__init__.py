"""The recipe of the embedded model: a vision tower, a language model on symbols, and both together."""
