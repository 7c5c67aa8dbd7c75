"""Trainers for what must be learned, on top of the public API.

Draft heads are the one recipe so far: ``python -m mmfast.training.draft_heads --method msd --out DIR``.
"""
