"""Data sets, metrics and runners, imported as ``mmfast.eval``: the only room that knows data."""

from mmfast.eval.datasets import Shapes

__all__ = ["Shapes"]
